"""What prior preservation buys and costs, and the paper's other findings, in the pocket world.

    python benchmarks/prior_preservation.py --work DIR [--jobs 2] [--only generated none] [--score]

Learns specimens that no part of the pocket base has seen, in every configuration of `prior_cells`, draws the
same prompts and seeds, and measures them (evaluation/scoring.py). Hours on two cores; started again with the
same --work it goes on. --score measures what is there and writes results/prior_preservation.{json,md,png}.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from benchmarks.prior_cells import CLASSES, MODES, SWEEPS, Configuration, cells, draw_base, run_cell

RESULTS = Path(__file__).resolve().parent / "results"
_PRELOAD = ["lorabooth.api", "diffusers", "transformers", "peft"]


def _run(configurations: list[Configuration], work: Path, jobs: int) -> None:
    """Every cell in a process of its own, so that each one's peak memory is its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    todo = cells(configurations)
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        waiting = {pool.submit(run_cell, cell, work): cell.name for cell in todo}
        waiting |= {pool.submit(draw_base, index, work): f"base/{name}" for index, name in enumerate(CLASSES)}
        for done, future in enumerate(as_completed(waiting), start=1):
            future.result()
            print(f"{done}/{len(waiting)} {waiting[future]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="runs and images; started again it goes on")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--only", nargs="*", help="configurations by name; all if not given")
    parser.add_argument("--specimens", type=int, help="at most so many specimens a configuration")
    parser.add_argument("--score", action="store_true", help="train nothing, measure what is there")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of json, md and png")
    parser.add_argument("--notes", default="", help="a sentence that goes into the JSON file")
    args = parser.parse_args()
    chosen = [each for each in (*MODES, *SWEEPS) if not args.only or each.name in args.only]
    if args.specimens:
        chosen = [replace(each, specimens=min(each.specimens, args.specimens)) for each in chosen]
    if not args.score:
        _run(chosen, args.work.absolute(), args.jobs)
    from benchmarks.prior_table import write_results

    write_results(chosen, args.work.absolute(), args.out, args.notes)


if __name__ == "__main__":
    main()
