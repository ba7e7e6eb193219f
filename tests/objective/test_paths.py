"""Noise paths equal the schedulers that checkpoints are sampled with, and conversions undo each other."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from lorabooth.errors import BaseModelError
from lorabooth.objective import paths
from lorabooth.rng import generator_for

SCHEDULES = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.02, "num_train_timesteps": 50},
    {"trained_betas": torch.linspace(0.001, 0.3, 40).tolist(), "num_train_timesteps": 40},
    {},
]


def normal(*shape: int, dtype: torch.dtype = torch.float32, purpose: str = "x") -> torch.Tensor:
    return torch.randn(*shape, generator=generator_for(0, 0, 0, purpose), dtype=dtype)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.get("beta_schedule", "other"))
def test_discrete_path_equals_diffusers_at_every_timestep(schedule, prediction, zero_snr):
    scheduler = DDPMScheduler(**schedule, prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    path = paths.discrete_path(dict(scheduler.config))
    level = torch.arange(scheduler.config.num_train_timesteps)
    latents, eps = normal(len(level), 2, 3, 3), normal(len(level), 2, 3, 3, purpose="eps")
    noised = path.noise(latents, eps, level)
    # diffusers accumulates the product in float32, the path in float64.
    torch.testing.assert_close(noised.x, scheduler.add_noise(latents, eps, level), rtol=1e-4, atol=2e-5)
    target = eps if prediction == "epsilon" else scheduler.get_velocity(latents, eps, level)
    torch.testing.assert_close(noised.target, target, rtol=1e-4, atol=2e-5)
    assert path.prediction == prediction
    assert noised.level is level
    abar = scheduler.alphas_cumprod.double()
    # The float32 product is off by a few units in its last place, which 1 / (1 - abar) magnifies near t = 0:
    # so the two are compared as abar and as 1 - abar.
    snr = noised.snr.double()
    torch.testing.assert_close(snr / (1 + snr), abar, rtol=1e-4, atol=5e-7)
    torch.testing.assert_close(1 / (1 + snr), 1 - abar, rtol=1e-4, atol=5e-7)
    assert noised.snr.isfinite().all()
    if zero_snr:
        assert noised.snr[-1] == 0
        assert torch.equal(noised.x[-1], eps[-1])


def test_config_as_stored_in_a_checkpoint_with_foreign_keys():
    config = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    path = paths.discrete_path(config)
    assert path.prediction == "epsilon"
    # abar_T of Stable Diffusion 1.x, arXiv 2305.08891 table 1: 0.0047 (its sqrt is 0.068265).
    assert path.alphas_cumprod[-1].sqrt().item() == pytest.approx(0.068265, abs=1e-5)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"prediction_type": "sample"}, "sample"),
        ({"prediction_type": "flow_prediction"}, "flow_prediction"),
        ({"beta_schedule": "laplace"}, "laplace"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
    ],
)
def test_unsupported_discrete_configs_are_refused_by_name(config, named):
    with pytest.raises(BaseModelError, match=named) as caught:
        paths.discrete_path(config)
    assert caught.value.exit_code == 4


def test_discrete_levels_cover_all_timesteps_evenly_and_repeat_with_the_seed():
    path = paths.discrete_path({"num_train_timesteps": 10})
    drawn = [path.sample_level(generator_for(3, step, 0, "level")) for step in range(2000)]
    assert all(level.shape == () and level.dtype == torch.int64 for level in drawn)
    counts = torch.bincount(torch.stack(drawn), minlength=10)
    assert counts.shape == (10,)
    assert counts.min() > 140
    assert counts.max() < 260
    assert torch.equal(path.sample_level(generator_for(3, 7, 0, "level")), drawn[7])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_path_equals_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    path = paths.flow_path(dict(scheduler.config), sampling="uniform")
    unshifted = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(path.shifted(unshifted), scheduler.sigmas)
    level = scheduler.timesteps[::97]
    latents, eps = normal(len(level), 4, 2, 2), normal(len(level), 4, 2, 2, purpose="eps")
    noised = path.noise(latents, eps, level)
    torch.testing.assert_close(noised.x, scheduler.scale_noise(latents, level, eps))
    torch.testing.assert_close(noised.target, eps - latents)
    s = scheduler.sigmas[::97]
    torch.testing.assert_close(noised.snr, ((1 - s) / s) ** 2)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_flow_shift_by_resolution_equals_diffusers(kind):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    path = paths.flow_path(dict(scheduler.config), image_tokens=1024)
    mu = 0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256)
    t = torch.linspace(0.01, 1, 50)
    torch.testing.assert_close(path.shifted(t), scheduler.time_shift(mu, 1.0, t))
    with pytest.raises(BaseModelError, match="resolution"):
        paths.flow_path(dict(scheduler.config))


@pytest.mark.parametrize("config", [{"_class_name": "DDPMScheduler"}, {"invert_sigmas": True}])
def test_what_is_not_a_supported_flow_is_refused(config):
    with pytest.raises(BaseModelError, match="not a rectified flow"):
        paths.flow_path(config)


@pytest.mark.parametrize(("sampling", "median_logit"), [("logit_normal", 0.0), ("uniform", 0.0)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_levels_have_the_stated_density(sampling, median_logit, shift):
    path = paths.FlowPath(shift=shift, sampling=sampling)
    levels = torch.stack([path.sample_level(generator_for(0, i, 0, "level")) for i in range(3000)])
    assert levels.dtype == torch.float32
    assert levels.min() >= 0
    assert levels.max() <= 1000
    s = levels / 1000
    u = s / (shift - (shift - 1) * s)
    assert u.logit().median().item() == pytest.approx(median_logit, abs=0.08)
    if sampling == "logit_normal":
        assert u.logit().std().item() == pytest.approx(1.0, abs=0.05)
    else:
        assert u.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.01)


def test_conversions_of_diffusion_undo_each_other_in_float64():
    x0, eps = normal(5, 3, dtype=torch.float64), normal(5, 3, dtype=torch.float64, purpose="eps")
    a = torch.linspace(0.05, 0.999, 5, dtype=torch.float64)[:, None]
    s = (1 - a**2).sqrt()
    x, v = a * x0 + s * eps, paths.v_from_pair(x0, eps, a, s)
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(paths.x0_from_eps(x, paths.eps_from_x0(x, x0, a, s), a, s), x0, **close)
    torch.testing.assert_close(paths.eps_from_x0(x, paths.x0_from_eps(x, eps, a, s), a, s), eps, **close)
    torch.testing.assert_close(paths.x0_from_v(x, v, a, s), x0, **close)
    torch.testing.assert_close(paths.v_from_x0(x, x0, a, s), v, **close)
    torch.testing.assert_close(paths.eps_from_v(x, v, a, s), eps, **close)
    torch.testing.assert_close(paths.v_from_eps(x, eps, a, s), v, **close)


def test_conversions_of_flow_undo_each_other_in_float64():
    x0, eps = normal(5, 3, dtype=torch.float64), normal(5, 3, dtype=torch.float64, purpose="eps")
    s = torch.linspace(0.01, 0.99, 5, dtype=torch.float64)[:, None]
    x, u = (1 - s) * x0 + s * eps, eps - x0
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(paths.x0_from_flow(x, u, s), x0, **close)
    torch.testing.assert_close(paths.flow_from_x0(x, x0, s), u, **close)
    torch.testing.assert_close(paths.eps_from_flow(x, u, s), eps, **close)
    torch.testing.assert_close(paths.flow_from_eps(x, eps, s), u, **close)


@pytest.mark.parametrize("path", [paths.discrete_path({}), paths.FlowPath()], ids=["discrete", "flow"])
def test_latents_dtype_is_kept_and_meta_tensors_pass(path):
    level = path.sample_level(generator_for(0, 0, 0, "level")).repeat(2)
    half = path.noise(normal(2, 4, 2, 2).bfloat16(), normal(2, 4, 2, 2).bfloat16(), level)
    assert half.x.dtype == half.target.dtype == torch.bfloat16
    assert half.snr.dtype == torch.float32
    meta = path.to("meta").noise(*(torch.empty(2, 4, 2, 2, device="meta") for _ in "ab"), level.to("meta"))
    assert meta.x.shape == (2, 4, 2, 2)
    assert meta.x.device.type == "meta"
