"""Wall time from photos to adapter, class images included, beside diffusers' script doing the same.

    python benchmarks/photos_to_adapter.py --peer-script PATH --class-images 200 --steps 500

Each side runs once in a process of its own, with nothing cached, at its own defaults for class images: the
peer draws batches of 4 with the checkpoint's sampler in 50 steps, in fp32 on a CPU and in fp16 on a GPU;
lorabooth as its family's defaults say, in bf16 on a CPU that has instructions for it (how good those images
are: class_images.py). Training has equal steps, batch 1 + 1 with prior preservation, rank 4, AdamW, fp32 on
a CPU and bf16 on a GPU. With --rounds they alternate. Every phase is listed. Where fewer images or steps are
run than --of-class-images and --of-steps, "extrapolated" says what the measured times an image and a step
would make of those: it is arithmetic, kept apart from what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.facts import machine_facts  # noqa: E402
from benchmarks.model_folder import make_photos, make_published_folder, make_sd_folder  # noqa: E402
from benchmarks.training_recipe import write_recipe  # noqa: E402
from lorabooth.families.sd import SD1  # noqa: E402


def ours(work: Path, round_: int, args: argparse.Namespace) -> dict[str, Any]:
    """`lorabooth train` with an empty cache, as a user starts it."""
    out = work / f"ours-{round_}"
    settings: dict[str, object] = {
        "prior.count": args.class_images,
        "optim.steps": args.steps,
        "images.resolution": args.resolution,
    }
    recipe = write_recipe(work / f"recipe-{round_}.toml", work / "model", work / "photos", settings)
    env = {**os.environ, "LORABOOTH_CACHE": str(work / f"cache-{round_}")}
    command = [sys.executable, "-m", "lorabooth", "train", str(recipe), "--out", str(out), "--quiet"]
    began = time.perf_counter()
    subprocess.run(command, check=True, cwd=HERE.parent, env=env)
    total_s = time.perf_counter() - began
    timings = json.loads((out / "run.json").read_text(encoding="utf-8"))["timings_s"]
    phases = {**timings, "start of the program and the rest": total_s - sum(timings.values())}
    used = tomllib.loads((out / "recipe.toml").read_text(encoding="utf-8"))
    facts = _facts(total_s, timings["class images"], timings["training"], phases, args)
    return {**facts, "class_images_in": used["prior"]["dtype"]}


def peer(script: Path, work: Path, round_: int, args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """The peer with an empty folder for class images."""
    times = work / f"peer-{round_}.json"
    options = {
        "pretrained_model_name_or_path": work / "model",
        "instance_data_dir": work / "photos",
        "instance_prompt": "a photo of a sks dog",
        "class_data_dir": work / f"peer-class-{round_}",
        "class_prompt": "a photo of a dog",
        "num_class_images": args.class_images,
        "output_dir": work / f"peer-{round_}",
        "resolution": args.resolution,
        "train_batch_size": 1,
        "max_train_steps": args.steps,
        "learning_rate": 1e-4,
        "rank": 4,
        "seed": 0,
        "checkpointing_steps": 100_000,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "mixed_precision": {"fp32": "no", "bf16": "bf16"}[precision],
    }
    arguments = [f"--{key}={value}" for key, value in options.items()]
    runner = [sys.executable, str(HERE / "peer_runner.py"), str(script), str(times)]
    began = time.perf_counter()
    subprocess.run([*runner, *arguments, "--with_prior_preservation"], check=True, cwd=work)
    total_s = time.perf_counter() - began
    told = json.loads(times.read_text(encoding="utf-8"))
    # Its first step is not seen to begin: the time of one step is added.
    training_s = told["training_s"] + statistics.median(told["step_s"])
    phases = {
        "class images": told["class_images_s"],
        "training": training_s,
        "loading, saving and the rest": total_s - told["class_images_s"] - training_s,
    }
    return _facts(total_s, told["class_images_s"], training_s, phases, args)


def _facts(
    total_s: float,
    class_images_s: float,
    training_s: float,
    phases: dict[str, float],
    args: argparse.Namespace,
) -> dict[str, Any]:
    an_image, a_step = class_images_s / args.class_images, training_s / args.steps
    rest_s = total_s - class_images_s - training_s
    return {
        "total_s": total_s,
        "phases_s": phases,
        "class_image_s": an_image,
        "step_s": a_step,
        "extrapolated": {
            "class_images": args.of_class_images,
            "steps": args.of_steps,
            "class_images_s": an_image * args.of_class_images,
            "training_s": a_step * args.of_steps,
            "total_s": rest_s + an_image * args.of_class_images + a_step * args.of_steps,
        },
    }


def main() -> None:
    """Measure, print, write JSON."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-script", type=Path)
    parser.add_argument("--class-images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--of-class-images", type=int, default=200)
    parser.add_argument("--of-steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "photos_to_adapter.json")
    args = parser.parse_args()
    if args.peer_script is not None and not args.peer_script.is_file():
        parser.error(f"no such script: {args.peer_script}")
    on_gpu = torch.cuda.is_available()
    precision = "bf16" if on_gpu else "fp32"
    args.resolution = args.resolution or (512 if on_gpu else 256)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if on_gpu:
            parameters = make_published_folder(work / "model", "sd15", dtype=torch.float32)
        else:
            parameters = make_sd_folder(work / "model", resolution_px=args.resolution)
        make_photos(work / "photos", 5, args.resolution)
        mine: list[dict[str, Any]] = []
        theirs: list[dict[str, Any]] = []
        for round_ in range(args.rounds):
            mine.append(ours(work, round_, args))
            if args.peer_script is not None:
                theirs.append(peer(args.peer_script.resolve(), work, round_, args, precision))
    result: dict[str, Any] = {
        "what": "seconds from photos to adapter, with class images, nothing cached; the median round",
        "machine": machine_facts(),
        "unet_parameters": parameters,
        "precision": precision,
        "resolution_px": args.resolution,
        "class_images": args.class_images,
        "steps": args.steps,
        "rounds": args.rounds,
        "class_images_of": {
            "ours": _our_sampler(mine[0]["class_images_in"]),
            "peer": "the checkpoint's sampler (PNDM), 50 steps, guidance 7.5, in "
            + ("fp16" if on_gpu else "fp32"),
        },
        "ours": _median(mine),
    }
    if theirs:
        result["peer"] = _median(theirs)
        result["speed_ratio"] = result["peer"]["total_s"] / result["ours"]["total_s"]
        result["speed_ratio_extrapolated"] = (
            result["peer"]["extrapolated"]["total_s"] / result["ours"]["extrapolated"]["total_s"]
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def _our_sampler(precision: str) -> str:
    defaults = SD1.defaults
    how = f"DPM-Solver++, {defaults.class_sampler_steps} steps, guidance {defaults.class_guidance:g}"
    low, high = defaults.class_guidance_interval
    return f"{how} at noise levels of {low:g} to {high:g}, in {precision}"


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return sorted(runs, key=lambda run: run["total_s"])[len(runs) // 2]


if __name__ == "__main__":
    main()
