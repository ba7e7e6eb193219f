"""How step time and memory grow: with batch, resolution, rank, photos and class images; and with processes.

    python benchmarks/scaling.py

Every figure is of a run of its own, of the same random base (a UNet of about 5 M parameters on a CPU, SD1.5's
size on a GPU), varied in one thing at a time. With 10 and with many class images step time and peak memory
should be the same. Two processes (torch's launcher, gloo on a CPU) with batch 1 should do what one does with
batch 2: the same examples, the same learning rate at the end, the same losses.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.facts import machine_facts  # noqa: E402
from benchmarks.model_folder import (  # noqa: E402
    make_class_images,
    make_photos,
    make_published_folder,
    make_sd_folder,
)
from benchmarks.step_time import OURS  # noqa: E402
from benchmarks.training_recipe import own_class_images, write_recipe  # noqa: E402

SMALL_CHANNELS = (32, 64, 128, 128)


def recipe(work: Path, name: str, args: argparse.Namespace, **varied: int) -> Path:
    """A recipe with one thing varied."""
    plain = {
        "photos": 5,
        "class_images": 10,
        "rank": 16,
        "steps": args.steps,
        "batch": 1,
        "resolution": args.resolution,
    }
    value = {**plain, **varied}
    settings: dict[str, object] = {
        **own_class_images(work / f"class-{value['class_images']}"),
        "adapter.rank": value["rank"],
        "optim.steps": value["steps"],
        "optim.schedule": "cosine",
        "optim.batch_size": value["batch"],
        "images.resolution": value["resolution"],
    }
    return write_recipe(work / f"{name}.toml", work / "model", work / f"photos-{value['photos']}", settings)


def run(work: Path, path: Path) -> dict[str, Any]:
    """One run in a process of its own."""
    times, out = path.with_suffix(".json"), path.with_suffix("")
    env = {**os.environ, "LORABOOTH_CACHE": str(work / "cache")}
    # The first run fills the cache, the second is measured: encoders are no part of it.
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-c", OURS, str(path), str(out), str(times)]
        subprocess.run(command, check=True, cwd=HERE.parent, env=env)
    told = json.loads(times.read_text(encoding="utf-8"))
    peak = told["peak_cuda_bytes"] if told["peak_cuda_bytes"] is not None else told["peak_rss_bytes"]
    return {"step_s": statistics.median(told["step_s"][2:]), "peak_mib": peak / 2**20}


def series(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Rows by what is varied."""
    varied = {
        "batch": args.batches,
        "resolution": args.resolutions,
        "rank": args.ranks,
        "photos": args.photos,
        "class_images": args.class_images,
    }
    found: dict[str, Any] = {}
    for what, values in varied.items():
        rows = []
        for value in values:
            path = recipe(work, f"run-{what}-{value}", args, **{what: value})
            rows.append({what: value, **run(work, path)})
        found[what] = rows
    return found


def processes(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Two processes with batch 1, and one with batch 2."""
    from lorabooth.data.batches import plan_step

    env = {
        **os.environ,
        "LORABOOTH_CACHE": str(work / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    traces = {}
    for name, batch, launch in (
        ("two", 1, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]),
        ("one", 2, []),
    ):
        path = recipe(work, f"run-processes-{name}", args, batch=batch)
        out = path.with_suffix("")
        train = ["-m", "lorabooth", "train", str(path), "--out", str(out), "--quiet"]
        subprocess.run([sys.executable, *launch, *train], check=True, cwd=HERE.parent, env=env)
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        traces[name] = [json.loads(line) for line in lines]

    def drawn(step: int, batch: int, world: int) -> list[tuple[str, int]]:
        plan = plan_step(seed=0, step=step, n_instance=5, n_class=10, batch_size=batch, world=world)
        return sorted((str(d.role), d.record) for rank in plan for turn in rank for d in turn)

    two, one = traces["two"], traces["one"]
    return {
        "same_examples": all(drawn(step, 1, 2) == drawn(step, 2, 1) for step in range(args.steps)),
        "final_lr": {"two": two[-1]["lr"], "one": one[-1]["lr"]},
        "largest_relative_difference_of_losses": max(
            abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(two, one, strict=True)
        ),
        "step_s": {
            name: statistics.median(line["step_s"] for line in trace[2:]) for name, trace in traces.items()
        },
    }


def main() -> None:
    """Measure, print, write JSON."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--resolutions", type=int, nargs="*")
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 16, 64])
    parser.add_argument("--photos", type=int, nargs="*", default=[3, 30])
    parser.add_argument("--class-images", type=int, nargs="*", default=[10, 10_000])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "scaling.json")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    args.resolution = args.resolution or (512 if on_gpu else 128)
    args.resolutions = args.resolutions or ([256, 512, 768] if on_gpu else [64, 128, 256])
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if on_gpu:
            parameters = make_published_folder(work / "model", "sd15", dtype=torch.float32)
        else:
            parameters = make_sd_folder(
                work / "model", resolution_px=args.resolution, channels=SMALL_CHANNELS, vae_channels=32
            )
        for count in {5, *args.photos}:
            make_photos(work / f"photos-{count}", count, args.resolution)
        for count in {10, *args.class_images}:
            make_class_images(work / f"class-{count}", count, args.resolution)
        result: dict[str, Any] = {
            "what": "median seconds of a step, and peak memory, varied in one thing at a time",
            "machine": machine_facts(),
            "unet_parameters": parameters,
            "plain": {"batch": 1, "rank": 16, "resolution": args.resolution, "photos": 5, "class_images": 10},
            "steps": args.steps,
            "memory": "allocated on the GPU" if on_gpu else "resident set of the process",
            "series": series(work, args),
            "processes": processes(work, args),
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
