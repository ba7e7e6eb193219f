"""The protocol in the pocket world: specimens that nobody has seen, photos of them, the demo's recipe.

Held out means three things here.
- A specimen is a continuous draw (six proportions, exact colours, pattern, mark), made in a stream of its own
  name: no specimen that the base or the subject encoder was trained on is among them, nor the demo's mug.
- Its caption tells it from no other: the base knows red striped mugs, and must learn this one from photos.
- In at least one place that the prompts ask for and the photos do not show, the base has never seen its class
  in its colour and pattern at all (`dataset.is_held_out`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock

from lorabooth import durable
from lorabooth.pocket.dataset import is_held_out
from lorabooth.pocket.photos import PLACES, SIDE_PX
from lorabooth.pocket.world import LIVE_CLASSES, Scene, Specimen, sample_scene, sample_specimen
from lorabooth.pocket.world import PLACES as WORLD_PLACES
from lorabooth.protocol.prompts import POCKET_APPLICATIONS
from lorabooth.protocol.subjects import CLASS_FILE
from lorabooth.recipe import Recipe, load
from lorabooth.rng import seed_for

if TYPE_CHECKING:
    from lorabooth.protocol.jobs import Job

CLASSES = ("mug", "cat", "boot", "duck", "car", "fish", "robot", "vase", "clock", "ball")
"""A specimen of each, live ones among them; a quick bench takes the first four."""
QUICK_SPECIMENS = 4
QUICK_COUNTS = {"images_per_prompt": 2, "class_images": 8, "unrelated_images": 1}
QUICK_SETTINGS = ("optim.steps=120", "prior.count=24", "run.checkpoint_every=60")
"""Too few steps to learn a specimen well: enough to see that all of it works, and which way it goes."""
PHOTOS = "photos"
_STREAM = "pocketbench"


@dataclass(frozen=True, slots=True)
class BenchSubject:
    """One specimen of the bench.

    Attributes:
        name: of its folder, and its class.
        specimen: what is learned.
        live: whether it lives.
    """

    name: str
    specimen: Specimen
    live: bool


def bench_subjects(*, quick: bool = False) -> tuple[BenchSubject, ...]:
    """The specimens, always the same."""
    names = CLASSES[:QUICK_SPECIMENS] if quick else CLASSES
    return tuple(BenchSubject(name, _specimen(name), name in LIVE_CLASSES) for name in names)


def new_places(specimen: Specimen) -> tuple[str, ...]:
    """Places without a photo in which the base has never seen this class in this colour and pattern."""
    asked = " ".join(POCKET_APPLICATIONS["recontextualisation"])
    scenes = _scenes(specimen, [place for place, words in WORLD_PLACES.items() if words in asked])
    return tuple(s.place for s in scenes if s.place not in PLACES and is_held_out(s))


def photo_scenes(subject: BenchSubject) -> list[Scene]:
    """What its photos show: as the demo's, it stands upright and bare in five places."""
    return _scenes(subject.specimen, PLACES, subject.name)


def write_photos(root: Path, subjects: Sequence[BenchSubject]) -> None:
    """A folder of photos and a class.txt for each specimen; those that are there are left.

    Raises:
        RecipeError, TrainingError: they cannot be written.
    """
    from PIL import Image

    from lorabooth.pocket.scenes import render

    with durable.user_errors(root):
        durable.make_folder(root)
        for subject in subjects:
            if (root / subject.name).is_dir():
                continue
            with durable.staged(root / subject.name) as folder:
                folder.mkdir()
                for number, scene in enumerate(photo_scenes(subject), start=1):
                    buffer = io.BytesIO()
                    Image.fromarray(render(scene, SIDE_PX)).save(buffer, "PNG", optimize=True)
                    (folder / f"{number:02d}.png").write_bytes(buffer.getvalue())
                kind = "live" if subject.live else "object"
                (folder / CLASS_FILE).write_text(f"{subject.name}, {kind}\n", encoding="utf-8")


def bench_recipe(*, quick: bool = False, overrides: Sequence[str] = ()) -> Recipe:
    """The demo's recipe without its previews; the last checkpoint is the result, as in the paper.

    Args:
        quick: fewer steps and class images.
        overrides: further keys, as for --set.
    """
    changes = [
        "run.sample_every=0",
        "run.sample_count=0",
        "run.select=last",
        *(QUICK_SETTINGS if quick else ()),
        *overrides,
    ]
    with as_file(files("lorabooth.pocket") / "demo" / "recipe.toml") as path:
        return load(path, changes)


def bench_templates(*, quick: bool = False) -> tuple[str, ...]:
    """The prompts: all of the pocket world's, or one of each of the paper's applications."""
    groups = POCKET_APPLICATIONS.values()
    return tuple(template for group in groups for template in (group[:1] if quick else group))


def bench_job(out: Path, *, quick: bool = False, overrides: Sequence[str] = (), device: str = "auto") -> Job:
    """The protocol over the bench's specimens; their photos are written into OUT/photos.

    Args:
        out: folder of the bench.
        quick: four specimens, few prompts, few steps.
        overrides: recipe keys that differ, as for --set.
        device: of the images and the measuring.

    Raises:
        LoraboothError: see `jobs.make_job`.
    """
    from lorabooth.protocol.jobs import Settings, make_job, require_free

    subjects = bench_subjects(quick=quick)
    recipe = bench_recipe(quick=quick, overrides=overrides)
    require_free(out)
    with durable.user_errors(out):
        durable.make_folder(out / ".protocol")
    # Several processes of a launcher come here at once.
    with FileLock(out / ".protocol" / "photos.lock"):
        write_photos(out / PHOTOS, subjects)
    settings = Settings(
        **(QUICK_COUNTS if quick else {}),
        device=device,
        title="pocketbench, quick" if quick else "pocketbench",
    )
    return make_job(
        out / PHOTOS,
        recipe,
        out,
        settings=settings,
        only=[subject.name for subject in subjects],
        templates=bench_templates(quick=quick),
    )


def _specimen(class_name: str) -> Specimen:
    """The first of the class's stream with a place that is new to the base."""
    index = 0
    while True:
        rng = np.random.default_rng(seed_for(0, 0, 0, f"{_STREAM}/{class_name}", index))
        specimen = sample_specimen(rng, class_name)
        if new_places(specimen):
            return specimen
        index += 1


def _scenes(specimen: Specimen, places: Sequence[str], name: str = "") -> list[Scene]:
    found = []
    for index, place in enumerate(places):
        rng = np.random.default_rng(seed_for(0, 0, 0, f"{_STREAM}/photo/{name}", index))
        found.append(
            sample_scene(rng, specimen, place=place, style="photo", accessory="none", pose="upright")
        )
    return found
