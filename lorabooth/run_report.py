"""From a run folder to its report: what training left on disk, as evaluation's page wants it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from lorabooth import durable
from lorabooth.data.images import decode
from lorabooth.evaluation.cells import ROW_TITLES, backbone_line, cell
from lorabooth.evaluation.curves import SelectionCurve, read_curves
from lorabooth.evaluation.grids import draw_grid
from lorabooth.evaluation.legend import METRICS
from lorabooth.evaluation.report import (
    Chosen,
    Pair,
    Picture,
    ReportData,
    ScoreTable,
    StepSamples,
    write_report,
)
from lorabooth.evaluation.sample import adapter_digest
from lorabooth.evaluation.scoring import Scores
from lorabooth.recipe import Recipe, dump
from lorabooth.training.folder import RunFolder, read_json
from lorabooth.training.subjects import scan_all, subjects_of


def write_run_report(folder: RunFolder, recipe: Recipe, steps: int) -> Path:
    """Write report.html of a run from its files.

    Args:
        folder: of the run.
        recipe: effective.
        steps: optimizer steps done.
    """
    return write_report(folder.root, gather(folder, recipe, steps))


def gather(folder: RunFolder, recipe: Recipe, steps: int) -> ReportData:
    """Everything that the page shows; what is not on disk is left out."""
    facts = read_json(folder.facts)
    subjects = subjects_of(recipe)
    timings: Mapping[str, float] = facts.get("timings_s", {})
    before = pictures(folder.samples / "before")
    selection = _selection(facts)
    after = pictures(folder.step_samples(steps if selection is None else selection.chosen))
    pairs = _pairs(before, after)
    tokens = [section.token for section in recipe.subjects]
    photos = [record for scan in scan_all(subjects) for record in scan.records]
    peak = facts.get("peak_memory_bytes")
    device: Mapping[str, Any] = facts.get("device", {})
    return ReportData(
        subject=", ".join(subject.name for subject in subjects),
        base=str(facts.get("base", {}).get("id", recipe.model.base)),
        steps=steps,
        seconds=sum(timings.values()),
        facts=tuple(_headline(facts, folder)),
        photos=tuple(Picture(record.path, record.caption) for record in photos),
        curves=read_curves(folder.metrics) if folder.metrics.is_file() else None,
        validation=_validation(facts),
        selection=selection,
        samples=tuple(
            StepSamples(int(place.name.removeprefix("step-")), pictures(place))
            for place in sorted(folder.samples.glob("step-*"))
        ),
        comparisons=tuple(pair for pair in pairs if _names_any(pair.prompt, tokens)),
        class_check=tuple(pair for pair in pairs if not _names_any(pair.prompt, tokens)),
        scores=_scores(folder),
        recipe_toml=dump(recipe, folder.root.absolute()),
        choices=tuple(
            Chosen(each["key"], str(each["value"]), each["reason"]) for each in facts.get("choices", [])
        ),
        timings_s=tuple(timings.items()),
        peak_memory_bytes=((str(device.get("name", "device")), int(peak)),) if peak else (),
        versions=tuple((name, str(value)) for name, value in facts.get("versions", {}).items()),
        warnings=tuple(facts.get("warnings", [])),
    )


def pictures(place: Path) -> tuple[Picture, ...]:
    """The samples of one folder, in order, with the prompt and seed that each file tells."""
    found = []
    for path in sorted(place.glob("*.png")):
        if path.name == "grid.png":
            continue
        with Image.open(path) as image:
            text = dict(image.info)
        seed = int(text["seed"]) if "seed" in text else None
        found.append(Picture(path, str(text.get("prompt", "")), seed))
    return tuple(found)


def write_story(folder: RunFolder, recipe: Recipe, steps: int) -> Path:
    """One picture of a run, RUN/story.png: the photos, and below them the last samples by prompt.

    Raises:
        RecipeError: it cannot be written.
    """
    drawn = pictures(folder.step_samples(steps))
    prompts = list(dict.fromkeys(picture.prompt for picture in drawn))
    photos = [decode(record.path) for scan in scan_all(subjects_of(recipe)) for record in scan.records]
    rows: list[list[Image.Image | None]] = [[Image.fromarray(photo) for photo in photos]]
    for prompt in prompts:
        rows.append([_opened(picture.path) for picture in drawn if picture.prompt == prompt])
    side_px = max((image.width for row in rows[1:] for image in row if image), default=64)
    rows[0] = [image and ImageOps.fit(image, (side_px, side_px)) for image in rows[0]]
    grid = draw_grid(rows, row_labels=["the photos", *prompts])
    buffer = io.BytesIO()
    grid.save(buffer, "PNG", optimize=True)
    path = folder.root / "story.png"
    durable.save(path, buffer.getvalue())
    return path


def _selection(facts: Mapping[str, Any]) -> SelectionCurve | None:
    """What run.json tells of the choice; None where the last checkpoint was taken."""
    told: Mapping[str, Any] = facts.get("selection", {})
    if not told:
        return None
    curve = told["curve"]
    return SelectionCurve(
        steps=tuple(one["step"] for one in curve),
        score=tuple(one["score"] for one in curve),
        criterion=told["criterion"],
        dino=tuple(one["dino"] for one in curve),
        clip_t=tuple(one["clip_t"] for one in curve),
        chosen=told["chosen"],
        why=told["why"],
        backbones=tuple(told["backbones"].items()),
        images=told["prompts"] * told["images_per_prompt"],
    )


def _validation(facts: Mapping[str, Any]) -> str:
    """What the validation losses are of, in a sentence; "" without any."""
    told: Mapping[str, Any] = facts.get("validation", {})
    if not told:
        return ""
    groups = [("photo", told["photos"], told["held_out"])]
    if told["class_examples"]:
        groups.append(("class example", told["class_examples"], told["class_held_out"]))
    parts = [
        f"{count} {name}{'s' * (count != 1)} ({'kept from training' if held else 'trained on: not held out'})"
        for name, count, held in groups
    ]
    return f"the validation loss at fixed noise and {told['levels']} timesteps, of {' and '.join(parts)}."


def _scores(folder: RunFolder) -> ScoreTable | None:
    """What `lorabooth evaluate` left in the run folder; None if nothing, or of another adapter or version."""
    raw = read_json(folder.root / "evaluation.json")
    if not raw or not folder.adapter.is_file():
        return None
    names = raw.get("backbones", {})
    try:
        if raw["facts"]["adapter"] != adapter_digest(folder.adapter):
            return None
        subjects = tuple(
            (
                str(one["subject"]),
                tuple(
                    (title, tuple(_cells(Scores.from_json(one[key]), names)))
                    for key, title in ROW_TITLES.items()
                ),
            )
            for one in raw.get("subjects", [])
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    if not subjects:
        return None
    page = "evaluation.html" if (folder.root / "evaluation.html").is_file() else ""
    headings = tuple(legend.heading for legend in METRICS)
    return ScoreTable(headings, subjects, backbone_line(names), page)


def _cells(scores: Scores, backbones: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    found = dict(scores.items())
    return (cell(legend, found[legend.key], backbones) for legend in METRICS)


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _pairs(before: Sequence[Picture], after: Sequence[Picture]) -> list[Pair]:
    """Pictures of the same prompt and seed, adapter off and on."""
    by_key = {(picture.prompt, picture.seed): picture.path for picture in before}
    return [
        Pair(picture.prompt, picture.seed, by_key[picture.prompt, picture.seed], picture.path)
        for picture in after
        if picture.seed is not None and (picture.prompt, picture.seed) in by_key
    ]


def _names_any(prompt: str, tokens: Sequence[str]) -> bool:
    words = prompt.replace(",", " ").split()
    return any(token in words for token in tokens)


def _headline(facts: Mapping[str, Any], folder: RunFolder) -> list[tuple[str, str]]:
    lines = []
    if folder.adapter.is_file():
        lines.append(("adapter", f"{folder.adapter.name}, {folder.adapter.stat().st_size / 1e6:.1f} MB"))
    adapter: Mapping[str, int] = facts.get("adapter", {})
    if adapter:
        lines.append(("trains", f"{adapter['modules']} modules, {adapter['parameters']:,} parameters"))
    classes: Mapping[str, Any] = facts.get("class_images", {})
    if classes:
        lines.append(("prior preservation", f"{classes['mode']}, {classes['images']} class images"))
    if plan := facts.get("plan"):
        lines.append(("memory plan", _plan_text(plan)))
    for each in facts.get("stepped_down", []):
        lines.append(("memory ran out", f"after step {each['step']}; then {each['technique']}"))
    return lines


def _plan_text(plan: Mapping[str, Any]) -> str:
    """What was chosen, predicted and measured: "checkpointing, 2 of 44 blocks; 3.6 GiB predicted ..."."""
    chosen = "; ".join(each["name"] for each in plan["chosen"]) or "no technique needed"
    planned, measured = plan["planned"], plan.get("measured", {}).get("allocated_bytes", {})
    text = f"{chosen}; {_gib(planned['peak_bytes'])} predicted in {planned['peak_phase']}"
    if "training" in measured:
        text += f"; training took {_gib(measured['training'])}"
    return text


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
