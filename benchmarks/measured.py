"""One command in a process of its own: wall time, processor time, peak resident memory of that process.

The kernel counts the memory of the process that starts another into the other's peak, so that a program that
measures with this must itself stay small (about 35 MB, the least that is ever reported): it imports neither
numpy nor torch, and has its files made elsewhere.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_READ_BYTES = 16 << 20


@dataclass(frozen=True)
class Command:
    """What is measured.

    Attributes:
        name: in the results.
        line: program and arguments.
        reads: files and folders that are read once before the clock starts, so that all commands find them
            in memory.
        makes: files and folders that are removed before and afterwards.
        sync: measure the time of `sync` on what was made, too.
        on_output: given what the command printed; gives further figures of this run.
    """

    name: str
    line: Sequence[str]
    reads: Sequence[Path] = ()
    makes: Sequence[Path] = ()
    sync: bool = False
    on_output: Callable[[str], dict[str, Any]] = field(default=lambda _: {})


def lorabooth(*arguments: str | Path) -> list[str]:
    """The command line of a lorabooth command."""
    return [sys.executable, "-m", "lorabooth", *map(str, arguments)]


def measure(commands: Sequence[Command], rounds: int, *, keep: bool = False) -> dict[str, dict[str, Any]]:
    """Run every command once a round, the order reversed in every other round.

    Args:
        commands: in the order of the first round.
        rounds: how often.
        keep: leave what the commands made where the last round ended; later commands read it. The order is
            then the same in every round.

    Returns:
        Command -> medians, largest peak memory, and all rounds.
    """
    found: dict[str, list[dict[str, Any]]] = {command.name: [] for command in commands}
    for round_ in range(rounds):
        ordered = commands if keep or round_ % 2 == 0 else commands[::-1]
        for command in ordered:
            run = _run(command)
            found[command.name].append(run)
            print(f"  round {round_ + 1}  {row(command.name, [run])}", file=sys.stderr, flush=True)
            if not keep:
                remove(command.makes)
        if keep and round_ + 1 < rounds:
            remove([path for command in commands for path in command.makes])
    return {name: summary(runs) for name, runs in found.items()}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the times, largest of the peaks, and the runs themselves."""
    times = [key for key in runs[0] if key.endswith("_s")]
    return {
        **{key: round(statistics.median(run[key] for run in runs), 3) for key in times},
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
        "rounds": list(runs),
    }


def row(name: str, runs: Sequence[dict[str, Any]]) -> str:
    """A line of the table."""
    found = summary(runs)
    sync = f"  + sync {found['sync_s']:.1f} s" if "sync_s" in found else ""
    return (
        f"{name:<34} {found['wall_s']:8.2f} s {found['cpu_s']:8.2f} s {found['peak_rss_bytes'] / 1e6:8.0f} MB"
        f"{sync}"
    )


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders, and wait until the disk has done so."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    os.sync()


def _run(command: Command) -> dict[str, Any]:
    remove(command.makes)
    for path in command.reads:
        _read(path)
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        process = subprocess.Popen(
            command.line, stdout=output, stderr=errors, stdin=subprocess.DEVNULL, cwd=ROOT, env=_environment()
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait for it again
        output.seek(0)
        errors.seek(0)
        printed, complaint = output.read().decode(), errors.read().decode()
    if process.returncode:
        line = " ".join(command.line)
        raise SystemExit(f"{command.name} ended with {process.returncode}: {line}\n{complaint[-3000:]}")
    run = {
        "wall_s": round(wall_s, 3),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }
    if command.sync:
        began = time.perf_counter()
        for path in command.makes:
            subprocess.run(["sync", *map(str, files_in(path))], check=True)
        run["sync_s"] = round(time.perf_counter() - began, 3)
    return run | command.on_output(printed)


def files_in(path: Path) -> list[Path]:
    """A file itself; a folder's files."""
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def _read(path: Path) -> None:
    buffer = bytearray(_READ_BYTES)
    for file in files_in(path):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def _environment() -> dict[str, str]:
    """Without the hub, and with compiled modules kept, as an installed program has them."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
