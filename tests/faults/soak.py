"""`make soak`: real processes killed 500 times, and a count of what that did; exit code 1 if anything.

python -m tests.faults.soak --kills 500 --jobs 2
python -m tests.faults.soak --kills 500 --fork      (a fifth of the time: processes are forked)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from tests.faults.harness import Bench, Start, Story, prepare, real
from tests.faults.moments import Moment, chains, places, site
from tests.faults.nursery import Nursery


class Soak:
    """Tortures runs until enough kills were survived.

    Args:
        bench: where.
        kills: how many.
        seed: of the moments.
    """

    def __init__(self, bench: Bench, kills: int, seed: int) -> None:
        self.bench, self.wanted = bench, kills
        self.stories: list[Story] = []
        self._plan: Iterator[list[Moment]] = chains(bench.changes, random.Random(seed))
        self._lock = threading.Lock()

    @property
    def kills(self) -> int:
        """So far."""
        return sum(len(story.kills) for story in self.stories)

    def work(self, start: Start) -> None:
        """Runs, one after another, until there are enough; several threads may do so at once."""
        bench = replace(self.bench, start=start)
        while True:
            with self._lock:
                if self.kills >= self.wanted:
                    return
                chain = next(self._plan)
                story = Story()
                self.stories.append(story)
                name = f"run-{len(self.stories):04d}"
            try:
                bench.torture(name, chain, story)
            except TimeoutError as error:
                story.differences.append(f"hung: {error}")
            if story.torn or story.left or story.differences:
                print(f"{name}: {chain}\n  {story}", flush=True)
            else:
                shutil.rmtree(bench.folder / name)
            if len(self.stories) % 10 == 0:
                print(f"{self.kills} kills in {len(self.stories)} runs", file=sys.stderr, flush=True)

    def count(self) -> dict[str, int]:
        """The figures."""
        sites = Counter(site(kill) for story in self.stories for kill in story.kills)
        return {
            "runs": len(self.stories),
            "kills": self.kills,
            "changes_of_an_undisturbed_run": len(places(self.bench.changes, random.Random(0))),
            "kinds_of_change_died_at": len(sites),
            "torn_files": sum(len(story.torn) for story in self.stories),
            "files_left_behind": sum(len(story.left) for story in self.stories),
            "runs_that_differ": sum(bool(story.differences) for story in self.stories),
        }


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes at once")
    parser.add_argument("--fork", action="store_true", help="fork processes from one that is ready")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for the recipe")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    began_s = time.monotonic()
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="lorabooth-soak-"))
        soak = Soak(prepare(folder / "bench", real, *options.set), options.kills, options.seed)
        starts: list[Start] = [real] * options.jobs
        if options.fork:
            starts = [stack.enter_context(Nursery()).start for _ in range(options.jobs)]
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(soak.work, starts))
    figures = soak.count()
    bad = any(figures[name] for name in ("torn_files", "files_left_behind", "runs_that_differ"))
    if bad:
        print(f"what differs is kept in {folder}")
    else:
        shutil.rmtree(folder)
    for name, number in figures.items():
        print(f"{name.replace('_', ' '):<32} {number:6}")
    print(f"{'minutes':<32} {(time.monotonic() - began_s) / 60:6.1f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
