import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lorabooth.evaluation.curves import (
    Curves,
    SelectionCurve,
    draw_curves,
    draw_selection,
    read_curves,
    smooth,
)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_metrics_are_read_back(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss": 0.5, "loss_instance": 0.3, "loss_prior": 0.2, "lr": 1e-4},
        {"step": 2, "loss": None, "loss_instance": None, "loss_prior": None, "lr": 1e-4, "skipped": True},
        {"step": 3, "loss": 0.4, "loss_instance": 0.1, "loss_prior": 0.3, "lr": 5e-5},
    ]
    path = write(tmp_path / "metrics.jsonl", rows)
    with path.open("a") as file:
        file.write('{"step": 4, "loss_ins')
    curves = read_curves(path)
    assert curves == Curves((1, 2, 3), (0.3, None, 0.1), (0.2, None, 0.3), (1e-4, 1e-4, 5e-5))


def test_a_step_done_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 3.0}]
    )
    curves = read_curves(path)
    assert curves is not None
    assert (curves.steps, curves.instance, curves.prior) == ((1, 2), (1.0, 3.0), (None, None))


def test_nothing_to_read(tmp_path: Path) -> None:
    assert read_curves(tmp_path / "absent") is None
    assert read_curves(write(tmp_path / "empty", [])) is None


def test_smoothing() -> None:
    assert smooth([4.0] * 5, 3) == pytest.approx([4.0] * 5)
    assert smooth([None, 2.0, None], 1) == [None, 2.0, 2.0]
    soft = smooth([0.0] * 50 + [1.0] * 4, 4)
    assert soft[-1] == pytest.approx(0.5, abs=1e-3)  # half of the weight lies within the half-life
    assert smooth([1.0, 0.0], 1) == pytest.approx([1.0, 1 / 3])


def test_a_panel_for_each_loss_that_there_is() -> None:
    steps = tuple(range(1, 41))
    instance = tuple(0.2 + math.sin(s) * 0.1 for s in steps)
    both = draw_curves(Curves(steps, instance, instance))
    assert len(both) == 2
    assert len(draw_curves(Curves(steps, instance, (None,) * 40))) == 1
    for svg, words in zip(both, ("Subject", "Class"), strict=True):
        root = ElementTree.fromstring(svg)
        assert "width" not in root.attrib
        assert words in "".join(root.itertext())
        assert "currentColor" in svg
        assert "<style" not in svg
    assert both == draw_curves(Curves(steps, instance, instance))


def test_long_and_short_runs_draw() -> None:
    steps = tuple(range(1, 30_001))
    assert len(draw_curves(Curves(steps, (0.1,) * 30_000, (None,) * 30_000))[0]) < 200_000
    assert draw_curves(Curves((1,), (0.0,), (0.1,)))


def test_validation_losses_are_read_and_drawn_where_there_are_any(tmp_path: Path) -> None:
    rows = [{"step": step, "loss_instance": 0.5, "loss_prior": 0.2} for step in (1, 2, 3, 4)]
    plain = read_curves(write(tmp_path / "plain", rows))
    assert plain is not None
    assert plain.validation_instance == plain.validation_prior == ()
    assert "validation" not in "".join(draw_curves(plain))
    for step in (2, 4):
        rows[step - 1] |= {"val_loss": 0.4, "val_loss_instance": 0.3}
    curves = read_curves(write(tmp_path / "validated", rows))
    assert curves is not None
    assert curves.validation_instance == (None, 0.3, None, 0.3)
    assert curves.validation_prior == ()
    subject, of_class = draw_curves(curves)
    assert "validation" in subject
    assert "validation" not in of_class


def test_a_panel_for_each_measure_of_the_checkpoints() -> None:
    def curve(criterion: str, clip_t: tuple[float | None, ...] = (0.4, 0.3)) -> SelectionCurve:
        return SelectionCurve((10, 20), (0.2, 0.21), criterion, (0.5, 0.7), clip_t, chosen=20)

    texts = [
        "".join(ElementTree.fromstring(svg).itertext()) for svg in draw_selection(curve("DINO x CLIP-T"))
    ]
    assert [text.count("step") for text in texts] == [1, 1, 1]
    for text, words in zip(texts, ("DINO x CLIP-T", "subject fidelity", "prompt fidelity"), strict=True):
        assert words in text
    assert len(draw_selection(curve("DINO"))) == 2, "what decides is not drawn twice"
    assert len(draw_selection(curve("DINO", (None, None)))) == 1
    assert draw_selection(SelectionCurve((), (), "DINO", (), (), chosen=6)) == ()
