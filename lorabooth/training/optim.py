"""Parameter groups, optimizers, gradient clipping, and the learning rate as a function of the step.

The only file that imports bitsandbytes' optimizers.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorabooth.errors import RecipeError
from lorabooth.progress import Reporter
from lorabooth.recipe import OptimSection

MIN_8BIT_ELEMENTS = 4096
"""bitsandbytes keeps the state of smaller tensors in 32 bit."""

_EIGHT_BIT_CLASSES = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}
_FUSED_DEVICES = ("cpu", "cuda")


def groups(parameters: Mapping[str, Iterable[nn.Parameter]], section: OptimSection) -> list[dict[str, Any]]:
    """One parameter group per component, with its own learning rate.

    Args:
        parameters: trained parameters by component: "denoiser", "text_encoder", ...; components without
            any are left out.
        section: the recipe's optim section, without "auto".

    Returns:
        Groups with "params", "name" (the component), "base_lr" (before the schedule), "lr" and
        "weight_decay".

    Raises:
        RecipeError: a learning rate that is needed is still "auto".
    """
    made = []
    for component, members in parameters.items():
        trained = list(members)
        if not trained:
            continue
        key = "lr" if component == "denoiser" else "text_encoder_lr"
        base_lr = getattr(section, key)
        if base_lr == "auto":
            raise RecipeError(f'optim.{key} is still "auto".', f"Write a number, e.g. optim.{key} = 1e-4.")
        made.append(
            {
                "params": trained,
                "name": component,
                "base_lr": float(base_lr),
                "lr": float(base_lr),
                "weight_decay": section.weight_decay,
            }
        )
    return made


def make(
    section: OptimSection,
    param_groups: list[dict[str, Any]],
    device: torch.device,
    *,
    strict: bool,
    reporter: Reporter,
    captured: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer that the recipe names, if it really works here.

    An 8-bit optimizer is proven by one real step first. Where it does not work, AdamW in 32 bit takes its
    place with a warning.

    Args:
        section: the recipe's optim section.
        param_groups: from `groups`.
        device: where the parameters are.
        strict: fail instead of falling back.
        reporter: hears what is used instead, and how much of the state is 8-bit.
        captured: its steps will be recorded: the learning rates are tensors, which can change afterwards.

    Raises:
        RecipeError: `strict`, and the optimizer does not work here.
    """
    name: str = section.name
    if name == "paged_adamw8bit" and device.type == "cpu":
        _fall_back(
            'optim.name = "paged_adamw8bit" has nothing to page on a CPU', "adamw8bit", strict, reporter
        )
        name = "adamw8bit"
    if name in _EIGHT_BIT_CLASSES:
        problem = eight_bit_problem(name, device)
        if not problem:
            return _eight_bit(name, param_groups, reporter)
        _fall_back(f'optim.name = "{name}" does not work here: {problem}', "adamw", strict, reporter)
    if captured:
        for group in param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
    # A recorded step must count on the device; a CPU's is not recorded, and its optimizer refuses the option.
    return torch.optim.AdamW(
        param_groups,
        fused=device.type in _FUSED_DEVICES,
        capturable=captured and device.type == "cuda",
    )


def eight_bit_problem(name: str, device: torch.device) -> str:
    """Why an 8-bit optimizer cannot be used on a device; "" after it has made one real step there.

    Args:
        name: "adamw8bit" or "paged_adamw8bit".
        device: where to prove it.
    """
    try:
        optimizer_class = _optimizer_class(name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"bitsandbytes cannot be imported ({error}); install it with: pip install 'lorabooth[gpu]'"
    weight = nn.Parameter(torch.full((2, MIN_8BIT_ELEMENTS // 2), 0.5, device=device))
    weight.grad = torch.full_like(weight, 0.25)
    try:
        optimizer = optimizer_class([weight], lr=1e-2, weight_decay=0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        moved = (0.5 - weight.detach()).cpu()
    # bitsandbytes without its compiled library fails in any of these ways, on the first step.
    except (RuntimeError, OSError, AttributeError, NameError, TypeError, ValueError) as error:
        return f"its first step failed ({type(error).__name__}: {error})"
    # The first AdamW step moves every weight by about the learning rate.
    if not torch.allclose(moved, torch.full_like(moved, 1e-2), rtol=0.1):
        return "its first step computed wrong numbers"
    return ""


def lr_at(section: OptimSection, base_lr: float, step: int, total_steps: int) -> float:
    """Learning rate of one optimizer step.

    Linear warmup over `warmup_steps` from base_lr / warmup_steps to base_lr, then the schedule over the rest:
    constant, cosine (half a period) or linear, both towards 0 after the last step.

    Args:
        section: the recipe's optim section.
        base_lr: learning rate after warmup.
        step: 0-based optimizer step.
        total_steps: of the whole run.
    """
    if step < section.warmup_steps:
        return base_lr * (step + 1) / section.warmup_steps
    share = (step - section.warmup_steps) / max(1, total_steps - section.warmup_steps)
    share = min(share, 1.0)
    if section.schedule == "cosine":
        return base_lr * 0.5 * (1.0 + math.cos(math.pi * share))
    if section.schedule == "linear":
        return base_lr * (1.0 - share)
    return base_lr


def set_lr(optimizer: torch.optim.Optimizer, section: OptimSection, step: int, total_steps: int) -> float:
    """Give every group its learning rate for this step.

    A rate that is a tensor (of a captured optimizer) is filled in its place.

    Returns:
        The first group's, for the log.
    """
    rates = [lr_at(section, group["base_lr"], step, total_steps) for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    return rates[0]


def clip(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down to a total norm; no host synchronisation.

    Args:
        parameters: those without a gradient are left out.
        max_norm: upper bound of the total 2-norm; 0 leaves the gradients as they are.

    Returns:
        [] float32 total norm before clipping; non-finite if any gradient is.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm


def _optimizer_class(name: str) -> Any:
    module = importlib.import_module("bitsandbytes.optim")
    return getattr(module, _EIGHT_BIT_CLASSES[name])


def _eight_bit(name: str, param_groups: list[dict[str, Any]], reporter: Reporter) -> torch.optim.Optimizer:
    """The optimizer itself, and a word on how much of it is 8-bit."""
    sizes = [parameter.numel() for group in param_groups for parameter in group["params"]]
    small = sum(size < MIN_8BIT_ELEMENTS for size in sizes)
    if small:
        reporter.say(
            f"{name}: the state of {len(sizes) - small} of {len(sizes)} tensors is 8-bit; "
            f"tensors under {MIN_8BIT_ELEMENTS} elements stay in 32 bit."
        )
    optimizer: torch.optim.Optimizer = _optimizer_class(name)(param_groups)
    return optimizer


def _fall_back(problem: str, instead: str, strict: bool, reporter: Reporter) -> None:
    if strict:
        raise RecipeError(f"{problem}.", f'Set optim.name = "{instead}", or optim.strict = false.')
    reporter.warn(f"{problem}; {instead} is used instead.")
