"""The lean forward pass is peft's: outputs and gradients, switched off, scaled, several adapters, bf16."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora.layer import Conv2d, Linear
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorabooth.adapters import inject
from lorabooth.adapters.lean_forward import LeanConv2d, LeanLinear, Siblings
from lorabooth.memory.meter_shapes import ShapesOnly

ATTENTION = r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
EVERYTHING = (ATTENTION, r".*\.ff\.net\.(0\.proj|2)", r".*\.resnets\.\d+\.(conv1|time_emb_proj)")


@pytest.fixture(scope="module")
def base(tiny_sd: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_sd / "unet").requires_grad_(False)


@pytest.fixture
def unet(base: UNet2DConditionModel) -> UNet2DConditionModel:
    return copy.deepcopy(base)


def adapted(
    unet: nn.Module, *patterns: str, name: str = "a", dropout: float = 0.0, alpha: float = 2.0
) -> Any:
    """An adapter that does something."""
    target = inject.Target("denoiser", patterns or (ATTENTION,), 4, alpha, dropout)
    attached = inject.attach({"denoiser": unet}, [target], name=name, seed=len(name))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in attached.up_weights():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return attached


@contextmanager
def as_peft(model: nn.Module) -> Iterator[None]:
    """With peft's own forward passes."""
    lean = [(m, type(m)) for m in model.modules() if type(m) in (LeanLinear, LeanConv2d)]
    assert lean
    for module, kind in lean:
        module.__class__ = Linear if kind is LeanLinear else Conv2d
    try:
        yield
    finally:
        for module, kind in lean:
            module.__class__ = kind


def output(unet: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    channels, side = unet.config.in_channels, unet.config.sample_size
    x = torch.randn(2, channels, side, side, generator=generator)
    text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator)
    return unet(x.to(dtype), torch.tensor([3, 700]), text.to(dtype)).sample


def both(unet: Any, attached: Any, run: Callable[[], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(lean, peft) outputs and gradients."""
    found = []
    for context in (nullcontext(), as_peft(unet)):
        for parameter in attached.parameters():
            parameter.grad = None
        with context:
            out = run()
            out.float().square().mean().backward()
        found.append([out.detach(), *(p.grad.clone() for p in attached.parameters())])
    yield from zip(*found, strict=True)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Relative difference; a gradient that is rounding alone (before a normalisation) counts as zero."""
    return float((ours - theirs).norm() / (theirs.norm() + 1e-4))


@pytest.mark.parametrize("patterns", [(ATTENTION,), EVERYTHING])
def test_outputs_and_gradients_are_pefts(unet: Any, patterns: tuple[str, ...]) -> None:
    attached = adapted(unet, *patterns)
    pairs = list(both(unet, attached, lambda: output(unet)))
    assert all(float(theirs.abs().max()) > 0 for _, theirs in pairs)
    for ours, theirs in pairs:
        assert apart(ours, theirs) < 1e-5


def test_two_adapters_add_up(unet: Any) -> None:
    adapted(unet, name="a")
    attached = adapted(unet, name="bb", alpha=8.0)
    inject.set_strength({"denoiser": unet}, "a", 0.5)
    for ours, theirs in both(unet, attached, lambda: output(unet)):
        assert apart(ours, theirs) < 1e-5
    inject.detach({"denoiser": unet}, "a")
    assert all("a" not in m.siblings for m in unet.modules() if isinstance(m, LeanLinear))
    for ours, theirs in both(unet, attached, lambda: output(unet)):
        assert apart(ours, theirs) < 1e-5


def test_switched_off_and_merged_it_is_pefts(unet: Any, base: Any) -> None:
    attached = adapted(unet)
    components = {"denoiser": unet}
    with torch.no_grad():
        plain, on = output(base), output(unet)
        assert not torch.allclose(on, plain, atol=1e-4)
        with inject.disabled(components):
            assert torch.equal(output(unet), plain)
        inject.set_strength(components, "a", 0.0)
        torch.testing.assert_close(output(unet), plain)
        inject.set_strength(components, "a", 1.0)
        assert torch.equal(output(unet), on)
        for layer in attached.modules.values():
            layer.merge()
        torch.testing.assert_close(output(unet), on, rtol=1e-4, atol=1e-5)


def test_dropout_draws_what_pefts_draws(unet: Any) -> None:
    attached = adapted(unet, dropout=0.5)
    unet.train()

    def seeded() -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return output(unet)

    for ours, theirs in both(unet, attached, seeded):
        assert apart(ours, theirs) < 1e-5


@pytest.mark.parametrize("autocast", [True, False])
def test_in_bfloat16_it_is_as_exact_as_pefts(unet: Any, autocast: bool) -> None:
    attached = adapted(unet)
    exact = [first for first, _ in both(unet, attached, lambda: output(unet))]
    unet.to(torch.bfloat16)
    for parameter in attached.parameters():
        parameter.data = parameter.data.float()
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()

    def run() -> Tensor:
        with context:
            return output(unet, torch.bfloat16)

    off: list[tuple[float, float]] = []
    for (ours, theirs), true in zip(both(unet, attached, run), exact, strict=True):
        assert ours.dtype == theirs.dtype
        off.append(tuple(float((each.float() - true).norm() / true.norm()) for each in (ours, theirs)))
    of_ours, of_peft = (statistics.mean(column) for column in zip(*off, strict=True))
    assert of_ours < 1.3 * of_peft < 0.1


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_layer_is_pefts_to_the_last_digits(dtype: torch.dtype, autocast: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = nn.ModuleDict({"lin": nn.Linear(48, 40), "conv": nn.Conv2d(6, 8, 3, padding=1)}).requires_grad_(
        False
    )
    for parameter in layers.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 7
    layers.to(dtype)
    adapted(layers, "lin", "conv", alpha=3.0)
    inputs = {
        "lin": torch.randn(2, 9, 48, generator=generator),
        "conv": torch.randn(2, 6, 5, 5, generator=generator),
    }
    for name, x in inputs.items():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours = layers[name](x.to(dtype))
            with as_peft(layers):
                theirs = layers[name](x.to(dtype))
        assert ours.dtype == theirs.dtype
        rounding = 1e-6 if ours.dtype == torch.float32 else 2**-8
        torch.testing.assert_close(ours, theirs, rtol=2 * rounding, atol=2 * rounding)


def test_a_checkpointed_and_a_copied_model_compute_the_same(unet: Any) -> None:
    attached = adapted(unet)
    plain = [ours for ours, _ in both(unet, attached, lambda: output(unet))]
    other = copy.deepcopy(unet)
    assert torch.equal(output(other), plain[0])
    unet.train()
    unet.enable_gradient_checkpointing()
    for (ours, _), expected in zip(both(unet, attached, lambda: output(unet)), plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_q_k_and_v_share_one_product_and_nothing_is_held_after_them(unet: Any) -> None:
    adapted(unet)
    layers = [module for module in unet.modules() if isinstance(module, LeanLinear)]
    groups = {id(shared): shared for layer in layers for _, shared in layer.siblings.values()}
    n_blocks = sum(type(module).__name__ == "BasicTransformerBlock" for module in unet.modules())
    assert sorted(len(group.weights) for group in groups.values()) == [2] * n_blocks + [3] * n_blocks
    n_linear = _linears(unet)
    with as_peft(unet):
        n_linear_of_peft = _linears(unet)
    # Of q, k, v one product instead of three; of the text's k, v one instead of two; lora_B is in a sum.
    assert n_linear_of_peft - n_linear == n_blocks * (2 + 1) + len(layers)
    assert all(group._x is None and group._inner == () for group in groups.values())


def _linears(unet: Any) -> int:
    """How many linear products a forward pass has, those that are part of a sum left out."""
    seen: list[Any] = []

    class Count(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Count():
        output(unet)
    return sum(function is torch.nn.functional.linear for function in seen)


def test_siblings_that_get_another_tensor_compute_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(2, 5, generator=generator)) for _ in range(3)]
    siblings = Siblings(weights)
    x, other = torch.randn(4, 5, generator=generator), torch.randn(4, 5, generator=generator)
    for place, given in ((0, x), (1, other), (2, x), (1, x), (0, other), (2, other), (2, other)):
        torch.testing.assert_close(siblings.down(place, given), given @ weights[place].T)
    assert siblings._x is None


def test_it_runs_on_shapes_alone(base: Any) -> None:
    with ShapesOnly():
        unet = UNet2DConditionModel.from_config(base.config).requires_grad_(False)
        attached = inject.attach(
            {"denoiser": unet}, [inject.Target("denoiser", (ATTENTION,), 4, 4.0)], name="a", seed=0
        )
        x = torch.empty(2, base.config.in_channels, 8, 8)
        with torch.autocast("cpu", torch.bfloat16):
            unet(
                x, torch.empty(2), torch.empty(2, 7, base.config.cross_attention_dim)
            ).sample.sum().backward()
    assert all(parameter.grad is not None for parameter in attached.parameters())
