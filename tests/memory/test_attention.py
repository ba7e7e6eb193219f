"""Attention kernels are proven before they are used; what cannot be used is said aloud."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorabooth.families import registry, source
from lorabooth.memory import attention
from lorabooth.progress import Silent


class Listener(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def warn(self, message: str) -> None:
        self.warned.append(message)


def unet_of(folder: Path) -> nn.Module:
    found = source.resolve(str(folder))
    return registry.family(found.family).load(found, torch.float32).denoiser


def test_head_sizes_are_the_models_own(tiny_sd: Path, tiny_sd2: Path) -> None:
    assert attention.head_sizes(unet_of(tiny_sd)) == (16, 32)
    assert attention.head_sizes(unet_of(tiny_sd2)) == (16,)


@pytest.mark.parametrize("kind", ["auto", "sdpa"])
def test_torchs_own_attention_is_the_default_and_said(tiny_sd: Path, kind: str) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    unet, listener = unet_of(tiny_sd), Listener()
    assert attention.set_attention(unet, kind, reporter=listener).name == "sdpa"
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}
    assert "sdpa" in listener.said[0]
    assert listener.warned == []


def test_xformers_without_a_kernel_for_this_device_falls_back_aloud(tiny_sd: Path) -> None:
    """A CPU has none, installed or not."""
    unet, listener = unet_of(tiny_sd), Listener()
    choice = attention.set_attention(unet, "xformers", reporter=listener)
    assert choice.name == "sdpa"
    assert "xformers was asked for" in choice.reason
    assert "xformers cannot be used" in listener.warned[0]
    if find_spec("xformers") is None:
        assert "pip install" in listener.warned[0]
    out = unet(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 77, 32)).sample
    assert torch.isfinite(out).all()


def test_facts_name_every_kernel_and_math_always_works() -> None:
    facts = {fact.name: fact for fact in attention.attention_facts("cpu")}
    assert set(facts) == {"flash", "mem_efficient", "cudnn", "math", "xformers"}
    assert facts["math"].works
    assert not facts["cudnn"].works
    assert facts["cudnn"].detail
    assert all(fact.works != bool(fact.detail) for fact in facts.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_proof_accepts_right_attention_in_every_precision(dtype: torch.dtype) -> None:
    right = torch.nn.functional.scaled_dot_product_attention
    assert attention._prove(right, 40, dtype, "cpu") == ""


def test_the_proof_finds_wrong_values_and_wrong_gradients() -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)

    def no_gradient_for_k(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k.detach(), v)

    def raises(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError("No operator found\nfor this head size")

    assert "wrong by" in attention._prove(wrong, 40, torch.float32, "cpu")
    assert attention._prove(no_gradient_for_k, 40, torch.float32, "cpu") == "it gives no gradient"
    assert attention._prove(raises, 40, torch.float32, "cpu") == "it does not run (No operator found)"
