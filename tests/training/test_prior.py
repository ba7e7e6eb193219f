import errno
import json
import os
import shutil
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

from lorabooth.errors import BaseModelError, RecipeError, TrainingError
from lorabooth.training.prior import ClassImages, Drawn, SamplerFacts, class_images_key, ensure_class_images

SAMPLER = SamplerFacts("dpm++", steps=2, guidance=3.0, height_px=24, width_px=16, group=3)


def noise(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
    """Images that depend on their own seed only, as the contract asks."""
    return [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 16, 3), dtype=np.uint8))
        for seed in seeds
    ]


def mixing(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
    """What batched arithmetic does to the last bits, made large: all of a batch is in each image."""
    return noise(prompts, [hash((seed, *seeds)) % 2**63 for seed in seeds])


def ensure(root: Path, count: int, generate=noise, prompt="a photo of a dog", **more) -> ClassImages:
    options = {"sampler": SAMPLER, "base_key": "tiny@abc", **more}

    def drawn(prompts: Sequence[str], seeds: Sequence[int]) -> list[Drawn]:
        made = generate(prompts, seeds)
        return [one if isinstance(one, Drawn) else Drawn(one) for one in made]

    return ensure_class_images(folder_root=root, prompt=prompt, count=count, generate=drawn, **options)


def contents(images: ClassImages) -> list[bytes]:
    return [path.read_bytes() for path in images.paths]


def test_many_images_begin_with_the_few(tmp_path: Path) -> None:
    few = ensure(tmp_path / "a", 4, mixing)
    many = ensure(tmp_path / "b", 10, mixing)
    assert contents(many)[:4] == contents(few)
    assert len(set(contents(many))) == 10
    assert (many.generated, many.reused, many.rejected) == (10, 0, 0)
    assert contents(ensure(tmp_path / "a", 10, mixing)) == contents(many)
    assert len(list(few.folder.glob("*.png"))) == 10  # the rest of the last group is not kept


@pytest.mark.parametrize("missing", [[0], [4], [9], [2, 3], [0, 4, 8], list(range(10))])
def test_an_image_is_the_same_bytes_whichever_were_missing(tmp_path: Path, missing: list[int]) -> None:
    whole = contents(ensure(tmp_path, 10, mixing))
    for index in missing:
        next(tmp_path.rglob(f"{index:06d}.png")).unlink()
    others = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    after = ensure(tmp_path, 10, mixing)
    assert (after.generated, after.reused) == (len(missing), 10 - len(missing))
    assert contents(after) == whole
    assert all(path.stat().st_mtime_ns == when for path, when in others.items())


def test_groups_are_aligned_and_flat_images_are_drawn_again_alone(tmp_path: Path) -> None:
    calls: list[int] = []

    def flat_in_groups(prompts, seeds):
        calls.append(len(seeds))
        images = mixing(prompts, seeds)
        return [images[0], Image.new("RGB", (16, 24)), *images[2:]] if len(seeds) == 3 else images

    whole = ensure(tmp_path, 6, flat_in_groups)
    assert calls == [3, 1, 3, 1]
    assert whole.rejected == 2
    before = contents(whole)
    whole.paths[4].unlink()
    again = ensure(tmp_path, 6, flat_in_groups)
    assert calls[4:] == [3, 1]
    assert contents(again) == before


def test_another_subject_of_the_class_reuses_them(tmp_path: Path) -> None:
    calls = []

    def counting(prompts, seeds):
        calls.append(len(seeds))
        return noise(prompts, seeds)

    first = ensure(tmp_path, 5, counting)
    assert calls == [3, 3]
    second = ensure(tmp_path, 7, counting)
    assert calls == [3, 3, 3, 3]
    assert (second.generated, second.reused) == (2, 5)
    assert ensure(tmp_path, 3, counting).paths == first.paths[:3]
    assert calls == [3, 3, 3, 3]


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "a photo of a cat"},
        {"base_key": "tiny@def"},
        {"sampler": replace(SAMPLER, steps=3)},
        {"sampler": replace(SAMPLER, guidance=3.5)},
        {"sampler": replace(SAMPLER, name="checkpoint")},
        {"sampler": replace(SAMPLER, dtype="bf16")},
        {"sampler": replace(SAMPLER, group=2)},
        {"sampler": replace(SAMPLER, guidance_interval=(0.3, 5.0))},
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
    assert len(set(seen)) == 3 + 1 + 3 + 1  # other seeds for the second attempts
    assert all(np.asarray(Image.open(path)).std() > 20 for path in images.paths)


def test_a_base_that_draws_nothing_is_found_out_soon(tmp_path: Path) -> None:
    drawn = []

    def black(prompts, seeds):
        drawn.extend(seeds)
        return [Image.new("RGB", (16, 24)) for _ in seeds]

    with pytest.raises(BaseModelError, match=r"image 0 .*black or flat 5 times"):
        ensure(tmp_path, 1000, black)
    assert len(drawn) == 3 + 4
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
from test_prior import ensure, mixing

def slow(prompts, seeds):
    time.sleep(0.03)
    return mixing(prompts, seeds)

ensure(Path(sys.argv[1]), 400, slow)
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
    after = ensure(tmp_path / "killed", count, mixing)
    assert (after.reused, after.generated) == (len(kept), 3)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert contents(after) == contents(ensure(tmp_path / "whole", count, mixing))
    assert not list(after.folder.glob(".*.tmp"))


DIES = """
import os, random, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_prior import ensure, mixing

# Odd: a file is written and not yet renamed; even: its folder is not yet synced.
number, fsync, count = random.Random(int(sys.argv[2])).randrange(5, 14), os.fsync, 0

def dying(descriptor):
    global count
    count += 1
    if count == number:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)

os.fsync = dying
ensure(Path(sys.argv[1]), 40, mixing)
"""


def test_killed_again_and_again_at_random_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    kept = 0
    for round_ in range(4):
        script = DIES.format(tests=str(Path(__file__).parent))
        arguments = [sys.executable, "-c", script, str(tmp_path / "killed"), str(round_)]
        done = subprocess.run(arguments, cwd=Path(__file__).parents[2], check=False)
        assert done.returncode == -signal.SIGKILL
        now = len(list((tmp_path / "killed").rglob("0*.png")))
        assert kept < now < 40
        kept = now
    after = ensure(tmp_path / "killed", 40, mixing)
    whole = ensure(tmp_path / "whole", 40, mixing)
    assert after.reused == kept
    assert {p.name: p.read_bytes() for p in after.folder.iterdir()} == {
        p.name: p.read_bytes() for p in whole.folder.iterdir()
    }


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


def test_a_full_disk_says_what_to_free_and_leaves_nothing_torn(tmp_path: Path, monkeypatch) -> None:
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 6:  # images.json and two images are written
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match="No space left") as caught:
        ensure(tmp_path, 5, mixing)
    assert caught.value.exit_code == 7
    assert str(tmp_path) in caught.value.fix
    monkeypatch.setattr(os, "fsync", fsync)
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["000000.png", "000001.png", "images.json"]
    after = ensure(tmp_path, 5, mixing)
    assert (after.generated, after.reused) == (3, 2)
    assert contents(after) == contents(ensure(tmp_path / "whole", 5, mixing))


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 32 KiB, where this is allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_real_disk_that_fills_up_keeps_whole_images_only(small_disk: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="No space left"):
        ensure(small_disk, 40, mixing)
    kept = [path.name for path in sorted(small_disk.glob("*/*")) if path.name != "images.json"]
    assert kept == [f"{index:06d}.png" for index in range(len(kept))]
    assert 3 <= len(kept) < 40
    found = ensure(small_disk, len(kept))  # nothing to write, though the disk is full
    assert (found.generated, found.reused) == (0, len(kept))
    assert contents(found) == contents(ensure(tmp_path / "whole", len(kept), mixing))


def test_real_class_images_of_a_tiny_base(tiny_sd: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from lorabooth.evaluation.generate import generate

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, local_files_only=True)
    sampler = SamplerFacts("dpm++", steps=2, guidance=3.0, height_px=32, width_px=32, group=4)

    def draw(prompts, seeds):
        return generate(
            pipeline, prompts, seeds, steps=2, guidance=3.0, height_px=32, width_px=32, batch_size=4
        )

    images = ensure(tmp_path, 3, draw, sampler=sampler)
    whole = contents(images)
    images.paths[1].unlink()
    assert contents(ensure(tmp_path, 3, draw, sampler=sampler)) == whole
    assert len({path.read_bytes() for path in images.paths}) == 3
    assert all(Image.open(path).size == (32, 32) for path in images.paths)
