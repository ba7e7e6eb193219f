"""What a run would do, for `--dry-run`: the effective recipe, the parts, what trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorabooth.recipe import Recipe, dump
from lorabooth.training.resolve import Choice


@dataclass(frozen=True, slots=True)
class PartFacts:
    """One component of the base.

    Attributes:
        name: "denoiser", "text_encoder", "vae", ...
        kind: its class.
        parameters: their number.
        dtype: they are held in, e.g. "float32".
    """

    name: str
    kind: str
    parameters: int
    dtype: str


@dataclass(frozen=True, slots=True)
class TrainedPart:
    """What the adapter adds to one component.

    Attributes:
        component: that it sits on.
        modules: number of layers it touches.
        rank: of its matrices.
        alpha: scale times rank.
        lr: learning rate.
        parameters: trained.
    """

    component: str
    modules: int
    rank: int
    alpha: float
    lr: float
    parameters: int


@dataclass(frozen=True)
class Plan:
    """What a dry run found.

    Attributes:
        recipe: without "auto".
        choices: what "auto" became.
        parts: of the base.
        trained: what would train.
        photos: "used N of M files ..." per folder.
        examples: subject and class examples per optimizer step.
        device: where it would run.
        out: where it would write.
    """

    recipe: Recipe
    choices: Sequence[Choice]
    parts: Sequence[PartFacts]
    trained: Sequence[TrainedPart]
    photos: str
    examples: tuple[int, int]
    device: str
    out: str

    def text(self) -> str:
        """Everything, to read in a terminal."""
        n_instance, n_class = self.examples
        blocks = [
            dump(self.recipe).rstrip(),
            '# Chosen for "auto"\n' + choices_text(self.choices),
            "# Photos\n" + self.photos,
            "# Parts\n" + _table([(p.name, p.kind, f"{p.parameters:,}", p.dtype) for p in self.parts]),
            "# Trains\n"
            + _table(
                [
                    (
                        t.component,
                        f"{t.modules} modules",
                        f"rank {t.rank}",
                        f"alpha {t.alpha:g}",
                        f"lr {t.lr:g}",
                        f"{t.parameters:,} parameters",
                    )
                    for t in self.trained
                ]
            ),
            f"# A step: {n_instance} subject and {n_class} class examples, on {self.device}; "
            f"{self.recipe.optim.steps} steps; written to {self.out}",
        ]
        return "\n\n".join(blocks)


def choices_text(choices: Sequence[Choice]) -> str:
    """One aligned line per choice: key, value, reason."""
    return _table([(choice.key, choice.text, choice.reason) for choice in choices])


def _table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "  (none)"
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
