"""The memory section as a whole: what cannot be done is said early, what can is done in order."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorabooth.errors import RecipeError
from lorabooth.families import registry, source
from lorabooth.memory import stream, techniques
from lorabooth.memory.checkpoint import checkpoint_units
from lorabooth.memory.frozen import FrozenConv2d, is_in_few_bits
from lorabooth.recipe import MemorySection, from_mapping
from tests.memory import nets

# Share of the spread of latents and pixels that tiles move them by, root mean square. On the pocket base, its
# picture cut into tiles of 32 px: a large base's tile has 8 times that side, and fewer borders to its area.
LATENTS_WITHIN, PIXELS_WITHIN = 0.3, 0.2


def test_what_the_machine_lacks_is_said_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    memory = MemorySection(base_precision="nf4", attention="xformers")
    problems = techniques.technique_problems(memory, "cpu")
    assert len(problems) == 2
    assert 'base_precision = "nf4"' in problems[0]
    assert "pip install 'lorabooth[gpu]'" in problems[0]
    assert "int8" in problems[0]
    assert "pip install xformers" in problems[1]
    with pytest.raises(RecipeError) as refused:
        techniques.require_techniques(memory, "cpu")
    assert all(problem in refused.value.what for problem in problems)


def test_an_apple_gpu_has_nothing_to_stream_to() -> None:
    memory = MemorySection(checkpointing=True, stream=True)
    assert "Apple" in techniques.technique_problems(memory, "mps")[0]
    assert techniques.technique_problems(memory, "cpu") == []


def test_what_depends_on_the_base_is_checked_with_it(tiny_sd: Path) -> None:
    unet = nets.load(tiny_sd)
    memory = MemorySection(checkpointing=True, checkpoint_blocks=500)
    assert techniques.technique_problems(memory, "cpu") == []
    assert "is 500, but this base has" in techniques.technique_problems(memory, "cpu", unet)[0]
    assert techniques.technique_problems(MemorySection(checkpointing=True), "cpu", unet) == []


def test_the_section_is_applied_whole_and_twice_is_once(tiny_sd: Path) -> None:
    memory = MemorySection(
        precision="bf16", base_precision="int8", checkpointing=True, checkpoint_offload=True, stream=True
    )
    unet = nets.load(tiny_sd)
    stream.stream(unet, "cpu")  # as `open_setting` does, for the class images
    parameters = nets.adapt(unet)
    for _ in range(2):
        said = [*techniques.hold_base(unet, memory, "cpu"), *techniques.recompute(unet, memory)]
    units = len(checkpoint_units(unet))
    assert any("wait in host memory" in line for line in said)
    assert f"{units} of {units} blocks" in said[-1]
    assert {p.dtype for p in parameters} == {torch.float32}
    assert unet.conv_in.weight.dtype == torch.bfloat16
    assert sum(is_in_few_bits(module) for module in unet.modules()) > 60
    assert type(unet.conv_in) is FrozenConv2d
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nets.loss(unet)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in parameters)


@pytest.mark.parametrize(
    ("overrides", "key", "told"),
    [
        (("memory.checkpoint_blocks=3",), "memory.checkpoint_blocks", "checkpointing is false"),
        (("memory.checkpoint_offload=true",), "memory.checkpoint_offload", "checkpointing is false"),
        (("memory.stream=true",), "memory.stream", "checkpointing is false"),
        (
            ("memory.stream=true", "memory.checkpointing=true", "memory.checkpoint_blocks=3"),
            "memory.checkpoint_blocks",
            "needs all blocks",
        ),
        (("memory.base_precision=nf4", "memory.precision=fp32"), "memory.base_precision", '"bf16"'),
    ],
)
def test_contradictions_are_recipe_errors(overrides: tuple[str, ...], key: str, told: str) -> None:
    raw: dict[str, Any] = {"subjects": [{"images": "photos", "noun": "dog"}]}
    with pytest.raises(RecipeError) as refused:
        from_mapping(raw, overrides, "test")
    assert key in refused.value.what
    assert told in refused.value.what


def vae_of(base: str, memory: MemorySection) -> Any:
    found = source.resolve(base)
    vae = registry.family(found.family).load_vae(found)
    techniques.save_vae_memory(vae, memory)
    techniques.save_vae_memory(vae, memory)
    return vae


@pytest.mark.parametrize("base", ["tiny", "pocket"])
def test_slices_are_exact(base: str, tiny_sd: Path) -> None:
    where = str(tiny_sd) if base == "tiny" else base
    plain, sliced = vae_of(where, MemorySection()), vae_of(where, MemorySection(vae_slicing=True))
    sizes: list[int] = []
    sliced.encoder.register_forward_pre_hook(lambda m, args: sizes.append(args[0].shape[0]))
    sliced.decoder.register_forward_pre_hook(lambda m, args: sizes.append(args[0].shape[0]))
    pixels = pictures(plain.config.sample_size)
    with torch.no_grad():
        latents = plain.encode(pixels).latent_dist.mean
        torch.testing.assert_close(sliced.encode(pixels).latent_dist.mean, latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            sliced.decode(latents).sample, plain.decode(latents).sample, rtol=1e-5, atol=1e-5
        )
    assert sizes == [1, 1, 1, 1]


def test_tiles_are_small_and_nearly_right() -> None:
    plain, tiled = vae_of("pocket", MemorySection()), vae_of("pocket", MemorySection(vae_tiling=True))
    side = plain.config.sample_size
    sides: list[int] = []
    tiled.encoder.register_forward_pre_hook(lambda m, args: sides.append(args[0].shape[-1]))
    tiled.decoder.register_forward_pre_hook(lambda m, args: sides.append(4 * args[0].shape[-1]))
    with torch.no_grad():
        latents = plain.encode(pictures(side)).latent_dist.mean
        pairs = [
            (tiled.encode(pictures(side)).latent_dist.mean, latents, LATENTS_WITHIN),
            (tiled.decode(latents).sample, plain.decode(latents).sample, PIXELS_WITHIN),
        ]
    assert max(sides) == side // 2 == tiled.tile_sample_min_size
    for ours, whole, tolerance in pairs:
        assert ours.shape == whole.shape
        assert 0 < float((ours - whole).square().mean().sqrt() / whole.std()) < tolerance


def pictures(side: int) -> torch.Tensor:
    """[2,3,side,side]: smooth ramps, and the same with a disc on them."""
    ramp = torch.linspace(-1, 1, side)
    smooth = torch.stack([ramp.repeat(side, 1), ramp.repeat(side, 1).T, ramp.outer(ramp)])
    disc = (ramp[:, None] ** 2 + ramp[None] ** 2) < 0.3
    return torch.stack([smooth, torch.where(disc, torch.tensor([0.8, -0.6, -0.2])[:, None, None], smooth)])
