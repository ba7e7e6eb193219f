"""One loop for every network of the pocket base: schedule by progress, EMA, resumable state, log lines.

On a CPU the build runs one single-threaded process a core and averages gradients between them: as fast as
threads on a free machine, and several times faster where other work runs too, because no thread spins at
barriers inside an operator.

The learning rate is a function of progress (the share of the phase's time or steps that is used up), so a
phase that was killed goes on where it was, and a phase that is given more time stretches its schedule.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lorabooth.errors import TrainingError

LOG_EVERY_S = 20.0

Losses = Mapping[str, Tensor]
"""Named scalar losses of one step; "loss" is the one that is minimised."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How long a phase may train.

    Attributes:
        seconds: training time, summed over interruptions.
        min_steps: optimizer steps that are made even when the time is up.
    """

    seconds: float
    min_steps: int = 2

    def progress(self, step: int, elapsed_s: float) -> float:
        """The share of the phase that is done, in [0, 1]; 1 ends it."""
        by_steps = step / self.min_steps
        by_time = elapsed_s / self.seconds if self.seconds > 0 else by_steps
        return min(by_time, by_steps, 1.0)


@dataclass(frozen=True, slots=True)
class Hyper:
    """Optimizer settings of one phase.

    Attributes:
        lr: peak learning rate.
        warmup_steps: linear warmup from 0.
        final_lr_ratio: share of the peak that is left at progress 1.
        weight_decay: AdamW's decoupled decay, on matrices only.
        betas: AdamW's betas.
        max_grad_norm: gradients are clipped to this norm.
        ema_decay: the decay that the moving average of the weights warms up to.
    """

    lr: float
    warmup_steps: int = 100
    final_lr_ratio: float = 0.02
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of the work is this process's.

    Attributes:
        rank: this process, in [0, world).
        world: how many processes train together.
    """

    rank: int = 0
    world: int = 1


ALONE = Shard()


@dataclass(frozen=True, slots=True)
class Task:
    """What `train` needs of a phase.

    Attributes:
        name: the phase's name in log and state files.
        module: the network that trains, on its device, in float32.
        losses: step -> losses; every random draw in it is a function of the step.
        hyper: optimizer settings.
        budget: when to stop.
        state_file: where the training state is kept (safetensors).
        log_file: JSON lines are appended here.
        save_every_s: seconds between two saves of the state.
        shard: this process among those that train together; the first one logs, averages and saves.
        on_save: called with (averaged weights, step, progress) after each save and at the end.
    """

    name: str
    module: nn.Module
    losses: Callable[[int], Losses]
    hyper: Hyper
    budget: Budget
    state_file: Path
    log_file: Path
    save_every_s: float = 300.0
    shard: Shard = ALONE
    on_save: Callable[[dict[str, Tensor], int, float], None] | None = None


def learning_rate(hyper: Hyper, step: int, progress: float) -> float:
    """Linear warmup over steps times a cosine over progress."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    shape = hyper.final_lr_ratio + (1.0 - hyper.final_lr_ratio) * cosine
    return hyper.lr * min(1.0, (step + 1) / max(hyper.warmup_steps, 1)) * shape


def ema_decay_at(step: int, limit: float) -> float:
    """The decay of step `step`: (1 + step) / (10 + step), at most `limit`."""
    return min(limit, (1.0 + step) / (10.0 + step))


def write_state(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able record to one safetensors file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
        partial,
        metadata={"info": json.dumps(dict(info))},
    )
    partial.replace(path)


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_state` wrote: (tensors, record)."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        info: dict[str, Any] = json.loads((file.metadata() or {})["info"])
    return tensors, info


def append_log(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line and print it."""
    line = json.dumps({"time": time.strftime("%H:%M:%S"), **record})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def _optimizer(task: Task) -> torch.optim.AdamW:
    trainable = [p for p in task.module.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": task.hyper.weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=task.hyper.lr,
        betas=task.hyper.betas,
        fused=True,
    )


def _state_tensors(
    module: nn.Module, ema: Mapping[str, Tensor], optimizer: torch.optim.AdamW
) -> dict[str, Tensor]:
    out = {f"model/{name}": tensor for name, tensor in module.state_dict().items()}
    out |= {f"ema/{name}": tensor for name, tensor in ema.items()}
    for index, entry in optimizer.state_dict()["state"].items():
        out |= {f"optim/{index}/{name}": tensor for name, tensor in entry.items()}
    return out


def _load_state(
    path: Path, module: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.AdamW
) -> dict[str, Any]:
    tensors, info = read_state(path)
    module.load_state_dict({n[6:]: t for n, t in tensors.items() if n.startswith("model/")})
    for name, average in ema.items():
        average.copy_(tensors[f"ema/{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optim/"):
            _, index, entry = name.split("/")
            state.setdefault(int(index), {})[entry] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return info


@torch.no_grad()
def _update_ema(ema: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    pairs = [(ema[name], value) for name, value in module.state_dict().items()]
    floating = [(a, v) for a, v in pairs if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floating], [v for _, v in floating], 1.0 - decay)
    for average, value in pairs:
        if not average.is_floating_point():
            average.copy_(value)


def average_of(state_file: Path) -> dict[str, Tensor]:
    """The averaged weights in a training state."""
    tensors, _ = read_state(state_file)
    return {name[4:]: tensor for name, tensor in tensors.items() if name.startswith("ema/")}


class _Means:
    """Running means of the losses since the last log line."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count = 0

    def add(self, losses: Losses) -> None:
        self.count += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())

    def take(self) -> dict[str, float]:
        means = {name: round(total / max(self.count, 1), 5) for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


def _average(parameters: Sequence[nn.Parameter], elapsed_s: float, shard: Shard) -> float:
    """Average the gradients over the processes; return the first one's clock, on which all agree."""
    if shard.world == 1:
        return elapsed_s
    grads = [p.grad for p in parameters if p.grad is not None]
    clock = grads[0].new_tensor([elapsed_s * shard.world if shard.rank == 0 else 0.0])
    flat = torch.cat([*(grad.flatten() for grad in grads), clock]).div_(shard.world)
    dist.all_reduce(flat)
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in _split(flat, grads)])
    return float(flat[-1])


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(torch.split(flat[:-1], [t.numel() for t in like]), like, strict=True))


def _update(task: Task, optimizer: torch.optim.AdamW, step: int, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm = float(nn.utils.clip_grad_norm_(task.module.parameters(), task.hyper.max_grad_norm))
    if not math.isfinite(norm):
        raise TrainingError(
            f"Training the pocket base's {task.name} diverged at step {step}.", "Lower its lr."
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def train(task: Task) -> dict[str, Tensor]:
    """Train until the budget is used up, from the saved state if there is one.

    Args:
        task: the phase.

    Returns:
        The moving average of the weights, on the module's device (of the first process; the others have
        none). The module itself ends at its last step.

    Raises:
        TrainingError: a gradient is not finite.
    """
    optimizer = _optimizer(task)
    ema = {name: value.detach().clone() for name, value in task.module.state_dict().items()}
    step, before_s = 0, 0.0
    if task.state_file.exists():
        info = _load_state(task.state_file, task.module, ema, optimizer)
        step, before_s = int(info["step"]), float(info["elapsed_s"])
    started = time.monotonic()
    elapsed_s = saved_s = logged_s = before_s
    means = _Means()

    parameters = [p for p in task.module.parameters() if p.requires_grad]

    def save() -> None:
        if task.shard.rank:
            return
        tensors = _state_tensors(task.module, ema, optimizer)
        write_state(task.state_file, tensors, {"step": step, "elapsed_s": elapsed_s})
        if task.on_save is not None:
            task.on_save(ema, step, task.budget.progress(step, elapsed_s))

    while (progress := task.budget.progress(step, elapsed_s)) < 1.0:
        lr = learning_rate(task.hyper, step, progress)
        losses = task.losses(step)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        means.add(losses)
        elapsed_s = _average(parameters, before_s + time.monotonic() - started, task.shard)
        _update(task, optimizer, step, lr)
        step += 1
        if task.shard.rank:
            continue
        _update_ema(ema, task.module, ema_decay_at(step, task.hyper.ema_decay))
        if elapsed_s - logged_s > LOG_EVERY_S:
            rate = {"s_per_step": round((elapsed_s - logged_s) / means.count, 3), "lr": round(lr, 7)}
            row = {"phase": task.name, "step": step, "progress": round(progress, 4), **means.take(), **rate}
            append_log(task.log_file, row)
            logged_s = elapsed_s
        if elapsed_s - saved_s > task.save_every_s:
            saved_s = elapsed_s
            save()
    save()
    return ema
