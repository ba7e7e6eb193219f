"""The table of benchmarks/prior_preservation.py: means, paired differences, costs beside quality."""

from __future__ import annotations

from benchmarks.prior_cells import CLASSES, MODES, SWEEPS, cells, shots
from benchmarks.prior_table import METRICS, Judged, _against, _rows, table

TOOK = {"step_s": 0.25, "peak_memory_bytes": 2**30, "timings_s": {"training": 75.0}}


def _judged(row: str, pres: tuple[float, ...]) -> list[Judged]:
    return [
        Judged(row, CLASSES[index], {**dict.fromkeys(METRICS), "pres": value}, TOOK)
        for index, value in enumerate(pres)
    ]


def test_a_row_has_means_over_specimens_and_what_they_took() -> None:
    (row,) = _rows(_judged("generated", (0.4, 0.5, 0.6)))
    assert abs(row["pres"]["mean"] - 0.5) < 1e-9
    assert row["pres"]["low"] < 0.5 < row["pres"]["high"]
    assert "dino" not in row
    assert (row["step_ms"], row["peak_mib"], row["seconds"]) == (250.0, 1024.0, {"training": 75.0})
    lines = table([row]).splitlines()
    assert lines[2].startswith("| generated | 3 |")
    assert lines[2].endswith("| 250 | 1024 |")


def test_differences_are_of_the_same_specimens() -> None:
    judged = _judged("generated", (0.4, 0.5, 0.6)) + _judged("none", (0.7, 0.8))
    found = _against(judged)["none"]["pres"]
    assert abs(found["mean"] - 0.3) < 1e-9
    assert abs(found["high"] - found["low"]) < 1e-9


def test_every_configuration_is_drawn_with_the_same_prompts_and_seeds() -> None:
    names = [cell.name for cell in cells([*MODES, *SWEEPS])]
    assert len(names) == len(set(names))
    first, second = shots("qzx", "mug", "mug"), shots("qzx", "thing", "mug")
    assert [(p.replace("mug", "thing"), s) for p, s in first["subject"]] == second["subject"]
    assert first["class"] == second["class"]
    assert not any("mug" in prompt for prompt, _ in first["unrelated"])
