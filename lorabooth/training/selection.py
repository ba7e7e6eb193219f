"""Which checkpoint becomes the result: a small fixed evaluation at each of them decides.

At every checkpoint a few prompts are drawn with seeds of their own and measured: subject fidelity (DINO) and
prompt fidelity (CLIP-T) of DreamBooth, section 4.1. What comes out is a line in RUN/selection.jsonl, on the
disk before an old checkpoint goes; everything that is decided (which checkpoint is kept, whether the run ends
early, which one becomes adapter.safetensors) is a function of these lines. So a run that was killed decides
as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from lorabooth import durable
from lorabooth.data.images import decode
from lorabooth.errors import LoraboothError, RecipeError
from lorabooth.prompts import class_prompt
from lorabooth.recipe import Recipe
from lorabooth.rng import seed_for
from lorabooth.training import state
from lorabooth.training.easel import Easel
from lorabooth.training.folder import RunFolder, read_json
from lorabooth.training.log import MetricsLog
from lorabooth.training.log import read as read_lines
from lorabooth.training.processes import together
from lorabooth.training.setting import Setting
from lorabooth.training.studio import Referee, Shot, Studio
from lorabooth.training.subjects import Subject, filled_in, selection_templates

_DIGITS = 6
_PHOTO_SIDE_PX = 512
"""The backbones look at 224 pixels: larger photos need not stay in memory."""

WORDS: Mapping[str, str] = {"balanced": "DINO x CLIP-T", "subject": "DINO", "prompt": "CLIP-T"}
"""run.select -> what decides."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One checkpoint's figures.

    Attributes:
        step: finished optimizer steps.
        dino: subject fidelity, the mean over images and subjects; None where it cannot be had.
        clip_t: prompt fidelity likewise.
        measure: digest of how they were measured; figures of another are not compared.
    """

    step: int
    dino: float | None
    clip_t: float | None
    measure: str = ""

    def by(self, select: str) -> float:
        """What decides; a cosine below 0 counts as 0, so that two bad ones do not make a good product."""
        # What is missing and decides was refused before training.
        dino, clip_t = (max(value or 0.0, 0.0) for value in (self.dino, self.clip_t))
        return {"balanced": dino * clip_t, "subject": self.dino or 0.0, "prompt": self.clip_t or 0.0}[select]


def recorded(folder: RunFolder) -> tuple[Scored, ...]:
    """What has been measured, oldest first; empty where nothing was. A torn last line is left out."""
    if not folder.selection.is_file():
        return ()
    return tuple(found for line in read_lines(folder.selection) if (found := _parsed(line)) is not None)


def ranked(scored: Sequence[Scored], select: str) -> list[Scored]:
    """The best first; of equal ones that of fewer steps."""
    return sorted(scored, key=lambda one: (-one.by(select), one.step))


def is_over(scored: Sequence[Scored], recipe: Recipe) -> bool:
    """Whether run.stop_early ends the run after what has been measured so far.

    So it does if that many checkpoints in a row, the newest among them, are below the best one before them.
    """
    select, patience = recipe.run.select, recipe.run.stop_early
    if select == "last" or not patience or len(scored) <= patience:
        return False
    best = max(one.by(select) for one in scored[:-patience])
    return all(one.by(select) < best for one in scored[-patience:])


def best_checkpoint(folder: RunFolder, recipe: Recipe) -> state.Checkpoint | None:
    """The best measured checkpoint that is there whole; None without any, or where the last one is taken."""
    if recipe.run.select == "last":
        return None
    for one in ranked(recorded(folder), recipe.run.select):
        found = state.at(folder.root, one.step)
        if found is not None:
            return found
    return None


def facts(
    folder: RunFolder, recipe: Recipe, *, chosen: int, done: int, backbones: Mapping[str, str]
) -> dict[str, Any]:
    """For run.json: what was chosen, why, and the whole curve.

    Args:
        folder: of the run.
        recipe: effective.
        chosen: step of the result.
        done: steps of the run.
        backbones: "dino" and "clip" -> what measured.
    """
    scored = recorded(folder)
    found: dict[str, Any] = {
        "select": recipe.run.select,
        "criterion": WORDS[recipe.run.select],
        "chosen": chosen,
        "why": _why(scored, recipe, chosen, done),
        "backbones": dict(backbones),
        "prompts": len(selection_templates(recipe)),
        "images_per_prompt": recipe.run.select_images,
        "curve": [
            {"step": one.step, "dino": one.dino, "clip_t": one.clip_t, "score": _short(_score(one, recipe))}
            for one in scored
        ],
    }
    total = int(recipe.optim.steps)
    if done < total:
        found["stopped_early"] = {"step": done, "of": total, "after": recipe.run.stop_early}
    return found


def chosen_in(folder: RunFolder, done: int) -> int:
    """Step of a finished run's result, as run.json tells it: the last one where nothing was chosen."""
    told = read_json(folder.facts).get("selection")
    chosen = told.get("chosen") if isinstance(told, dict) else None
    return chosen if isinstance(chosen, int) else done


def _score(one: Scored, recipe: Recipe) -> float:
    return one.by(recipe.run.select)


def _why(scored: Sequence[Scored], recipe: Recipe, chosen: int, done: int) -> str:
    """In a sentence."""
    select = recipe.run.select
    own = next((one for one in scored if one.step == chosen), None)
    if own is None:
        return f"step {chosen}: no checkpoint could be measured, so the last one is taken"
    text = f"step {chosen}: highest {WORDS[select]} of {len(scored)} checkpoints, {own.by(select):.4f}"
    last = next((one for one in scored if one.step == done), None)
    if last is not None and last.step != chosen:
        text += f"; the last one, step {done}, has {last.by(select):.4f}"
    if done < int(recipe.optim.steps):
        text += (
            f"; ended at step {done} of {recipe.optim.steps}, after {recipe.run.stop_early} in a row below "
            "the best"
        )
    return text


def open_referee(recipe: Recipe, studio: Studio) -> Referee | None:
    """What measures, opened in the main process before any work; None in others, or if nothing is measured.

    Raises:
        LoraboothError: it cannot be had, in all processes: says what is missing and what to do.
    """
    if recipe.run.select == "last":
        return None
    found: list[Referee] = []

    def ask() -> None:
        if studio.referee is None:
            raise RecipeError(
                f'run.select: "{recipe.run.select}" needs images to be measured, which nobody does here.',
                'Set run.select = "last", or train with lorabooth.train.',
            )
        found.append(studio.referee(recipe))

    together(ask)
    return found[0] if found else None


@dataclass(frozen=True)
class Trial:
    """One subject's small evaluation.

    Attributes:
        photos: its photos, at most 512 pixels a side.
        shots: what is drawn.
    """

    photos: tuple[Image.Image, ...]
    shots: tuple[Shot, ...]


@dataclass
class Selection:
    """Measures checkpoints and keeps the figures; of several processes only the main one has it.

    Attributes:
        folder: of the run.
        recipe: effective.
        easel: draws.
        referee: measures.
        trials: one a subject.
        scored: figures so far, oldest first.
    """

    folder: RunFolder
    recipe: Recipe
    easel: Easel
    referee: Referee
    trials: tuple[Trial, ...]
    scored: list[Scored] = field(default_factory=list)

    @classmethod
    def of(cls, setting: Setting, easel: Easel, folder: RunFolder, referee: Referee) -> Selection:
        """For a run on this footing.

        Raises:
            DataError: a photo cannot be read any more.
        """
        photos: dict[str, list[Image.Image]] = {subject.name: [] for subject in setting.subjects}
        for record in setting.photos.records:
            photos[record.subject].append(_opened(record.path))
        trials = tuple(
            Trial(tuple(photos[subject.name]), tuple(shots_of(setting.recipe, subject, number)))
            for number, subject in enumerate(setting.subjects)
        )
        return cls(folder, setting.recipe, easel, referee, trials)

    @property
    def measure(self) -> str:
        """Digest of all that decides the figures besides the weights."""
        how = {
            "shots": [[asdict(shot) for shot in trial.shots] for trial in self.trials],
            "backbones": dict(self.referee.names),
            "steps": self.easel.steps,
            "guidance": self.easel.guidance,
            "side_px": self.easel.side_px,
        }
        return hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:12]

    def begin(self, start: int) -> None:
        """Take up what is on the disk of the steps up to `start`, as far as it was measured in the same way.

        Raises:
            TrainingError: the file cannot be read or written.
            RecipeError: it cannot be written.
        """
        log = MetricsLog(self.folder.selection)
        log.truncate_after(start)
        before = recorded(self.folder)
        self.scored = [one for one in before if one.measure == self.measure]
        if len(self.scored) < len(before):
            with durable.user_errors(self.folder.selection):
                text = "".join(json.dumps(asdict(one)) + "\n" for one in self.scored)
                durable.replace(self.folder.selection, text.encode())
            self.easel.reporter.say("checkpoints that were measured otherwise before do not count")

    def judge(self, step: int) -> Scored | None:
        """Draw and measure the present weights, once a step; the figures are on the disk on return.

        Returns:
            The figures; None if drawing or measuring failed: that is told, and the run goes on.
        """
        known = next((one for one in self.scored if one.step == step), None)
        if known is not None:
            return known
        try:
            found = self._measured(step)
            log = MetricsLog(self.folder.selection)
            log.append(asdict(found))
            log.sync()
        except (LoraboothError, OSError) as error:
            self.easel.reporter.warn(
                f"the checkpoint of step {step} could not be measured and is not chosen; training goes on. "
                f"{error}"
            )
            return None
        self.scored.append(found)
        self.easel.reporter.say(
            f"step {step}: {_told(found)}"
            + ("; the best so far" if ranked(self.scored, self.recipe.run.select)[0] == found else "")
        )
        return found

    @property
    def is_over(self) -> bool:
        """Whether the run ends here."""
        return is_over(self.scored, self.recipe)

    def _measured(self, step: int) -> Scored:
        shots = [shot for trial in self.trials for shot in trial.shots]
        images = self.easel.draw(
            [shot.prompt for shot in shots],
            [shot.seed for shot in shots],
            at_once=self.recipe.run.select_images,
        )
        marks, first = [], 0
        for trial in self.trials:
            own = images[first : first + len(trial.shots)]
            marks.append(self.referee.marks(trial.photos, trial.shots, own))
            first += len(trial.shots)
        dino, clip_t = _mean([one.dino for one in marks]), _mean([one.clip_t for one in marks])
        return Scored(step, dino, clip_t, self.measure)


def shots_of(recipe: Recipe, subject: Subject, number: int) -> list[Shot]:
    """What is drawn of one subject: every prompt, each image with a seed that no sample and no test has."""
    noun, shots = subject.placeholders["noun"], list[Shot]()
    for template in selection_templates(recipe):
        for _ in range(recipe.run.select_images):
            seed = seed_for(recipe.run.seed, 0, 0, f"selection-{number}", len(shots))
            shots.append(Shot(filled_in(template, subject), seed, class_prompt(template, noun)))
    return shots


def _opened(path: Path) -> Image.Image:
    image = Image.fromarray(decode(path))
    image.thumbnail((_PHOTO_SIDE_PX, _PHOTO_SIDE_PX))
    return image


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if not all(map(math.isfinite, known)):
        raise LoraboothError("The measures are not finite.")
    return _short(sum(known) / len(known)) if known else None


def _told(one: Scored) -> str:
    parts = (("DINO", one.dino), ("CLIP-T", one.clip_t))
    return ", ".join(f"{name} {value:.3f}" for name, value in parts if value is not None)


def _parsed(line: Mapping[str, Any]) -> Scored | None:
    try:
        dino, clip_t = (None if line[key] is None else float(line[key]) for key in ("dino", "clip_t"))
        return Scored(int(line["step"]), dino, clip_t, str(line.get("measure", "")))
    except (KeyError, TypeError, ValueError):
        return None


def _short(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.{_DIGITS}g}")
