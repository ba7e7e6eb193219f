"""A base model as a diffusers folder on disk: what it holds, what is missing, its family. Loads nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorabooth.errors import BaseModelError

SUPPORTED_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
SUPPORTED_TEXT = "Supported today: Stable Diffusion 1.x and 2.x (text to image)."
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
PICKLE_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
FAMILY_BY_WIDTH = MappingProxyType({768: "sd1", 1024: "sd2"})
"""Width of the text embeddings that the UNet attends to: CLIP ViT-L/14 in SD1, OpenCLIP ViT-H/14 in SD2."""

_STEM = MappingProxyType(
    {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
)
_CONFIG = MappingProxyType({"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"})
_KNOWN_PIPELINES = MappingProxyType(
    {
        "StableDiffusionXLPipeline": "Stable Diffusion XL",
        "StableDiffusionXLImg2ImgPipeline": "Stable Diffusion XL (refiner)",
        "StableDiffusionInpaintPipeline": "a Stable Diffusion inpainting model",
        "StableDiffusionUpscalePipeline": "a Stable Diffusion upscaler",
        "StableDiffusionDepth2ImgPipeline": "a Stable Diffusion depth model",
        "StableDiffusion3Pipeline": "Stable Diffusion 3",
        "FluxPipeline": "FLUX",
        "IFPipeline": "DeepFloyd IF",
        "LatentConsistencyModelPipeline": "a latent consistency model (distilled; train on its base instead)",
    }
)


@dataclass(frozen=True, slots=True)
class Detected:
    """Which family a base belongs to.

    Attributes:
        family: "sd1" or "sd2".
        certain: False where the layout alone decides (unusual widths), so that a recipe may say otherwise.
    """

    family: str
    certain: bool


@dataclass(frozen=True, slots=True)
class Weights:
    """The safetensors files of one component.

    Attributes:
        files: one file, or the shards in name order.
        variant: "" or "fp16", as diffusers names it.
    """

    files: tuple[Path, ...]
    variant: str


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a base model.

    Raises:
        BaseModelError: absent, not readable, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BaseModelError(
            f"{path}: this file of the base model is missing.", "Download the base again."
        ) from error
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{path}: not readable as JSON ({error}).", "Download the base again."
        ) from error
    if not isinstance(value, dict):
        raise BaseModelError(f"{path}: holds no JSON object.", "Download the base again.")
    return value


def component_config(folder: Path, component: str) -> dict[str, Any]:
    """The config of one component of a diffusers folder, e.g. of "unet"."""
    return read_json(folder / component / _CONFIG.get(component, "config.json"))


def component_weights(folder: Path, component: str) -> Weights:
    """The safetensors files of a component: full precision if there, else the fp16 variant.

    Raises:
        BaseModelError: there are none, only pickles, or a shard is missing.
    """
    directory, stem = folder / component, _STEM[component]
    for variant in ("", "fp16"):
        dotted = f".{variant}" if variant else ""
        single = directory / f"{stem}{dotted}.safetensors"
        if single.is_file():
            return Weights((single,), variant)
        index = directory / f"{stem}.safetensors.index{dotted}.json"
        if index.is_file():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            missing = [name for name in names if not (directory / name).is_file()]
            if missing or not names:
                raise BaseModelError(
                    f"{index}: names weight files that are not there: {', '.join(missing) or 'none named'}.",
                    "Download the base again.",
                )
            return Weights(tuple(directory / name for name in names), variant)
    pickles = sorted(f.name for f in _files(directory) if f.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise pickle_error(directory / pickles[0])
    raise BaseModelError(
        f"{directory}: no weights here ({stem}.safetensors is missing).",
        "The folder looks like an incomplete download; download the base again.",
    )


def pickle_error(path: Path) -> BaseModelError:
    """The refusal of a pickle checkpoint, with how to convert it."""
    return BaseModelError(
        f"{path}: a pickle file can run any code when it is opened, so it is never read.",
        "Get the .safetensors version of this model, or convert it where you trust it: "
        "StableDiffusionPipeline.from_pretrained(FOLDER) or .from_single_file(FILE), "
        "then .save_pretrained(NEW_FOLDER, safe_serialization=True).",
    )


def detect_folder(folder: Path) -> Detected:
    """Which family a diffusers folder is.

    Raises:
        BaseModelError: not a diffusers folder, incomplete, or of a kind that is not supported.
    """
    if not (folder / "model_index.json").is_file():
        raise _no_index(folder)
    name = str(read_json(folder / "model_index.json").get("_class_name", ""))
    if name not in SUPPORTED_PIPELINES:
        kind = _KNOWN_PIPELINES.get(name, f"a {name}" if name else "of no named pipeline class")
        raise BaseModelError(f"{folder}: this base is {kind}, which is not supported.", SUPPORTED_TEXT)
    missing = [part for part in COMPONENTS if not (folder / part).is_dir()]
    if missing:
        raise BaseModelError(
            f"{folder}: parts of the base are missing: {', '.join(missing)}.",
            "A base folder holds " + ", ".join(COMPONENTS) + "; download it again.",
        )
    unet = component_config(folder, "unet")
    latent_channels = int(component_config(folder, "vae").get("latent_channels", 4))
    if int(unet.get("in_channels", 4)) != latent_channels:
        raise BaseModelError(
            f"{folder}: the UNet takes {unet.get('in_channels')} channels, latents have {latent_channels}: "
            "an inpainting, depth or editing model, which is not supported.",
            SUPPORTED_TEXT,
        )
    return detect_unet(unet)


def detect_unet(unet_config: dict[str, Any]) -> Detected:
    """Which family a Stable Diffusion UNet config is: by width, else by SD2's linear projections."""
    width = unet_config.get("cross_attention_dim")
    if isinstance(width, int) and width in FAMILY_BY_WIDTH:
        return Detected(FAMILY_BY_WIDTH[width], certain=True)
    return Detected("sd2" if unet_config.get("use_linear_projection") else "sd1", certain=False)


def similar_names(path: Path) -> list[str]:
    """Names beside `path` that look like it, best first, for "did you mean"."""
    parent = path.parent if str(path.parent) else Path()
    try:
        names = {entry.name.casefold(): entry.name for entry in parent.iterdir()}
    except OSError:
        return []
    close = get_close_matches(path.name.casefold(), list(names), n=3, cutoff=0.6)
    return [str(parent / names[name]) for name in close]


def _files(directory: Path) -> list[Path]:
    try:
        return sorted(entry for entry in directory.iterdir() if entry.is_file())
    except OSError:
        return []


def _no_index(folder: Path) -> BaseModelError:
    """Says what a folder without model_index.json is, and which path was meant."""
    what = f"{folder}: not a base model folder: it has no model_index.json."
    nested = sorted(
        {p.parent for pattern in ("*", "*/*", "*/*/*") for p in folder.glob(f"{pattern}/model_index.json")}
    )
    if nested:
        return BaseModelError(what, f"Did you mean {nested[-1]}?")
    if (folder.parent / "model_index.json").is_file():
        return BaseModelError(what, f"It is one part of a base; give the whole folder: {folder.parent}")
    files = _files(folder)
    safe = [f for f in files if f.suffix == ".safetensors"]
    if safe:
        return BaseModelError(what, f"It holds {safe[0].name}; to use that file as the base give {safe[0]}")
    pickles = [f for f in files if f.suffix in PICKLE_SUFFIXES]
    if pickles:
        return pickle_error(pickles[0])
    parts = [part for part in COMPONENTS if (folder / part).is_dir()]
    if parts:
        return BaseModelError(
            what, f"It holds {', '.join(parts)}: an incomplete download; download the base again."
        )
    return BaseModelError(
        what, "Give a diffusers folder, a .safetensors checkpoint, a hub id (owner/name), or pocket."
    )
