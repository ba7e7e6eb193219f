"""What a family of base models must offer. A family is stateless: weights live in frozen `Parts`.

Legend of shape suffixes: B batch, C latent channels, h w latent size, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lorabooth.types import Cond, Geometry, Moments

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from lorabooth.objective.paths import NoisePath


@dataclass(frozen=True, slots=True)
class Source:
    """Where a base model is, resolved to files on disk.

    Attributes:
        path: a diffusers folder, or one .safetensors file in the original (LDM) layout.
        base_id: what adapters record: the hub id, "pocket", or the folder's or file's own name; never a path.
        family: name of the family it was detected as.
        revision: resolved hub commit, or "".
        sha256: digest that identifies the denoiser's weights ("" until computed).
    """

    path: Path
    base_id: str
    family: str
    revision: str = ""
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What "auto" means in a recipe for a family, with the figures' source in the family's docstring.

    Attributes:
        resolution_px: that the base was trained at.
        learning_rate: of the denoiser's adapter.
        text_encoder_learning_rate: of the text encoder's.
        rank: of both.
        steps: optimizer steps.
        guidance: of samples.
        class_guidance: of class images. What is sharpened by guidance, learned, and drawn with guidance again
            is sharpened twice; without any, class images are blurred.
        class_guidance_interval: noise levels sigma (low, high] at which that acts; empty is all.
        sampler_steps: per sample.
        class_sampler_steps: per class image.
        class_bf16: whether class images gain from bf16 on a CPU that has it; a small denoiser hardly does.
    """

    resolution_px: int
    learning_rate: float
    text_encoder_learning_rate: float
    rank: int
    steps: int
    guidance: float
    class_guidance: float
    class_guidance_interval: tuple[float, ...]
    sampler_steps: int
    class_sampler_steps: int
    class_bf16: bool


@dataclass(frozen=True)
class Parts:
    """The loaded components of one base model.

    Attributes:
        source: where they came from.
        tokenizers: by component name, "tokenizer", "tokenizer_2", ...
        text_encoders: by component name, "text_encoder", "text_encoder_2", ...; empty once released.
        vae: None once released.
        denoiser: the UNet or transformer.
        scheduler_config: the checkpoint's own, read only.
        dtype: of the frozen weights.
    """

    source: Source
    tokenizers: Mapping[str, Any]
    text_encoders: Mapping[str, nn.Module]
    vae: nn.Module | None
    denoiser: nn.Module
    scheduler_config: Mapping[str, Any]
    dtype: torch.dtype
    extras: Mapping[str, Any] = field(default_factory=dict)

    def components(self) -> dict[str, nn.Module]:
        """The components an adapter can sit on, by canonical name: "denoiser", "text_encoder", ..."""
        return {"denoiser": self.denoiser, **self.text_encoders}


class Family(Protocol):
    """One file a family; see design.md section 2 for the contract of each member."""

    @property
    def name(self) -> str:
        """Short name: "sd1", "sd2", ..."""
        ...

    @property
    def defaults(self) -> Defaults:
        """What "auto" stands for."""
        ...

    def defaults_for(self, base: Source | Parts) -> Defaults:
        """The defaults with the base's own resolution; reads configs only."""
        ...

    @property
    def targets(self) -> Mapping[str, Sequence[str]]:
        """Preset name -> regular expressions, matched whole against denoiser module paths."""
        ...

    @property
    def text_targets(self) -> Sequence[str]:
        """Regular expressions for text encoder module paths (canonical: with the `text_model.` prefix)."""
        ...

    def load(self, source: Source, dtype: torch.dtype) -> Parts:
        """Load all components, frozen (requires_grad False, eval mode), on the CPU.

        Raises:
            BaseModelError: a component is missing, broken or of another kind.
        """
        ...

    def skeleton(self, source: Source, dtype: torch.dtype) -> Parts:
        """As `load`, from the configs alone: no weight file is looked at, and the weights mean nothing.

        Among fake tensors (memory/meter_shapes.py) it costs no memory: what a prediction runs on. Tokenizers
        are in it if their vocabulary is on this machine.

        Raises:
            BaseModelError: a config is missing or broken.
        """
        ...

    def load_vae(self, source: Source) -> nn.Module:
        """The VAE alone, frozen, on the CPU: to look at images after it was released."""
        ...

    def noise_path(self, parts: Parts) -> NoisePath:
        """The path that the checkpoint was trained on, from its scheduler config."""
        ...

    def tokenize(self, parts: Parts, prompts: Sequence[str]) -> list[Cond]:
        """One unbatched dict of token ids per prompt (int64), padded and truncated to the encoder's limit."""
        ...

    def encode_tokens(self, parts: Parts, tokens: Cond) -> Cond:
        """Collated tokens -> collated conditioning; differentiable in the text encoders' adapters."""
        ...

    def encode_prompts(self, parts: Parts, prompts: Sequence[str]) -> list[Cond]:
        """`tokenize` and `encode_tokens` without gradient; one unbatched dict of CPU tensors per prompt."""
        ...

    def count_tokens(self, parts: Parts, prompts: Sequence[str]) -> list[tuple[int, int]]:
        """(tokens that the prompt has, tokens that the encoder takes) per prompt, special tokens included."""
        ...

    def encode_images(self, parts: Parts, pixels: Tensor) -> list[Moments]:
        """Pixels [B,3,H,W] float32 in [-1,1] -> B float32 moments on the CPU, scaled and shifted."""
        ...

    def decode_latents(self, parts: Parts, latents_BChw: Tensor) -> Tensor:
        """Latents as the denoiser sees them -> pixels [B,3,H,W] float32 in [-1,1] on the CPU."""
        ...

    def image_cond(self, parts: Parts, pixels: Tensor) -> list[Cond]:
        """Extra conditioning from the image itself (super-resolution stages); empty dicts elsewhere."""
        ...

    def collate(self, conds: Sequence[Cond]) -> Cond:
        """Stack (and pad) unbatched dicts to one batched dict."""
        ...

    def predict(
        self, parts: Parts, x_BChw: Tensor, level_B: Tensor, cond: Cond, geometry: Sequence[Geometry]
    ) -> Tensor:
        """The denoiser's prediction [B,C,h,w] in the noise path's target convention."""
        ...

    def pipeline(self, parts: Parts) -> DiffusionPipeline:
        """A diffusers pipeline over the same modules (no copy), with the checkpoint's scheduler."""
        ...

    def resolution_multiple_px(self, parts: Parts) -> int:
        """Image sides must be multiples of this many pixels."""
        ...
