"""One optimizer step: gradients of all micro-batches, norms, and the update unless a number is not finite.

There are two ways to decide on the update. On the host: the figures are read, which waits for the device, and
a bad step is not applied. On the device: the fused optimizer is told by a flag that never leaves the device,
and the figures are read when the next step is under way, so that the device is never idle. The results are
the same bit for bit. Deciding on the device takes torch's fused AdamW in one process; fp16 decides on the
host, because what becomes of the loss scale depends on which number was bad.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from lorabooth.training import optim
from lorabooth.training.alarms import StepFigures
from lorabooth.training.log import wrong_parts
from lorabooth.training.prefetch import Forwards
from lorabooth.training.step import micro_step

if TYPE_CHECKING:
    from lorabooth.training.loop import Session

_LOSS, _GRAD_NORM = 0, 4
"""Places in what is read of a step: loss, subject's, class's, stop, gradient norm, norms by group, ..."""


Launched = Callable[[], StepFigures]
"""A step that is under way or done: gives its figures, waiting for the device if it must."""


@dataclass(frozen=True)
class _Layout:
    """How the numbers that are read of a step are laid out, and what goes with them.

    Attributes:
        names: the optimizer's groups.
        record_ids: the step's examples.
        has_prior: class examples are among them.
        has_ups: the groups' lora_B norms are at the end.
    """

    names: tuple[str, ...]
    record_ids: tuple[str, ...]
    has_prior: bool
    has_ups: bool = False

    def figures(self, read: Sequence[float]) -> StepFigures:
        """Without a verdict."""
        total, instance, prior, stopping, grad_norm = read[:5]
        line: dict[str, Any] = {"loss": total, "loss_instance": instance}
        if self.has_prior:
            line["loss_prior"] = prior
        line["grad_norm"] = grad_norm
        n = len(self.names)
        ups = read[5 + n :] if self.has_ups else ()
        return StepFigures(
            line=line,
            record_ids=self.record_ids,
            grad_norms=dict(zip(self.names, read[5 : 5 + n], strict=True)),
            up_norms=dict(zip(self.names, ups, strict=True)) if self.has_ups else {},
            stopping=stopping > 0,
        )


def launch(
    session: Session, step: int, forwards: Forwards, *, asked: Sequence[int], want_up_norms: bool
) -> Launched:
    """Run one optimizer step; with `session.late` without waiting for the device.

    Args:
        session: what to run.
        step: optimizer step.
        forwards: of this rank, on the CPU.
        asked: signals that this rank got so far; looked at when the gradients are there.
        want_up_norms: the figures should have the lora_B norms.
    """
    layout = _Layout(
        names=tuple(str(group["name"]) for group in session.optimizer.param_groups),
        record_ids=tuple(name for turn in forwards for ready in turn for name in ready.batch.record_ids),
        has_prior=session.n_class > 0 and step % session.prior_every == 0,
        has_ups=want_up_norms,
    )
    if session.late:
        captured = session.graph is not None
        if session.graph is not None and not want_up_norms:
            read = session.graph(forwards)
        else:
            read = decide_on_device(session, step, forwards, want_up_norms, keep_gradients=captured)
        return _read_later(layout, read)
    sums = accumulate(session, step, forwards)
    if asked:
        sums[3] = 1.0
    if session.accelerator.num_processes > 1:
        _sum_over_ranks(session, sums)
    session.scaler.unscale_(session.optimizer)
    read = _measured(session, sums, want_up_norms=want_up_norms)
    figures = _decide(session, layout, read.tolist())
    session.optimizer.zero_grad(set_to_none=True)
    return lambda: figures


def can_decide_on_device(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> bool:
    """Whether the optimizer takes a flag instead of a host's decision: torch's fused AdamW, no loss scale."""
    fused = type(optimizer) is torch.optim.AdamW and bool(optimizer.defaults.get("fused"))
    return fused and not scaler.is_enabled()


def decide_on_device(
    session: Session,
    step: int,
    forwards: Forwards,
    want_up_norms: bool = False,
    *,
    keep_gradients: bool = False,
) -> Tensor:
    """A whole optimizer step that the host neither reads nor decides on: it can be captured.

    Args:
        session: what to run; `can_decide_on_device`.
        step: optimizer step.
        forwards: on the CPU or the device.
        want_up_norms: put the lora_B norms at the end.
        keep_gradients: zero the gradients in place instead of letting them go.

    Returns:
        The step's numbers, on the device.
    """
    sums = accumulate(session, step, forwards)
    read = _measured(session, sums, want_up_norms=want_up_norms)
    optimizer: Any = session.optimizer
    finite = torch.isfinite(read[_LOSS]) & torch.isfinite(read[_GRAD_NORM])
    # Torch's own protocol for loss scaling: the fused kernel leaves weights and state alone where it is 1.
    optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf
    optimizer.zero_grad(set_to_none=not keep_gradients)
    return read


def accumulate(session: Session, step: int, forwards: Forwards) -> Tensor:
    """Gradients of all micro-batches of this rank.

    Returns:
        [4] loss, the subject's, the class images', and 0.
    """
    device = session.accelerator.device
    sums = torch.zeros(4, device=device)
    for turn, micro_batch in enumerate(forwards):
        for given in micro_batch:
            ready = given.on(device)
            with session.autocast(), session.randomness(step, turn):
                terms = micro_step(
                    session.step_parts,
                    ready.batch,
                    ready.eps,
                    ready.level,
                    class_rows=ready.class_rows,
                    n_instance=session.n_instance,
                    n_class=session.n_class,
                )
            session.scaler.scale(terms.total).backward()  # type: ignore[no-untyped-call]
            sums[:3] += torch.stack([terms.total.detach(), terms.instance.detach(), terms.prior.detach()])
    return sums


def _measured(session: Session, sums: Tensor, *, want_up_norms: bool) -> Tensor:
    """Clip the gradients; the step's numbers in one tensor, in the order of `_Layout`."""
    groups = session.optimizer.param_groups
    by_component = _grad_norms(session) if len(groups) > 1 else []
    ups = _up_norms(session) if want_up_norms else []
    norm = optim.clip(session.parameters, session.section.max_grad_norm)
    return torch.cat([sums, torch.stack([norm, *(by_component or [norm]), *ups])])


def _read_later(layout: _Layout, read: Tensor) -> Launched:
    """Start the copy to the host; who asks for the figures waits for it."""
    arrived: torch.cuda.Event | None = None
    if read.is_cuda:
        host = torch.empty(read.shape, dtype=read.dtype, pin_memory=True)
        host.copy_(read, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
    else:
        host = read.clone()

    def figures() -> StepFigures:
        if arrived is not None:
            arrived.synchronize()
        found = layout.figures(host.tolist())
        wrong = wrong_parts(found.line, found.grad_norms)
        if not wrong:
            return found
        line = {**found.line, "skipped": True, "record_ids": [*layout.record_ids], "not_finite": [*wrong]}
        return _judged(found, line, tuple(wrong))

    return figures


def _decide(session: Session, layout: _Layout, read: Sequence[float]) -> StepFigures:
    """Apply the step, or mark that it is not applied."""
    found = layout.figures(read)
    wrong = wrong_parts(found.line, found.grad_norms)
    if not wrong:
        session.scaler.step(session.optimizer)
        session.scaler.update()
        return found
    record_ids = list(layout.record_ids)
    if session.accelerator.num_processes > 1:
        record_ids = gather_object(record_ids)
    line = {**found.line, "skipped": True, "record_ids": record_ids, "not_finite": list(wrong)}
    scale = _after_skipping(session.scaler, float(found.line["loss"]))
    if scale is not None:
        line |= {"overflow": True, "loss_scale": scale}
    return _judged(found, line, () if scale is not None else tuple(wrong), overflow=scale is not None)


def _after_skipping(scaler: torch.amp.GradScaler, loss: float) -> float | None:
    """Lower the loss scale if that can mend the step; the scale that was too high, or None.

    A loss that is not finite says nothing about the scale: halving it for a bad photo in every epoch would
    bring it to 0. Below 1 the scale does not help any more.
    """
    scale = float(scaler.get_scale())
    if not math.isfinite(loss):
        scaler.update(scale)
        return None
    scaler.update()
    return scale if scaler.is_enabled() and scale > 1.0 else None


def _judged(
    found: StepFigures, line: dict[str, Any], wrong: Sequence[str], *, overflow: bool = False
) -> StepFigures:
    return StepFigures(
        line=line,
        grad_norms=found.grad_norms,
        up_norms=found.up_norms,
        record_ids=line["record_ids"],
        wrong=wrong,
        overflow=overflow,
        stopping=found.stopping,
    )


def _grad_norms(session: Session) -> list[Tensor]:
    """2-norm of the gradient of each component; 0 where there is none."""
    zero = torch.zeros((), device=session.accelerator.device)
    norms = []
    for group in session.optimizer.param_groups:
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients) if gradients else zero)
    return norms


def _up_norms(session: Session) -> list[Tensor]:
    """2-norm of all lora_B of each component."""
    ups = {id(weight) for weight in session.up_weights}
    return [
        torch.nn.utils.get_total_norm([p.detach() for p in group["params"] if id(p) in ups])
        for group in session.optimizer.param_groups
    ]


def _sum_over_ranks(session: Session, sums: Tensor) -> None:
    """Gradients add up: each rank's loss is already divided by the counts over all ranks. One exchange."""
    for parameter in session.parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in session.parameters if parameter.grad is not None]
    flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), sums])
    total: Tensor = session.accelerator.reduce(flat, reduction="sum")
    *parts, summed = torch.split(total, [*(gradient.numel() for gradient in gradients), sums.numel()])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    sums.copy_(summed)
