"""The README's table is what the files in benchmarks/results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed_table import BEGIN, END, RESULTS, rows, table, with_table
from tests.documents import ROOT


def test_the_readme_has_the_table_of_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_table(text, table()) == text, "run python benchmarks/speed_table.py"


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    (tmp_path / "step_time.json").write_bytes((RESULTS / "step_time.json").read_bytes())
    found = rows(tmp_path)
    assert "not measured" in {row.ours for row in found}
    missing = [row.what for row in found if not row.where]
    assert missing == ["`photos_to_adapter.py`", "`lora_overhead.py`", "`scaling.py`", "`merge.py`"]


def test_a_changed_figure_changes_its_row(tmp_path: Path) -> None:
    facts = json.loads((RESULTS / "step_time.json").read_text(encoding="utf-8"))
    facts["rows"][0]["ours_step_s"] = 123.456
    (tmp_path / "step_time.json").write_text(json.dumps(facts), encoding="utf-8")
    changed = rows(tmp_path)[0]
    assert changed.ours.startswith("123.46 s")
    assert changed.what == rows()[0].what


def test_a_document_without_marks_is_left_alone() -> None:
    with pytest.raises(ValueError, match="begin"):
        with_table(f"text {END}", "new")
    assert with_table(f"a {BEGIN}\nold\n{END} b", "new") == f"a {BEGIN}\nnew\n{END} b"
