"""What every family must do, on a real base of each kind. A new family joins by one row in `BASES`.

The bases are tiny models made in code, and the pocket base where the package has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorabooth.adapters import file, inject
from lorabooth.errors import LoraboothError
from lorabooth.families import registry, source
from lorabooth.families.base import Family, Parts
from lorabooth.memory import apply, attention, checkpoint, frozen, stream
from lorabooth.objective.loss import per_example_error
from lorabooth.types import Geometry

BASES = ("tiny-sd1", "tiny-sd2", "pocket")
PROMPTS = ("a photo of a dog", "", "a red mug on the beach " * 30)


@dataclass(frozen=True)
class Case:
    """One family with one base."""

    path: str
    family: Family

    def load(self, dtype: torch.dtype = torch.float32) -> Parts:
        return self.family.load(source.resolve(self.path), dtype)


@dataclass(frozen=True)
class Example:
    """Inputs of a denoiser: two noisy latents of one size, their levels, conditioning and target."""

    x: Tensor
    level: Tensor
    cond: dict[str, Tensor]
    target: Tensor
    geometry: tuple[Geometry, ...]


@pytest.fixture(scope="module", params=BASES)
def case(request: pytest.FixtureRequest, tiny_sd: Path, tiny_sd2: Path) -> Case:
    path = {"tiny-sd1": str(tiny_sd), "tiny-sd2": str(tiny_sd2), "pocket": "pocket"}[request.param]
    if path == "pocket":
        if find_spec("lorabooth.pocket.base") is None:
            pytest.skip("the package has no pocket base yet")
        try:
            source.resolve(path)
        except LoraboothError as error:
            pytest.skip(f"no pocket base: {error.what}")
    return Case(path, registry.family(source.resolve(path).family))


@pytest.fixture(scope="module")
def parts(case: Case) -> Parts:
    """Read only."""
    return case.load()


@pytest.fixture(scope="module")
def side_px(case: Case) -> int:
    return min(64, case.family.defaults_for(source.resolve(case.path)).resolution_px)


@pytest.fixture(scope="module")
def pixels(side_px: int) -> Tensor:
    ramp = torch.linspace(-1, 1, side_px)
    image = torch.stack((ramp[:, None] + 0 * ramp, 0 * ramp[:, None] + ramp, ramp[:, None] * ramp))
    return torch.stack((image, image.flip(1)))


@pytest.fixture(scope="module")
def example(case: Case, parts: Parts, pixels: Tensor) -> Example:
    latents = torch.stack([m.mean for m in case.family.encode_images(parts, pixels)])
    path = case.family.noise_path(parts)
    eps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7))
    noised = path.noise(latents, eps, torch.tensor([100, 700]))
    cond = case.family.collate(case.family.encode_prompts(parts, PROMPTS[:2]))
    size = (pixels.shape[-2], pixels.shape[-1])
    geometry = (Geometry(size, (0, 0), size),) * 2
    return Example(noised.x, noised.level, dict(cond), noised.target, geometry)


def error_of(case: Case, parts: Parts, example: Example) -> Tensor:
    prediction = case.family.predict(parts, example.x, example.level, example.cond, example.geometry)
    return per_example_error(prediction, example.target).mean()


def attach(case: Case, parts: Parts, preset: str = "attn", *, text: bool = False) -> inject.Attached:
    targets = [inject.Target("denoiser", tuple(case.family.targets[preset]), 4, 4.0, 0.0)]
    if text:
        targets.append(inject.Target("text_encoder", tuple(case.family.text_targets), 4, 4.0, 0.0))
    return inject.attach(parts.components(), targets, name="default", seed=0)


def stir(attached: inject.Attached) -> None:
    """lora_B starts at zero, where the adapter has no effect; give it one."""
    with torch.no_grad():
        for index, parameter in enumerate(attached.parameters()):
            parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(index))


# --- the base


def test_moments_have_the_denoisers_shape_and_are_the_pipelines_own(
    case: Case, parts: Parts, pixels: Tensor
) -> None:
    moments = case.family.encode_images(parts, pixels)
    posterior = parts.vae.encode(pixels).latent_dist
    config = parts.vae.config
    shift = getattr(config, "shift_factor", None) or 0.0
    for index, one in enumerate(moments):
        assert one.mean.dtype == one.std.dtype == torch.float32
        assert one.mean.shape[0] == parts.denoiser.config.in_channels
        assert not one.mean.requires_grad
        torch.testing.assert_close(one.mean, (posterior.mean[index] - shift) * config.scaling_factor)
        torch.testing.assert_close(one.std, posterior.std[index] * config.scaling_factor)


def test_decoding_gives_pixels_back(case: Case, parts: Parts, pixels: Tensor) -> None:
    latents = torch.stack([m.mean for m in case.family.encode_images(parts, pixels)])
    decoded = case.family.decode_latents(parts, latents)
    assert decoded.shape == pixels.shape
    assert decoded.dtype == torch.float32
    assert float(decoded.abs().max()) <= 1


def test_prompts_are_encoded_as_the_pipeline_does(case: Case, parts: Parts) -> None:
    ours = case.family.encode_prompts(parts, PROMPTS)
    pipeline = case.family.pipeline(parts)
    for cond, prompt in zip(ours, PROMPTS, strict=True):
        theirs, _ = pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
        torch.testing.assert_close(cond["encoder_hidden_states"], theirs[0])


def test_encoding_does_not_depend_on_the_company(case: Case, parts: Parts) -> None:
    together = case.family.encode_prompts(parts, PROMPTS)
    alone = [case.family.encode_prompts(parts, [prompt])[0] for prompt in PROMPTS]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(dict(a), dict(b))


def test_counted_tokens_are_those_that_are_encoded(case: Case, parts: Parts) -> None:
    for cond, (has, limit) in zip(
        case.family.tokenize(parts, PROMPTS), case.family.count_tokens(parts, PROMPTS), strict=True
    ):
        assert cond["input_ids"].shape == (limit,)
        assert has >= 2
    assert case.family.count_tokens(parts, [""])[0][0] == 2


def test_image_cond_is_one_entry_an_image(case: Case, parts: Parts, pixels: Tensor) -> None:
    assert [dict(c) for c in case.family.image_cond(parts, pixels)] == [{}, {}]


def test_noising_equals_the_schedulers_own(case: Case, parts: Parts) -> None:
    from diffusers import DDPMScheduler

    # Samplers renumber their timesteps; the training noise is DDPM's on the same config.
    scheduler = DDPMScheduler.from_config(case.family.pipeline(parts).scheduler.config)
    path = case.family.noise_path(parts)
    generator = torch.Generator().manual_seed(0)
    latents, eps = torch.randn(2, 5, 4, 8, 8, generator=generator)
    level = torch.tensor([0, 1, 499, 998, 999])
    noised = path.noise(latents, eps, level)
    torch.testing.assert_close(noised.x, scheduler.add_noise(latents, eps, level), rtol=1e-5, atol=1e-6)
    kind = parts.scheduler_config["prediction_type"]
    assert path.prediction == kind
    if kind == "epsilon":
        torch.testing.assert_close(noised.target, eps)
    else:
        velocity = scheduler.get_velocity(latents, eps, level)
        torch.testing.assert_close(noised.target, velocity, rtol=1e-5, atol=1e-6)


def test_the_prediction_is_the_denoisers(case: Case, parts: Parts, example: Example) -> None:
    with torch.no_grad():
        ours = case.family.predict(parts, example.x, example.level, example.cond, example.geometry)
        theirs = parts.denoiser(example.x, example.level, **example.cond).sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert ours.shape == example.x.shape
    assert torch.isfinite(ours).all()


def test_a_pipeline_draws_without_copying_the_modules(case: Case, parts: Parts, side_px: int) -> None:
    pipeline = case.family.pipeline(parts)
    assert pipeline.unet is parts.denoiser
    assert pipeline.vae is parts.vae
    assert type(pipeline.scheduler).__name__ == parts.scheduler_config["_class_name"]
    image = pipeline("a dog", num_inference_steps=2, height=side_px, width=side_px, output_type="np").images
    assert image.shape == (1, side_px, side_px, 3)


def test_sides_are_a_multiple_that_the_base_can_take(case: Case, parts: Parts, side_px: int) -> None:
    assert side_px % case.family.resolution_multiple_px(parts) == 0


def test_the_vae_alone_is_the_same_vae(case: Case, parts: Parts) -> None:
    torch.testing.assert_close(
        dict(case.family.load_vae(parts.source).state_dict()), dict(parts.vae.state_dict()), rtol=0, atol=0
    )


# --- with an adapter


@pytest.mark.parametrize("preset", ["attn", "attn+ff", "attn+ff+conv"])
def test_every_preset_attaches_trains_and_leaves_the_base_frozen(
    case: Case, example: Example, preset: str
) -> None:
    parts = case.load()
    attached = attach(case, parts, preset)
    stir(attached)
    error_of(case, parts, example).backward()
    ours = {id(p) for p in attached.parameters()}
    for component in parts.components().values():
        for parameter in component.parameters():
            assert (parameter.grad is not None) == (id(parameter) in ours)
            assert parameter.requires_grad == (id(parameter) in ours)
    assert all(float(p.grad.abs().sum()) > 0 for p in attached.parameters())


def test_gradients_reach_the_text_encoders_adapter_through_the_tokens(case: Case, example: Example) -> None:
    parts = case.load()
    attached = attach(case, parts, text=True)
    stir(attached)
    tokens = case.family.collate(case.family.tokenize(parts, PROMPTS[:2]))
    cond = case.family.encode_tokens(parts, tokens)
    prediction = case.family.predict(parts, example.x, example.level, cond, example.geometry)
    per_example_error(prediction, example.target).mean().backward()
    assert attached.parameters("text_encoder")
    assert all(float(p.grad.abs().sum()) > 0 for p in attached.parameters("text_encoder"))


def test_tokens_give_what_prompts_give(case: Case, parts: Parts) -> None:
    tokens = case.family.collate(case.family.tokenize(parts, PROMPTS))
    with torch.no_grad():
        ours = case.family.encode_tokens(parts, tokens)
    torch.testing.assert_close(
        dict(ours), dict(case.family.collate(case.family.encode_prompts(parts, PROMPTS)))
    )


@pytest.mark.parametrize(
    "technique",
    [
        pytest.param(lambda parts: checkpoint.recompute(parts.denoiser), id="checkpointing"),
        pytest.param(lambda parts: checkpoint.recompute(parts.denoiser, 3, offload=True), id="offload"),
        pytest.param(lambda parts: frozen.keep_no_inputs(parts.denoiser), id="no inputs"),
        pytest.param(
            lambda parts: (stream.stream(parts.denoiser, "cpu"), checkpoint.recompute(parts.denoiser)),
            id="stream",
        ),
        pytest.param(lambda parts: apply.cast_base(parts.denoiser, torch.float32), id="cast"),
        pytest.param(lambda parts: attention.set_attention(parts.denoiser, "sdpa"), id="sdpa"),
    ],
)
def test_memory_techniques_do_not_change_gradients(
    case: Case, example: Example, technique: Callable[[Parts], object]
) -> None:
    def gradients(change: Callable[[Parts], object]) -> list[Tensor]:
        parts = case.load()
        attached = attach(case, parts)
        stir(attached)
        change(parts)
        return list(torch.autograd.grad(error_of(case, parts, example), list(attached.parameters())))

    torch.testing.assert_close(gradients(technique), gradients(lambda parts: None), rtol=1e-5, atol=1e-7)


def test_half_precision_runs_forward_and_backward(case: Case, example: Example) -> None:
    parts = case.load(torch.bfloat16)
    attached = attach(case, parts)
    stir(attached)
    assert {p.dtype for p in attached.parameters()} == {torch.float32}
    chosen = apply.Precision(torch.bfloat16, torch.bfloat16, "")
    with chosen.autocast("cpu"):
        error = error_of(case, parts, example)
    error.backward()
    assert all(torch.isfinite(p.grad).all() for p in attached.parameters())


def test_a_saved_adapter_gives_the_same_predictions_on_a_fresh_base(
    case: Case, example: Example, tmp_path: Path
) -> None:
    trained, fresh = case.load(), case.load()
    attached = attach(case, trained, "attn+ff+conv", text=True)
    stir(attached)
    metadata = file.Metadata(family=case.family.name, base_id=trained.source.base_id)
    file.write(tmp_path / "adapter.safetensors", inject.tensors(trained.components()), metadata)
    inject.attach_tensors(fresh.components(), file.read(tmp_path / "adapter.safetensors").tensors)
    for inputs in (example, example):
        with torch.no_grad():
            ours, theirs = (
                case.family.predict(p, inputs.x, inputs.level, inputs.cond, inputs.geometry)
                for p in (fresh, trained)
            )
        torch.testing.assert_close(ours, theirs)
    ours, theirs = (case.family.encode_prompts(p, PROMPTS) for p in (fresh, trained))
    torch.testing.assert_close([dict(c) for c in ours], [dict(c) for c in theirs])


def test_off_and_detached_are_the_base(case: Case, parts: Parts, example: Example) -> None:
    changed = case.load()
    stir(attach(case, changed, text=True))
    predict = case.family.predict
    with torch.no_grad():
        base = predict(parts, example.x, example.level, example.cond, example.geometry)
        live = predict(changed, example.x, example.level, example.cond, example.geometry)
        with inject.disabled(changed.components()):
            off = predict(changed, example.x, example.level, example.cond, example.geometry)
        inject.detach(changed.components())
        detached = predict(changed, example.x, example.level, example.cond, example.geometry)
    assert not torch.allclose(live, base)
    torch.testing.assert_close(off, base)
    torch.testing.assert_close(detached, base)


def test_a_few_steps_lower_the_loss(case: Case, example: Example) -> None:
    parts = case.load()
    attached = attach(case, parts)
    optimizer = torch.optim.AdamW(attached.parameters(), lr=1e-2)
    errors = []
    for _ in range(6):
        error = error_of(case, parts, example)
        errors.append(float(error.detach()))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert errors[5] < errors[0]
