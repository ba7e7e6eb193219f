import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorabooth.errors import BaseModelError, RecipeError
from lorabooth.training.prior import ClassImages, SamplerFacts, class_images_key, ensure_class_images

SAMPLER = SamplerFacts("dpm++", steps=2, guidance=3.0, height_px=24, width_px=16)


def noise(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
    """Images that depend on their own seed only, as the contract asks."""
    return [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 16, 3), dtype=np.uint8))
        for seed in seeds
    ]


def ensure(root: Path, count: int, generate=noise, prompt="a photo of a dog", **more) -> ClassImages:
    options = {"sampler": SAMPLER, "base_key": "tiny@abc", "batch_size": 3, **more}
    return ensure_class_images(folder_root=root, prompt=prompt, count=count, generate=generate, **options)


def contents(images: ClassImages) -> list[bytes]:
    return [path.read_bytes() for path in images.paths]


def test_many_images_begin_with_the_few(tmp_path: Path) -> None:
    few = ensure(tmp_path / "a", 4, batch_size=3)
    many = ensure(tmp_path / "b", 10, batch_size=4)
    assert contents(many)[:4] == contents(few)
    assert len(set(contents(many))) == 10
    assert (many.generated, many.reused, many.rejected) == (10, 0, 0)


def test_another_subject_of_the_class_reuses_them(tmp_path: Path) -> None:
    calls = []

    def counting(prompts, seeds):
        calls.append(len(seeds))
        return noise(prompts, seeds)

    first = ensure(tmp_path, 5, counting)
    assert calls == [3, 2]
    second = ensure(tmp_path, 7, counting)
    assert calls == [3, 2, 2]
    assert (second.generated, second.reused) == (2, 5)
    assert ensure(tmp_path, 3, counting).paths == first.paths[:3]
    assert calls == [3, 2, 2]


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "a photo of a cat"},
        {"base_key": "tiny@def"},
        {"sampler": replace(SAMPLER, steps=3)},
        {"sampler": replace(SAMPLER, guidance=3.5)},
        {"sampler": replace(SAMPLER, name="checkpoint")},
        {"sampler": replace(SAMPLER, dtype="bf16")},
    ],
)
def test_whatever_decides_pixels_is_part_of_the_key(tmp_path: Path, other) -> None:
    mine, theirs = ensure(tmp_path, 2), ensure(tmp_path, 2, **other)
    assert theirs.folder != mine.folder
    assert theirs.reused == 0


def test_black_flat_and_broken_ones_are_drawn_again(tmp_path: Path) -> None:
    bad = {0: (0, 0, 0), 2: (200, 30, 90)}
    seen: list[int] = []

    def sometimes_flat(prompts, seeds):
        images = noise(prompts, seeds)
        for place in range(len(seeds)):
            if (order := len(seen)) in bad:
                images[place] = Image.new("RGB", (16, 24), bad[order])
            seen.append(seeds[place])
        return images

    images = ensure(tmp_path, 4, sometimes_flat)
    assert images.rejected == 2
    assert len(set(seen)) == 6  # other seeds for the second attempts
    assert all(np.asarray(Image.open(path)).std() > 20 for path in images.paths)


def test_a_base_that_draws_nothing_is_found_out_soon(tmp_path: Path) -> None:
    drawn = []

    def black(prompts, seeds):
        drawn.extend(seeds)
        return [Image.new("RGB", (16, 24)) for _ in seeds]

    with pytest.raises(BaseModelError, match=r"image 0 .*black or flat 5 times"):
        ensure(tmp_path, 1000, black)
    assert len(drawn) == 5 * 3
    assert not list(tmp_path.rglob("0*.png"))


@pytest.mark.parametrize("damage", ["torn", "empty", "jpeg", "size", "flat"])
def test_damaged_files_are_drawn_again(tmp_path: Path, damage: str) -> None:
    before = ensure(tmp_path, 4)
    whole = contents(before)
    victim = before.paths[2]
    if damage == "torn":
        victim.write_bytes(whole[2][: len(whole[2]) // 2])
    elif damage == "empty":
        victim.write_bytes(b"")
    elif damage == "jpeg":
        Image.open(victim).save(victim, "JPEG")
    else:
        Image.new("RGB", (8, 8) if damage == "size" else (16, 24)).save(victim, "PNG")
    after = ensure(tmp_path, 4)
    assert (after.generated, after.reused) == (1, 3)
    assert contents(after) == whole


def test_facts_are_kept_beside_the_images_without_paths(tmp_path: Path) -> None:
    images = ensure(tmp_path, 1, prompt="a photo of a façade: /night/")
    facts = json.loads((images.folder / "images.json").read_text(encoding="utf-8"))
    assert facts["prompt"] == "a photo of a façade: /night/"
    assert facts["sampler"]["guidance"] == 3.0
    assert facts["key"] == class_images_key(
        base_key="tiny@abc", prompt="a photo of a façade: /night/", sampler=SAMPLER
    )
    assert str(tmp_path) not in json.dumps(facts)
    with Image.open(images.paths[0]) as image:
        assert image.text["prompt"] == "a photo of a façade: /night/"
    assert images.folder.parent == tmp_path


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_prior import ensure, noise

def slow(prompts, seeds):
    time.sleep(0.03)
    return noise(prompts, seeds)

ensure(Path(sys.argv[1]), 400, slow, batch_size=2)
"""


def start_slow_drawing(root: Path) -> subprocess.Popen[bytes]:
    script = KILLED.format(tests=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", script, str(root)], cwd=Path(__file__).parents[2])


def wait_for_pngs(root: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(root.rglob("0*.png"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_drawing_goes_on_where_it_was(tmp_path: Path) -> None:
    process = start_slow_drawing(tmp_path / "killed")
    wait_for_pngs(tmp_path / "killed", 5)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("0*.png")}
    assert 5 <= len(kept) < 400
    count = len(kept) + 3
    after = ensure(tmp_path / "killed", count)
    assert (after.reused, after.generated) == (len(kept), 3)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert contents(after) == contents(ensure(tmp_path / "whole", count))
    assert not list(after.folder.glob(".*.tmp"))


def test_a_second_process_waits_and_reuses(tmp_path: Path) -> None:
    said = []

    class Heard:
        def say(self, message):
            said.append(message)
            os.kill(process.pid, signal.SIGKILL)  # the lock of a killed process is free

        def __getattr__(self, name):
            from lorabooth.progress import Silent

            return getattr(Silent(), name)

    process = start_slow_drawing(tmp_path)
    wait_for_pngs(tmp_path, 3)
    images = ensure(tmp_path, 4, reporter=Heard())
    process.wait(10)
    assert "waiting" in said[0]
    assert images.reused >= 3


def test_two_at_once_draw_each_image_once(tmp_path: Path) -> None:
    drawn: list[int] = []

    def slow(prompts, seeds):
        drawn.extend(seeds)
        time.sleep(0.01)
        return noise(prompts, seeds)

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: ensure(tmp_path, 12, slow), range(2))
    assert len(drawn) == len(set(drawn)) == 12
    assert {one.generated, two.generated} == {0, 12}
    assert contents(one) == contents(two)


def test_unwritable_folder_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RecipeError, match="cannot be kept in"):
        ensure(tmp_path / "file", 1)


def test_real_class_images_of_a_tiny_base(tiny_sd: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from lorabooth.evaluation.generate import generate

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, local_files_only=True)
    sampler = SamplerFacts("dpm++", steps=2, guidance=3.0, height_px=32, width_px=32)

    def draw(prompts, seeds):
        return generate(
            pipeline, prompts, seeds, steps=2, guidance=3.0, height_px=32, width_px=32, batch_size=2
        )

    images = ensure(tmp_path, 3, draw, sampler=sampler)
    assert len({path.read_bytes() for path in images.paths}) == 3
    assert all(Image.open(path).size == (32, 32) for path in images.paths)
