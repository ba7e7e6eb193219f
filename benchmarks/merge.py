"""Wall time and peak memory of the commands on files, beside `cp` and beside diffusers' own merging.

    python benchmarks/merge.py --work DIR            # 15 GB free in DIR, 16 GB of memory for diffusers
    python benchmarks/merge.py --size tiny --rounds 1 --out /tmp/tiny.json

The base is SDXL in fp16 with random weights, 6.9 GB, as one checkpoint and as a diffusers folder; adapters
are in kohya's layout, on attention, feed-forward and projections. Every command is a process of its own, its
inputs are read once before the clock starts, and everything older is on the disk by then. Rounds alternate,
so that a busy machine is busy for all. `merge` ends when the disk has the result; the others' `sync` is
measured apart. The figures are medians, memory is the largest peak; all rounds are in the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.file_commands import GROUPS, Cases, ratios  # noqa: E402
from benchmarks.made_files import SD15_BYTES, SDXL_BYTES, Files  # noqa: E402
from benchmarks.measured import row  # noqa: E402


def main() -> None:
    """Measure, print, write JSON."""
    args = _arguments()
    # An installed program's modules are compiled, and so are ours.
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(HERE.parent / "lorabooth")], check=True)
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lorabooth-merge-", dir=args.work) as temporary:
        files = Files(Path(temporary), args.size == "tiny")
        files.out("").mkdir()
        if not files.tiny:
            _require_space(files.work, args.only)
        disk = _disk_facts(files.work)
        cases: Cases = {}
        for name, run in GROUPS.items():
            if name in args.only:
                if name not in ("file", "inspect"):
                    files.drop("base.safetensors")
                print(f"{name}:", file=sys.stderr, flush=True)
                cases |= run(files, args.rounds)
    result = _result(args, disk, cases)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(_table(cases, result["ratios"]))
    print(f"\nwritten to {args.out}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="a folder on a disk")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), metavar="NAME")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--out", type=Path, help="[benchmarks/results/merge.json]")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds: at least 1")
    if args.out is None:
        if args.size == "tiny" or set(args.only) != set(GROUPS):
            parser.error("give --out: benchmarks/results/merge.json is for the whole run at full size")
        args.out = HERE / "results" / "merge.json"
    return args


def _require_space(work: Path, only: list[str]) -> None:
    """The base and one result of its size at a time; adapters beside them."""
    needed = 2 * SDXL_BYTES if {"file", "folder", "inspect"} & set(only) else 2 * SD15_BYTES
    needed += 3_000_000_000
    free = shutil.disk_usage(work).free
    if free < needed:
        raise SystemExit(f"{work}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB will be written")


def _result(args: argparse.Namespace, disk: dict[str, Any], cases: Cases) -> dict[str, Any]:
    from benchmarks.facts import machine_facts

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "what": "wall and processor seconds (medians) and peak resident bytes (largest) of whole processes; "
        "inputs in the page cache; lorabooth's results are on the disk when it ends",
        "machine": machine_facts() | {"memory_bytes": memory} | disk,
        "size": "SDXL, fp16, 6.9 GB" if args.size == "full" else "tiny",
        "rounds": args.rounds,
        "ratios": ratios(cases),
        "cases": cases,
    }


def _disk_facts(work: Path) -> dict[str, Any]:
    """File system, whether it shares blocks between copies, and which `cp` this is."""
    kind = subprocess.run(
        ["df", "--output=fstype", str(work)], capture_output=True, text=True, check=False
    ).stdout.split()
    version = subprocess.run(["cp", "--version"], capture_output=True, text=True, check=False).stdout
    probe, copy = work / "probe", work / "probe-copy"
    probe.write_bytes(b"0" * 4096)
    clone = ["cp", "--reflink=always", str(probe), str(copy)]
    shares = subprocess.run(clone, capture_output=True, check=False).returncode == 0
    for path in (probe, copy):
        path.unlink(missing_ok=True)
    return {
        "file_system": kind[-1] if kind else "unknown",
        "reflink": shares,
        "cp": version.partition("\n")[0],
    }


def _table(cases: Cases, found: dict[str, Any]) -> str:
    lines = [f"{'command':<34} {'wall':>10} {'processor':>10} {'peak memory':>11}"]
    lines += [row(name, case["rounds"]) for name, case in cases.items()]
    for name, ratio in found.items():
        more = f", {ratio['their_memory']:.1f} times the memory there" if "their_memory" in ratio else ""
        if "speed_before_disk" in ratio:
            more = f"; before the disk is waited for: {ratio['speed_before_disk']:.2f}{more}"
        lines.append(
            f"speed of {name}: {ratio['speed']:.2f}; by the fastest rounds: {ratio['speed_of_fastest']:.2f}; "
            f"of that and sync: {ratio['speed_and_sync']:.2f}{more}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
