"""Every file of the corpus is used, refused or left out as it should be, and the CLI accounts for all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lorabooth.data import images, records
from lorabooth.recipe.rules import printable
from lorabooth.types import Role
from tests.data import corpus
from tests.data.corpus import CASES, Case

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names and links")
ROOT = Path(__file__).parents[2]


def _look(folder: Path) -> tuple[records.Scan, images.PhotoReport]:
    found = records.scan(folder, role=Role.INSTANCE, subject="x mug", prompt="a mug", captions=False)
    return found, images.check(found.records, resolution_px=64)


@pytest.mark.parametrize("case", CASES, ids=[printable(case.name) for case in CASES])
def test_fate_of_each_file(tmp_path: Path, case: Case) -> None:
    if case.needs_user and os.geteuid() == 0:
        pytest.skip("root reads everything; the test of the CLI below gives that up")
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "0.png").write_bytes(corpus.encoded("PNG"))
    case.make(folder / case.name)
    found, report = _look(folder)
    path = folder / case.name
    used = [facts.path for facts in report.used]
    refused, left_out = dict(report.problems), {skip.path: skip.reason for skip in found.skipped}
    fates = {"used": path in used, "refused": path in refused, "left out": path in left_out}
    assert [fate for fate, is_so in fates.items() if is_so] == [case.fate]
    assert case.told in (refused | left_out).get(path, "")
    assert folder / "0.png" in used
    if case.fate == "used":
        pixels = images.decode(path).astype(int)
        assert pixels.shape == (corpus.HEIGHT_PX, corpus.WIDTH_PX, 3)
        seen = np.array([pixels[y, x] for y in (10, -10) for x in (10, -10)])
        assert np.abs(seen - np.array(case.corners)).max() <= 4


def _train(folder: Path) -> subprocess.CompletedProcess[str]:
    words = ["train", "--base", "pocket", "--images", str(folder), "--noun", "mug"]
    return subprocess.run(
        [sys.executable, "-m", "lorabooth", *words, "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=300,
        preexec_fn=corpus.obey_permissions,
    )


def _is_plain(text: str) -> bool:
    """Whether nothing in it steers a terminal."""
    return all(printable(line) == line for line in text.split("\n"))


def test_one_report_of_the_real_cli_names_them_all(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    cases = corpus.make(folder)
    done = _train(folder)
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    assert _is_plain(done.stderr)
    report = done.stderr.split("error: ")[1]
    lines = report.splitlines()
    by_fate = {fate: [c for c in cases if c.fate == fate] for fate in ("used", "refused", "left out")}
    n_bad, n_out = len(by_fate["refused"]), len(by_fate["left out"])
    assert lines[0] == f"{n_bad} of {n_bad + len(by_fate['used'])} photos cannot be used:"
    assert lines[n_bad + 1] == f"{n_out} other files left out:"
    assert len(lines) == n_bad + n_out + 3, report
    for block, fate in ((lines[1 : n_bad + 1], "refused"), (lines[n_bad + 2 : -1], "left out")):
        for case in by_fate[fate]:
            start = f"  {printable(str(folder / case.name))}: "
            (line,) = [each for each in block if each.startswith(start)]
            assert case.told in line
    assert "Replace these files" in lines[-1]
    assert sorted(os.listdir(folder)) == sorted(case.name for case in cases)  # noqa: PTH208


@pytest.mark.slow
def test_what_is_left_trains_and_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    cases = corpus.make(folder, "used", "left out")
    corpus._of_size(40, 40)(folder / "small \x1b[31m.png")
    done = _train(folder)
    assert done.returncode == 0, done.stderr
    assert _is_plain(done.stdout)
    assert _is_plain(done.stderr)
    n_used = sum(case.fate == "used" for case in cases) + 1
    assert f"photos: used {n_used} of {len(cases) + 1} files\n" in done.stdout
    for case in cases:
        told = [line for line in done.stdout.splitlines() if line.startswith(f"  {printable(case.name)}: ")]
        assert len(told) == (case.fate == "left out")
        assert all(case.told in line for line in told)
    assert r"warning: small \x1b[31m.png: 40x40 px, enlarged 1.6 times" in done.stderr
