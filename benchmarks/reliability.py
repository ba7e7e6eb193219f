"""What is survived, in one table: kills, full disks, wrong inputs, mutated files, resumed configurations.

    python benchmarks/reliability.py                   (500 kills of real processes: hours)
    python benchmarks/reliability.py --kills 500 --fork --jobs 1

The figures are those of the tests themselves, which are run here: a kill counts if the run went on to the
end of the undisturbed one, an input if the test that refuses it passes. Exit code 1 if anything did not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.facts import machine_facts  # noqa: E402

_PARAMETER = re.compile(r"\w+\[(.*)\]", re.DOTALL)


@dataclass(frozen=True)
class Group:
    """Tests whose cases are counted.

    Attributes:
        name: in the table.
        tests: files, or "file::test".
        each: a text that the file's constant "NAME = number" is found by, if a test is so many cases.
    """

    name: str
    tests: tuple[str, ...]
    each: str = ""


INPUTS = (
    Group("photo files: used, refused or left out", ("tests/data/test_corpus.py::test_fate_of_each_file",)),
    Group(
        "tensor files: refused",
        ("tests/checkpoints/test_header.py::test_each_way_to_be_wrong_is_refused_and_named",),
    ),
    Group(
        "recipes and overrides: refused",
        tuple(
            f"tests/recipe/test_every_error.py::{name}"
            for name in (
                "test_a_wrong_type_of_each_field_alone",
                "test_texts_that_python_itself_stumbles_over",
                "test_overrides_that_used_to_crash",
                "test_files_that_are_no_recipes",
            )
        ),
    ),
    Group(
        "command lines: refused",
        tuple(
            f"tests/test_bad_input.py::{name}"
            for name in (
                "test_one_message_and_the_right_code",
                "test_a_base_that_is_not_there",
                "test_what_is_told_before_the_base_is_loaded",
                "test_recipe_files_that_python_stumbles_over",
            )
        ),
    ),
)
MUTATIONS = Group(
    "mutated tensor files",
    (
        "tests/checkpoints/test_header_fuzz.py"
        "::test_ten_thousand_mutations_are_read_as_the_library_reads_them_or_refused",
    ),
    each="MUTATIONS",
)
RESUMED = Group(
    "interrupted twice, equal to never",
    ("tests/training/test_resume_matrix.py::test_interrupted_twice_is_never_interrupted",),
)
FULL_DISK = Group("full disks", ("tests/faults/test_full_disk.py",))


def run_tests(group: Group) -> dict[str, Any]:
    """Run a group's tests, slow ones too.

    Returns:
        "cases" and "failed" (numbers), "skipped" (names), and "results": parameter -> "passed", "failed",
        "skipped".
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "", f"--junitxml={report}", *group.tests],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=3600,
        )
        if not report.is_file():
            raise SystemExit(
                f"{group.name}: the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        results = read_report(report.read_text(encoding="utf-8"))
    states = list(results.values())
    if done.returncode:
        print(done.stdout[-4000:], file=sys.stderr)
    if "passed" not in states or (done.returncode and "failed" not in states):
        raise SystemExit(f"{group.name}: the tests did not run as they should\n{done.stdout[-2000:]}")
    factor = constant(ROOT / group.tests[0].partition("::")[0], group.each) if group.each else 1
    return {
        "cases": factor * states.count("passed"),
        "failed": states.count("failed"),
        "skipped": [name for name, state in results.items() if state == "skipped"],
        "results": results,
    }


def read_report(text: str) -> dict[str, str]:
    """pytest's JUnit report as test case -> "passed", "failed" or "skipped"."""
    results: dict[str, str] = {}
    for case in ElementTree.fromstring(text).iter("testcase"):
        kinds = {child.tag for child in case}
        state = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        results[f"{case.get('classname')}::{case.get('name')}"] = state
    return results


def constant(file: Path, name: str) -> int:
    """The number that a Python file gives to a name at its top level.

    Raises:
        SystemExit: there is none.
    """
    found = re.search(rf"^{name} = ([\d_]+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit(f"{file} has no {name}")
    return int(found[1])


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Kill processes; the soak test's own figures."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "soak.json"
        line = [sys.executable, "-m", "tests.faults.soak", "--json", str(report)]
        line += ["--kills", str(options.kills), "--jobs", str(options.jobs)]
        done = subprocess.run([*line, "--fork"] if options.fork else line, cwd=ROOT, check=False)
        if not report.is_file():
            raise SystemExit(f"the soak test ended with {done.returncode} and no figures")
        figures: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return {**figures, "processes": "forked" if options.fork else "started", "failed": done.returncode}


def table(result: dict[str, Any]) -> list[str]:
    """The figures as lines."""
    kills, full = result["kills"], result["full_disk"]
    rows = [
        (f"kills survived ({kills['processes']} processes, {kills['runs']} runs)", kills["kills"]),
        ("  kinds of change on the disk died at", kills["kinds_of_change_died_at"]),
        ("  torn files found", kills["torn_files"]),
        ("  files left behind", kills["files_left_behind"]),
        ("  runs that differ", kills["runs_that_differ"]),
        ("full disks survived", f"{full['cases']}, failed {full['failed']}, skipped {len(full['skipped'])}"),
    ]
    for name, group in result["inputs"].items():
        rows.append((name, f"{group['cases']}, failed {group['failed']}, skipped {len(group['skipped'])}"))
    rows.append((MUTATIONS.name, f"{result['mutations']['cases']}, failed {result['mutations']['failed']}"))
    rows.append((RESUMED.name, f"{result['resumed']['cases']} configurations"))
    for name, state in result["resumed"]["results"].items():
        found = _PARAMETER.fullmatch(name.rpartition("::")[2])
        rows.append((f"  {found[1] if found else name}", _WORDS[state]))
    return [f"{name:<92} {value}" for name, value in rows]


_WORDS = {"passed": "equal", "failed": "DIFFERS", "skipped": "not tried"}


def failures(result: dict[str, Any]) -> int:
    """Of everything."""
    kinds = ("kills", "full_disk", "mutations", "resumed")
    groups = [*(result[kind] for kind in kinds), *result["inputs"].values()]
    return sum(group["failed"] for group in groups)


def main() -> int:
    """Run, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--fork", action="store_true", help="fork the killed processes: a fifth of the time")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "reliability.json")
    options = parser.parse_args()
    began_s = time.monotonic()
    result: dict[str, Any] = {
        "what": "kills survived, inputs refused, mutations tried, configurations resumed to the same bytes",
        "machine": machine_facts(),
        "inputs": {group.name: run_tests(group) for group in INPUTS},
        "mutations": run_tests(MUTATIONS),
        "resumed": run_tests(RESUMED),
        "full_disk": run_tests(FULL_DISK),
        "kills": soak(options),
    }
    result["minutes"] = round((time.monotonic() - began_s) / 60, 1)
    for group in (*result["inputs"].values(), result["mutations"]):
        group["results"] = {name: state for name, state in group["results"].items() if state == "failed"}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join(table(result)))
    return 1 if failures(result) else 0


if __name__ == "__main__":
    sys.exit(main())
