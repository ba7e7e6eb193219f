"""metrics.jsonl: one JSON line per optimizer step; and the guard against non-finite steps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
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
        """
        text = json.dumps({key: _plain(value) for key, value in line.items()}, allow_nan=False)
        # Opened for each line: a step takes far longer, and nothing is left open after an error.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def sync(self) -> None:
        """Wait until all lines are on the disk; before a checkpoint that counts on them."""
        if self.path.exists():
            durable.sync_file(self.path)

    def truncate_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run will do again, and a torn last line; atomic.

        Args:
            step: finished steps of the checkpoint that the run goes on from.
        """
        if not self.path.exists():
            return
        kept = [line for line in read(self.path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        durable.replace(self.path, text.encode())


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file, in order; a torn last line is left out.

    Raises:
        TrainingError: a line before the last is not a step's JSON object.
    """
    pieces = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = []
    # After the last newline comes an empty piece, or what a killed run had begun to write.
    for number, piece in enumerate(pieces[:-1], start=1):
        try:
            line = json.loads(piece)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise TrainingError(f"{path}, line {number}: not a step of a run.", "Remove that line.")
        lines.append(line)
    return lines


class FiniteGuard:
    """Counts non-finite steps in a row and ends a run that no longer learns.

    Args:
        limit: the run ends at this many in a row.
    """

    def __init__(self, limit: int = 10) -> None:
        self.limit = limit
        self.in_a_row = 0

    def check(
        self,
        *,
        step: int,
        finite: bool,
        record_ids: Sequence[str],
        diagnosis: str,
        figures: Mapping[str, Any],
    ) -> None:
        """Note one step.

        Args:
            step: finished steps, this one included.
            finite: its loss and gradient norm are finite; if not, the caller has not applied it.
            record_ids: its examples.
            diagnosis: compute dtype, base, and whatever else helps.
            figures: the step's line of the metrics: names the part that went wrong.

        Raises:
            TrainingError: `limit` steps in a row were not finite.
        """
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if self.in_a_row < self.limit:
            return
        wrong = [
            f"{key} is {value}"
            for key, value in figures.items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
        shown = ", ".join(dict.fromkeys(record_ids))
        raise TrainingError(
            f"{self.limit} optimizer steps in a row up to step {step} were not finite "
            f"({', '.join(wrong) or 'loss or gradient'}; {diagnosis}; examples: {shown}). "
            "None of them was applied; the last checkpoint is whole.",
            'Try memory.precision = "bf16" or "fp32", a lower optim.lr, optim.max_grad_norm = 1.0, '
            "and look at the examples named above.",
        )


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
