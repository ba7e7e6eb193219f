"""Step time and peak memory beside diffusers' own DreamBooth LoRA script, in one run, alternating.

    python benchmarks/step_time.py --peer-script PATH/TO/train_dreambooth_lora.py

Both train the same randomly initialised Stable-Diffusion-shaped folder (UNet of about 70 M parameters) on the
same photos and class images with the same options: 256 px, batch 1 + 1 with prior preservation, rank 4 on
attention, AdamW, fp32. Rounds alternate, so that a busy machine is busy for both. The figure is the ratio
of the medians over all rounds. Without --peer-script only our own side is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.facts import machine_facts  # noqa: E402
from benchmarks.model_folder import make_class_images, make_photos, make_sd_folder  # noqa: E402

OURS = """
import json, resource, sys
from pathlib import Path
import lorabooth
recipe = lorabooth.Recipe.from_toml(Path(sys.argv[1]))
result = lorabooth.train(recipe, out=Path(sys.argv[2]))
lines = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text("utf-8").splitlines()]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
Path(sys.argv[3]).write_text(json.dumps({"step_s": [l["step_s"] for l in lines][1:], "peak_rss_bytes": peak}))
"""

RECIPE = """
[model]
base = "{base}"
[[subjects]]
images = "{photos}"
noun = "dog"
token = "sks"
[prior]
mode = "images"
images = "{class_images}"
[adapter]
rank = 4
[optim]
steps = {steps}
lr = 1e-4
[images]
resolution = {resolution}
[run]
checkpoint_every = 0
sample_count = 0
"""


def run_ours(work: Path, round_: int, steps: int, resolution: int) -> dict[str, Any]:
    """One training run of lorabooth in a process of its own."""
    recipe = work / f"recipe-{round_}.toml"
    recipe.write_text(
        RECIPE.format(
            base=(work / "model").as_posix(),
            photos=(work / "photos").as_posix(),
            class_images=(work / "class").as_posix(),
            steps=steps,
            resolution=resolution,
        ),
        encoding="utf-8",
    )
    times = work / f"ours-{round_}.json"
    subprocess.run(
        [sys.executable, "-c", OURS, str(recipe), str(work / f"run-{round_}"), str(times)],
        check=True,
        cwd=HERE.parent,
    )
    return dict(json.loads(times.read_text(encoding="utf-8")))


def run_peer(script: Path, work: Path, round_: int, steps: int, resolution: int) -> dict[str, Any]:
    """One training run of the peer in a process of its own."""
    times = work / f"peer-{round_}.json"
    options = {
        "pretrained_model_name_or_path": work / "model",
        "instance_data_dir": work / "photos",
        "instance_prompt": "a photo of a sks dog",
        "class_data_dir": work / "class",
        "class_prompt": "a photo of a dog",
        "num_class_images": len(list((work / "class").iterdir())),
        "output_dir": work / f"peer-{round_}",
        "resolution": resolution,
        "train_batch_size": 1,
        "max_train_steps": steps,
        "learning_rate": 1e-4,
        "rank": 4,
        "seed": 0,
        "checkpointing_steps": 100_000,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
    }
    arguments = [f"--{key}={value}" for key, value in options.items()]
    subprocess.run(
        [
            sys.executable,
            str(HERE / "peer_runner.py"),
            str(script),
            str(times),
            *arguments,
            "--with_prior_preservation",
        ],
        check=True,
        cwd=work,
    )
    return dict(json.loads(times.read_text(encoding="utf-8")))


def unet_alone(work: Path, steps: int, resolution: int) -> list[float]:
    """Forward and backward of the bare UNet with a rank-4 adapter, on a batch of two."""
    import torch
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    unet = UNet2DConditionModel.from_pretrained(work / "model" / "unet").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    side = resolution // 8
    x = torch.randn(2, 4, side, side)
    text = torch.randn(2, 77, unet.config.cross_attention_dim)
    level = torch.tensor([10, 500])
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        unet(x, level, text).sample.square().mean().backward()
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-script", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "step_time.json")
    args = parser.parse_args()
    if args.peer_script is not None and not args.peer_script.is_file():
        parser.error(f"no such script: {args.peer_script}")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        parameters = make_sd_folder(work / "model", resolution_px=args.resolution)
        make_photos(work / "photos", 5, args.resolution)
        make_class_images(work / "class", 20, args.resolution)
        ours: list[dict[str, Any]] = []
        peer: list[dict[str, Any]] = []
        bare: list[float] = []
        for round_ in range(args.rounds):
            ours.append(run_ours(work, round_, args.steps, args.resolution))
            if args.peer_script is not None:
                script = args.peer_script.resolve()
                peer.append(run_peer(script, work, round_, args.steps, args.resolution))
            bare += unet_alone(work, max(3, args.steps // 3), args.resolution)
    result: dict[str, Any] = {
        "what": "seconds an optimizer step; median over rounds; fp32, 1+1 images, rank 4",
        "machine": machine_facts(),
        "unet_parameters": parameters,
        "resolution_px": args.resolution,
        "rounds": args.rounds,
        "steps": args.steps,
        "bare_unet_forward_backward_s": statistics.median(bare),
        "ours_step_s": statistics.median([s for run in ours for s in run["step_s"]]),
        "ours_peak_rss_gib": max(run["peak_rss_bytes"] for run in ours) / 2**30,
    }
    if peer:
        result["peer"] = "diffusers examples/dreambooth/train_dreambooth_lora.py"
        result["peer_step_s"] = statistics.median([s for run in peer for s in run["step_s"]])
        result["peer_peak_rss_gib"] = max(run["peak_rss_bytes"] for run in peer) / 2**30
        result["peer_torchvision_stand_in"] = peer[0]["torchvision_stand_in"]
        result["speed_ratio"] = result["peer_step_s"] / result["ours_step_s"]
        result["speed_ratio_per_round"] = [
            statistics.median(b["step_s"]) / statistics.median(a["step_s"])
            for a, b in zip(ours, peer, strict=True)
        ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
