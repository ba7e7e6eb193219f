"""The pure step on a real tiny UNet with a real peft adapter."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils._python_dispatch import TorchDispatchMode

from lorabooth.objective.loss import weighting
from lorabooth.objective.paths import FlowPath, discrete_path
from lorabooth.recipe import LossSection
from lorabooth.rng import generator_for
from lorabooth.training import step
from lorabooth.types import Batch, Geometry

GEOMETRY = Geometry(original_px=(64, 64), crop_px=(0, 0), target_px=(64, 64))


class TextEncoder(torch.nn.Module):
    """The smallest thing that turns token ids into embeddings and can carry an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 16)
        self.proj = torch.nn.Linear(16, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.proj(self.embed(ids))


def with_adapter(module: torch.nn.Module, targets: list[str]) -> torch.nn.Module:
    module.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=targets), module)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return module


def make_unet() -> torch.nn.Module:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return with_adapter(unet, ["to_q", "to_k", "to_v", "to_out.0"])


@contextmanager
def adapters_off(*modules):
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class Setup:
    """A model with counted calls."""

    def __init__(self, prediction: str = "epsilon") -> None:
        self.unet = make_unet()
        self.encoder = with_adapter(TextEncoder(), ["proj"])
        self.rows: Counter[bool] = Counter()
        self.path = discrete_path({"beta_schedule": "scaled_linear", "prediction_type": prediction})

    def predict(self, x, level, cond, geometry):
        assert len(geometry) == len(x) == len(level)
        self.rows[torch.is_grad_enabled()] += len(x)
        return self.unet(x, level, cond["prompt"]).sample

    def encode(self, cond):
        return {"prompt": self.encoder(cond["ids"])}

    def off(self):
        return adapters_off(self.unet, self.encoder)

    def parts(self, *, distill: bool = False, train_text: bool = False) -> step.StepParts:
        condition = self.encode if train_text else step.cached_condition
        targets = step.distill_targets(self.predict, condition, self.off) if distill else step.path_targets
        return step.StepParts(
            predict=self.predict,
            condition=condition,
            path=self.path,
            weighting=weighting(LossSection(weighting="min_snr"), self.path.prediction),
            targets=targets,
        )


def make_batch(roles: list[bool], *, tokens: bool = False, lam: float = 0.5, positions=None) -> Batch:
    places = list(range(len(roles))) if positions is None else positions
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(8, 4, 8, 8, generator=generator)[places]
    prompts = torch.randn(8, 5, 16, generator=generator)[places]
    ids = torch.randint(11, (8, 5), generator=generator)[places]
    return Batch(
        latents=latents,
        cond={"ids": ids} if tokens else {"prompt": prompts},
        geometry=(GEOMETRY,) * len(roles),
        weight=torch.tensor([1.0 if role else lam for role in roles]),
        is_instance=torch.tensor(roles),
        record_ids=tuple(f"r{place}" for place in places),
        positions=tuple(places),
    )


def run(setup: Setup, parts: step.StepParts, batch: Batch, n_instance: int, n_class: int, at: int = 0):
    eps, level = step.draw_noise(parts.path, 7, at, batch.positions, batch.latents.shape[1:])
    rows = step.class_rows(batch)
    return step.micro_step(parts, batch, eps, level, class_rows=rows, n_instance=n_instance, n_class=n_class)


def gradients(setup: Setup) -> dict[str, torch.Tensor]:
    named = [*setup.unet.named_parameters(), *setup.encoder.named_parameters("text")]
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_step_equals_a_loop_by_hand(prediction):
    setup = Setup(prediction)
    batch = make_batch([True, False, True])
    terms = run(setup, setup.parts(), batch, 2, 1)
    instance = prior = 0.0
    for row, role in enumerate([True, False, True]):
        eps, level = step.draw_noise(setup.path, 7, 0, [row], (4, 8, 8))
        noised = setup.path.noise(batch.latents[row : row + 1], eps, level)
        got = setup.unet(noised.x, level, batch.cond["prompt"][row : row + 1]).sample
        snr = noised.snr.item()
        weight = min(snr, 5.0) / (snr if prediction == "epsilon" else snr + 1)
        error = weight * torch.nn.functional.mse_loss(got, noised.target).item()
        instance += error / 2 if role else 0
        prior += 0 if role else error
    assert terms.instance.item() == pytest.approx(instance, rel=1e-4)
    assert terms.prior.item() == pytest.approx(prior, rel=1e-4)
    assert terms.total.item() == pytest.approx(instance + 0.5 * prior, rel=1e-4)


@pytest.mark.parametrize("distill", [False, True])
@pytest.mark.parametrize("train_text", [False, True])
def test_accumulated_4x1_equals_1x4(distill, train_text):
    roles = [True, False, False, True]
    results = []
    for pieces in ([[0, 1, 2, 3]], [[0], [1], [2], [3]], [[3, 1], [0, 2]]):
        setup = Setup()
        parts = setup.parts(distill=distill, train_text=train_text)
        total = 0.0
        for piece in pieces:
            batch = make_batch([roles[place] for place in piece], tokens=train_text, positions=piece)
            terms = run(setup, parts, batch, 2, 2)
            terms.total.backward()
            total += terms.total.item()
        results.append((total, gradients(setup)))
    for total, grads in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-5)
        assert grads.keys() == results[0][1].keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, results[0][1][name], rtol=1e-3, atol=1e-6)


def test_text_encoder_adapter_has_gradients_only_when_it_trains():
    for train_text in (False, True):
        setup = Setup()
        batch = make_batch([True, False], tokens=train_text)
        run(setup, setup.parts(train_text=train_text), batch, 1, 1).total.backward()
        assert any(name.startswith("text.") for name in gradients(setup)) is train_text


@pytest.mark.parametrize("train_text", [False, True])
def test_distilled_class_target_is_the_base_models_prediction(train_text):
    setup = Setup()
    parts = setup.parts(distill=True, train_text=train_text)
    batch = make_batch([False, True, False], tokens=train_text)
    eps, level = step.draw_noise(setup.path, 7, 0, batch.positions, (4, 8, 8))
    noised = setup.path.noise(batch.latents, eps, level)
    target = parts.targets(batch, noised, step.class_rows(batch))
    with torch.no_grad():
        adapted = setup.predict(noised.x, level, parts.condition(batch.cond), batch.geometry)
        with setup.off():
            base = setup.predict(noised.x, level, parts.condition(batch.cond), batch.geometry)
    assert torch.equal(target[1], noised.target[1])
    for row in (0, 2):
        torch.testing.assert_close(target[row], base[row], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(target[row], adapted[row], atol=1e-2)
    assert not target.requires_grad


def test_teacher_sees_class_rows_only_and_the_adapter_is_on_again():
    setup = Setup()
    terms = run(setup, setup.parts(distill=True), make_batch([True, True, False]), 2, 1)
    assert setup.rows == {False: 1, True: 3}
    terms.total.backward()
    assert any(grad.abs().max() > 0 for grad in gradients(setup).values())
    setup.rows.clear()
    run(setup, setup.parts(distill=True), make_batch([True, True]), 2, 0)
    assert setup.rows == {True: 2}


def test_an_untrained_adapter_has_no_distilled_prior_loss():
    """lora_B = 0 is the base itself: the class term is zero, whatever lambda."""
    setup = Setup()
    for name, parameter in setup.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    terms = run(setup, setup.parts(distill=True), make_batch([True, False], lam=100.0), 1, 1)
    assert terms.prior.item() == pytest.approx(0.0, abs=1e-9)
    assert terms.total.item() == pytest.approx(terms.instance.item(), rel=1e-4)


class NoHostSync(TorchDispatchMode):
    """Refuses what would wait for the device: .item(), branches on data, shapes that depend on data."""

    REFUSED = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.REFUSED:
            raise AssertionError(f"host synchronisation: {name}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("distill", [False, True])
def test_no_host_synchronisation_in_the_step(distill):
    setup = Setup()
    parts = setup.parts(distill=distill)
    batch = make_batch([True, False])
    eps, level = step.draw_noise(parts.path, 7, 0, batch.positions, (4, 8, 8))
    rows = step.class_rows(batch)
    with NoHostSync():
        step.micro_step(parts, batch, eps, level, class_rows=rows, n_instance=1, n_class=1).total.backward()
    with pytest.raises(AssertionError, match="host synchronisation"), NoHostSync():
        eps.sum().item()


@pytest.mark.parametrize("distill", [False, True])
def test_step_runs_on_meta_tensors(distill):
    setup = Setup()
    setup.unet.to("meta")
    setup.path = setup.path.to("meta")
    batch = make_batch([True, False])
    rows = step.class_rows(batch)
    meta = replace(
        batch,
        latents=batch.latents.to("meta"),
        cond={name: tensor.to("meta") for name, tensor in batch.cond.items()},
        weight=batch.weight.to("meta"),
        is_instance=batch.is_instance.to("meta"),
    )
    eps, level = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    parts = setup.parts(distill=distill)
    terms = step.micro_step(parts, meta, eps, level, class_rows=rows, n_instance=1, n_class=1)
    terms.total.backward()
    assert terms.total.device.type == "meta"


def test_class_rows_follow_the_flags_not_the_place():
    assert step.class_rows(make_batch([False, True, False, True])) == (0, 2)
    assert step.class_rows(make_batch([True])) == ()


@pytest.mark.parametrize("path", [discrete_path({}), FlowPath()], ids=["discrete", "flow"])
def test_noise_is_a_function_of_seed_step_and_position(path):
    shape = (4, 8, 8)
    eps, level = step.draw_noise(path, 1, 5, [0, 1, 2, 3], shape)
    assert eps.shape == (4, *shape)
    assert level.shape == (4,)
    torch.manual_seed(99)
    some, some_level = step.draw_noise(path, 1, 5, [3, 1], shape)
    assert torch.equal(some, eps[[3, 1]])
    assert torch.equal(some_level, level[[3, 1]])
    for seed, at in ((2, 5), (1, 6)):
        other, other_level = step.draw_noise(path, seed, at, [0, 1, 2, 3], shape)
        assert not torch.equal(other, eps)
        assert not torch.equal(other_level, level)
    assert len({row.sum().item() for row in eps}) == 4
    # Levels have their own randomness: with the noise's they would follow its first element.
    assert not torch.equal(level[0], path.sample_level(generator_for(1, 5, 0, "noise", 0)))
