"""How well the pocket world's subject encoder tells specimens apart.

    python benchmarks/subject_encoder.py

Every specimen of a stream that training has not seen is sought, by a picture in any style, place, pose and
accessory, among one photo each of a hundred specimens of its class. Writes results/subject_encoder.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.facts import machine_facts
from lorabooth.pocket.base import pocket_dir
from lorabooth.pocket.card import subject_section, with_section
from lorabooth.pocket.judge import share
from lorabooth.pocket.scenes import CLASSES, STYLES
from lorabooth.pocket.subject import Answer, load_subject_encoder, retrieval
from lorabooth.pocket.trainer import read_state

AIMED_AT = 0.90
RESULTS = Path(__file__).parent / "results"


def _share(answers: Sequence[Answer]) -> dict[str, Any]:
    found = share(sum(answer.right for answer in answers), len(answers))
    return {**asdict(found), "value": found.value}


def main() -> int:
    """Measure, print, write; 1 if the aim is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="a pocket base; the embedded one by default")
    parser.add_argument("--per-class", type=int, default=100, help="specimens of each class")
    parser.add_argument("--out", type=Path, default=RESULTS / "subject_encoder.json")
    parser.add_argument(
        "--state", type=Path, help="training state: writes the section of the card beside the weights"
    )
    parser.add_argument("--notes", default="", help="a sentence for the card on how this one came about")
    options = parser.parse_args()
    encoder = load_subject_encoder(options.folder or pocket_dir())
    answers = retrieval(encoder, 0, per_class=options.per_class)
    coloured = [answer for answer in answers if answer.style != "pencil sketch"]
    figures = {
        "all": _share(answers),
        "photos and paintings": _share(coloured),
        "by style": {s: _share([a for a in answers if a.style == s]) for s in STYLES},
        "by class": {c: _share([a for a in answers if a.class_name == c]) for c in CLASSES},
        "by class, photos and paintings": {
            c: _share([a for a in coloured if a.class_name == c]) for c in CLASSES
        },
    }
    record = {
        "aimed_at": AIMED_AT,
        "among": options.per_class,
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "retrieval": figures,
        "machine": machine_facts(),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.state is not None:
        info = read_state(options.state)[1]
        card = (options.folder or pocket_dir()) / "README.md"
        section = subject_section(record, info["step"], info["elapsed_s"] / 60, options.notes)
        card.write_text(with_section(card.read_text(encoding="utf-8"), section), encoding="utf-8")
    for name in ("all", "photos and paintings"):
        found: Any = figures[name]
        print(f"{name}: {found['value']:.1%} ({found['low']:.1%} to {found['high']:.1%})")
    for kind in ("by style", "by class"):
        rows: Any = figures[kind]
        print(f"{kind}: " + ", ".join(f"{name} {row['value']:.0%}" for name, row in rows.items()))
    return 0 if share(sum(a.right for a in answers), len(answers)).value >= AIMED_AT else 1


if __name__ == "__main__":
    sys.exit(main())
