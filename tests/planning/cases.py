"""Plans for tests: a tiny base on a card that is not here, with budgets to the byte."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorabooth.families import registry
from lorabooth.families.base import Family, Source
from lorabooth.families.source import resolve
from lorabooth.memory.facts import Device
from lorabooth.memory.meter import Usage, ordered
from lorabooth.planning.blocks import block_weights
from lorabooth.planning.budget import Budget, card
from lorabooth.planning.forecast import PHASES, Forecast, Phase, prepared
from lorabooth.planning.memory_plan import Case
from lorabooth.recipe import Recipe, from_mapping

GIB = 1 << 30
MIB = 1 << 20


def recipe(base: Path, *overrides: str) -> Recipe:
    """As a user writes it: nothing in [memory]."""
    raw = {
        "model": {"base": str(base)},
        "subjects": [{"images": "photos", "noun": "dog", "token": "sks"}],
        "run": {"sample_count": 2},
    }
    return from_mapping(raw, overrides, "test")


def case(base: Path, usable_bytes: int = GIB, *, device: Device | None = None, **more: Any) -> Case:
    """A CUDA card; `predict=arithmetic` for figures that follow from the recipe in an instant."""
    source = resolve(str(base), configs_only=True)
    budget = Budget(usable_bytes, 0, "given")
    return Case(source, registry.family(source.family), device or card(usable_bytes), budget, **more)


def arithmetic(
    recipe: Recipe,
    source: Source,
    family: Family,
    device: Device,
    *,
    phases: Collection[str] = PHASES,
) -> Forecast:
    """Memory by a rule of thumb instead of a rehearsal, for tests of what a plan makes of forecasts.

    On the tiny base, in MiB: base 800 (400 in int8, 200 in NF4, 20 streamed), activations 1000 of which
    recomputing spares up to 900, 8 images drawn at once 1600, the VAE 300 (100 in tiles), optimizer 40.
    """
    known = prepared(recipe, source, family, device)
    memory, side = known.memory, (int(known.images.resolution) / 64) ** 2
    bits = {"int8": 400, "nf4": 200}
    base = 20 if memory.stream else bits.get(memory.base_precision, 800)
    at_once = 8 if memory.images_at_once == "auto" else memory.images_at_once
    spared = 0.0
    if memory.checkpointing:
        weights = _weights(family, source)
        spared = sum(weights if memory.checkpoint_blocks == "auto" else weights[: memory.checkpoint_blocks])
    kept = 1000 * (1 - 0.9 * spared) - 50 * memory.checkpoint_offload
    vae = 100 if memory.vae_tiling else 300
    optimizer = 10 if known.optim.name == "adamw8bit" else 40
    parts = {
        "class images": {"denoiser": 800, "vae": 300, "activations": side * 200 * at_once},
        "caching": {"text encoder": 100, "vae": 300, "activations": side * vae},
        "training": {"denoiser": base, "optimizer": optimizer, "activations": side * kept},
        "previews": {
            "denoiser": base,
            "vae": 300,
            "optimizer": optimizer,
            "activations": side * 50 * at_once,
        },
        "saving": {"denoiser": base, "optimizer": 2 * optimizer},
    }
    if known.prior.mode != "generated":
        del parts["class images"]
    if known.run.sample_count == 0:
        del parts["previews"]
    found = [Phase(name, _usage(parts[name])) for name in PHASES if name in phases and name in parts]
    return Forecast(device, known, tuple(found))


@lru_cache
def _weights(family: Family, source: Source) -> list[float]:
    return block_weights(family, source)


def _usage(parts: dict[str, float]) -> Usage:
    sizes = {name: int(size * MIB) for name, size in parts.items()}
    return Usage(sum(sizes.values()), ordered(sizes))
