from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from PIL import Image

from lorabooth.errors import LoraboothError, OutOfMemoryError, RecipeError
from lorabooth.evaluation.generate import dpm_solver, generate
from lorabooth.memory import in_turn

PROMPTS = ("a photo of a dog", "a red mug in snow", "a painting of a cat", "a boot")
SEEDS = (0, 7, 7, 2**62 + 1)
SMALL = {"steps": 2, "guidance": 3.0, "height_px": 32, "width_px": 48}


@pytest.fixture
def pipeline(tiny_sd: Path) -> Iterator[StableDiffusionPipeline]:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def arrays(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images])


def sd_scheduler(prediction: str) -> PNDMScheduler:
    return PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction
    )


class Heard:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.advanced = 0

    def task(self, label, total, unit="it", start=0):
        import contextlib

        return contextlib.nullcontext(self)

    def advance(self, count=1, **fields):
        self.advanced += count

    def say(self, message):
        pass

    def warn(self, message):
        self.warnings.append(message)


def test_size_and_variety(pipeline) -> None:
    images = generate(pipeline, PROMPTS, SEEDS, **SMALL)
    assert [image.size for image in images] == [(48, 32)] * 4
    pixels = arrays(images)
    assert all((pixels[i] != pixels[j]).any() for i in range(4) for j in range(i))


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_an_image_depends_on_its_own_prompt_and_seed_only(pipeline, batch_size: int) -> None:
    alone = arrays(generate(pipeline, PROMPTS, SEEDS, **SMALL))
    turned = arrays(generate(pipeline, PROMPTS[::-1], SEEDS[::-1], batch_size=batch_size, **SMALL))[::-1]
    # Batched matrix products may round otherwise; one 8-bit level at most.
    assert np.abs(alone - turned).max() <= 1


def test_same_call_same_bits(pipeline) -> None:
    first = arrays(generate(pipeline, PROMPTS, SEEDS, batch_size=3, **SMALL))
    torch.rand(5)
    assert (first == arrays(generate(pipeline, PROMPTS, SEEDS, batch_size=3, **SMALL))).all()


def test_nothing_is_left_changed(pipeline) -> None:
    pipeline.unet.train()
    pipeline.unet.mid_block.eval()
    pipeline.text_encoder.train()
    scheduler, config = pipeline.scheduler, dict(pipeline.scheduler.config)
    modes = {name: module.training for name, module in pipeline.unet.named_modules()}
    weights = {k: v.clone() for k, v in pipeline.vae.state_dict().items()}
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    generate(pipeline, PROMPTS[:2], SEEDS[:2], sampler="dpm++", **SMALL)
    generate(pipeline, PROMPTS[:1], SEEDS[:1], sampler="checkpoint", **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert {name: module.training for name, module in pipeline.unet.named_modules()} == modes
    assert pipeline.text_encoder.training
    assert not pipeline.vae.training
    assert pipeline.scheduler is scheduler
    assert dict(pipeline.scheduler.config) == config
    assert pipeline._progress_bar_config == {"disable": True}
    assert torch.is_grad_enabled()
    assert all(torch.equal(v, weights[k]) for k, v in pipeline.vae.state_dict().items())


def test_everything_is_put_back_after_a_failure_too(pipeline) -> None:
    pipeline.unet.train()
    scheduler = pipeline.scheduler
    with pytest.raises(LoraboothError, match="divisible by 8"):
        generate(pipeline, PROMPTS[:1], SEEDS[:1], **{**SMALL, "height_px": 33})
    assert pipeline.unet.training
    assert pipeline.scheduler is scheduler


def test_samplers_differ_and_both_follow_the_checkpoint(pipeline) -> None:
    dpm = arrays(generate(pipeline, PROMPTS[:1], SEEDS[:1], **SMALL))
    own = arrays(generate(pipeline, PROMPTS[:1], SEEDS[:1], sampler="checkpoint", **SMALL))
    assert (dpm != own).any()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_solver_keeps_schedule_and_prediction_type(prediction: str) -> None:
    source = sd_scheduler(prediction)
    solver = dpm_solver(source)
    assert solver.config.prediction_type == prediction
    assert solver.config.algorithm_type == "dpmsolver++"
    assert solver.config.solver_order == 2
    assert not solver.config.use_karras_sigmas
    assert torch.equal(solver.alphas_cumprod, source.alphas_cumprod)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_solver_lands_on_the_clean_image_of_a_perfect_model(prediction: str) -> None:
    source = sd_scheduler(prediction)
    solver = dpm_solver(source)
    solver.set_timesteps(20)
    clean = torch.linspace(-1, 1, 64, dtype=torch.float64).reshape(1, 1, 8, 8)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for t in solver.timesteps:
        signal = source.alphas_cumprod[t].double().sqrt()
        noise = (1 - source.alphas_cumprod[t].double()).sqrt()
        epsilon = (x - signal * clean) / noise
        prediction_now = epsilon if prediction == "epsilon" else signal * epsilon - noise * clean
        x = solver.step(prediction_now, t, x).prev_sample
    assert torch.allclose(x, clean, atol=2e-3)


def test_flow_models_are_refused_by_the_solver() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    source = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(RecipeError, match="checkpoint"):
        dpm_solver(source)


def test_v_prediction_base_draws(tiny_sd2: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd2, local_files_only=True)
    image = generate(pipeline, PROMPTS[:1], SEEDS[:1], **SMALL)[0]
    assert arrays([image]).std() > 1


def test_images_are_handed_over_one_by_one(pipeline) -> None:
    got: list[tuple[int, Image.Image]] = []
    heard = Heard()
    images = generate(
        pipeline,
        PROMPTS,
        SEEDS,
        batch_size=3,
        on_image=lambda i, x: got.append((i, x)),
        reporter=heard,
        **SMALL,
    )
    assert got == list(enumerate(images))
    assert heard.advanced == 4


def test_out_of_memory_halves_the_batch(pipeline) -> None:
    whole = arrays(generate(pipeline, PROMPTS, SEEDS, **SMALL))
    sizes = []

    def small_card(module, args):
        sizes.append(len(args[0]))
        if len(args[0]) > 2:  # guidance doubles the batch
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    hook = pipeline.unet.register_forward_pre_hook(small_card)
    heard = Heard()
    images = generate(pipeline, PROMPTS, SEEDS, batch_size=4, reporter=heard, **SMALL)
    hook.remove()
    assert np.abs(arrays(images) - whole).max() <= 1
    assert sizes[:3] == [8, 4, 2]
    assert len(heard.warnings) == 2


def test_one_image_that_does_not_fit_is_an_error(pipeline) -> None:
    def no_memory(module, args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    pipeline.unet.register_forward_pre_hook(no_memory)
    with pytest.raises(OutOfMemoryError, match="48 x 32 px"):
        generate(pipeline, PROMPTS, SEEDS, batch_size=2, **SMALL)


def test_denoiser_and_vae_in_turn_draw_the_same_images(pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU plays the device; memory runs out once while decoding, when the denoiser is away."""
    expected = arrays(generate(pipeline, PROMPTS, SEEDS, batch_size=2, **SMALL))
    monkeypatch.setattr(in_turn, "has_own_memory", lambda device: True)
    weights = {id(p): p.detach().clone() for m in (pipeline.unet, pipeline.vae) for p in m.parameters()}
    for parameter in (*pipeline.unet.parameters(), *pipeline.vae.parameters()):
        parameter.requires_grad_(False)
    decode, away = pipeline.vae.decode, []

    def short_once(*args, **kwargs):
        # What waits is a copy of its own.
        away.append(pipeline.unet.conv_in.weight.data_ptr())
        if len(away) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return decode(*args, **kwargs)

    def drawing(*args):
        # A pipeline takes the device of the first module that it finds; a VAE that waits is on another.
        assert pipeline._execution_device == pipeline.unet.device
        assert pipeline.vae is pipeline.text_encoder is None

    pipeline.unet.register_forward_pre_hook(drawing)
    pipeline.vae.decode = short_once
    place, heard = pipeline.unet.conv_in.weight.data_ptr(), Heard()
    images = generate(pipeline, PROMPTS, SEEDS, batch_size=4, in_turn=True, reporter=heard, **SMALL)
    assert (arrays(images) == expected).all()
    assert len(heard.warnings) == 1
    assert len(set(away)) == 1
    assert place not in away
    for module in (pipeline.unet, pipeline.vae):
        assert all(torch.equal(p, weights[id(p)]) for p in module.parameters())


def test_nan_becomes_a_black_image_and_a_warning(pipeline) -> None:
    pipeline.unet.conv_out.weight.data[0] = torch.nan
    heard = Heard()
    images = generate(pipeline, PROMPTS[:1], SEEDS[:1], reporter=heard, **SMALL)
    assert arrays(images).max() == 0
    assert "NaN" in heard.warnings[0]


def test_encoded_prompts_replace_a_text_encoder_that_left(pipeline, tiny_sd: Path) -> None:
    expected = arrays(generate(pipeline, PROMPTS[:2], SEEDS[:2], **SMALL))
    texts = [*PROMPTS[:2], ""]
    with torch.no_grad():
        encoded = dict(zip(texts, pipeline.encode_prompt(texts, "cpu", 1, False)[0], strict=True))
    left = StableDiffusionPipeline(
        vae=pipeline.vae,
        text_encoder=None,
        tokenizer=pipeline.tokenizer,
        unet=pipeline.unet,
        scheduler=pipeline.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    assert (
        np.abs(arrays(generate(left, PROMPTS[:2], SEEDS[:2], encoded=encoded, **SMALL)) - expected).max() <= 1
    )
    with pytest.raises(LoraboothError, match="Sampling failed"):
        generate(left, ["not encoded"], [0], encoded=encoded, **SMALL)


def test_half_precision_parts_may_be_mixed_and_keep_their_bits(pipeline) -> None:
    expected = arrays(generate(pipeline, PROMPTS[:2], SEEDS[:2], **SMALL))
    torch.nn.Module.to(pipeline.unet, torch.bfloat16)
    torch.nn.Module.to(pipeline.vae, torch.float16)
    before = {k: v.clone() for k, v in pipeline.vae.state_dict().items()}
    images = arrays(generate(pipeline, PROMPTS[:2], SEEDS[:2], **SMALL))
    assert pipeline.vae.dtype == torch.float16
    assert all(torch.equal(v, before[k]) for k, v in pipeline.vae.state_dict().items())
    assert np.abs(images - expected).mean() < 4
