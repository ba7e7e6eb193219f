"""Recomputation by the block: which blocks, in which order, and what stays where."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorabooth.errors import RecipeError
from lorabooth.memory import checkpoint, host
from lorabooth.memory.checkpoint import recompute
from lorabooth.memory.meter import Meter
from lorabooth.memory.units import checkpoint_units
from tests.memory import nets


def test_units_go_from_the_outside_in_and_hold_nearly_all_weights_once(tiny_sd: Path) -> None:
    unet = nets.load(tiny_sd)
    units = checkpoint_units(unet)
    names = [unit.name for unit in units]
    assert names[:4] == [
        "down_blocks.0.attentions.0",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
        "down_blocks.0.resnets.0",
    ]
    assert names[-1].startswith("mid_block")
    assert len(names) == len(set(names))
    inside = [id(p) for unit in units for p in unit.module.parameters()]
    assert len(inside) == len(set(inside))
    held = sum(p.numel() for unit in units for p in unit.module.parameters())
    assert held > 0.9 * sum(p.numel() for p in unet.parameters())


def test_an_attention_block_of_several_transformer_blocks_is_several_units(tiny_sdxl: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl / "unet")
    blocks = [m for m in unet.modules() if type(m).__name__ == "Transformer2DModel"]
    several = [m for m in blocks if len(m.transformer_blocks) > 1]
    names = {unit.name for unit in checkpoint_units(unet)}
    if several:
        assert any("transformer_blocks" in name for name in names)
    assert not any(a != b and b.startswith(f"{a}.") for a in names for b in names)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("count", [None, 1, 5])
def test_gradients_are_equal(tiny_sd: Path, count: int | None, offload: bool) -> None:
    plain, unet = nets.load(tiny_sd), nets.load(tiny_sd)
    expected = nets.gradients(plain, nets.adapt(plain))
    parameters = nets.adapt(unet)
    done = recompute(unet, count, offload=offload, offload_from_bytes=0)
    assert done == (count or len(checkpoint_units(unet)))
    torch.testing.assert_close(nets.gradients(unet, parameters), expected, rtol=0, atol=0)


def test_each_further_block_keeps_less(tiny_sd: Path) -> None:
    unet = nets.load(tiny_sd)
    nets.adapt(unet)
    kept = [nets.kept_bytes(unet)]
    for count in range(1, len(checkpoint_units(unet)) + 1):
        recompute(unet, count)
        kept.append(nets.kept_bytes(unet))
    # Samplers have little to give: their inputs are kept instead of their outputs.
    assert kept[-1] < kept[0] / 2
    assert all(later < earlier for earlier, later in pairwise(kept[:5]))
    assert kept[0] - kept[3] > kept[-4] - kept[-1]
    recompute(unet, 1)
    assert nets.kept_bytes(unet) == kept[1]


def test_only_the_blocks_inputs_wait_in_host_memory(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[int, ...]] = []
    to_host = checkpoint.to_host

    def noted(tensor: Tensor) -> Tensor:
        assert host.made_for() == ""
        moved.append(tuple(tensor.shape))
        return to_host(tensor)

    monkeypatch.setattr(checkpoint, "to_host", noted)
    unet = nets.load(tiny_sd)
    parameters = nets.adapt(unet)
    inputs: list[tuple[int, ...]] = []
    for unit in checkpoint_units(unet):
        unit.module.register_forward_pre_hook(_shape_noter(inputs))
    count = recompute(unet, offload=True, offload_from_bytes=20_000)  # text embeddings are smaller
    nets.gradients(unet, parameters)
    assert moved
    # Pre-hooks run for each unit once: a recomputation calls the unit's own forward.
    large = [shape for shape in inputs if 4 * torch.Size(shape).numel() >= 20_000]
    assert sorted(moved) == sorted(large)
    assert len(moved) <= count
    moved.clear()
    recompute(unet, offload=True)
    nets.gradients(unet, parameters)
    assert not moved, "these are all smaller than a mebibyte"


def _shape_noter(inputs: list[tuple[int, ...]]) -> Any:
    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(tuple(args[0].shape))

    return note


def test_dropout_is_recomputed_with_its_own_random_numbers(tiny_sd: Path) -> None:
    from lorabooth.adapters import inject

    def gradients(change: Any) -> list[Tensor]:
        unet = nets.load(tiny_sd)
        target = inject.Target("denoiser", nets.EVERYTHING, 4, 4.0, 0.5)
        parameters = inject.attach({"denoiser": unet}, [target], seed=0).parameters()
        with torch.no_grad():
            for p in parameters:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(p.numel()))
        unet.train()
        change(unet)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return nets.gradients(unet, parameters)

    plain = gradients(lambda unet: None)
    equal = gradients(lambda unet: recompute(unet, preserve_rng=True))
    torch.testing.assert_close(equal, plain, rtol=0, atol=0)
    other = gradients(lambda unet: recompute(unet, preserve_rng=False))
    assert any(not torch.equal(a, b) for a, b in zip(other, plain, strict=True))


def test_too_many_blocks_and_none_at_all_are_refused(tiny_sd: Path) -> None:
    unet = nets.load(tiny_sd)
    available = len(checkpoint_units(unet))
    with pytest.raises(RecipeError, match=f"is {available + 1}, but this base has {available}"):
        recompute(unet, available + 1)
    with pytest.raises(RecipeError, match="Linear has no blocks"):
        recompute(nn.Linear(2, 2))


def test_what_is_offloaded_is_gone_from_the_device(tiny_sd: Path) -> None:
    held = {}
    for offload in (False, True):
        unet = nets.load(tiny_sd)
        nets.adapt(unet)
        recompute(unet, offload=offload, offload_from_bytes=0)
        with Meter(host_counts=False) as meter:
            value = nets.loss(unet)
            held[offload] = meter.live_bytes
        value.backward()
    assert held[True] < 0.8 * held[False]
