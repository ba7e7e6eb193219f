"""Attention kernels are proven before they are used; what cannot be used is said aloud."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorabooth.errors import TrainingError
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


def test_the_kernel_in_use_is_the_one_torch_takes_proven_and_said(tiny_sd: Path) -> None:
    unet, listener = unet_of(tiny_sd), Listener()
    choice = attention.set_attention(unet, "auto", reporter=listener)
    assert choice.kernels == ("flash",), "torch has one for CPUs"
    assert "flash kernel, proven forward and backward at head sizes 16, 32 in float32" in listener.said[0]


def test_a_wrong_kernel_is_refused_and_another_held_to(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a build of torch has a kernel that is wrong at one head size."""
    prove = attention._prove

    def flash_is_wrong(attend: object, size: int, dtype: torch.dtype, device: object) -> str:
        if attend is torch.nn.functional.scaled_dot_product_attention and size == 32:
            return "it is wrong by 0.5"
        return prove(attend, size, dtype, device)  # type: ignore[arg-type]

    def calls_of(unet: nn.Module) -> set[str]:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            unet(torch.ones(1, 4, 8, 8), 5, torch.ones(1, 77, 32)).sample.sum().backward()
        return {event.key for event in profiled.key_averages() if "scaled_dot_product" in event.key}

    unet, plain, listener = unet_of(tiny_sd), unet_of(tiny_sd), Listener()
    for net in (unet, plain):
        net.conv_in.requires_grad_(True)
    attention.set_attention(plain, "sdpa")
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    assert any(flash in name for name in calls_of(plain))
    monkeypatch.setattr(attention, "_prove", flash_is_wrong)
    monkeypatch.setattr(attention, "_attend_with", _without_flash(attention._attend_with))
    choice = attention.set_attention(unet, "sdpa", reporter=listener)
    assert choice.kernels == ("math",)
    assert "flash kernel at head size 32 in float32: it is wrong by 0.5" in listener.warned[0]
    assert not any(flash in name for name in calls_of(unet))
    torch.testing.assert_close(unet.conv_in.weight.grad, plain.conv_in.weight.grad, rtol=1e-4, atol=1e-4)


def _without_flash(attend_with: object) -> object:
    def attend(name: str) -> object:
        if name == "flash":
            return lambda q, k, v: torch.zeros_like(q)
        return attend_with(name)  # type: ignore[operator]

    return attend


def test_no_right_kernel_at_all_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_prove", lambda *args: "it is wrong by 1")
    with pytest.raises(TrainingError, match="no attention kernel"):
        attention.choose_sdpa((16,), torch.float32, "cpu")
