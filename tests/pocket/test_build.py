"""A real build of a few steps: it is a pipeline, it resumes, it refuses to mix builds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from lorabooth.errors import RecipeError
from lorabooth.pocket.build import BuildPlan, build
from lorabooth.pocket.clip import load_clip
from lorabooth.pocket.dataset import rendered
from lorabooth.pocket.trainer import read_state
from lorabooth.pocket.vae import encode_all


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, small_batches: None) -> BuildPlan:
    folder = tmp_path_factory.mktemp("pocket")
    plan = BuildPlan(work=folder / "work", out=folder / "out", minutes=0, scenes=60, processes=1)
    build(plan)
    return plan


def test_build_makes_a_pipeline_that_samples(plan: BuildPlan) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(plan.out)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a photo of a mug", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.float32


def test_folder_is_half_precision_and_small(plan: BuildPlan) -> None:
    total = sum(file.stat().st_size for file in plan.out.rglob("*") if file.is_file())
    assert total <= 16_000_000
    tensors = load_file(plan.out / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_clip_of_the_folder_is_the_pipelines_text_encoder(plan: BuildPlan) -> None:
    clip = load_clip(plan.out)
    encoder = StableDiffusionPipeline.from_pretrained(plan.out).text_encoder
    ids = torch.arange(8)[None]
    assert torch.equal(clip.text_model(ids).last_hidden_state, encoder(ids).last_hidden_state)


def test_latents_are_standardised_and_decode_the_same(plan: BuildPlan) -> None:
    vae = StableDiffusionPipeline.from_pretrained(plan.out).vae
    latents = read_state(plan.work / "latents.safetensors")[0]["latents"].float()
    assert vae.config.scaling_factor == 1.0
    assert torch.allclose(latents.std(dim=(0, 2, 3)), torch.ones(latents.shape[1]), atol=0.02)
    images = rendered(plan.seed, "train", 4).images
    again = encode_all(vae, images, torch.device("cpu")).float()
    assert float((again - latents[:4]).abs().mean()) < 0.05


def test_finished_build_does_nothing_more(plan: BuildPlan) -> None:
    before = read_state(plan.state_file("unet"))
    build(plan)
    after = read_state(plan.state_file("unet"))
    assert before[1] == after[1]


@pytest.mark.slow
def test_resuming_goes_on_where_it_was(plan: BuildPlan, tmp_path: Path) -> None:
    longer = replace(plan, min_steps=4, out=tmp_path / "out")
    first = read_state(plan.state_file("clip"))
    build(longer)
    tensors, info = read_state(plan.state_file("clip"))
    assert (first[1]["step"], info["step"]) == (2, 4)
    assert float(tensors["optim/0/step"]) == 4.0
    assert (tmp_path / "out" / "model_index.json").exists()


def test_work_folder_of_another_seed_is_refused(plan: BuildPlan) -> None:
    with pytest.raises(RecipeError, match="another build"):
        build(replace(plan, seed=1))
    assert json.loads((plan.work / "build.json").read_text())["seed"] == 0
