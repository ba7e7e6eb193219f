"""Adapters on the tiny bases, and what the bases compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorabooth.adapters import inject
from lorabooth.adapters.inject import Target

ATTENTION = r".*\.attn[12]\.to_(q|k|v|out\.0)"
FEED_FORWARD = r".*\.ff\.net\.(0\.proj|2)"
CONVOLUTIONS = r".*\.(conv1|conv2|conv_shortcut|time_emb_proj|proj_in|proj_out|conv)|conv_in|conv_out"
EMBEDDING = r"time_embedding\.linear_[12]"
TEXT = r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
EVERYTHING = (ATTENTION, FEED_FORWARD, CONVOLUTIONS, EMBEDDING)


@cache
def _pipeline(folder: Path):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    for module in (pipe.unet, pipe.text_encoder, pipe.vae):
        module.requires_grad_(False).eval()
    return pipe


@dataclass(frozen=True)
class Base:
    """A tiny pipeline folder; every call gives fresh modules."""

    folder: Path

    def load(self) -> dict[str, nn.Module]:
        pipe = _pipeline(self.folder)
        return {"denoiser": copy.deepcopy(pipe.unet), "text_encoder": copy.deepcopy(pipe.text_encoder)}

    def pipeline(self):
        fresh = self.load()
        shared = _pipeline(self.folder).components
        new = {"unet": fresh["denoiser"], "text_encoder": fresh["text_encoder"]}
        return type(_pipeline(self.folder))(**shared | new, requires_safety_checker=False)


@pytest.fixture(params=["sd1", "sd2"])
def base(request: pytest.FixtureRequest, tiny_sd: Path, tiny_sd2: Path) -> Base:
    return Base(tiny_sd if request.param == "sd1" else tiny_sd2)


@pytest.fixture
def sd1(tiny_sd: Path) -> Base:
    return Base(tiny_sd)


def outputs(components: dict[str, nn.Module], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(denoiser's prediction, text encoder's states) of fixed inputs."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    cond = torch.randn(2, 7, 32, generator=generator).to(dtype)
    ids = torch.randint(0, 400, (2, 77), generator=generator)
    with torch.no_grad():
        noise = components["denoiser"](x, torch.tensor([10, 700]), cond).sample
        states = components["text_encoder"](ids)[0]
    return noise, states


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture
def trained() -> Callable[..., dict[str, Tensor]]:
    """Attach to fresh modules, make lora_B non-zero, return the tensors."""

    def make(
        components: dict[str, nn.Module],
        *,
        patterns: tuple[str, ...] = EVERYTHING,
        rank: int = 4,
        alpha: float = 6.0,
        text: bool = True,
        name: str = "default",
        seed: int = 0,
    ) -> dict[str, Tensor]:
        targets = [Target("denoiser", patterns, rank, alpha)]
        if text:
            targets.append(Target("text_encoder", (TEXT,), rank // 2, 5.0))
        attached = inject.attach(components, targets, name=name, seed=seed)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for layer in attached.modules.values():
                weight = layer.lora_B[name].weight
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
        return inject.tensors(components, name)

    return make
