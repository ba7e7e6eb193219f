"""The cells of benchmarks/prior_preservation.py: one specimen learned in one configuration, and drawn.

A cell is a run folder and a folder of images. What is there already is not made again.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lorabooth import durable

CLASSES = ("mug", "cat", "boot", "duck", "clock", "fish", "robot", "vase", "car", "ball")
"""One specimen of each: objects and live ones."""
PLACES = ("wooden floor", "grass", "brick wall", "pink fabric", "cobblestones")
"""Of the photos, in this order; the prompts ask for others."""
TOKEN = "qzx"
PROMPTS = (
    "a photo of a {token} {noun} on the beach",
    "a photo of a {token} {noun} in the snow",
    "a photo of a {token} {noun} at night",
    "a painting of a {token} {noun}",
    "a photo of a {token} {noun} wearing a red hat",
    "a photo of an upside down {token} {noun} in the desert",
)
SEEDS = range(4)
CLASS_SEEDS = range(16)
"""Of "a photo of a {noun}", for PRES."""
UNRELATED = (
    "a photo of a {other} on the beach",
    "a photo of a {other} in the snow",
    "a photo of a {other} on the grass",
    "a painting of a {other}",
)
"""Each with two other classes, for drift."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way to train.

    Attributes:
        name: unique.
        settings: recipe keys that differ from the pocket recipe's.
        photos: how many are given.
        noun: the class noun that is told: "right", "none" (a word that the base does not know), "wrong".
        specimens: how many specimens are learned this way.
        at: steps whose checkpoints are judged as well; empty is the last alone.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    photos: int = 5
    noun: str = "right"
    specimens: int = 10
    at: tuple[int, ...] = ()


MODES = (
    Configuration("generated"),
    Configuration("none", {"prior.mode": "none"}),
    Configuration("distill", {"prior.mode": "distill"}),
    Configuration("images", {"prior.mode": "images"}),
)
_FEW = 2
SWEEPS = (
    *(Configuration(f"photos {n}", photos=n, specimens=_FEW) for n in (1, 2, 3, 4)),
    *(Configuration(f"noun {n}", {"prior.mode": "none"}, noun=n, specimens=4) for n in ("none", "wrong")),
    *(Configuration(f"rank {n}", {"adapter.rank": n}, specimens=_FEW) for n in (1, 4, 64)),
    *(Configuration(f"weight {n:g}", {"prior.weight": n}, specimens=_FEW) for n in (0.5, 2.0)),
    Configuration("text encoder", {"adapter.text_encoder": "true"}, specimens=_FEW),
    Configuration(
        "steps",
        {"optim.steps": 600, "run.checkpoint_every": 50, "run.keep": 0},
        specimens=_FEW,
        at=(50, 100, 200, 300, 600),
    ),
    Configuration(
        "steps, none",
        {"optim.steps": 600, "run.checkpoint_every": 50, "run.keep": 0, "prior.mode": "none"},
        specimens=_FEW,
        at=(50, 100, 200, 300, 600),
    ),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One specimen in one configuration.

    Attributes:
        configuration: how it is learned.
        specimen: index into CLASSES.
    """

    configuration: Configuration
    specimen: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.configuration.name.replace(' ', '-').replace(',', '')}/{CLASSES[self.specimen]}"


def cells(configurations: Sequence[Configuration]) -> list[Cell]:
    """All of them, specimen by specimen; every configuration's are the first of the same ten."""
    found = [Cell(each, index) for each in configurations for index in range(each.specimens)]
    return sorted(found, key=lambda cell: cell.specimen)


def write_photos(work: Path, specimen: int, count: int) -> Path:
    """The specimen's photos, 256 px, upright and bare, in `PLACES`."""
    from PIL import Image

    from lorabooth.pocket.scenes import render, sample_scene, sample_specimen
    from lorabooth.rng import seed_for

    drawn = sample_specimen(
        np.random.default_rng(seed_for(0, 0, 0, "prior preservation", specimen)), CLASSES[specimen]
    )
    folder = work / "photos" / f"{CLASSES[specimen]}-{count}"
    folder.mkdir(parents=True, exist_ok=True)
    for index, place in enumerate(PLACES[:count]):
        rng = np.random.default_rng(seed_for(0, index, 0, "prior preservation photo", specimen))
        scene = sample_scene(rng, drawn, place=place, style="photo", accessory="none", pose="upright")
        if not (folder / f"{index:02d}.png").is_file():
            Image.fromarray(render(scene, 256)).save(folder / f"{index:02d}.png")
    return folder


def write_class_images(work: Path, specimen: int, count: int = 100) -> Path:
    """Other specimens of the class as the world draws them, for prior mode "images"."""
    from PIL import Image

    from lorabooth.pocket.scenes import render, sample_scene
    from lorabooth.rng import seed_for

    folder = work / "class-images" / CLASSES[specimen]
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng = np.random.default_rng(seed_for(0, index, 0, "prior preservation class", specimen))
        scene = sample_scene(
            rng, class_name=CLASSES[specimen], style="photo", accessory="none", pose="upright"
        )
        if not (folder / f"{index:03d}.png").is_file():
            Image.fromarray(render(scene, 64)).save(folder / f"{index:03d}.png")
    return folder


def told_noun(cell: Cell) -> str:
    """The noun that the recipe gives."""
    return {
        "right": CLASSES[cell.specimen],
        "none": "thing",
        "wrong": CLASSES[(cell.specimen + 3) % len(CLASSES)],
    }[cell.configuration.noun]


def run_cell(cell: Cell, work: Path) -> None:
    """Train, draw, and write what it took; whatever is there stays."""
    import torch

    torch.set_num_threads(1)
    os.environ["LORABOOTH_CACHE"] = str(work / "cache")
    place = work / "cells" / cell.name
    if (place / "cell.json").is_file():
        return
    started = time.monotonic()
    adapters = _train(cell, work, place)
    trained_s = time.monotonic() - started
    for name, adapter in adapters.items():
        _draw(place / "images" / name, adapter, TOKEN, told_noun(cell), CLASSES[cell.specimen])
    durable.save(
        place / "cell.json",
        json.dumps({**_took(place / "run"), "trained_s": round(trained_s, 1), "at": list(adapters)}).encode(),
    )


def _train(cell: Cell, work: Path, place: Path) -> dict[str, Path]:
    """Step -> adapter of what is judged."""
    from importlib.resources import as_file, files

    from lorabooth import api
    from lorabooth.recipe import load

    photos = write_photos(work, cell.specimen, cell.configuration.photos)
    settings = {
        "subjects.0.images": str(photos),
        "subjects.0.noun": told_noun(cell),
        "subjects.0.token": TOKEN,
        "run.sample_every": 0,
        "run.sample_count": 0,
        "run.checkpoint_every": 0,
        "run.select": "last",
        **cell.configuration.settings,
    }
    if settings.get("prior.mode") == "images":
        settings["prior.images"] = str(write_class_images(work, cell.specimen))
    with as_file(files("lorabooth.pocket") / "demo") as demo:
        recipe = load(demo / "recipe.toml", [f"{key}={value}" for key, value in settings.items()])
    result = api.train(recipe, out=place / "run")
    if not cell.configuration.at:
        return {str(result.steps): result.adapter}
    folder = place / "run" / "checkpoints"
    return {str(at): folder / f"step-{at:06d}" / "adapter.safetensors" for at in cell.configuration.at}


def draw_base(specimen: int, work: Path) -> None:
    """The same prompts and seeds without an adapter."""
    import torch

    torch.set_num_threads(1)
    _draw(work / "base" / CLASSES[specimen], None, TOKEN, CLASSES[specimen], CLASSES[specimen])


def shots(token: str, noun: str, true_class: str) -> dict[str, list[tuple[str, int]]]:
    """Purpose -> (prompt, seed) pairs; the same ones for every configuration."""
    subject = [p.format(token=token, noun=noun) for p in PROMPTS]
    first = CLASSES.index(true_class)
    others = [CLASSES[(first + shift) % len(CLASSES)] for shift in (1, 4)]
    return {
        "subject": [(prompt, seed) for prompt in subject for seed in SEEDS],
        "class": [(f"a photo of a {true_class}", seed) for seed in CLASS_SEEDS],
        "unrelated": [(p.format(other=o), 0) for o in others for p in UNRELATED],
    }


def _draw(place: Path, adapter: Path | None, token: str, noun: str, true_class: str) -> None:
    import torch

    from lorabooth.evaluation.apply import attach_file
    from lorabooth.evaluation.generate import generate
    from lorabooth.families import registry, source

    wanted = shots(token, noun, true_class)
    flat = [(kind, prompt, seed) for kind, pairs in wanted.items() for prompt, seed in pairs]
    names = [f"{kind}-{index:03d}.png" for index, (kind, _, _) in enumerate(flat)]
    if all((place / name).is_file() for name in names):
        return
    place.mkdir(parents=True, exist_ok=True)
    found = source.resolve("pocket")
    family = registry.family(found.family)
    parts = family.load(found, torch.float32)
    if adapter is not None:
        attach_file(parts.components(), adapter, 1.0)
    defaults = family.defaults_for(parts)
    generate(
        family.pipeline(parts),
        [prompt for _, prompt, _ in flat],
        [seed for _, _, seed in flat],
        steps=defaults.sampler_steps,
        guidance=defaults.guidance,
        batch_size=8,
        on_image=lambda index, image: image.save(place / names[index]),
    )


def _took(run: Path) -> dict[str, Any]:
    """Step time, peak memory and phases of a run."""
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "step_s": statistics.median(line["step_s"] for line in lines[2:]),
        "peak_memory_bytes": facts["peak_memory_bytes"],
        "timings_s": facts["timings_s"],
        "processor": facts["device"],
    }
