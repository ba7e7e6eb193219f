"""Images and texts to vectors, through transformers' models: what the metrics are measured with.

Weights are read from safetensors only, no code of a model's folder is run, and torchvision is not needed:
images are prepared with Pillow, also where torchvision is installed, so that numbers do not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from lorabooth.errors import BaseModelError, first_line, is_out_of_memory
from lorabooth.progress import Reporter, Silent

if TYPE_CHECKING:
    from torch import Tensor

Vectors = NDArray[np.float32]

BATCH = 32
# Whose class token, after the last layer norm, is the embedding; of others it is the pooled output.
CLASS_TOKEN = frozenset({"vit", "vit_msn", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit"})
# What transformers raises for a folder that is broken, or is not what it should be.
_FAILURES = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    SafetensorError,
)


class SubjectEmbedder:
    """DINO's part: a vision model's embedding of each image.

    Args:
        name: for every output.
        model: a transformers vision model in evaluation mode.
        processor: its image processor.
        device: where it computes.
        projection: [D,W], for a model whose embedding is a linear map of its pooled output.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        processor: Any,
        device: torch.device,
        projection: Tensor | None = None,
    ) -> None:
        self.name = name
        self._model = model.to(device).eval()
        self._projection = None if projection is None else projection.to(device, torch.float32)
        self._processor = processor
        self._device = device
        self._reads_token = model.config.model_type in CLASS_TOKEN

    def __call__(self, images: Sequence[Image.Image]) -> Vectors:
        """Unit vectors [N,D], float32: the class token of a ViT, the pooled output of a ResNet."""
        return _batched(images, self._embed)

    @torch.inference_mode()
    def stages(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """The feature maps [B,C,H,W] after each stage, for LPIPS's formula; empty if it has no maps."""
        output = self._model(prepared(self._processor, images, self._device), output_hidden_states=True)
        # The first is what comes before the stages.
        return [maps for maps in (output.hidden_states or ())[1:] if maps.ndim == 4]

    @torch.inference_mode()
    def _embed(self, images: Sequence[Image.Image]) -> Vectors:
        output = self._model(prepared(self._processor, images, self._device))
        if self._reads_token:
            vectors = output.last_hidden_state[:, 0]
        elif getattr(output, "pooler_output", None) is not None:
            vectors = output.pooler_output.flatten(1)
        else:
            raise ValueError(f"{type(self._model).__name__} gives no embedding of a whole image")
        return _unit(vectors if self._projection is None else vectors @ self._projection.T)


class ClipEmbedder:
    """CLIP's two halves.

    Args:
        name: for every output.
        model: a CLIPModel.
        processor: its image processor.
        tokenizer: its tokenizer.
        device: where it computes.
        reporter: told of captions that are cut.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        processor: Any,
        tokenizer: Any,
        device: torch.device,
        reporter: Reporter | None = None,
    ) -> None:
        self.name = name
        self._model = model.to(device).eval()
        self._processor = processor
        self._tokenizer = tokenizer
        self._device = device
        self._reporter = reporter or Silent()
        self._limit = int(model.config.text_config.max_position_embeddings)

    def images(self, images: Sequence[Image.Image]) -> Vectors:
        """Unit vectors [N,D], float32."""
        return _batched(images, self._images)

    def texts(self, prompts: Sequence[str]) -> Vectors:
        """Unit vectors [N,D], float32. What is longer than the text half reads is cut, and said to be."""
        long = [
            prompt
            for prompt in prompts
            if len(self._tokenizer(prompt, verbose=False)["input_ids"]) > self._limit
        ]
        if long:
            self._reporter.warn(
                f"{len(long)} of {len(prompts)} captions are longer than the {self._limit} tokens that"
                f' {self.name} reads, and are cut for CLIP-T: "{long[0]}"'
            )
        return _batched(prompts, self._texts)

    # The halves are called one by one: what `get_image_features` returns differs by transformers' version.
    @torch.inference_mode()
    def _images(self, images: Sequence[Image.Image]) -> Vectors:
        hidden = self._model.vision_model(prepared(self._processor, images, self._device))
        return _unit(self._model.visual_projection(hidden.pooler_output))

    @torch.inference_mode()
    def _texts(self, prompts: Sequence[str]) -> Vectors:
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self._limit, return_tensors="pt"
        )
        hidden = self._model.text_model(
            input_ids=tokens["input_ids"].to(self._device),
            attention_mask=tokens["attention_mask"].to(self._device),
        )
        return _unit(self._model.text_projection(hidden.pooler_output))


class CosineDistance:
    """1 - the cosine of two images' embeddings: what is left where there are no feature maps.

    Args:
        embedder: whose embeddings.
    """

    def __init__(self, embedder: SubjectEmbedder) -> None:
        self.name = f"1 - cosine of {embedder.name} (no LPIPS)"
        self._embedder = embedder

    def __call__(self, first: Sequence[Image.Image], second: Sequence[Image.Image]) -> Vectors:
        """Distance of pair i, [N]; an image that is in several pairs is embedded once."""
        if len(first) != len(second):
            raise ValueError(f"{len(first)} images against {len(second)}")
        distinct = {id(image): image for image in (*first, *second)}
        if not distinct:
            return np.zeros(0, np.float32)
        vectors = dict(zip(distinct, self._embedder(list(distinct.values())), strict=True))
        pairs = [vectors[id(a)] @ vectors[id(b)] for a, b in zip(first, second, strict=True)]
        return np.maximum(0, 1 - np.array(pairs, np.float32))


def open_subject(folder: Path, name: str, device: torch.device) -> SubjectEmbedder:
    """A vision model from its folder, proven on one image.

    A pocket base's subject encoder has its projection beside it, in projection.safetensors.

    Raises:
        BaseModelError: it cannot be opened, lacks weights, or gives no embedding.
    """
    from transformers import AutoImageProcessor, AutoModel

    _require_safetensors(folder, name)
    try:
        model, told = AutoModel.from_pretrained(
            folder, output_loading_info=True, **_SAFE, dtype=torch.float32
        )
        _require_whole(told, unused=("pooler.",) if model.config.model_type in CLASS_TOKEN else ())
        processor = AutoImageProcessor.from_pretrained(folder, **_PILLOW)
        embedder = SubjectEmbedder(name, model, processor, device, _projection(folder))
        embedder([_GREY])
    except _FAILURES as error:
        raise _broken(folder, name, "a vision model", error) from error
    return embedder


def open_clip(
    folder: Path, name: str, device: torch.device, reporter: Reporter | None = None
) -> ClipEmbedder:
    """A CLIPModel with its tokenizer and image processor from its folder, proven on one image and one text.

    Raises:
        BaseModelError: it cannot be opened, lacks weights, or is no CLIP.
    """
    from transformers import AutoConfig, AutoTokenizer, CLIPModel

    _require_safetensors(folder, name)
    try:
        kind = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).model_type
        if kind != "clip":
            raise ValueError(f'its config.json says model_type "{kind}"')
        model, told = CLIPModel.from_pretrained(
            folder, output_loading_info=True, **_SAFE, dtype=torch.float32
        )
        _require_whole(told)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return _proven_clip(name, model, folder, tokenizer, device, reporter)
    except _FAILURES as error:
        raise _broken(folder, name, "a CLIP", error) from error


def open_pocket_clip(
    folder: Path, name: str, device: torch.device, reporter: Reporter | None = None
) -> ClipEmbedder:
    """The CLIP of a pocket base: its text half is the base's text encoder.

    Raises:
        BaseModelError: the folder is not whole.
    """
    from transformers import AutoTokenizer

    from lorabooth.pocket.clip import load_clip

    try:
        model = load_clip(folder)
        tokenizer = AutoTokenizer.from_pretrained(
            folder / "tokenizer", local_files_only=True, trust_remote_code=False
        )
        return _proven_clip(name, model, folder / "clip", tokenizer, device, reporter)
    except _FAILURES as error:
        raise _broken(folder, name, "a pocket base's CLIP", error) from error


def prepared(processor: Any, images: Sequence[Image.Image], device: torch.device) -> Tensor:
    """Images as a model takes them: float32 [B,3,H,W]."""
    pixels = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    moved: Tensor = pixels.to(device, torch.float32)
    return moved


_SAFE: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
# transformers 5 calls it backend="pil", 4 use_fast=False; each ignores what it does not know.
_PILLOW: dict[str, Any] = {
    "backend": "pil",
    "use_fast": False,
    "local_files_only": True,
    "trust_remote_code": False,
}
_GREY = Image.new("RGB", (64, 64), (128, 128, 128))


def _projection(folder: Path) -> Tensor | None:
    file = folder / "projection.safetensors"
    return load_file(file)["weight"] if file.is_file() else None


def _proven_clip(
    name: str, model: Any, folder: Path, tokenizer: Any, device: torch.device, reporter: Reporter | None
) -> ClipEmbedder:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, **_PILLOW)
    embedder = ClipEmbedder(name, model, processor, tokenizer, device, reporter)
    embedder.images([_GREY])
    embedder.texts(["a photo"])
    return embedder


def _batched(items: Sequence[Any], embed: Any) -> Vectors:
    parts = [embed(items[start : start + BATCH]) for start in range(0, len(items), BATCH)]
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def _unit(vectors: Tensor) -> Vectors:
    return F.normalize(vectors.float(), dim=-1).cpu().numpy()


def _require_safetensors(folder: Path, name: str) -> None:
    if not folder.is_dir():
        raise BaseModelError(f"{name}: there is no such folder.")
    if not (folder / "config.json").is_file():
        raise BaseModelError(f"{name}: no config.json here, so this is no folder of a transformers model.")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        found = f"only {pickles[0]}, a pickle that could run any code" if pickles else "no weights"
        raise BaseModelError(f"{name}: {found}; model.safetensors is needed.")


def _require_whole(told: Any, unused: tuple[str, ...] = ()) -> None:
    """Weights that a file lacks would be random ones, and so would the metric."""
    missing = sorted(key for key in told["missing_keys"] if not key.startswith(unused or ("\0",)))
    if missing or told.get("mismatched_keys"):
        names = ", ".join([*missing, *map(str, told.get("mismatched_keys") or ())][:3])
        raise ValueError(f"weights are missing or of another shape: {names}")


def _broken(folder: Path, name: str, kind: str, error: Exception) -> BaseModelError:
    if is_out_of_memory(error):
        raise error
    # What is said here is written into evaluation.json, which is to name no folders of this machine.
    text = first_line(error).replace(str(folder), folder.name)
    return BaseModelError(f"{name}: cannot be used as {kind}: {text}")
