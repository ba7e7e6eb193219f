"""Small real runs for tests: a tiny base, a few photos, a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorabooth
from lorabooth.recipe import Recipe, from_mapping


def recipe(base: Path, photos: Path, *overrides: str) -> Recipe:
    """Six steps, three class images of one sampler step, no samples; overrides as for --set."""
    raw: dict[str, Any] = {
        "model": {"base": str(base)},
        "subjects": [{"images": str(photos), "noun": "dog", "token": "sks"}],
        "prior": {"count": 3, "sampler_steps": 1},
        "adapter": {"rank": 4},
        "optim": {"steps": 6, "lr": 1e-3},
        "run": {"checkpoint_every": 2, "sample_count": 0},
    }
    return from_mapping(raw, overrides, "test")


def train(base: Path, photos: Path, out: Path, *overrides: str) -> lorabooth.RunResult:
    """Run it."""
    return lorabooth.train(recipe(base, photos, *overrides), out=out)


def metrics(out: Path) -> list[dict[str, Any]]:
    """The run's lines, without what a clock wrote."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "step_s"} for line in lines]
