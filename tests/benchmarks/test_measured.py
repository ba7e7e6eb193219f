"""How commands are measured: in turn, each in a process of its own, and nothing left behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.measured import Command, measure, row, summary


def _writer(name: str, out: Path, log: Path) -> Command:
    code = f"open({str(log)!r}, 'a').write({name!r}); open({str(out)!r}, 'x').write('made'); print(7)"
    return Command(
        name, [sys.executable, "-c", code], makes=[out], sync=True, on_output=lambda text: {"n": int(text)}
    )


def test_rounds_alternate_and_what_was_made_is_removed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    commands = [_writer(name, tmp_path / name, log) for name in "ab"]
    found = measure(commands, 3)
    assert log.read_text() == "abbaab"
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
    assert [run["n"] for run in found["a"]["rounds"]] == [7, 7, 7]
    assert all(run["sync_s"] >= 0 < run["peak_rss_bytes"] for run in found["b"]["rounds"])


def test_what_later_commands_read_is_kept_to_the_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    commands = [_writer(name, tmp_path / name, log) for name in "ab"]
    measure(commands, 2, keep=True)
    assert log.read_text() == "abab"
    assert (tmp_path / "a").exists()


def test_a_failed_command_ends_the_run_and_says_why(tmp_path: Path) -> None:
    command = Command("broken", [sys.executable, "-c", "raise SystemExit('no such thing')"])
    with pytest.raises(SystemExit, match="no such thing"):
        measure([command], 1)


def test_medians_of_times_and_the_largest_memory() -> None:
    runs = [
        {"wall_s": s, "cpu_s": 1.0, "peak_rss_bytes": m} for s, m in ((3.0, 1), (1.0, 9_000_000), (2.0, 2))
    ]
    found = summary(runs)
    assert (found["wall_s"], found["peak_rss_bytes"]) == (2.0, 9_000_000)
    assert "2.00 s" in row("x", runs)
    assert "9 MB" in row("x", runs)
