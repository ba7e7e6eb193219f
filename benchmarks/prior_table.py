"""From the cells of benchmarks/prior_preservation.py to a JSON file, a table and a figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.facts import machine_facts
from benchmarks.prior_cells import (
    CLASSES,
    TOKEN,
    Cell,
    Configuration,
    cells,
    shots,
    told_noun,
    write_photos,
)

METRICS = ("dino", "clip_i", "clip_t", "pres", "div", "drift")
TITLES = {
    "dino": "DINO ↑",
    "clip_i": "CLIP-I ↑",
    "clip_t": "CLIP-T ↑",
    "pres": "PRES ↓",
    "div": "DIV ↑",
    "drift": "drift ↓",
}


@dataclass(frozen=True, slots=True)
class Judged:
    """One adapter of one cell.

    Attributes:
        row: configuration, with its step where several were judged.
        specimen: class name.
        means: metric -> mean over the cell's images; None where it does not exist.
        took: step time, peak memory and phases of the cell; empty for rows without training.
    """

    row: str
    specimen: str
    means: Mapping[str, float | None]
    took: Mapping[str, Any]


def write_results(configurations: Sequence[Configuration], work: Path, out: Path, notes: str = "") -> None:
    """Measure every finished cell; write prior_preservation.json, .md and .png into `out`."""
    judged, names = _judge(configurations, work)
    if not judged:
        raise SystemExit(f"{work} holds no finished cell")
    rows = _rows(judged)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": machine_facts(),
        "notes": notes,
        "backbones": names,
        "rows": rows,
        "against_generated": _against(judged),
    }
    (out / "prior_preservation.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = table(rows)
    (out / "prior_preservation.md").write_text(text, encoding="utf-8")
    from benchmarks.prior_figure import draw

    draw(rows, out / "prior_preservation.png")
    print(text)


def _judge(configurations: Sequence[Configuration], work: Path) -> tuple[list[Judged], dict[str, str]]:
    from lorabooth.evaluation.backbones import open_backbones
    from lorabooth.evaluation.scoring import real_row, score

    backbones = open_backbones(base="pocket")
    found = []
    for index, name in enumerate(CLASSES):
        photos = [_opened(path) for path in sorted(write_photos(work, index, 5).glob("*.png"))]
        bare = _drawn(work / "base" / name, name, name)
        if bare is None:
            continue
        found.append(Judged("real photos", name, _means(real_row(backbones, photos)), {}))
        without = score(backbones, photos=photos, images=bare["subject"], class_images=bare["class"])
        found.append(Judged("without adapter", name, _means(without), {}))
        mine = [cell for cell in cells(configurations) if cell.specimen == index]
        for cell in mine:
            for row, drawn, took in _adapters(cell, work):
                scores = score(
                    backbones,
                    photos=photos,
                    images=drawn["subject"],
                    class_images=drawn["class"],
                    unrelated=drawn["unrelated"],
                    unrelated_before=bare["unrelated"],
                )
                found.append(Judged(row, name, _means(scores), took))
    return found, backbones.names()


def _adapters(cell: Cell, work: Path) -> list[tuple[str, dict[str, Any], Mapping[str, Any]]]:
    """Row name, images and costs of each adapter of a finished cell."""
    place = work / "cells" / cell.name
    if not (place / "cell.json").is_file():
        return []
    took = json.loads((place / "cell.json").read_text(encoding="utf-8"))
    found = []
    for at in took["at"]:
        drawn = _drawn(place / "images" / at, told_noun(cell), CLASSES[cell.specimen])
        assert drawn is not None, f"{cell.name}: images are missing"
        several = len(took["at"]) > 1
        found.append(
            (f"{cell.configuration.name}: {at}" if several else cell.configuration.name, drawn, took)
        )
    return found


def _drawn(place: Path, noun: str, true_class: str) -> dict[str, Any] | None:
    """Purpose -> images of a folder; CLIP-T's captions have the true noun and no token."""
    from lorabooth.evaluation.scoring import Drawn

    found: dict[str, Any] = {}
    index = 0
    for kind, pairs in shots(TOKEN, noun, true_class).items():
        found[kind] = []
        for prompt, seed in pairs:
            file = place / f"{kind}-{index:03d}.png"
            index += 1
            if not file.is_file():
                return None
            caption = prompt.replace(f"{TOKEN} {noun}", true_class)
            found[kind].append(Drawn(prompt, seed, _opened(file), caption))
    return found


def _opened(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def _means(scores: Any) -> dict[str, float | None]:
    found = {name: getattr(scores, name) for name in METRICS}
    return {name: None if value is None else value.mean for name, value in found.items()}


def _rows(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """A row a configuration: every metric with its interval over the specimens, and what it took."""
    from lorabooth.evaluation.metrics import measured

    rows = []
    for name in dict.fromkeys(each.row for each in judged):
        mine = [each for each in judged if each.row == name]
        row: dict[str, Any] = {"configuration": name, "specimens": [each.specimen for each in mine]}
        for metric in METRICS:
            values = [value for each in mine if (value := each.means[metric]) is not None]
            if values:
                over = measured(values)
                row[metric] = {"mean": over.mean, "low": over.low, "high": over.high, "values": values}
        took = [each.took for each in mine if each.took]
        if took:
            row["step_ms"] = 1000 * statistics.median(each["step_s"] for each in took)
            row["peak_mib"] = statistics.median(each["peak_memory_bytes"] for each in took) / 2**20
            phases = {p for each in took for p in each["timings_s"]}
            row["seconds"] = {
                p: statistics.median(each["timings_s"].get(p, 0.0) for each in took) for p in sorted(phases)
            }
        rows.append(row)
    return rows


def _against(judged: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """Row -> metric -> difference to "generated" on the same specimens, with its interval."""
    from lorabooth.evaluation.metrics import difference, measured

    base = {each.specimen: each.means for each in judged if each.row == "generated"}
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(each.row for each in judged if each.row != "generated"):
        mine = [each for each in judged if each.row == name and each.specimen in base]
        for metric in METRICS:
            pairs = [
                (a, b)
                for each in mine
                if (a := each.means[metric]) is not None and (b := base[each.specimen][metric]) is not None
            ]
            if len(pairs) > 1:
                over = difference(measured([a for a, _ in pairs]), measured([b for _, b in pairs]))
                found.setdefault(name, {})[metric] = {"mean": over.mean, "low": over.low, "high": over.high}
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: quality, step time and peak memory of each configuration side by side."""
    head = ["configuration", "n", *TITLES.values(), "step (ms)", "peak (MiB)"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cellsof = [_cell(row.get(metric)) for metric in METRICS]
        costs = [f"{row[key]:.0f}" if key in row else "" for key in ("step_ms", "peak_mib")]
        lines.append(
            "| " + " | ".join([row["configuration"], str(len(row["specimens"])), *cellsof, *costs]) + " |"
        )
    return "\n".join(lines) + "\n"


def _cell(metric: Mapping[str, float] | None) -> str:
    if metric is None:
        return ""
    if metric["low"] is None:
        return f"{metric['mean']:.3f}"
    return f"{metric['mean']:.3f} ({metric['low']:.3f} to {metric['high']:.3f})"
