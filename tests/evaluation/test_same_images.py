"""A file of diffusers' training script gives the same images in `lorabooth sample` and in diffusers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from lorabooth.adapters.convert import convert_file
from lorabooth.evaluation.sample import sample

PROMPT, SEED, STEPS, GUIDANCE = "a photo of a sks dog in the snow", 7, 4, 5.0


@pytest.fixture(scope="module")
def written(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As examples/dreambooth/train_dreambooth_lora.py saves it: no alphas, a LoraConfig with alpha = rank."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd)
    targets = {
        "unet": ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_v_proj"],
        "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
    }
    states = {}
    for name, modules in targets.items():
        model = getattr(pipe, name)
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=modules))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "lora_B" in key:
                    value.copy_(0.3 * torch.randn(value.shape, generator=generator))
        states[name] = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    folder = tmp_path_factory.mktemp("script")
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=states["unet"], text_encoder_lora_layers=states["text_encoder"]
    )
    return folder / "pytorch_lora_weights.safetensors"


def theirs(base: Path, adapter: Path | None) -> np.ndarray:
    """The image of diffusers' own pipeline and loader, with the sampler that `sample` takes."""
    from diffusers import DPMSolverMultistepScheduler

    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    if adapter is not None:
        pipe.load_lora_weights(adapter.parent, weight_name=adapter.name)
    image = pipe(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(SEED),
    ).images[0]
    return np.asarray(image, dtype=np.int16)


def ours(base: Path, adapter: Path | None, out: Path) -> np.ndarray:
    adapters = [] if adapter is None else [(adapter, 1.0)]
    result = sample(
        str(base),
        adapters,
        [PROMPT],
        [SEED],
        out=out,
        steps=STEPS,
        guidance=GUIDANCE,
        device="cpu",
        dtype="fp32",
    )
    return np.asarray(Image.open(result.paths[0]).convert("RGB"), dtype=np.int16)


def test_the_same_images(tiny_sd: Path, written: Path, tmp_path: Path) -> None:
    plain = ours(tiny_sd, None, tmp_path / "plain")
    assert np.abs(plain - theirs(tiny_sd, None)).max() <= 1
    with_adapter = ours(tiny_sd, written, tmp_path / "adapter")
    assert np.abs(with_adapter - theirs(tiny_sd, written)).max() <= 1
    assert np.abs(with_adapter - plain).max() > 20
    # and after a turn through kohya's and PEFT's layouts
    convert_file(written, tmp_path / "kohya.safetensors", to="kohya")
    convert_file(tmp_path / "kohya.safetensors", tmp_path / "peft", to="peft")
    for path in (tmp_path / "kohya.safetensors", tmp_path / "peft"):
        again = ours(tiny_sd, path, tmp_path / f"{path.name}-images")
        assert np.array_equal(again, with_adapter)
    assert np.abs(theirs(tiny_sd, tmp_path / "kohya.safetensors") - with_adapter).max() <= 1
