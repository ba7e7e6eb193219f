"""Precision, casting, checkpointing and the start-up probe, on a real tiny UNet with a real adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorabooth.adapters import inject
from lorabooth.errors import RecipeError, TrainingError
from lorabooth.families import registry, source
from lorabooth.memory import apply, quantise
from lorabooth.progress import Silent
from lorabooth.recipe import MemorySection

ATTENTION = (r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",)


class Listener(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, message: str) -> None:
        self.said.append(message)


def never(dtype: torch.dtype) -> nn.Module:
    raise AssertionError("the base is loaded anew where nothing was rounded")


def broken(dtype: torch.dtype) -> nn.Module:
    """A base whose files are as broken as what was loaded of them."""
    return nn.Module()


@pytest.fixture
def unet(tiny_sd: Path) -> nn.Module:
    found = source.resolve(str(tiny_sd))
    return registry.family(found.family).load(found, torch.float32).denoiser


def trained(unet: nn.Module) -> list[nn.Parameter]:
    attached = inject.attach({"denoiser": unet}, [inject.Target("denoiser", ATTENTION, 4, 4.0, 0.0)], seed=0)
    parameters = list(attached.parameters())
    with torch.no_grad():
        for p in parameters:  # lora_B starts at zero, where no gradient reaches lora_A
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    return parameters


def forward(unet: nn.Module) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, cond = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 77, 32, generator=generator)

    def attempt() -> Tensor:
        dtype = unet.conv_in.weight.dtype
        return unet(x.to(dtype), torch.tensor([500]), cond.to(dtype)).sample.float().square().mean()

    return attempt


@pytest.mark.parametrize(
    ("asked", "base", "expected"),
    [
        ("auto", "auto", (torch.float32, torch.float32)),
        ("bf16", "auto", (torch.bfloat16, torch.bfloat16)),
        ("bf16", "fp32", (torch.bfloat16, torch.float32)),
        ("fp16", "fp16", (torch.float16, torch.float16)),
    ],
)
def test_precision_on_a_cpu(asked: str, base: str, expected: tuple[torch.dtype, torch.dtype]) -> None:
    chosen = apply.precision(MemorySection(precision=asked, base_precision=base), "cpu")  # type: ignore[arg-type]
    assert (chosen.compute, chosen.base) == expected
    assert chosen.scaled == (asked == "fp16")
    assert chosen.scaler("cpu").is_enabled() == chosen.scaled
    assert chosen.reason


def test_a_base_coarser_than_the_arithmetic_is_refused() -> None:
    with pytest.raises(RecipeError, match="base_precision"):
        apply.precision(MemorySection(precision="fp32", base_precision="bf16"), "cpu")


def test_cast_base_leaves_the_adapter_in_float32(unet: nn.Module) -> None:
    parameters = trained(unet)
    apply.cast_base(unet, torch.bfloat16)
    assert {p.dtype for p in parameters} == {torch.float32}
    assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert len([p for p in unet.parameters() if p.requires_grad]) == len(parameters)


def test_cast_base_to_the_same_dtype_changes_nothing(unet: nn.Module) -> None:
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    apply.cast_base(unet, torch.float32)
    torch.testing.assert_close(dict(unet.state_dict()), before, rtol=0, atol=0)


def test_checkpointing_gives_equal_gradients_and_stores_less(unet: nn.Module) -> None:
    parameters, attempt = trained(unet), forward(unet)

    def gradients() -> tuple[list[Tensor], int]:
        held: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = attempt()
        found = torch.autograd.grad(loss, parameters)
        return list(found), sum(held.values())

    plain, plain_bytes = gradients()
    apply.enable_checkpointing(unet)
    saved, saved_bytes = gradients()
    torch.testing.assert_close(saved, plain, rtol=0, atol=0)
    assert all(bool(g.abs().sum() > 0) for g in saved)
    assert saved_bytes < plain_bytes / 2


def test_checkpointing_a_text_encoder_is_allowed_and_other_modules_are_refused(tiny_sd: Path) -> None:
    found = source.resolve(str(tiny_sd))
    parts = registry.family(found.family).load(found, torch.float32)
    apply.enable_checkpointing(parts.text_encoders["text_encoder"])
    with pytest.raises(RecipeError, match="Linear"):
        apply.enable_checkpointing(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_the_probe_keeps_what_works_and_leaves_no_gradient(unet: nn.Module, name: str) -> None:
    parameters, listener = trained(unet), Listener()
    wanted = apply.Precision(apply.DTYPES[name], apply.DTYPES[name], "")
    assert apply.probe(forward(unet), parameters, unet, wanted, "cpu", never, listener) == wanted
    assert listener.said == []
    assert all(p.grad is None for p in parameters)


def test_the_probe_steps_down_from_fp16_with_the_weights_as_they_were(tiny_sd: Path, unet: nn.Module) -> None:
    """Weights beyond 65504 are infinite in float16; a step down must not be left with those."""

    def damage(net: nn.Module) -> nn.Module:
        with torch.no_grad():
            net.conv_out.weight[0, 0, 0, 0] = 1e5
            net.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = 1 / 3
        return net

    def reload(dtype: torch.dtype) -> nn.Module:
        loaded.append(dtype)
        found = source.resolve(str(tiny_sd))
        fresh = damage(registry.family(found.family).load(found, torch.float32).denoiser)
        apply.cast_base(fresh.requires_grad_(False), dtype)
        return fresh

    loaded: list[torch.dtype] = []
    parameters, listener = trained(damage(unet)), Listener()
    before = [p.detach().clone() for p in parameters]
    exact = {name: p.detach().clone() for name, p in unet.named_parameters() if not p.requires_grad}
    wanted = apply.Precision(torch.float16, torch.float16, "")
    used = apply.probe(forward(unet), parameters, unet, wanted, "cpu", reload, listener)
    assert (used.compute, used.base) == (torch.bfloat16, torch.bfloat16)
    assert loaded == [torch.bfloat16]
    assert "fp16 failed" in listener.said[0]
    assert "going on in bf16" in listener.said[0]
    for name, weight in unet.named_parameters():
        if not weight.requires_grad:
            torch.testing.assert_close(weight.detach(), exact[name].bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close([p.detach() for p in parameters], before, rtol=0, atol=0)


def test_a_step_down_that_rounds_nothing_loads_nothing(unet: nn.Module) -> None:
    """A float32 base under float16 arithmetic is whole: only the activations overflow."""
    parameters, listener = trained(unet), Listener()
    with torch.no_grad():
        unet.conv_out.weight.mul_(3e4)
        unet.conv_norm_out.weight.mul_(3e3)
    wanted = apply.Precision(torch.float16, torch.float32, "")
    used = apply.probe(forward(unet), parameters, unet, wanted, "cpu", never, listener)
    assert (used.compute, used.base) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_the_probe_works_with_a_base_in_few_bits_and_steps_down_beside_it(
    tiny_sd: Path, unet: nn.Module, kind: str
) -> None:
    parameters, listener = trained(unet), Listener()
    quantise.quantise(unet, kind, "cpu")
    wanted = apply.precision(MemorySection(base_precision=kind), "cpu")  # type: ignore[arg-type]
    assert (wanted.compute, wanted.base_name) == (torch.bfloat16, kind)
    assert apply.probe(forward(unet), parameters, unet, wanted, "cpu", never, listener) == wanted
    layer = unet.mid_block.resnets[0].conv1
    stored = [getattr(layer, name).clone() for name in layer.stored_names]
    found = source.resolve(str(tiny_sd))
    fresh = registry.family(found.family).load(found, torch.float32).denoiser
    with torch.no_grad():
        unet.conv_out.weight.fill_(float("inf"))
    used = apply.probe(forward(unet), parameters, unet, wanted, "cpu", lambda dtype: fresh, listener)
    assert (used.compute, used.base, used.storage) == (torch.float32, torch.float32, kind)
    torch.testing.assert_close([getattr(layer, name) for name in layer.stored_names], stored, rtol=0, atol=0)
    assert unet.conv_out.weight.dtype == torch.float32


def test_few_bits_are_not_for_float32_arithmetic() -> None:
    with pytest.raises(RecipeError, match='"int8" does not go with'):
        apply.precision(MemorySection(precision="fp32", base_precision="int8"), "cpu")


def test_the_probe_gives_up_on_broken_weights(unet: nn.Module) -> None:
    parameters, listener = trained(unet), Listener()
    with torch.no_grad():
        unet.conv_in.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        apply.probe(
            forward(unet),
            parameters,
            unet,
            apply.Precision(torch.bfloat16, torch.bfloat16, ""),
            "cpu",
            broken,
            listener,
        )
    assert len(listener.said) == 1


def test_the_probe_notices_that_no_gradient_flows(unet: nn.Module) -> None:
    parameters = trained(unet)

    def cut() -> Tensor:
        return forward(unet)().detach().requires_grad_()

    with pytest.raises(TrainingError, match="no gradient"):
        apply.probe(cut, parameters, unet, apply.Precision(torch.float32, torch.float32, ""), "cpu", never)
