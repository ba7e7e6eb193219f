"""`lorabooth doctor`: what this machine can do, each claim proven; facts that may be posted anywhere."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from lorabooth.cli.errors import command

OPTIMIZERS = ("adamw8bit", "paged_adamw8bit")


@command
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Versions, devices, and whether optional packages really work here. No paths, no names."""
    facts = examine()
    print(json.dumps(facts, indent=2) if as_json else facts_text(facts))


def examine() -> dict[str, Any]:
    """Everything that `doctor` knows, ready for JSON."""
    from lorabooth.families.quiet import quiet_libraries

    with quiet_libraries():
        return _facts()


def _facts() -> dict[str, Any]:
    import torch

    from lorabooth.memory.attention import attention_facts
    from lorabooth.memory.facts import default_device, devices, mismatches, versions
    from lorabooth.training.optim import eight_bit_problem

    place = torch.device(default_device())
    return {
        "versions": versions(),
        "torch_built_for": _build(),
        "devices": [dataclasses.asdict(device) for device in devices()],
        "device": place.type,
        "optimizers": {"adamw": "", **{name: eight_bit_problem(name, place) for name in OPTIMIZERS}},
        "attention": {kernel.name: kernel.detail for kernel in attention_facts(place)},
        "pocket_base": _pocket(),
        "problems": mismatches(),
    }


def facts_text(facts: dict[str, Any]) -> str:
    """The facts to read in a terminal."""
    blocks = [
        _block("Versions", {**facts["versions"], "torch built for": facts["torch_built_for"]}),
        "Devices\n" + "\n".join(f"  {_device_text(device)}" for device in facts["devices"]),
        _block(f"Optimizers, proven by one step on {facts['device']}", _verdicts(facts["optimizers"])),
        _block(f"Attention, proven forward and backward on {facts['device']}", _verdicts(facts["attention"])),
        _block("Pocket base", {"weights": facts["pocket_base"]}),
    ]
    problems = [f"  {problem}" for problem in facts["problems"]] or ["  none"]
    return "\n\n".join([*blocks, "\n".join(["Problems", *problems])])


def _build() -> str:
    import torch

    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def _pocket() -> str:
    from importlib.resources import files

    return "present" if (files("lorabooth.pocket") / "weights" / "model_index.json").is_file() else "absent"


def _verdicts(problems: dict[str, str]) -> dict[str, str]:
    return {name: f"no: {problem}" if problem else "works" for name, problem in problems.items()}


def _block(title: str, rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def _device_text(device: dict[str, Any]) -> str:
    parts = [f"{device['kind']}: {device['name']}", f"{device['total_bytes'] / 2**30:.1f} GiB"]
    parts.append(f"{device['free_bytes'] / 2**30:.1f} GiB free")
    if device["capability"]:
        parts.append(f"compute capability {device['capability']}")
    parts.append("bf16" if device["bf16"] else "no native bf16")
    return ", ".join(parts)
