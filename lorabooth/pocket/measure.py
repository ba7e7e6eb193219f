"""How good the pocket base is: what a judge reads from samples of held-out prompts, and the VAE's PSNR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor

from lorabooth.pocket import judge as judging
from lorabooth.pocket.dataset import pixels_of, rendered, scene_at
from lorabooth.pocket.judge import Judge, Share
from lorabooth.pocket.scenes import Scene, full_caption, render
from lorabooth.pocket.trainer import Budget, Task, train
from lorabooth.pocket.vae import psnr_db, reconstruct
from lorabooth.rng import generator_for, seed_for

CLEAN_SCENES, CODED_SCENES = 40_000, 12_000


@dataclass(frozen=True, slots=True)
class Sampling:
    """How samples are drawn.

    Attributes:
        steps: DPM-Solver++ steps.
        guidance: classifier-free guidance scale.
        batch: samples at once.
        seed: one noise a sample is drawn from it.
    """

    steps: int = 20
    guidance: float = 4.0
    batch: int = 50
    seed: int = 0


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """Upright, bare photos of combinations of class, place, colour and pattern that training never saw."""
    drawn = (scene_at(seed, "held-out", index) for index in range(count))
    return [replace(scene, style="photo", accessory="none", pose="upright") for scene in drawn]


def train_judge(work: Path, vae: AutoencoderKL, seconds: float, seed: int) -> Judge:
    """The judge of a work folder, trained there if it is not yet.

    Args:
        work: work folder of the build; its renderings are read, the judge is kept there.
        vae: some of the judge's pictures go through it, so that it reads samples as well.
        seconds: training time.
        seed: of renderings and weights.
    """
    clean = rendered(seed, "train", CLEAN_SCENES, work / "train.npy")
    coded = rendered(seed, "judge", CODED_SCENES, work / "judge.npy")
    images = np.concatenate([clean.images, _through(vae, coded.images, work / "judge-vae.npy")])
    labels = judging.label_table(clean.scenes + coded.scenes)
    torch.manual_seed(seed_for(seed, 0, 0, "judge") % 2**31)
    judge = Judge()
    losses = judging.judge_losses(judge, images, labels, seed)
    budget = Budget(seconds, min_steps=2)
    task = Task(
        "judge", judge, losses, judging.HYPER, budget, work / "judge.safetensors", work / "judge.jsonl", 60.0
    )
    judge.load_state_dict(train(task))
    return judge.eval()


def _through(vae: AutoencoderKL, images: NDArray[np.uint8], file: Path) -> NDArray[np.uint8]:
    """The pictures through the autoencoder, kept in `file`."""
    if file.exists():
        kept: NDArray[np.uint8] = np.load(file)
        return kept
    out = reconstruct(vae, images, torch.device("cpu")).permute(0, 2, 3, 1)
    result: NDArray[np.uint8] = ((out + 1) * 127.5).round().byte().numpy()
    np.save(file, result)
    return result


@torch.no_grad()
def sample_pixels(pipeline: StableDiffusionPipeline, prompts: Sequence[str], sampling: Sampling) -> Tensor:
    """A picture a prompt: float32 [N,3,64,64] in [-1, 1] on the CPU."""
    parts: list[Tensor] = []
    size = pipeline.unet.config.sample_size
    channels = pipeline.unet.config.in_channels
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    for start in range(0, len(prompts), sampling.batch):
        chunk = list(prompts[start : start + sampling.batch])
        noise = [
            torch.randn(
                (channels, size, size), generator=generator_for(sampling.seed, 0, 0, "sample", start + i)
            )
            for i in range(len(chunk))
        ]
        images: NDArray[np.float32] = pipeline(
            chunk,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            latents=torch.stack(noise).to(pipeline.unet.device, pipeline.unet.dtype),
            output_type="np",
        ).images
        parts.append(torch.from_numpy(images).permute(0, 3, 1, 2).float() * 2 - 1)
    return torch.cat(parts)


def accuracy(
    pipeline: StableDiffusionPipeline, judge: Judge, scenes: Sequence[Scene], sampling: Sampling
) -> tuple[dict[str, Share], Tensor]:
    """How often class, place and colour of samples are those of the prompt, and the samples."""
    pixels = sample_pixels(pipeline, [full_caption(scene) for scene in scenes], sampling)
    return judging.agreement(judge, pixels, scenes), pixels


def judge_quality(judge: Judge, vae: AutoencoderKL, seed: int, count: int = 500) -> dict[str, Any]:
    """The judge's own accuracy on renderings of what the samples are asked to show, and the VAE's PSNR.

    Args:
        judge: reads the renderings plain and through `vae`.
        vae: its PSNR is taken over held-out scenes of every style, pose and accessory.
        seed: of the scenes.
        count: how many.
    """
    scenes = held_out_scenes(count, seed)
    images = np.stack([render(scene) for scene in scenes])
    every = rendered(seed, "held-out", count).images
    return {
        "clean": judging.agreement(judge, pixels_of(images, torch.device("cpu")), scenes),
        "through_vae": judging.agreement(judge, reconstruct(vae, images, torch.device("cpu")), scenes),
        "vae_psnr_db": psnr_db(reconstruct(vae, every, torch.device("cpu")), every),
    }


def grid(pixels_NCHW: Tensor, columns: int) -> NDArray[np.uint8]:
    """Pictures in [-1, 1] in rows of `columns`: uint8 [rows*64, columns*64, 3]."""
    tiles = ((pixels_NCHW + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    rows = [
        np.concatenate(list(tiles[i : i + columns]), axis=1)
        for i in range(0, len(tiles) - columns + 1, columns)
    ]
    return np.concatenate(rows, axis=0)
