"""Guidance in an interval of noise levels: what the pipeline is made to do, beside a sampler written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from torch import Tensor

from lorabooth.evaluation.generate import dpm_solver, generate
from lorabooth.evaluation.guidance import guided_steps, noise_levels
from lorabooth.families.sd import SD1

PROMPTS = ("a photo of a dog", "a painting of a red mug in the snow")
SEEDS = (3, 11)
STEPS, SCALE = 8, 6.0
OPTIONS: dict[str, Any] = {"steps": STEPS, "guidance": SCALE, "height_px": 32, "width_px": 32}
SD_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture
def pipeline(tiny_sd: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: StableDiffusionPipeline, **more: Any) -> Tensor:
    latents: dict[int, Tensor] = {}
    options = {"batch_size": 2, **OPTIONS, **more}
    generate(pipeline, PROMPTS, SEEDS, on_latent=latents.__setitem__, **options)
    return torch.stack([latents[index] for index in range(len(PROMPTS))])


def rows_seen(pipeline: StableDiffusionPipeline, **more: Any) -> list[int]:
    """Rows of each of the denoiser's passes."""
    seen: list[int] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    drawn(pipeline, **more)
    hook.remove()
    return seen


@torch.no_grad()
def by_hand(pipeline: StableDiffusionPipeline, low: float, high: float) -> Tensor:
    """The same images by a loop of a few lines: each pass alone, guidance where sigma is in the interval."""
    positive, negative = pipeline.encode_prompt(list(PROMPTS), "cpu", 1, True)
    scheduler = dpm_solver(pipeline.scheduler)
    scheduler.set_timesteps(STEPS)
    latents = torch.cat(
        [torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    )
    for t in scheduler.timesteps:
        kept = scheduler.alphas_cumprod[t].item()
        output = pipeline.unet(latents, t, positive).sample
        if low < math.sqrt((1 - kept) / kept) <= high:
            away = pipeline.unet(latents, t, negative).sample
            output = away + SCALE * (output - away)
        latents = scheduler.step(output, t, latents).prev_sample
    return latents


def test_noise_levels_are_those_of_the_schedule() -> None:
    scheduler = dpm_solver(PNDMScheduler(**SD_SCHEDULE))
    levels = noise_levels(scheduler, 20)
    assert levels == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-3)
    assert levels[0] == pytest.approx(14.61, abs=0.01)  # "sigma_max = 14.61": arXiv 2404.07724, section 3.1
    assert levels == sorted(levels, reverse=True)


def test_where_no_signal_is_left_the_level_is_infinite_and_guidance_is_off() -> None:
    scheduler = DDIMScheduler(**SD_SCHEDULE, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.alphas_cumprod[-1] = 0.0
    assert noise_levels(scheduler, 4)[0] == math.inf
    assert guided_steps(scheduler, 4, 5.0, (0.0, 1000.0)) == [False, True, True, True]


def test_class_images_of_stable_diffusion_take_a_quarter_of_the_passes_of_the_usual_fifty_steps() -> None:
    defaults = SD1.defaults
    low, high = defaults.class_guidance_interval
    scheduler = dpm_solver(PNDMScheduler(**SD_SCHEDULE, steps_offset=1))
    acts = guided_steps(scheduler, defaults.class_sampler_steps, defaults.class_guidance, (low, high))
    assert (len(acts), sum(acts)) == (15, 11)
    assert not acts[0]
    assert not acts[-1]


@pytest.mark.parametrize(("low", "high"), [(0.28, 5.42), (0.0, 2.0), (2.0, 1000.0)])
def test_it_draws_what_a_loop_by_hand_draws(
    pipeline: StableDiffusionPipeline, low: float, high: float
) -> None:
    found, expected = drawn(pipeline, guidance_interval=(low, high)), by_hand(pipeline, low, high)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    for other in (drawn(pipeline), drawn(pipeline, guidance=1.0)):
        assert (found - other).abs().max() > 2e-3 * expected.abs().max()


def test_everywhere_and_nowhere_are_guidance_and_none(pipeline: StableDiffusionPipeline) -> None:
    assert torch.equal(drawn(pipeline, guidance_interval=(0.0, 1000.0)), drawn(pipeline))
    assert torch.equal(drawn(pipeline, guidance_interval=(900.0, 1000.0)), drawn(pipeline, guidance=1.0))
    assert torch.equal(
        drawn(pipeline, guidance=1.0, guidance_interval=(0.3, 5.0)), drawn(pipeline, guidance=0)
    )


def test_only_guided_steps_take_twice_the_rows(pipeline: StableDiffusionPipeline) -> None:
    acts = guided_steps(dpm_solver(pipeline.scheduler), STEPS, SCALE, (0.28, 5.42))
    assert 0 < sum(acts) < STEPS
    assert rows_seen(pipeline, guidance_interval=(0.28, 5.42)) == [4 if on else 2 for on in acts]
    assert rows_seen(pipeline) == [4] * STEPS


def test_with_embeddings_that_were_made_before(pipeline: StableDiffusionPipeline) -> None:
    encoded = {text: pipeline.encode_prompt(text, "cpu", 1, False)[0][0] for text in (*PROMPTS, "")}
    here = drawn(pipeline, guidance_interval=(0.28, 5.42))
    assert torch.allclose(drawn(pipeline, guidance_interval=(0.28, 5.42), encoded=encoded), here, atol=1e-5)


def test_the_next_image_knows_nothing_of_it(pipeline: StableDiffusionPipeline) -> None:
    plain = drawn(pipeline)
    drawn(pipeline, guidance_interval=(0.28, 5.42))
    assert torch.equal(drawn(pipeline), plain)
    drawn(pipeline, guidance_interval=(0.28, 5.42), sampler="checkpoint")  # PNDM's steps are not one by one
    theirs = pipeline("a dog", num_inference_steps=2, height=32, width=32, output_type="np").images
    assert np.isfinite(theirs).all()
