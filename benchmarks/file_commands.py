"""What benchmarks/merge.py measures: for each group of commands, their lines, inputs and outputs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from benchmarks.made_files import Files, size_bytes
from benchmarks.measured import ROOT, Command, lorabooth, measure

Cases = dict[str, dict[str, Any]]
"""Command -> what was measured."""

RANKS = (16, 64)


def merge_file(files: Files, rounds: int) -> Cases:
    """`cp` of the single file, and merging into it."""
    base, copy = files.base, files.out("copy.safetensors")
    commands = [Command("cp", ["cp", str(base), str(copy)], [base], [copy], sync=True)]
    for rank in RANKS:
        adapter, out = files.adapter(rank), files.out(f"merged-{rank}.safetensors")
        line = lorabooth("merge", "--base", base, "--adapter", adapter, "--out", out, "--json")
        commands.append(Command(f"merge rank {rank}", line, [base, adapter], [out], on_output=_waited))
    return measure(commands, rounds)


def merge_folder(files: Files, rounds: int) -> Cases:
    """Merging into a diffusers folder, diffusers' way and ours."""
    base, adapter = files.folder, files.adapter(RANKS[0])
    ours, theirs = files.out("ours"), files.out("theirs")
    peer = [sys.executable, str(ROOT / "benchmarks" / "fuse_peer.py"), str(base), str(adapter), str(theirs)]
    line = lorabooth("merge", "--base", base, "--adapter", adapter, "--out", ours, "--quiet")
    found = measure(
        [
            Command("merge folder, diffusers", peer, [base, adapter], [theirs], sync=True, on_output=_parts),
            Command("merge folder, lorabooth", line, [base, adapter], [ours]),
        ],
        rounds,
    )
    files.drop("folder")
    return found


def inspect(files: Files, rounds: int) -> Cases:
    """`inspect` of a checkpoint and of an adapter."""
    targets = {"inspect base": files.base, f"inspect rank {RANKS[-1]}": files.adapter(RANKS[-1])}
    return measure(
        [Command(name, lorabooth("inspect", path), [path]) for name, path in targets.items()], rounds
    )


def convert(files: Files, rounds: int) -> Cases:
    """`convert` from kohya's layout to diffusers', and from there to PEFT's."""
    adapter, middle, last = files.adapter(RANKS[-1]), files.out("diffusers.safetensors"), files.out("peft")
    there = lorabooth("convert", adapter, "--to", "diffusers", "--out", middle, "--quiet")
    onward = lorabooth("convert", middle, "--to", "peft", "--out", last, "--quiet")
    found = measure(
        [
            Command("convert kohya to diffusers", there, [adapter], [middle]),
            Command("convert diffusers to peft", onward, [middle], [last]),
        ],
        rounds,
        keep=True,
    )
    files.drop("out/diffusers.safetensors", "out/peft")
    return found


def blend(files: Files, rounds: int) -> Cases:
    """`blend` of two adapters: exact at the sum of their ranks, and nearest at the rank of one."""
    first, second = files.adapter(RANKS[-1]), files.adapter(RANKS[-1], "b")
    commands = []
    for method, further in {"cat": (), "svd": ("--rank", str(RANKS[-1]))}.items():
        out = files.out(f"{method}.safetensors")
        line = lorabooth(
            "blend", f"{first}:0.7", f"{second}:0.5", "--method", method, *further, "--out", out, "--quiet"
        )
        commands.append(Command(f"blend {method}", line, [first, second], [out]))
    return measure(commands, rounds)


def resize(files: Files, rounds: int) -> Cases:
    """`resize` to a rank, to a share of the energy, and to a third of the size."""
    adapter = files.adapter(RANKS[-1])
    ways = {
        "rank": str(RANKS[0]),
        "energy": "0.95",
        "max-size": str(size_bytes(adapter) // 3),
    }
    commands = []
    for way, value in ways.items():
        out = files.out(f"{way}.safetensors")
        line = lorabooth("resize", adapter, f"--{way}", value, "--out", out, "--quiet")
        shown = "a third of the size" if way == "max-size" else f"{way} {value}"
        commands.append(Command(f"resize to {shown}", line, [adapter], [out]))
    return measure(commands, rounds)


def extract(files: Files, rounds: int) -> Cases:
    """`extract` from two Stable Diffusion 1.5 folders that differ in every weight."""
    base, tuned, out = files.sd15, files.tuned, files.out("extracted.safetensors")
    rank = str(RANKS[0])
    line = lorabooth("extract", "--base", base, "--tuned", tuned, "--rank", rank, "--out", out, "--quiet")
    found = measure([Command(f"extract SD1.5 rank {rank}", line, [base, tuned], [out])], rounds)
    files.drop("sd15", "tuned")
    return found


GROUPS: Mapping[str, Callable[[Files, int], Cases]] = MappingProxyType(
    {
        "file": merge_file,
        "inspect": inspect,
        "folder": merge_folder,
        "convert": convert,
        "blend": blend,
        "resize": resize,
        "extract": extract,
    }
)
"""In this order: the single file is made first, and removed before the folder is made."""


def ratios(cases: Cases) -> dict[str, Any]:
    """Speeds and memory of merging, beside `cp` and beside diffusers.

    "speed" is the other's median wall time over ours; ours ends when the disk has the bytes, the other's does
    so only where "and sync" stands. "speed_of_fastest" holds the fastest round against the fastest: on a
    virtual machine one `cp` may take three times as long as the next, all of it in the kernel.
    "speed_before_disk" leaves out ours after everything was written, when it only waits for the disk: what
    `cp` does not do.
    """
    found: dict[str, Any] = {}
    for rank in RANKS:
        if "cp" in cases and f"merge rank {rank}" in cases:
            found[f"merge rank {rank}, of cp"] = _beside(cases["cp"], cases[f"merge rank {rank}"])
    if "merge folder, diffusers" in cases:
        theirs, ours = cases["merge folder, diffusers"], cases["merge folder, lorabooth"]
        memory = theirs["peak_rss_bytes"] / ours["peak_rss_bytes"]
        found["merge folder, of diffusers"] = _beside(theirs, ours) | {"their_memory": round(memory, 2)}
    return found


def _beside(other: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    pairs = list(zip(other["rounds"], ours["rounds"], strict=True))
    found: dict[str, Any] = {
        "speed": round(other["wall_s"] / ours["wall_s"], 3),
        "speed_and_sync": round((other["wall_s"] + other["sync_s"]) / ours["wall_s"], 3),
        "speed_of_fastest": round(_fastest_s(other) / _fastest_s(ours), 3),
        "speed_by_round": [round(a["wall_s"] / b["wall_s"], 3) for a, b in pairs],
        "speed_and_sync_by_round": [round((a["wall_s"] + a["sync_s"]) / b["wall_s"], 3) for a, b in pairs],
    }
    if "waited_s" in ours:
        by_round = [a["wall_s"] / (b["wall_s"] - b["waited_s"]) for a, b in pairs]
        found["speed_before_disk"] = round(other["wall_s"] / (ours["wall_s"] - ours["waited_s"]), 3)
        found["speed_before_disk_by_round"] = [round(ratio, 3) for ratio in by_round]
    return found


def _fastest_s(case: dict[str, Any]) -> float:
    return float(min(each["wall_s"] for each in case["rounds"]))


def _waited(printed: str) -> dict[str, Any]:
    """Seconds that a merge waited for the disk when everything was written."""
    return {"waited_s": round(json.loads(printed)["waited_s"], 3)}


def _parts(printed: str) -> dict[str, Any]:
    """The seconds that fuse_peer.py prints last."""
    return dict(json.loads(printed.strip().splitlines()[-1]))
