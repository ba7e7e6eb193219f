"""Step time and peak memory beside diffusers' own DreamBooth LoRA script, in one run, alternating.

    python benchmarks/step_time.py --peer-script PATH/TO/train_dreambooth_lora.py

Rows: on the CPU a randomly initialised Stable-Diffusion-shaped folder (UNet of about 70 M parameters) at
256 px, in fp32 and in bf16; on a GPU, where there is one, SD1.5's own size at 512 px in bf16. Both sides
train the same folder on the same photos and class images with the same options: batch 1 + 1 with prior
preservation, rank 4 on attention, AdamW. Rounds alternate, so that a busy machine is busy for both. The
figure is the ratio of the medians over all rounds. Without --peer-script only our own side is measured.
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
from dataclasses import asdict, dataclass
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
from benchmarks.training_recipe import own_class_images, write_recipe  # noqa: E402

OURS = """
import json, resource, sys
from pathlib import Path
import torch
import lorabooth
recipe = lorabooth.Recipe.from_toml(Path(sys.argv[1]))
result = lorabooth.train(recipe, out=Path(sys.argv[2]))
lines = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text("utf-8").splitlines()]
facts = {
    "step_s": [line["step_s"] for line in lines][1:],
    "lr": lines[-1]["lr"],
    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "peak_cuda_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    "run": json.loads((result.out / "run.json").read_text("utf-8")),
}
Path(sys.argv[3]).write_text(json.dumps(facts))
"""


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: of the row.
        device: "cpu" or "cuda".
        precision: of both sides: "fp32" or "bf16".
        resolution_px: side of the images.
        size: "small" (70 M) or the name of a published base.
    """

    name: str
    device: str
    precision: str
    resolution_px: int
    size: str


ROWS = (
    Row("CPU, 70 M UNet, fp32", "cpu", "fp32", 256, "small"),
    Row("CPU, 70 M UNet, bf16", "cpu", "bf16", 256, "small"),
    Row("GPU, SD1.5 size, bf16", "cuda", "bf16", 512, "sd15"),
)


def environment(device: str) -> dict[str, str]:
    """For a process that is to run on this device; a GPU is hidden from one that is to run on the CPU."""
    return {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}


def run_ours(work: Path, round_: int, row: Row, steps: int) -> dict[str, Any]:
    """One training run of lorabooth in a process of its own."""
    settings: dict[str, object] = {
        **own_class_images(work / "class"),
        "optim.steps": steps,
        "images.resolution": row.resolution_px,
        "memory.precision": row.precision,
    }
    recipe = write_recipe(work / f"recipe-{round_}.toml", work / "model", work / "photos", settings)
    times = work / f"ours-{round_}.json"
    subprocess.run(
        [sys.executable, "-c", OURS, str(recipe), str(work / f"run-{round_}"), str(times)],
        check=True,
        cwd=HERE.parent,
        env=environment(row.device),
    )
    return dict(json.loads(times.read_text(encoding="utf-8")))


def run_peer(script: Path, work: Path, round_: int, row: Row, steps: int) -> dict[str, Any]:
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
        "resolution": row.resolution_px,
        "train_batch_size": 1,
        "max_train_steps": steps,
        "learning_rate": 1e-4,
        "rank": 4,
        "seed": 0,
        "checkpointing_steps": 100_000,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "mixed_precision": {"fp32": "no", "bf16": "bf16"}[row.precision],
    }
    arguments = [f"--{key}={value}" for key, value in options.items()]
    runner = [sys.executable, str(HERE / "peer_runner.py"), str(script), str(times)]
    subprocess.run(
        [*runner, *arguments, "--with_prior_preservation"], check=True, cwd=work, env=environment(row.device)
    )
    return dict(json.loads(times.read_text(encoding="utf-8")))


def bare_unet(work: Path, row: Row, steps: int) -> dict[str, Any]:
    """Forward and backward of the bare UNet with a rank-4 adapter, on a batch of two: seconds, operations."""
    import torch
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig
    from torch.utils.flop_counter import FlopCounterMode

    unet = UNet2DConditionModel.from_pretrained(work / "model" / "unet").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    side = row.resolution_px // 8
    dtype = torch.bfloat16 if row.precision == "bf16" else torch.float32
    x, text = torch.randn(2, 4, side, side), torch.randn(2, 77, unet.config.cross_attention_dim)
    unet, x, text = (each.to(row.device, dtype) for each in (unet, x, text))
    level = torch.tensor([10, 500], device=row.device)
    seconds = []

    def step() -> None:
        unet(x, level, text).sample.float().square().mean().backward()

    for _ in range(steps):
        began = time.perf_counter()
        step()
        if row.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    with FlopCounterMode(display=False) as counter:
        step()
    return {"step_s": seconds[1:], "flops": counter.get_total_flops()}


def matmul_rate(row: Row, side: int = 2048, rounds: int = 5) -> float:
    """Operations a second of the best of some square matrix products, as the row computes."""
    import torch

    dtype = torch.bfloat16 if row.precision == "bf16" else torch.float32
    side = side if row.device == "cpu" else 4 * side
    a, b = (torch.randn(side, side).to(row.device, dtype) for _ in range(2))
    best_s = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        a @ b
        if row.device == "cuda":
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - began)
    return 2 * side**3 / best_s


def measure(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """One row; "measured" is false where its device is not there."""
    import torch

    facts: dict[str, Any] = {**asdict(row), "measured": row.device == "cpu" or torch.cuda.is_available()}
    if not facts["measured"]:
        return {**facts, "why": "no CUDA device here"}
    script = None if args.peer_script is None else args.peer_script.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if row.size == "small":
            facts["unet_parameters"] = make_sd_folder(work / "model", resolution_px=row.resolution_px)
        else:
            facts["unet_parameters"] = make_published_folder(work / "model", row.size, dtype=torch.float32)
        make_photos(work / "photos", 5, row.resolution_px)
        make_class_images(work / "class", 20, row.resolution_px)
        ours: list[dict[str, Any]] = []
        peer: list[dict[str, Any]] = []
        bare: list[dict[str, Any]] = []
        for round_ in range(args.rounds):
            ours.append(run_ours(work, round_, row, args.steps))
            if script is not None:
                peer.append(run_peer(script, work, round_, row, args.steps))
            bare.append(bare_unet(work, row, max(3, args.steps // 3)))
    rate = matmul_rate(row)
    facts["ours_step_s"] = statistics.median([s for run in ours for s in run["step_s"]])
    facts["ours_peak_gib"] = max(_peak_bytes(run, row) for run in ours) / 2**30
    facts["bare_unet_forward_backward_s"] = statistics.median([s for run in bare for s in run["step_s"]])
    facts["step_operations"] = bare[0]["flops"]
    facts["matmul_operations_per_s"] = rate
    facts["share_of_matmul_rate"] = bare[0]["flops"] / facts["ours_step_s"] / rate
    if peer:
        facts["peer_step_s"] = statistics.median([s for run in peer for s in run["step_s"]])
        facts["peer_peak_gib"] = max(_peak_bytes(run, row) for run in peer) / 2**30
        facts["peer_torchvision_stand_in"] = peer[0]["torchvision_stand_in"]
        facts["speed_ratio"] = facts["peer_step_s"] / facts["ours_step_s"]
        facts["speed_ratio_per_round"] = [
            statistics.median(b["step_s"]) / statistics.median(a["step_s"])
            for a, b in zip(ours, peer, strict=True)
        ]
    return facts


def _peak_bytes(run: dict[str, Any], row: Row) -> int:
    return int(run["peak_rss_bytes"] if row.device == "cpu" else run["peak_cuda_bytes"])


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-script", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", nargs="*", type=int, default=list(range(len(ROWS))), help="which, from 0")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "step_time.json")
    args = parser.parse_args()
    if args.peer_script is not None and not args.peer_script.is_file():
        parser.error(f"no such script: {args.peer_script}")
    result: dict[str, Any] = {
        "what": "seconds an optimizer step; median over rounds; 1+1 images, rank 4",
        "machine": machine_facts(),
        "peer": "diffusers examples/dreambooth/train_dreambooth_lora.py" if args.peer_script else None,
        "rounds": args.rounds,
        "steps": args.steps,
        "rows": [measure(ROWS[index], args) for index in args.rows],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
