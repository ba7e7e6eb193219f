from __future__ import annotations

from pathlib import Path

import numpy as np

from lorabooth.pocket.dataset import batch_indices, is_held_out, rendered, scene_at


def test_pictures_are_a_function_of_seed_and_index(tmp_path: Path) -> None:
    first = rendered(3, "train", 4, tmp_path / "a.npy")
    assert np.array_equal(rendered(3, "train", 2).images, first.images[:2])
    assert np.array_equal(rendered(3, "train", 4, tmp_path / "a.npy").images, first.images)
    assert not np.array_equal(rendered(4, "train", 4).images, first.images)
    assert first.images.shape == (4, 64, 64, 3)
    assert len(first.scenes) == 4


def test_training_never_sees_what_is_held_out() -> None:
    assert not any(is_held_out(scene_at(0, "train", i)) for i in range(200))
    assert all(is_held_out(scene_at(0, "held-out", i)) for i in range(50))


def test_every_example_comes_once_an_epoch() -> None:
    epoch = np.concatenate([batch_indices(0, step, "x", 12, 5) for step in range(12)])
    assert all(sorted(epoch[i * 12 : i * 12 + 12]) == list(range(12)) for i in range(5))
    assert len(batch_indices(0, 0, "x", 3, 8)) == 8
