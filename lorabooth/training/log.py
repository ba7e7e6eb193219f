"""metrics.jsonl: one JSON line per optimizer step; and the guard against non-finite steps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorabooth import durable
from lorabooth.errors import TrainingError


class MetricsLog:
    """Appends one line per step to a file that anybody may read meanwhile.

    Args:
        path: metrics.jsonl; made on the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line and flush it.

        Args:
            line: "step" (finished optimizer steps, from 1), "loss", "loss_instance", "lr", "grad_norm",
                "step_s", ...; non-finite numbers are written as null, so that every line is valid JSON.

        Raises:
            TrainingError: the disk is full; at most this line is torn.
            RecipeError: the file cannot be written.
        """
        text = json.dumps({key: _plain(value) for key, value in line.items()}, allow_nan=False)
        # Opened for each line: a step takes far longer, and nothing is left open after an error.
        with durable.user_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def sync(self) -> None:
        """Wait until all lines are on the disk; before a checkpoint that counts on them.

        Raises:
            TrainingError: the disk is full.
            RecipeError: the file cannot be written.
        """
        if self.path.exists():
            with durable.user_errors(self.path):
                durable.sync_file(self.path)

    def truncate_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run will do again, torn ones among them; atomic.

        Args:
            step: finished steps of the checkpoint that the run goes on from.

        Raises:
            TrainingError: a line of a step that is kept is no step's JSON object; or the disk is full.
            RecipeError: the file cannot be written.
        """
        if not self.path.exists():
            return
        kept: list[str] = []
        reached = 0
        for number, piece in enumerate(_pieces(self.path), start=1):
            # The lines up to the checkpoint were on the disk before it was; what a crash tore comes after.
            if reached >= step:
                break
            found = _step_of(piece)
            if found is None:
                raise _foreign(self.path, number)
            if found["step"] > step:
                break
            kept.append(piece + "\n")
            reached = found["step"]
        with durable.user_errors(self.path):
            durable.replace(self.path, "".join(kept).encode())


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file, in order; a torn last line is left out.

    Raises:
        TrainingError: a line before the last is not a step's JSON object.
    """
    lines = []
    for number, piece in enumerate(_pieces(path), start=1):
        line = _step_of(piece)
        if line is None:
            raise _foreign(path, number)
        lines.append(line)
    return lines


def _pieces(path: Path) -> list[str]:
    """The lines that end; after the last newline comes nothing, or what a killed run had begun to write."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def _step_of(piece: str) -> dict[str, Any] | None:
    """A step's JSON object, or None."""
    try:
        line = json.loads(piece)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _foreign(path: Path, number: int) -> TrainingError:
    return TrainingError(f"{path}, line {number}: not a step of a run.", "Remove that line.")


class FiniteGuard:
    """Counts non-finite steps in a row and ends a run that no longer learns.

    Args:
        limit: the run ends at this many in a row.
        state: from `state_dict` of the run that is gone on with; empty for a new one.
    """

    def __init__(self, limit: int = 10, state: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.limit = limit
        self.in_a_row = int(state.get("in_a_row", 0))
        self.overflows = int(state.get("overflows", 0))
        self._in_all: list[str] = list(state.get("in_all", ()))
        self._parts: list[str] = list(state.get("parts", ()))

    def state_dict(self) -> dict[str, Any]:
        """JSON values that go into the checkpoint."""
        return {
            "in_a_row": self.in_a_row,
            "overflows": self.overflows,
            "in_all": list(self._in_all),
            "parts": list(self._parts),
        }

    def check(
        self,
        *,
        step: int,
        wrong: Sequence[str],
        record_ids: Sequence[str],
        diagnosis: str,
        overflow: bool = False,
    ) -> None:
        """Note one step.

        Args:
            step: finished steps, this one included.
            wrong: parts that were not finite, in words ("the subject's loss"); empty if all were. If not
                empty, the caller has not applied the step.
            record_ids: its examples.
            diagnosis: compute dtype (its first word: "fp16", "bf16" or "fp32"), base, and what else helps.
            overflow: only a scaled fp16 gradient was too large, and the scale is being halved: the step is
                counted in `overflows` and neither continues nor ends a row. A scale of 65536 may take many.

        Raises:
            TrainingError: `limit` steps in a row were not finite.
        """
        if overflow:
            self.overflows += 1
            return
        if not wrong:
            self.in_a_row, self._in_all, self._parts = 0, [], []
            return
        met = list(dict.fromkeys(record_ids))
        self._in_all = [name for name in self._in_all if name in met] if self.in_a_row else met
        self._parts = list(dict.fromkeys([*self._parts, *wrong]))
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise self._ended(step, met, diagnosis)

    def _ended(self, step: int, met: Sequence[str], diagnosis: str) -> TrainingError:
        """The diagnosis: which part, which examples, which dtype, what to try."""
        if self._in_all:
            who = f"In all of them: {', '.join(self._in_all)}."
        else:
            who = f"No example is in all of them, so it is not one photo; in the last: {', '.join(met)}."
        tries = [f"look at {', '.join(self._in_all)}, or leave it out"] if 0 < len(self._in_all) <= 3 else []
        wider = {"fp16": '"bf16" or "fp32"', "bf16": '"fp32"'}.get(diagnosis.partition(" ")[0])
        if wider:
            tries.append(f"memory.precision = {wider}")
        tries += ["a lower optim.lr", "optim.max_grad_norm = 1.0"]
        return TrainingError(
            f"{self.in_a_row} optimizer steps in a row up to step {step} were not finite: "
            f"{', '.join(self._parts)} ({diagnosis}). {who} "
            "None of them was applied; the last checkpoint is whole.",
            f"Try, in this order: {'; '.join(tries)}.",
        )


def wrong_parts(figures: Mapping[str, Any], grad_norms: Mapping[str, float]) -> list[str]:
    """What was not finite in a step, in words; empty if everything was.

    A loss that is not finite makes every gradient so; then only the loss is named.

    Args:
        figures: "loss", "loss_instance", "loss_prior" (where there is one), "grad_norm".
        grad_norms: 2-norm of the gradient by component.
    """
    losses = {"loss_instance": "the subject's loss", "loss_prior": "the class images' loss"}
    if not math.isfinite(figures["loss"]):
        named = [text for key, text in losses.items() if not math.isfinite(figures.get(key, 0.0))]
        return named or ["the loss"]
    if math.isfinite(figures["grad_norm"]):
        return []
    named = [f"the gradient of {name}" for name, norm in grad_norms.items() if not math.isfinite(norm)]
    return named or ["the gradient's norm"]


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
