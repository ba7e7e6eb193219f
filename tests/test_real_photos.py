"""Real photos of a dog (DreamBench, if it lies beside the project), on a base of Stable Diffusion's shape."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorabooth.cli.app import app
from tests.tiny import make_sd_folder

DOG = Path(__file__).resolve().parents[2] / "shared" / "dreambench" / "dog6"


@pytest.mark.skipif(not DOG.is_dir(), reason="DreamBench's photos are not here")
def test_a_dog_is_learned_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import StableDiffusionPipeline

    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path / "cache"))
    base = make_sd_folder(tmp_path / "base", unet_channels=(32, 64, 64), resolution=64)
    words = ["train", "--base", str(base), "--images", str(DOG), "--noun", "dog", "--steps", "5"]
    few = ["--set", "prior.count=4", "--set", "prior.sampler_steps=2", "--set", "run.sample_count=1"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "run"), *few])
    assert done.exit_code == 0, done.output
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.load_lora_weights(str(tmp_path / "run"), weight_name="adapter.safetensors")
    adapted = [name for name, _ in pipeline.unet.named_parameters() if "lora_B" in name]
    assert len(adapted) == sum(
        1
        for name, _ in pipeline.unet.named_modules()
        if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))
    )
