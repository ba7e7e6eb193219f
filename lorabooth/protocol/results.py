"""What an evaluation found, and evaluation.json: written and read here, free of paths of the machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorabooth import durable
from lorabooth.errors import RecipeError
from lorabooth.evaluation.metrics import by_group
from lorabooth.evaluation.scoring import Scores

SCHEMA = 1
_KIND = "lorabooth evaluation"

PER_PROMPT = ("dino", "clip_i", "clip_t", "div")
"""Metrics that each prompt has a value of."""


@dataclass(frozen=True, slots=True)
class PromptScores:
    """One prompt's means.

    Attributes:
        prompt: as it was drawn.
        caption: as CLIP-T compares it: without the rare token.
        adapter: metric -> mean with the adapter on; None where it was not measured.
        without: likewise with the adapter off.
    """

    prompt: str
    caption: str
    adapter: Mapping[str, float | None]
    without: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Pictures:
    """Where the images of one (prompt, seed) are, relative to evaluation.json.

    Attributes:
        kind: "subject", "class" or "unrelated".
        prompt: of both.
        seed: of both.
        adapter: drawn with the adapter on.
        without: drawn with it off.
    """

    kind: str
    prompt: str
    seed: int
    adapter: str
    without: str


@dataclass(frozen=True)
class SubjectEvaluation:
    """What was found of one subject.

    Attributes:
        subject: "qzx mug".
        adapter: with the adapter on.
        without: the base, its adapter off, under the same prompts and seeds.
        real: the photos among themselves.
        prompts: (prompt, caption) as drawn and as compared.
        class_prompts: of PRES.
        unrelated: of drift.
        photos: a digest of the photos' contents; "" where the run tells none.
        pictures: all images.
    """

    subject: str
    adapter: Scores
    without: Scores
    real: Scores
    prompts: tuple[tuple[str, str], ...]
    class_prompts: tuple[str, ...] = ()
    unrelated: tuple[str, ...] = ()
    photos: str = ""
    pictures: tuple[Pictures, ...] = ()

    @property
    def per_prompt(self) -> tuple[PromptScores, ...]:
        """The means of each prompt, in their order."""
        sides = [_by_prompt(scores) for scores in (self.adapter, self.without)]
        return tuple(
            PromptScores(
                prompt,
                caption,
                *({key: side[key].get(prompt) for key in PER_PROMPT} for side in sides),
            )
            for prompt, caption in self.prompts
        )


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found of one run.

    Attributes:
        run: name of the run folder.
        base: id of the base model.
        subjects: one entry per subject of the run.
        backbones: "dino", "clip", "lpips" -> what it was measured with.
        notes: what was not measured, and why; and other things to know.
        images_per_prompt: seeds 0, 1, ... of each of the subject's prompts.
        class_images: seeds of each class prompt.
        unrelated_images: seeds of each unrelated prompt.
        sampler: how the images were drawn.
        facts: of base and adapter: digests, strength, steps trained.
        versions: of the packages.
        seconds: what it took, this time.
        path: evaluation.json.
        page: evaluation.html.
    """

    run: str
    base: str
    subjects: tuple[SubjectEvaluation, ...]
    backbones: Mapping[str, str]
    notes: tuple[str, ...]
    images_per_prompt: int
    class_images: int
    unrelated_images: int
    sampler: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    path: Path = Path("evaluation.json")
    page: Path = Path("evaluation.html")

    @property
    def subject(self) -> str:
        """Of the first subject, as the next five: most runs have one."""
        return self.subjects[0].subject

    @property
    def adapter(self) -> Scores:
        """With the adapter on."""
        return self.subjects[0].adapter

    @property
    def without(self) -> Scores:
        """The base."""
        return self.subjects[0].without

    @property
    def real(self) -> Scores:
        """The photos."""
        return self.subjects[0].real

    @property
    def prompts(self) -> tuple[str, ...]:
        """As drawn."""
        return tuple(prompt for prompt, _ in self.subjects[0].prompts)

    @property
    def per_prompt(self) -> tuple[PromptScores, ...]:
        """The means of each prompt."""
        return self.subjects[0].per_prompt

    def to_json(self) -> dict[str, Any]:
        """As it is written; names of files only within its own folder."""
        return {
            "schema": SCHEMA,
            "kind": _KIND,
            "run": self.run,
            "base": self.base,
            "backbones": dict(self.backbones),
            "notes": list(self.notes),
            "images_per_prompt": self.images_per_prompt,
            "class_images": self.class_images,
            "unrelated_images": self.unrelated_images,
            "sampler": dict(self.sampler),
            "facts": dict(self.facts),
            "versions": dict(self.versions),
            "seconds": round(self.seconds, 1),
            "subjects": [_subject_json(one) for one in self.subjects],
        }

    def write(self) -> None:
        """Write evaluation.json.

        Raises:
            RecipeError, TrainingError: it cannot be written.
        """
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        durable.save(self.path, text.encode())


def read_evaluation(path: Path) -> Evaluation:
    """Read a run folder's evaluation.json, or the file itself.

    Raises:
        RecipeError: there is none, or it cannot be read.
    """
    if path.is_dir():
        path = path / "evaluation.json"
        if not path.is_file():
            raise RecipeError(
                f"{path.parent} was not evaluated: it has no evaluation.json.",
                f"Run: lorabooth evaluate {path.parent}",
            )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read: {error.strerror or error}.", "Give a run folder or its evaluation.json."
        ) from error
    except ValueError:
        raise _unreadable(path, "it is no JSON") from None
    if not isinstance(raw, dict) or raw.get("kind") != _KIND:
        raise _unreadable(path, "it is of another kind")
    if raw.get("schema") != SCHEMA:
        raise _unreadable(path, f"its schema is {raw.get('schema')}, this version reads {SCHEMA}")
    try:
        return _parse(raw, path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(path, f"something in it is missing or wrong ({error})") from None


def _parse(raw: Mapping[str, Any], path: Path) -> Evaluation:
    return Evaluation(
        run=str(raw["run"]),
        base=str(raw["base"]),
        subjects=tuple(
            SubjectEvaluation(
                subject=str(one["subject"]),
                adapter=Scores.from_json(one["adapter"]),
                without=Scores.from_json(one["without"]),
                real=Scores.from_json(one["real"]),
                prompts=tuple((str(each["prompt"]), str(each["caption"])) for each in one["per_prompt"]),
                class_prompts=tuple(map(str, one["class_prompts"])),
                unrelated=tuple(map(str, one["unrelated"])),
                photos=str(one["photos"]),
                pictures=tuple(Pictures(**each) for each in one["pictures"]),
            )
            for one in raw["subjects"]
        ),
        backbones={str(key): str(name) for key, name in raw["backbones"].items()},
        notes=tuple(map(str, raw["notes"])),
        images_per_prompt=int(raw["images_per_prompt"]),
        class_images=int(raw["class_images"]),
        unrelated_images=int(raw["unrelated_images"]),
        sampler={str(key): str(value) for key, value in raw["sampler"].items()},
        facts=dict(raw["facts"]),
        versions=dict(raw["versions"]),
        seconds=float(raw["seconds"]),
        path=path,
        page=path.with_suffix(".html"),
    )


def _subject_json(one: SubjectEvaluation) -> dict[str, Any]:
    return {
        "subject": one.subject,
        "photos": one.photos,
        "adapter": one.adapter.to_json(),
        "without": one.without.to_json(),
        "real": one.real.to_json(),
        "per_prompt": [
            {
                "prompt": each.prompt,
                "caption": each.caption,
                "adapter": _rounded(each.adapter),
                "without": _rounded(each.without),
            }
            for each in one.per_prompt
        ],
        "class_prompts": list(one.class_prompts),
        "unrelated": list(one.unrelated),
        "pictures": [
            {"kind": p.kind, "prompt": p.prompt, "seed": p.seed, "adapter": p.adapter, "without": p.without}
            for p in one.pictures
        ],
    }


def _rounded(means: Mapping[str, float | None]) -> dict[str, float | None]:
    return {key: None if value is None else float(f"{value:.6g}") for key, value in means.items()}


def _by_prompt(scores: Scores) -> dict[str, Mapping[str, float]]:
    found = dict(scores.items())
    return {key: by_group(metric) if (metric := found[key]) is not None else {} for key in PER_PROMPT}


def _unreadable(path: Path, why: str) -> RecipeError:
    return RecipeError(f"{path} is no evaluation that can be read: {why}.", "Run `lorabooth evaluate` again.")
