"""The README's table of speed and memory, made from the files in benchmarks/results.

    python benchmarks/speed_table.py             # writes it into README.md
    python benchmarks/speed_table.py --print     # prints it

What no file has is "not measured". Every row names the commit it was measured at, and the processor or GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- made by benchmarks/speed_table.py: begin -->", "<!-- end -->"
_NOT_MEASURED = "not measured"
_WORTH_TELLING_S = 0.1


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table.

    Attributes:
        what: is measured.
        ours: lorabooth's figures.
        beside: what was measured in the same run, and its figures.
        ratio: ours is so many times as fast; "" where there is none.
        where: device and commit.
    """

    what: str
    ours: str
    beside: str
    ratio: str
    where: str


def rows(results: Path = RESULTS) -> list[Row]:
    """All lines, from the files that are there."""
    found: list[Row] = []
    for name, lines in (
        ("step_time", _step_time),
        ("photos_to_adapter", _photos_to_adapter),
        ("lora_overhead", _lora_overhead),
        ("scaling", _scaling),
        ("merge", _merge),
    ):
        file = results / f"{name}.json"
        if file.is_file():
            found += lines(json.loads(file.read_text(encoding="utf-8")))
        else:
            found.append(Row(f"`{name}.py`", _NOT_MEASURED, "", "", ""))
    return found


def table(results: Path = RESULTS) -> str:
    """The table in Markdown."""
    lines = ["| | lorabooth | beside it, in the same run | speed | where |", "|---|---|---|---|---|"]
    lines += [
        f"| {one.what} | {one.ours} | {one.beside} | {one.ratio} | {one.where} |" for one in rows(results)
    ]
    return "\n".join(lines)


def with_table(text: str, made: str) -> str:
    """A document with the table between its marks.

    Raises:
        ValueError: it lacks the marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no {BEGIN} ... {END} in the document")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def _step_time(facts: Mapping[str, Any]) -> Iterator[Row]:
    for row in facts["rows"]:
        size = f"UNet of {row['unet_parameters'] / 1e6:.0f} M" if row["size"] == "small" else "SD1.5's size"
        what = f"a training step, {row['precision']}, {size}, {row['resolution_px']} px, 1 + 1 images"
        if not row["measured"]:
            yield Row(what, _NOT_MEASURED, "", "", "GPU")
            continue
        ours = f"{row['ours_step_s']:.2f} s, {row['ours_peak_gib']:.2f} GiB"
        beside, ratio = f"the bare UNet {row['bare_unet_forward_backward_s']:.2f} s", ""
        if "peer_step_s" in row:
            beside = f"diffusers' script {row['peer_step_s']:.2f} s, {row['peer_peak_gib']:.2f} GiB; {beside}"
            ratio = _times(row["speed_ratio"])
        yield Row(what, ours, beside, ratio, _where(facts, row["device"]))


def _photos_to_adapter(facts: Mapping[str, Any]) -> Iterator[Row]:
    what = f"photos to adapter: {facts['class_images']} class images, {facts['steps']} steps"
    ours, peer = facts["ours"], facts.get("peer")
    beside = f"diffusers' script {_parts(peer)}" if peer else ""
    ratio = _times(facts["speed_ratio"]) if peer else ""
    yield Row(what, _parts(ours), beside, ratio, _where(facts, _device(facts)))
    if peer:
        counts = ours["extrapolated"]
        yield Row(
            f"the same with {counts['class_images']} and {counts['steps']}, by arithmetic from that",
            _minutes(counts["total_s"]),
            f"diffusers' script {_minutes(peer['extrapolated']['total_s'])}",
            _times(facts["speed_ratio_extrapolated"]),
            "",
        )


def _parts(side: Mapping[str, Any]) -> str:
    """Of one side: all of it, an image, a step."""
    return (
        f"{_minutes(side['total_s'])}: {side['class_image_s']:.1f} s an image, {side['step_s']:.2f} s a step"
    )


def _lora_overhead(facts: Mapping[str, Any]) -> Iterator[Row]:
    for row in facts["rows"]:
        yield Row(
            f"what a rank-{row['rank']} adapter adds to the base's forward and backward",
            f"{row['lean_overhead']:.0%}",
            f"peft's own forward {row['peft_overhead']:.0%}",
            "",
            _where(facts, row["device"]),
        )


def _scaling(facts: Mapping[str, Any]) -> Iterator[Row]:
    few, *_, many = facts["series"]["class_images"]
    yield Row(
        f"a step with {many['class_images']:,} class images",
        f"{many['step_s'] * 1000:.0f} ms, {many['peak_mib']:.0f} MiB",
        f"with {few['class_images']}: {few['step_s'] * 1000:.0f} ms, {few['peak_mib']:.0f} MiB",
        "",
        _where(facts, _device(facts)),
    )
    pair = facts["processes"]
    yield Row(
        "two processes with batch 1",
        f"losses differ by {pair['largest_relative_difference_of_losses']:.0e} at most"
        + (", same examples" if pair["same_examples"] else ", OTHER EXAMPLES"),
        "one process with batch 2",
        "",
        _where(facts, "cpu"),
    )


def _merge(facts: Mapping[str, Any]) -> Iterator[Row]:
    copy = facts["cases"]["cp"]
    for name, case in facts["cases"].items():
        if not name.startswith("merge rank"):
            continue
        ratio = facts["ratios"][f"{name}, of cp"]
        waited, before = "", f" ({_times(ratio['speed_of_fastest'])} by the fastest rounds)"
        if case.get("waited_s", 0.0) >= _WORTH_TELLING_S:
            waited = f", {case['waited_s']:.1f} s of it for the disk"
            before = f"{before[:-1]}, {_times(ratio['speed_before_disk'])} without the wait)"
        yield Row(
            f"{name} into {facts['size']}",
            f"{case['wall_s']:.1f} s{waited}, {case['peak_rss_bytes'] / 1e9:.2f} GB",
            f"`cp` {copy['wall_s']:.1f} s, and {copy['sync_s']:.1f} s of `sync`",
            f"{_times(ratio['speed'])} of `cp`{before}, {_times(ratio['speed_and_sync'])} of both",
            _where(facts, "cpu"),
        )


def _times(ratio: float) -> str:
    return f"{ratio:.2g}x" if ratio < 1 else f"{ratio:.1f}x"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _device(facts: Mapping[str, Any]) -> str:
    return "cuda" if facts["machine"]["gpu"] else "cpu"


def _where(facts: Mapping[str, Any], device: str) -> str:
    machine = facts["machine"]
    name = machine["gpu"] if device == "cuda" else f"{machine['cores']} cores, {machine['processor']}"
    return f"{name}, {machine['commit'].removesuffix('-dirty')}"


def main() -> None:
    """Write or print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print", action="store_true", dest="prints", help="print, and write nothing")
    options = parser.parse_args()
    if options.prints:
        print(table())
        return
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), table()), encoding="utf-8")


if __name__ == "__main__":
    main()
