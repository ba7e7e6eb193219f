from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorabooth.errors import RecipeError
from lorabooth.pocket.dataset import is_held_out, scene_at
from lorabooth.pocket.photos import PLACES, demo_specimen
from lorabooth.pocket.world import CLASSES, LIVE_CLASSES, sample_scene
from lorabooth.protocol import pocketbench
from lorabooth.protocol.prompts import POCKET_APPLICATIONS


def test_ten_specimens_live_and_not_always_the_same() -> None:
    first, second = pocketbench.bench_subjects(), pocketbench.bench_subjects()
    assert first == second
    assert len(first) >= 10
    assert len({one.specimen for one in first}) == len(first)
    assert {one.live for one in first} == {True, False}
    assert all(one.live == (one.specimen.class_name in LIVE_CLASSES) for one in first)
    assert {one.specimen.class_name for one in first} <= set(CLASSES)
    quick = pocketbench.bench_subjects(quick=True)
    assert quick == first[: len(quick)]
    assert {one.live for one in quick} == {True, False}


def test_nobody_has_seen_them() -> None:
    subjects = pocketbench.bench_subjects()
    assert demo_specimen() not in [one.specimen for one in subjects]
    # Of the streams that the base trains on, the beginning: the rest is other draws of the same kind.
    trained = {scene_at(0, purpose, i).specimen for purpose in ("train", "held-out") for i in range(300)}
    assert not trained & {one.specimen for one in subjects}
    for one in subjects:
        places = pocketbench.new_places(one.specimen)
        assert places
        assert not set(places) & set(PLACES)
        for place in places:
            assert is_held_out(sample_scene(np.random.default_rng(0), one.specimen, place=place))


def test_photos_are_taken_as_the_demos_are(tmp_path: Path) -> None:
    subject = pocketbench.bench_subjects()[1]
    scenes = pocketbench.photo_scenes(subject)
    assert [s.place for s in scenes] == list(PLACES)
    assert {(s.style, s.accessory, s.pose) for s in scenes} == {("photo", "none", "upright")}
    assert len({(s.scale, s.light) for s in scenes}) == len(scenes)
    pocketbench.write_photos(tmp_path, [subject])
    folder = tmp_path / subject.name
    paths = sorted(folder.glob("*.png"))
    assert [Image.open(path).size for path in paths] == [(256, 256)] * 5
    assert (folder / "class.txt").read_text() == "cat, live\n"
    before = {path: path.stat().st_mtime_ns for path in paths}
    pocketbench.write_photos(tmp_path, [subject])
    assert {path: path.stat().st_mtime_ns for path in paths} == before


def test_the_prompts_are_of_every_application() -> None:
    for quick in (True, False):
        templates = pocketbench.bench_templates(quick=quick)
        assert all(set(group) & set(templates) for group in POCKET_APPLICATIONS.values())
    assert len(pocketbench.bench_templates(quick=True)) < len(pocketbench.bench_templates())


def test_the_recipe_is_the_demos_without_previews() -> None:
    whole, quick = pocketbench.bench_recipe(), pocketbench.bench_recipe(quick=True)
    assert (whole.run.sample_count, whole.run.sample_every) == (0, 0)
    assert whole.prior.mode == "generated"
    assert int(quick.optim.steps) < int(whole.optim.steps)
    assert quick.prior.count < whole.prior.count
    assert pocketbench.bench_recipe(overrides=["optim.steps=7"]).optim.steps == 7


def test_a_quick_job(tmp_path: Path) -> None:
    job = pocketbench.bench_job(tmp_path / "bench", quick=True)
    assert [one.subject.name for one in job.todo] == sorted(pocketbench.CLASSES[: len(job.todo)])
    assert {one.templates for one in job.asked} == {pocketbench.bench_templates(quick=True)}
    assert job.settings.images_per_prompt == 2
    assert job.recipe_for(job.todo[0].subject).subjects[0].noun == job.todo[0].subject.noun


def test_a_folder_that_holds_something_else_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="holds no protocol"):
        pocketbench.bench_job(tmp_path, quick=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
