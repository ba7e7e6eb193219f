from __future__ import annotations

import pytest
from rich.console import Console

from lorabooth.evaluation.backbones import NOT_AVAILABLE
from lorabooth.evaluation.cells import cell, interval, number
from lorabooth.evaluation.legend import METRICS
from lorabooth.evaluation.metrics import Measured
from lorabooth.evaluation.scoring import Scores
from lorabooth.protocol.tables import backbone_line, markdown_table, terminal_table

NAMES = {"dino": "an encoder", "clip": "a clip", "lpips": NOT_AVAILABLE}
FULL = Scores(*(Measured(0.6123, 0.594, 0.641) for _ in range(4)))
ROWS = [("real images", Scores(dino=Measured(0.9, None, None))), ("adapter off", FULL), ("adapter on", FULL)]


def test_the_legend_is_in_the_order_of_the_scores() -> None:
    assert [legend.key for legend in METRICS] == [key for key, _ in Scores().items()]
    assert {legend.key for legend in METRICS if not legend.higher_is_better} == {"pres", "drift"}
    assert METRICS[3].heading == "PRES ↓"


@pytest.mark.parametrize(
    ("value", "sign", "text"),
    [(0.6123, False, "0.612"), (0.05, True, "+0.050"), (-0.05, True, "−0.050"), (-0.0001, True, "0.000")],
)
def test_numbers(value: float, sign: bool, text: str) -> None:
    assert number(value, sign=sign) == text


def test_cells_say_why_they_are_empty() -> None:
    assert interval(Measured(0.6, 0.594, 0.641)) == "0.59…0.64"
    assert interval(Measured(0.6, None, None)) == ""
    assert cell(METRICS[0], None, NAMES) == ("–", "")
    assert cell(METRICS[4], None, NAMES) == ("not measured", "")


def test_a_terminal_of_80_columns_shows_every_number_whole() -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(terminal_table(ROWS, {**NAMES, "lpips": "a distance"}, title="qzx mug", strong=[2]))
    shown = captured.get()
    assert shown.count("0.612") == 8
    assert shown.count("0.59…0.64") == 8
    assert all(name in shown for name, _ in ROWS)
    assert all(legend.heading in shown for legend in METRICS)


def test_markdown_has_a_column_a_metric_and_a_line_a_row() -> None:
    lines = markdown_table([*ROWS, ("a|b", Scores())], NAMES).splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert lines[2].startswith("| real images | 0.900 | –")
    assert "0.612 (0.59…0.64)" in lines[3]
    assert lines[3].endswith("| not measured | not measured |")
    assert lines[5].startswith("| a\\|b |")


def test_the_backbones_are_named_in_one_line() -> None:
    assert backbone_line(NAMES) == (
        "DINO and PRES: an encoder; CLIP-I and CLIP-T: a clip; DIV and drift: not available"
    )
