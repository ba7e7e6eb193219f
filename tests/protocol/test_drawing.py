from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorabooth.errors import RecipeError
from lorabooth.protocol.drawing import Pace, Shot, drawn, image_path, missing, shots_of

HOW: dict[str, Any] = {"steps": 1, "guidance": 2.0, "side_px": 64, "facts": {"base": "pocket", "adapter": ""}}
SHOTS = shots_of([("a photo of a mug", None), ("a photo of a qzx cat", "a photo of a cat")], range(2))


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from lorabooth.families import registry, source

    found = source.resolve("pocket")
    family = registry.family(found.family)
    return family.pipeline(family.load(found, torch.float32))


@pytest.fixture(scope="module")
def album(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("album") / "images"
    drawn(pipeline, SHOTS, place, **HOW)
    return place


def files(place: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in place.iterdir()}


def test_every_prompt_has_every_seed_and_its_caption() -> None:
    assert [(shot.prompt[-3:], shot.seed, shot.caption) for shot in SHOTS] == [
        ("mug", 0, None),
        ("mug", 1, None),
        ("cat", 0, "a photo of a cat"),
        ("cat", 1, "a photo of a cat"),
    ]


def test_an_image_that_is_there_is_read_and_needs_no_pipeline(album: Path) -> None:
    before = files(album)
    assert len(before) == len(SHOTS)
    found = drawn(None, SHOTS, album, **HOW)
    assert files(album) == before
    assert [(one.prompt, one.seed, one.caption) for one in found] == [
        (shot.prompt, shot.seed, shot.caption) for shot in SHOTS
    ]
    assert found[0].image.size == (64, 64)
    assert not np.array_equal(found[0].image, found[1].image)


@pytest.mark.parametrize(
    "change",
    [{"steps": 2}, {"guidance": 3.0}, {"side_px": 32}, {"facts": {"base": "pocket", "adapter": "another"}}],
)
def test_what_decides_an_image_makes_it_another_one(album: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="4 images are missing"):
        drawn(None, SHOTS, album, **{**HOW, **change})


def test_a_torn_image_and_one_that_tells_something_else_are_drawn_again(
    pipeline: Any, album: Path, tmp_path: Path
) -> None:
    place = tmp_path / "images"
    place.mkdir()
    for path in album.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    torn, swapped, *_ = sorted(place.iterdir())
    whole = torn.read_bytes(), swapped.read_bytes()
    torn.write_bytes(whole[0][:60])
    swapped.write_bytes(whole[0])
    before = files(place)
    counted: list[int] = []
    drawn(pipeline, SHOTS, place, **HOW, on_image=lambda: counted.append(1))
    after = files(place)
    assert len(counted) == 2
    assert {name for name in after if after[name] != before[name]} == {torn.name, swapped.name}
    assert (torn.read_bytes(), swapped.read_bytes()) == whole


def test_an_interruption_leaves_whole_images_and_the_rest_is_drawn_later(
    pipeline: Any, album: Path, tmp_path: Path
) -> None:
    counted: list[int] = []

    def stop_after_the_first() -> None:
        counted.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drawn(pipeline, SHOTS, tmp_path, **HOW, on_image=stop_after_the_first)
    assert len(files(tmp_path)) == 1
    assert len(missing(SHOTS, tmp_path, {**HOW["facts"], **sampler_facts()})) == len(SHOTS) - 1
    drawn(pipeline, SHOTS, tmp_path, **HOW, on_image=lambda: counted.append(1))
    assert len(counted) == len(SHOTS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in album.iterdir()
    }


def sampler_facts() -> dict[str, str]:
    from lorabooth.protocol.drawing import Sampler

    return Sampler(HOW["steps"], HOW["guidance"], HOW["side_px"]).facts()


def test_prompts_that_look_alike_in_a_file_name_are_two_files(tmp_path: Path) -> None:
    names = {image_path(tmp_path, Shot(prompt, 0), {}) for prompt in ("a mug!", "a mug?", "A mug")}
    assert len(names) == 3
    assert all(name.parent == tmp_path for name in names)


def test_a_folder_that_cannot_be_made_is_one_message(pipeline: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written"):
        drawn(pipeline, SHOTS, tmp_path / "file" / "images", **HOW)


def test_the_cost_is_told_after_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((10.0, 14.0))
    monkeypatch.setattr("lorabooth.protocol.drawing.time.perf_counter", lambda: next(clock))
    said: list[str] = []

    class Listener:
        def advance(self, count: int = 1, **fields: str) -> None:
            said.append("one")

        def say(self, message: str) -> None:
            said.append(message)

    pace = Pace(62, 2, Listener(), Listener())  # type: ignore[arg-type]
    for _ in range(3):
        pace()
    assert said == ["one", "one", "2.00 s an image: about 2 min for the other 60", "one"]
    assert pace.done == 3
