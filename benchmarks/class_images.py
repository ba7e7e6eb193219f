"""What class images cost and how good they are, by sampler, on the pocket base.

    python benchmarks/class_images.py

Draws the same number of images of every class in each way and measures: passes of the denoiser and processor
seconds an image; the share whose class the pocket world's CLIP names; how different images of one class are
(1 - the mean cosine among them); and the Frechet distance (arXiv 1706.08500) between CLIP's embeddings of all
that was drawn and of pictures of other specimens of the same classes. Writes results/class_images.json. The
pocket base stands in for a full-size one: schedule, samplers and guidance scales are Stable Diffusion's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from diffusers import PNDMScheduler
from numpy.typing import NDArray
from PIL import Image

from benchmarks.facts import machine_facts
from lorabooth.evaluation.embedders import ClipEmbedder, open_pocket_clip
from lorabooth.evaluation.generate import generate
from lorabooth.families import registry, source
from lorabooth.families.recast import recast
from lorabooth.families.sd import SD1
from lorabooth.memory.apply import DTYPES
from lorabooth.pocket.base import pocket_dir
from lorabooth.pocket.judge import share
from lorabooth.pocket.scenes import CLASSES, render, sample_scene
from lorabooth.rng import seed_for
from lorabooth.types import Interval

RESULTS = Path(__file__).parent / "results"
REFERENCES = 150
"""Pictures of each class, of as many specimens."""
BATCH = 8


@dataclass(frozen=True, slots=True)
class Way:
    """One way to draw.

    Attributes:
        name: for the table.
        sampler: as `generate` takes it; "checkpoint" is the PNDM of Stable Diffusion's folders.
        steps: of the sampler.
        guidance: its scale.
        interval: the noise levels at which guidance acts; None is all.
        dtype: that the denoiser draws in.
    """

    name: str
    sampler: Literal["dpm++", "checkpoint"]
    steps: int
    guidance: float
    interval: Interval | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"


def ways() -> list[Way]:
    """diffusers' script's defaults, and what became of ours."""
    defaults = SD1.defaults
    low, high = defaults.class_guidance_interval
    scale, steps = defaults.class_guidance, defaults.class_sampler_steps
    ours = f"DPM-Solver++, {steps} steps, interval"
    return [
        Way("PNDM, 50 steps (diffusers' script)", "checkpoint", 50, scale),
        Way("DPM-Solver++, 20 steps", "dpm++", 20, scale),
        Way("DPM-Solver++, 20 steps, interval", "dpm++", 20, scale, (low, high)),
        Way(f"DPM-Solver++, {steps} steps", "dpm++", steps, scale),
        Way(f"{ours} (lorabooth for SD)", "dpm++", steps, scale, (low, high)),
        Way(f"{ours}, bf16 (on a CPU that has it)", "dpm++", steps, scale, (low, high), "bf16"),
    ]


def references(clip: ClipEmbedder) -> NDArray[np.float32]:
    """Embeddings [N,D] of upright, bare photos of many specimens of every class."""
    pictures = []
    for number, name in enumerate(CLASSES):
        for index in range(REFERENCES):
            rng = np.random.default_rng(seed_for(0, index, 0, "class image references", number))
            scene = sample_scene(rng, class_name=name, style="photo", accessory="none", pose="upright")
            pictures.append(Image.fromarray(render(scene, 64)))
    return clip.images(pictures)


def frechet(a_ND: NDArray[np.float32], b_MD: NDArray[np.float32]) -> float:
    """Between normal distributions fitted to two sets of vectors."""
    apart = a_ND.mean(axis=0) - b_MD.mean(axis=0)
    a_DD, b_DD = np.cov(a_ND.T), np.cov(b_MD.T)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(a_DD @ b_DD).real, 0))
    return float(apart @ apart + np.trace(a_DD) + np.trace(b_DD) - 2 * roots.sum())


def measure(way: Way, clip: ClipEmbedder, real_ND: NDArray[np.float32], per_class: int) -> dict[str, Any]:
    """Draw and judge."""
    found = source.resolve("pocket")
    family = registry.family(found.family)
    pipeline = family.pipeline(recast(family.load(found, torch.float32), DTYPES[way.dtype]))
    if way.sampler == "checkpoint":
        kept = {key: pipeline.scheduler.config[key] for key in ("beta_start", "beta_end", "beta_schedule")}
        prediction = pipeline.scheduler.config.prediction_type
        pipeline.scheduler = PNDMScheduler(
            **kept, prediction_type=prediction, skip_prk_steps=True, steps_offset=1
        )
    rows: list[int] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    prompts = [f"a photo of a {name}" for name in CLASSES for _ in range(per_class)]
    began_s = time.process_time()
    images = generate(
        pipeline,
        prompts,
        range(len(prompts)),
        steps=way.steps,
        guidance=way.guidance,
        guidance_interval=way.interval,
        sampler=way.sampler,
        batch_size=BATCH,
    )
    took_s = time.process_time() - began_s
    hook.remove()
    return {
        **asdict(way),
        "passes_an_image": sum(rows) / len(images),
        "cpu_s_an_image": took_s / len(images),
        **judged(clip.images(images), clip, real_ND, per_class),
    }


def judged(
    drawn_ND: NDArray[np.float32], clip: ClipEmbedder, real_MD: NDArray[np.float32], per_class: int
) -> dict[str, Any]:
    """What embeddings of images, class after class, say of them."""
    texts = clip.texts([f"a photo of a {name}" for name in CLASSES])
    wanted = np.repeat(np.arange(len(CLASSES)), per_class)
    right = int(((drawn_ND @ texts.T).argmax(axis=1) == wanted).sum())
    of_class = share(right, len(wanted))
    pairs = np.triu_indices(per_class, 1)
    groups = drawn_ND.reshape(len(CLASSES), per_class, -1)
    return {
        "class_named": {**asdict(of_class), "value": of_class.value},
        "variety": float(np.mean([(1 - group @ group.T)[pairs].mean() for group in groups])),
        "frechet": frechet(drawn_ND, real_MD),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--per-class", type=int, default=24, help="images of each class")
    parser.add_argument("--out", type=Path, default=RESULTS / "class_images.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    clip = open_pocket_clip(pocket_dir(), "pocket CLIP", torch.device("cpu"))
    real_ND, rows = references(clip), []
    for way in ways():
        row = measure(way, clip, real_ND, options.per_class)
        rows.append(row)
        print(
            f"{way.name}: {row['passes_an_image']:.0f} passes, {row['cpu_s_an_image']:.2f} s an image,"
            f" class named {row['class_named']['value']:.0%}, variety {row['variety']:.3f},"
            f" Frechet {row['frechet']:.4f}",
            flush=True,
        )
    record = {
        "what": "class images of the pocket base by sampler; embeddings by the pocket world's CLIP",
        "machine": machine_facts(),
        "per_class": options.per_class,
        "references_a_class": REFERENCES,
        "rows": rows,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
