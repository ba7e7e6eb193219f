"""Scenes as training data: picture i and its scene are functions of (seed, i); pixels are kept on disk."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorabooth.pocket import scenes
from lorabooth.rng import seed_for

SIZE_PX = 64
_CHUNK = 500


@dataclass(frozen=True, slots=True)
class Rendered:
    """Pictures with the scenes they show.

    Attributes:
        images: uint8 [N,64,64,3].
        scenes: N scenes.
    """

    images: NDArray[np.uint8]
    scenes: tuple[scenes.Scene, ...]


def is_held_out(scene: scenes.Scene) -> bool:
    """Whether training never sees this combination of class, place, colour and pattern: one in eight."""
    s = scene.specimen
    return seed_for(0, 0, 0, f"held out/{s.class_name}/{scene.place}/{s.colour}/{s.pattern}") % 8 == 0


def scene_at(seed: int, purpose: str, index: int) -> scenes.Scene:
    """Scene `index` of a stream; "train" skips what is held out, "held-out" is nothing else."""
    rng = np.random.default_rng(seed_for(seed, 0, 0, f"scene/{purpose}", index))
    while True:
        scene = scenes.sample_scene(rng)
        if purpose not in ("train", "held-out") or is_held_out(scene) == (purpose == "held-out"):
            return scene


def _render_chunk(job: tuple[int, str, int, int]) -> NDArray[np.uint8]:
    seed, purpose, start, stop = job
    return np.stack([scenes.render(scene_at(seed, purpose, i), SIZE_PX) for i in range(start, stop)])


def _chunks(seed: int, purpose: str, count: int, processes: int) -> Iterator[NDArray[np.uint8]]:
    jobs = [(seed, purpose, i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK)]
    if processes <= 1 or len(jobs) == 1:
        yield from map(_render_chunk, jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_render_chunk, jobs)


def rendered(seed: int, purpose: str, count: int, file: Path | None = None, processes: int = 1) -> Rendered:
    """The first `count` pictures of a stream, rendered or read back.

    Args:
        seed: the build's seed.
        purpose: names the stream; "train" and "held-out" share no combination of attributes.
        count: pictures.
        file: where the pixels are kept (.npy); None keeps nothing.
        processes: worker processes for rendering.
    """
    kept = tuple(scene_at(seed, purpose, i) for i in range(count))
    if file is not None and file.exists():
        images: NDArray[np.uint8] = np.load(file)
        if len(images) >= count:
            return Rendered(images[:count], kept)
    images = np.concatenate(list(_chunks(seed, purpose, count, processes)))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name("partial-" + file.name)
        np.save(partial, images)
        partial.replace(file)
    return Rendered(images, kept)


def pixels_of(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """uint8 [N,H,W,3] -> float32 [N,3,H,W] in [-1, 1]."""
    batch = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    return batch.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def batch_indices(seed: int, step: int, purpose: str, count: int, batch: int) -> NDArray[np.int64]:
    """The examples of step `step`: `batch` indices below `count`, every example once an epoch."""
    first = step * batch
    picks: list[NDArray[np.int64]] = []
    while sum(map(len, picks)) < batch:
        epoch, offset = divmod(first, count)
        order = np.random.default_rng(seed_for(seed, epoch, 0, f"order/{purpose}")).permutation(count)
        part = order[offset : offset + batch - sum(map(len, picks))]
        picks.append(part)
        first += len(part)
    return np.concatenate(picks)
