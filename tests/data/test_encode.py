from __future__ import annotations

import gc
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from lorabooth.data.cache import Store
from lorabooth.data.encode import LatentIndex, cache_latents, cache_texts
from lorabooth.data.photo import PhotoError
from lorabooth.errors import TrainingError
from lorabooth.recipe import ImagesSection
from lorabooth.types import Cond, Moments, Record, Role


class Encoder:
    """A real, tiny VAE that counts what it is given."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.vae = AutoencoderKL(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ).eval()
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, pixels: Tensor) -> list[Moments]:
        self.shapes.append(tuple(pixels.shape))
        posterior = self.vae.encode(pixels).latent_dist
        return [Moments(mean, std) for mean, std in zip(posterior.mean, posterior.std, strict=True)]


def make(folder: Path, count: int = 3, sizes: Sequence[tuple[int, int]] = ((40, 32),)) -> list[Record]:
    folder.mkdir(exist_ok=True)
    found = []
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        found.append(Record(folder / f"{number}.png", f"photo {number}", Role.INSTANCE, "dog"))
    return found


def run(
    tmp_path: Path,
    records: Sequence[Record],
    encode: object = None,
    *,
    images: ImagesSection = ImagesSection(),  # noqa: B008 - frozen
    encoder_id: str = "vae",
    seed: int = 0,
    resolution_px: int = 32,
) -> LatentIndex:
    return cache_latents(
        Store(tmp_path / "cache"),
        records,
        encode=encode or Encoder(),  # type: ignore[arg-type]
        encoder_id=encoder_id,
        images=images,
        resolution_px=resolution_px,
        multiple_px=8,
        seed=seed,
    )


def counts(index: LatentIndex) -> tuple[int, int]:
    return index.computed, index.reused


def test_the_second_run_computes_nothing_and_is_the_same(tmp_path: Path) -> None:
    records = make(tmp_path / "dog")
    first = run(tmp_path, records)
    encoder = Encoder()
    second = run(tmp_path, records, encoder)
    assert counts(first) == (3, 0)
    assert counts(second) == (0, 3)
    assert encoder.shapes == []
    for record in records:
        one, two = first.of(record, 0), second.of(record, 0)
        assert torch.equal(one.moments.mean, two.moments.mean)
        assert torch.equal(one.moments.std, two.moments.std)
        assert one.geometry == two.geometry
    assert one.moments.mean.shape == (4, 16, 16)
    assert one.moments.mean.dtype == torch.float32
    assert not one.moments.mean.requires_grad


def test_what_changed_is_computed_and_only_that(tmp_path: Path) -> None:
    records = make(tmp_path / "dog")
    run(tmp_path, records)
    assert counts(run(tmp_path, records, encoder_id="vae 2")) == (3, 0)
    assert counts(run(tmp_path, records, resolution_px=24)) == (3, 0)
    assert counts(run(tmp_path, records, images=ImagesSection(flip=True))) == (3, 3)
    assert counts(run(tmp_path, records, images=ImagesSection(crop="random"))) == (12, 0)
    assert counts(run(tmp_path, records, images=ImagesSection(crop="random"), seed=1)) == (12, 0)
    assert counts(run(tmp_path, records, seed=1)) == (0, 3)
    recaptioned = [Record(r.path, "another caption", r.role, r.subject) for r in records]
    assert counts(run(tmp_path, recaptioned)) == (0, 3)

    before = run(tmp_path, records).of(records[1], 0).moments.mean
    Image.fromarray(np.zeros((40, 32, 3), np.uint8)).save(records[1].path)  # other bytes, same name
    changed = run(tmp_path, records)
    assert counts(changed) == (1, 2)
    assert not torch.equal(changed.of(records[1], 0).moments.mean, before)

    moved = records[0].path.rename(tmp_path / "dog" / "renamed.png")
    renamed = [Record(moved, "x", Role.CLASS, "dog"), *records[1:]]
    assert counts(run(tmp_path, renamed)) == (0, 3)


def test_every_photo_gets_its_own_latent_whatever_comes_beside_it(tmp_path: Path) -> None:
    records = make(tmp_path / "dog", 7, sizes=((32, 32), (32, 64), (64, 32), (32, 32)))
    images = ImagesSection(buckets=True, flip=True)
    encoder = Encoder()
    together = run(tmp_path / "a", records, encoder, images=images)
    assert len({shape[1:] for shape in encoder.shapes}) == 3
    assert all(shape[0] == 1 for shape in encoder.shapes)
    for record in records:
        alone = run(tmp_path / "b", [record], images=images)
        assert len(together.latents[record.path]) == 2
        for variant in (0, 1):
            one, two = together.of(record, variant), alone.of(record, variant)
            assert one.geometry == two.geometry
            assert one.geometry.flipped is bool(variant)
            assert torch.equal(one.moments.mean, two.moments.mean)
            assert torch.equal(one.moments.std, two.moments.std)


def mixing(pixels: Tensor) -> list[Moments]:
    """What batched arithmetic does to the last bits, made large: all of a batch is in each result."""
    mixed = pixels + pixels.mean()
    return [Moments(each, each.abs()) for each in mixed]


def mixing_text(prompts: Sequence[str]) -> list[Cond]:
    return [{"tokens": torch.full((4,), float(len(prompt) + 100 * len(prompts)))} for prompt in prompts]


def entries(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((tmp_path / "cache").rglob("*.safetensors"))}


@pytest.mark.parametrize("missing", [1, 3, 5, 9])
@pytest.mark.parametrize("encode", [mixing, None])
def test_an_entry_is_the_same_bytes_however_many_were_missing(
    tmp_path: Path, missing: int, encode: object
) -> None:
    records = make(tmp_path / "dog", 9)
    run(tmp_path, records, encode)
    whole = entries(tmp_path)
    for name in list(whole)[:missing]:
        next((tmp_path / "cache").rglob(name)).unlink()
    assert counts(run(tmp_path, records, encode)) == (missing, 9 - missing)
    assert entries(tmp_path) == whole


@pytest.mark.parametrize("missing", [1, 3, 20])
def test_a_prompt_is_the_same_bytes_however_many_were_missing(tmp_path: Path, missing: int) -> None:
    prompts = [f"{'very ' * number}good" for number in range(20)]
    store = Store(tmp_path / "cache")
    cache_texts(store, prompts, encode=mixing_text, encoder_id="clip")
    whole = entries(tmp_path)
    for name in list(whole)[:missing]:
        next((tmp_path / "cache").rglob(name)).unlink()
    cache_texts(store, prompts, encode=mixing_text, encoder_id="clip")
    assert len(whole) == 20
    assert entries(tmp_path) == whole


KILLED = """
import os, signal, sys
from pathlib import Path
from lorabooth import durable
from tests.data.test_encode import entries, make, mixing, run

tmp_path, moment, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
seen = 0

def kill_at(place):
    global seen
    seen += place == moment
    if seen == number:
        os.kill(os.getpid(), signal.SIGKILL)

def encode(pixels):
    kill_at("encoding")
    return mixing(pixels)

fsync = os.fsync

def half_written(descriptor):
    kill_at("writing")
    fsync(descriptor)

os.fsync = half_written
run(tmp_path, make(tmp_path / "dog", 9), encode)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize("moment", [pytest.param("encoding", marks=pytest.mark.slow), "writing"])
def test_killed_while_caching_and_resumed_is_uninterrupted(tmp_path: Path, moment: str) -> None:
    records = make(tmp_path / "dog", 9)
    before = 0
    for number in (2, 5):  # killed, and killed again
        script = [sys.executable, "-c", KILLED, str(tmp_path), moment, str(number)]
        root = Path(__file__).parents[2]
        assert subprocess.run(script, cwd=root, check=False).returncode == -signal.SIGKILL
        assert before < len(entries(tmp_path)) < 9
        before = len(entries(tmp_path))
    assert bool(list((tmp_path / "cache").rglob(".*.tmp"))) is (moment == "writing")
    resumed = run(tmp_path, records, mixing)
    assert counts(resumed) == (9 - before, before)
    whole = run(tmp_path / "other", records, mixing)
    assert entries(tmp_path) == entries(tmp_path / "other")
    for record in records:
        assert torch.equal(resumed.of(record, 0).moments.mean, whole.of(record, 0).moments.mean)


def test_random_crops_depend_on_seed_photo_and_variant_only(tmp_path: Path) -> None:
    records = make(tmp_path / "dog", 2, sizes=((32, 96),))
    images = ImagesSection(crop="random")

    def crops(index: LatentIndex, record: Record) -> list[tuple[int, int]]:
        return [cut.geometry.crop_px for cut in index.latents[record.path]]

    one = run(tmp_path / "a", records, images=images)
    two = run(tmp_path / "b", records[::-1], images=images)
    other = run(tmp_path / "c", records, images=images, seed=1)
    assert [crops(one, r) for r in records] == [crops(two, r) for r in records]
    assert [crops(one, r) for r in records] != [crops(other, r) for r in records]
    assert crops(one, records[0]) != crops(one, records[1])
    assert len(set(crops(one, records[0]))) > 1


def test_a_flipped_variant_is_the_same_crop_mirrored(tmp_path: Path) -> None:
    records = make(tmp_path / "dog", 1, sizes=((32, 96),))
    seen: list[Tensor] = []

    def encode(pixels: Tensor) -> list[Moments]:
        seen.extend(pixels.clone())
        return [Moments(each[:1], each[:1].abs()) for each in pixels]

    run(tmp_path, records, encode, images=ImagesSection(crop="random", flip=True))
    assert len(seen) == 8
    assert all(torch.equal(seen[i].flip(-1), seen[i + 1]) for i in range(0, 8, 2))


def test_a_torn_entry_is_computed_again(tmp_path: Path) -> None:
    records = make(tmp_path / "dog")
    run(tmp_path, records)
    torn = sorted((tmp_path / "cache").rglob("*.safetensors"))[0]
    torn.write_bytes(torn.read_bytes()[:50])
    assert counts(run(tmp_path, records)) == (1, 2)
    assert counts(run(tmp_path, records)) == (0, 3)


def test_an_interrupted_run_keeps_what_it_had(tmp_path: Path) -> None:
    records = make(tmp_path / "dog", 5)
    encoder = Encoder()

    def failing(pixels: Tensor) -> list[Moments]:
        if len(encoder.shapes) == 2:
            raise KeyboardInterrupt
        return encoder(pixels)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, records, failing)
    assert counts(run(tmp_path, records)) == (3, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_name_the_photo_and_are_not_kept(tmp_path: Path, bad: float) -> None:
    records = make(tmp_path / "dog", 3)
    seen: list[Tensor] = []

    def encode(pixels: Tensor) -> list[Moments]:
        seen.extend(pixels)
        good = [Moments(each.clone(), each.abs()) for each in pixels]
        if len(seen) == 2:
            good[0].mean[0, 0, 0] = bad
        return good

    with pytest.raises(TrainingError) as caught:
        run(tmp_path, records, encode)
    assert "1.png" in str(caught.value)
    assert "0.png" not in str(caught.value)
    assert len(entries(tmp_path)) == 1  # the good one before it
    assert counts(run(tmp_path, records)) == (2, 1)


def test_a_photo_that_went_bad_is_named(tmp_path: Path) -> None:
    records = make(tmp_path / "dog")
    records[2].path.write_text("no photo any more")
    with pytest.raises(PhotoError, match=r"2\.png"):
        run(tmp_path, records)


def test_the_same_path_twice_is_encoded_once(tmp_path: Path) -> None:
    records = make(tmp_path / "dog")
    as_class = [Record(r.path, "a dog", Role.CLASS, "dog") for r in records]
    index = run(tmp_path, [*records, *as_class])
    assert counts(index) == (3, 0)
    assert index.of(as_class[0], 0) is index.of(records[0], 0)


def test_joined_indexes_hold_both(tmp_path: Path) -> None:
    dogs, cats = make(tmp_path / "dog"), make(tmp_path / "cat", 4, sizes=((50, 50),))
    flipped = run(tmp_path, dogs, images=ImagesSection(flip=True))
    both = flipped.joined(run(tmp_path, [*cats, *dogs]))
    assert {record.path for record in (*dogs, *cats)} == set(both.latents)
    assert len(both.latents[dogs[0].path]) == 2
    assert counts(both) == (10, 3)


def test_no_memory_of_the_encoder_is_kept(tmp_path: Path) -> None:
    records = make(tmp_path / "dog", 2)
    outputs: list[weakref.ref[Tensor]] = []

    def once() -> tuple[LatentIndex, weakref.ref[Encoder]]:
        encoder = Encoder()

        def encode(pixels: Tensor) -> list[Moments]:
            stacked = torch.stack([each.mean for each in encoder(pixels)])
            outputs.append(weakref.ref(stacked))
            return [Moments(each, each.abs()) for each in stacked]  # views of one batch

        return run(tmp_path, records, encode), weakref.ref(encoder)

    index, watched = once()
    gc.collect()
    assert watched() is None
    assert outputs[0]() is None
    mean = index.of(records[0], 0).moments.mean
    assert mean.untyped_storage().nbytes() == mean.numel() * 4


def encode_text(prompts: Sequence[str]) -> list[Cond]:
    block = torch.stack([torch.full((5, 3), float(len(prompt))) for prompt in prompts])
    return [{"tokens": each} for each in block]


def test_prompts_are_encoded_once_each(tmp_path: Path) -> None:
    seen: list[str] = []

    def encode(prompts: Sequence[str]) -> list[Cond]:
        seen.extend(prompts)
        return encode_text(prompts)

    store = Store(tmp_path)
    prompts = ["a dog", "", "a sks dog", "a dog", *(f"prompt {n}" for n in range(40))]
    first = cache_texts(store, prompts, encode=encode, encoder_id="clip")
    assert (first.computed, first.reused) == (43, 0)
    assert seen == list(dict.fromkeys(prompts))
    assert list(first.conds) == seen
    assert all(torch.equal(first.conds[p]["tokens"], encode_text([p])[0]["tokens"]) for p in prompts)
    assert first.conds["a dog"]["tokens"].untyped_storage().nbytes() == 5 * 3 * 4

    edited = cache_texts(store, ["a dog", "a dog!"], encode=encode, encoder_id="clip")
    assert (edited.computed, edited.reused) == (1, 1)
    assert seen[-1] == "a dog!"
    again = cache_texts(store, ["a dog"], encode=encode, encoder_id="clip 2")
    assert (again.computed, again.reused) == (1, 0)


def test_a_prompt_whose_embedding_is_not_finite_is_named(tmp_path: Path) -> None:
    def encode(prompts: Sequence[str]) -> list[Cond]:
        return [{"tokens": torch.full((2,), float("nan") if "bad" in prompt else 0.0)} for prompt in prompts]

    with pytest.raises(TrainingError, match="'a bad one'"):
        cache_texts(Store(tmp_path), ["fine", "a bad one"], encode=encode, encoder_id="clip")
