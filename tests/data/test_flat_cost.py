"""A step costs the same with ten class images and with ten thousand, in files, bytes and memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorabooth.data import cache
from lorabooth.data.batches import Orders, assemble, plan_step
from lorabooth.data.cache import CachedLatent, Store
from lorabooth.data.encode import LatentIndex, StoredLatent, cache_latents
from lorabooth.errors import TrainingError
from lorabooth.recipe import ImagesSection
from lorabooth.types import Batch, Geometry, Moments, Record, Role
from tests.tiny import make_photos

STEPS = range(300, 330)


def _moments(seed: int) -> Moments:
    mean = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed))
    return Moments(mean, mean.abs())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Ten latents on disk."""
    store = Store(tmp_path_factory.mktemp("store"))
    for number in range(10):
        geometry = Geometry((128, 128), (0, 0), (128, 128))
        store.put_moments(f"{number:064d}", CachedLatent(_moments(number), geometry))
    return store


def _steps(store: Store, n_class: int) -> Callable[[int], list[Batch]]:
    """Batches of 1 + 1 from one photo and so many class images, all in the store."""
    photo = Record(Path("photo.png"), "a sks dog", Role.INSTANCE, "sks dog")
    classes = [Record(Path(f"class/{i}.png"), "a dog", Role.CLASS, "sks dog") for i in range(n_class)]
    entries = {
        record.path: (StoredLatent(store, f"{number % 10:064d}"),)
        for number, record in enumerate([photo, *classes])
    }
    index = LatentIndex(entries, 0, len(entries))
    conds = {caption: {"encoder_hidden_states": torch.zeros(3, 4)} for caption in ("a sks dog", "a dog")}
    orders = Orders()

    def step(number: int) -> list[Batch]:
        plan = plan_step(seed=0, step=number, n_instance=1, n_class=n_class, batch_size=1, orders=orders)
        return assemble(
            plan[0][0],
            instance_records=[photo],
            class_records=classes,
            latents=index,
            conds=conds,
            collate=lambda some: {
                "encoder_hidden_states": torch.stack([c["encoder_hidden_states"] for c in some])
            },
            prior_weight=1.0,
            seed=0,
            step=number,
        )

    return step


def test_files_and_bytes_read_in_a_step_do_not_grow(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    plain = Path.read_bytes

    def counted(path: Path) -> bytes:
        content = plain(path)
        read.append(len(content))
        return content

    monkeypatch.setattr(Path, "read_bytes", counted)
    found = []
    for n_class in (10, 10_000):
        step = _steps(store, n_class)
        step(STEPS.start)
        read.clear()
        for number in STEPS:
            step(number)
        found.append((len(read), sum(read)))
    assert found[0] == found[1]
    assert found[0][0] == 2 * len(STEPS)


def test_memory_of_a_step_does_not_grow(store: Store) -> None:
    peaks = []
    for n_class in (10, 10_000):
        step = _steps(store, n_class)
        step(STEPS.start)
        tracemalloc.start()
        for number in STEPS:
            step(number)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 16 * 1024


def test_an_order_is_drawn_once_an_epoch_and_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    plain = torch.randperm

    def counted(count: int, **more: object) -> Tensor:
        drawn.append(count)
        return plain(count, **more)  # type: ignore[no-any-return, call-overload]

    monkeypatch.setattr(torch, "randperm", counted)
    orders = Orders()

    def plans(orders: Orders | None) -> list[object]:
        options = {"seed": 3, "n_instance": 4, "n_class": 1000, "batch_size": 2}
        return [plan_step(step=step, orders=orders, **options) for step in range(600)]

    remembered = plans(orders)
    assert drawn.count(1000) == 2
    drawn.clear()
    assert plans(None) == remembered
    assert drawn.count(1000) > 500


def test_only_so_much_is_held_in_memory_and_the_rest_is_the_same(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", n=4)
    records = [Record(path, "a dog", Role.CLASS, "dog") for path in photos]

    def encode(pixels: Tensor) -> list[Moments]:
        mean = torch.nn.functional.avg_pool2d(pixels, 8)[0]
        return [Moments(mean, mean.abs())]

    def index(in_memory_bytes: int) -> LatentIndex:
        return cache_latents(
            Store(tmp_path / "cache"),
            records,
            encode=encode,
            encoder_id="pool",
            images=ImagesSection(flip=True),
            resolution_px=32,
            multiple_px=8,
            seed=0,
            in_memory_bytes=in_memory_bytes,
        )

    whole, few = index(10**9), index(3 * 2 * 3 * 4 * 4 * 4)
    held = [isinstance(cut, CachedLatent) for cuts in few.latents.values() for cut in cuts]
    assert held == [True] * 3 + [False] * 5
    assert all(isinstance(cut, CachedLatent) for cuts in whole.latents.values() for cut in cuts)
    for record in records:
        for variant in range(2):
            one, other = whole.of(record, variant), few.of(record, variant)
            assert torch.equal(one.moments.mean, other.moments.mean)
            assert one.geometry == other.geometry
    for path in (tmp_path / "cache" / "latents").rglob("*.safetensors"):
        path.unlink()
    few.of(records[0], 0)
    with pytest.raises(TrainingError, match="gone from the cache") as raised:
        few.of(records[3], 1)
    assert "goes on from the last checkpoint" in raised.value.fix


def test_the_latent_of_a_sampler_has_a_key_of_its_own() -> None:
    assert cache.sampled_key("ab") != cache.sampled_key("cd")
