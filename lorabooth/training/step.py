"""The pure training step: tensors in, loss terms out. No host synchronisation, no I/O, no branch on data.

So it can be run on meta tensors to predict its memory, compiled, and captured in a CUDA graph. What differs
between runs (family, cached or trained text encoder, prior mode, loss weighting) is chosen above the loop and
arrives as functions.

Legend of shape suffixes: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorabooth.objective.loss import LossTerms, Weighting, per_example_error, step_loss
from lorabooth.objective.paths import NoisePath
from lorabooth.rng import generator_for
from lorabooth.types import Batch, Cond, Geometry, Noised

Predict = Callable[[Tensor, Tensor, Cond, Sequence[Geometry]], Tensor]
"""(x [B,C,h,w], level [B], conditioning, B geometries) -> prediction [B,C,h,w], as `Family.predict`."""
Condition = Callable[[Cond], Cond]
"""A batch's conditioning -> what the denoiser takes: `cached_condition`, or the text encoder on tokens."""
Targets = Callable[[Batch, Noised, Sequence[int]], Tensor]
"""(batch, noised batch, rows of its class examples) -> what each example is trained towards, [B,C,h,w]."""


@dataclass(frozen=True)
class StepParts:
    """The functions that a training step is composed of.

    Attributes:
        predict: the one call that touches the big network.
        condition: from the batch's conditioning to the denoiser's.
        path: noising; its tables already on the training device.
        weighting: weight of an example by its signal-to-noise ratio.
        targets: `path_targets`, or for the adapter-off prior `distill_targets(...)`, or `stored_targets`
            where the teacher's predictions were computed before training.
    """

    predict: Predict
    condition: Condition
    path: NoisePath
    weighting: Weighting
    targets: Targets


def micro_step(
    parts: StepParts,
    batch: Batch,
    eps_BChw: Tensor,
    level_B: Tensor,
    *,
    class_rows: Sequence[int],
    n_instance: int,
    n_class: int,
) -> LossTerms:
    """Forward pass and loss of one micro-batch; the caller runs backward on `total`.

    Args:
        parts: what the step is composed of.
        batch: examples, on the training device.
        eps_BChw: standard normal noise, same device and shape as the latents.
        level_B: [B] noise levels from the path.
        class_rows: `class_rows(batch)`, read while the batch was still on the CPU.
        n_instance: subject examples in the whole optimizer step, accumulation and ranks included.
        n_class: class examples likewise.
    """
    noised = parts.path.noise(batch.latents, eps_BChw, level_B)
    target = parts.targets(batch, noised, class_rows)
    prediction = parts.predict(noised.x, noised.level, parts.condition(batch.cond), batch.geometry)
    return step_loss(
        per_example_error(prediction, target),
        parts.weighting(noised.snr),
        batch.is_instance,
        batch.weight,
        n_instance=n_instance,
        n_class=n_class,
    )


def class_rows(batch: Batch) -> tuple[int, ...]:
    """Rows of the class examples. Call it on the CPU batch: on a GPU it would wait for the device."""
    return tuple(row for row, is_instance in enumerate(batch.is_instance.tolist()) if not is_instance)


def cached_condition(cond: Cond) -> Cond:
    """The conditioning is already what the denoiser takes (text embeddings from the cache)."""
    return cond


def path_targets(batch: Batch, noised: Noised, class_rows: Sequence[int]) -> Tensor:  # noqa: ARG001
    """Every example is trained towards the noise path's target: prior modes generated, images and none."""
    return noised.target


def stored_targets(batch: Batch, noised: Noised, class_rows: Sequence[int]) -> Tensor:  # noqa: ARG001
    """As `distill_targets`, from what the frozen base predicted before training: no second forward."""
    if batch.taught is None:
        return noised.target
    of_subject = batch.is_instance.reshape(-1, *(1,) * (noised.target.dim() - 1))
    return torch.where(of_subject, noised.target, batch.taught.to(noised.target.dtype))


def distill_targets(
    predict: Predict, condition: Condition, adapter_off: Callable[[], AbstractContextManager[Any]]
) -> Targets:
    """Class examples are held to what the same model predicts with the adapter off.

    The teacher sees the same noisy latent, timestep and prompt, without gradient; if the text encoder
    trains, its adapter is off as well. Only class rows go through the teacher.

    Args:
        predict: as in `StepParts`.
        condition: as in `StepParts`.
        adapter_off: context in which the denoiser and the text encoders are the frozen base.
    """

    def targets(batch: Batch, noised: Noised, class_rows: Sequence[int]) -> Tensor:
        if not class_rows:
            return noised.target
        cond = {name: _take(tensor, class_rows) for name, tensor in batch.cond.items()}
        geometry = [batch.geometry[row] for row in class_rows]
        with torch.no_grad(), adapter_off():
            taught = predict(
                _take(noised.x, class_rows), _take(noised.level, class_rows), condition(cond), geometry
            )
        taught = taught.to(noised.target.dtype)
        place = {row: index for index, row in enumerate(class_rows)}
        return torch.cat(
            [
                taught[place[row]].unsqueeze(0) if row in place else noised.target[row].unsqueeze(0)
                for row in range(noised.target.shape[0])
            ]
        )

    return targets


def draw_noise(
    path: NoisePath,
    seed: int,
    step: int,
    positions: Sequence[int],
    shape: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Noise and level of each example: functions of (seed, step, position) alone.

    Drawn on the CPU, one generator an example, so that neither the device nor how a step is split into
    micro-batches and ranks changes them.

    Args:
        path: where levels are drawn from.
        seed: the run's seed.
        step: the optimizer step.
        positions: B positions of the examples within the optimizer step.
        shape: of one example's latents, (C, h, w).
        device: where the result goes.
        dtype: of the noise.

    Returns:
        eps [B,C,h,w] in `dtype` and level [B] in the path's dtype, on `device`.
    """
    eps = torch.stack(
        [torch.randn(*shape, generator=generator_for(seed, step, 0, "noise", place)) for place in positions]
    )
    level = torch.stack(
        [path.sample_level(generator_for(seed, step, 0, "level", place)) for place in positions]
    )
    return eps.to(device, dtype, non_blocking=True), level.to(device, non_blocking=True)


def noise_of(
    path: NoisePath,
    batch: Batch,
    seed: int,
    step: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Noise and level of a batch's examples: those of the fixed pool they come from, else `draw_noise`'s.

    Args:
        path: where levels are drawn from.
        batch: while it is on the CPU.
        seed: the run's seed.
        step: the optimizer step.
        device: where the result goes.
        dtype: of the noise.

    Returns:
        As `draw_noise`.
    """
    shape = batch.latents.shape[1:]
    if not any(batch.fixed):
        return draw_noise(path, seed, step, batch.positions, shape, device=device, dtype=dtype)
    rows: list[tuple[Tensor, Tensor]] = []
    for known, place in zip(batch.fixed, batch.positions, strict=True):
        if known is None:
            eps_1Chw, level_1 = draw_noise(path, seed, step, (place,), shape)
            rows.append((eps_1Chw[0], level_1[0]))
        else:
            rows.append((known.eps, known.level))
    eps, level = (torch.stack(column) for column in zip(*rows, strict=True))
    return eps.to(device, dtype, non_blocking=True), level.to(device, non_blocking=True)


def _take(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows by slices: indexing by a list would copy an index to the device and wait for it."""
    return torch.cat([tensor[row : row + 1] for row in rows])
