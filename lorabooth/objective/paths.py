"""Noise paths: how clean latents become noisy, and what the denoiser is asked to predict.

A path is read from the checkpoint's own scheduler config, so a v-prediction model, a zero-terminal-SNR
schedule or a shifted flow needs no flag.

Every path is x = a x0 + s eps with a, s functions of the level, and one of four targets:
epsilon (DDPM, arXiv 2006.11239), x0, v = a eps - s x0 (arXiv 2202.00512, for a^2 + s^2 = 1), and for
rectified flow (arXiv 2209.03003, a = 1 - s) u = eps - x0. The conversions between them come in pairs.

Legend of shape suffixes: B batch, C latent channels, h w latent size, T training timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lorabooth.errors import BaseModelError
from lorabooth.types import Noised

Prediction = Literal["epsilon", "v_prediction", "flow"]
"""What the denoiser predicts: the noise, v, or the flow's velocity."""


class NoisePath(Protocol):
    """How clean latents become noisy, and what the denoiser predicts."""

    @property
    def prediction(self) -> Prediction:
        """The target's kind; loss weights depend on it."""
        ...

    def to(self, device: torch.device | str) -> NoisePath:
        """The same path with its tables on `device`, so that no step copies them."""
        ...

    def sample_level(self, generator: torch.Generator) -> Tensor:
        """One level [] for one example."""
        ...

    def noise(self, latents_BChw: Tensor, eps_BChw: Tensor, level_B: Tensor) -> Noised:
        """Move latents to `level` along `eps`."""
        ...


@dataclass(frozen=True, eq=False)
class DiscretePath:
    """Variance-preserving diffusion over T discrete timesteps: a = sqrt(abar_t), s = sqrt(1 - abar_t).

    Attributes:
        alphas_cumprod: [T] float32, abar; computed in float64 and rounded once.
        prediction: "epsilon" or "v_prediction".
    """

    alphas_cumprod: Tensor
    prediction: Prediction

    def to(self, device: torch.device | str) -> DiscretePath:
        """The same path with its table on `device`."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def sample_level(self, generator: torch.Generator) -> Tensor:
        """One timestep [] int64, uniform over 0 .. T-1, on the CPU."""
        return torch.randint(self.alphas_cumprod.shape[0], (), generator=generator)

    def noise(self, latents_BChw: Tensor, eps_BChw: Tensor, level_B: Tensor) -> Noised:
        """Noise latents at their timesteps, as diffusers' `add_noise` and `get_velocity` do.

        Args:
            latents_BChw: clean latents, floating point.
            eps_BChw: standard normal noise, same shape and dtype.
            level_B: [B] int64 timesteps in 0 .. T-1.

        Returns:
            x and target in the latents' dtype; snr [B] float32, 0 at a zero-terminal timestep.
        """
        abar_B = self.alphas_cumprod.to(latents_BChw.device)[level_B]
        a, s = (_spread(c.sqrt(), latents_BChw) for c in (abar_B, 1 - abar_B))
        target = eps_BChw if self.prediction == "epsilon" else v_from_pair(latents_BChw, eps_BChw, a, s)
        x_BChw = a * latents_BChw + s * eps_BChw
        return Noised(x=x_BChw, target=target, level=level_B, snr=abar_B / (1 - abar_B))


@dataclass(frozen=True)
class FlowPath:
    """Rectified flow over continuous time: x = (1 - s) x0 + s eps, target eps - x0.

    Attributes:
        shift: timestep shift (SD3, arXiv 2403.03206 eq. 23); 1 is none. Moves levels towards noise when > 1.
        train_timesteps: the denoiser is told s * train_timesteps.
        sampling: density that u is drawn from before the shift: "logit_normal" (SD3) or "uniform".
        logit_mean: mean of logit(u), for "logit_normal".
        logit_std: standard deviation of logit(u), > 0.
    """

    shift: float = 1.0
    train_timesteps: int = 1000
    sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0

    @property
    def prediction(self) -> Prediction:
        """Always "flow"."""
        return "flow"

    def to(self, device: torch.device | str) -> FlowPath:  # noqa: ARG002 - a flow has no tables
        """The path itself: it holds no tensors."""
        return self

    def sample_level(self, generator: torch.Generator) -> Tensor:
        """One time [] float32 in [0, train_timesteps], as the denoiser takes it, on the CPU."""
        if self.sampling == "uniform":
            u = torch.rand((), generator=generator)
        else:
            u = torch.sigmoid(torch.randn((), generator=generator) * self.logit_std + self.logit_mean)
        return self.shifted(u) * self.train_timesteps

    def shifted(self, u: Tensor) -> Tensor:
        """Noise share s in [0, 1] from an unshifted one: s = shift u / (1 + (shift - 1) u)."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def noise(self, latents_BChw: Tensor, eps_BChw: Tensor, level_B: Tensor) -> Noised:
        """Noise latents at their times.

        Args:
            latents_BChw: clean latents, floating point.
            eps_BChw: standard normal noise, same shape and dtype.
            level_B: [B] float32 times in [0, train_timesteps].

        Returns:
            x and target in the latents' dtype; snr [B] float32 = ((1 - s) / s)^2, infinite at s = 0.
        """
        s_B = level_B.float() / self.train_timesteps
        s = _spread(s_B, latents_BChw)
        x_BChw = (1 - s) * latents_BChw + s * eps_BChw
        return Noised(x=x_BChw, target=eps_BChw - latents_BChw, level=level_B, snr=((1 - s_B) / s_B) ** 2)


def discrete_path(scheduler_config: Mapping[str, Any]) -> DiscretePath:
    """The diffusion path that a checkpoint was trained on.

    Args:
        scheduler_config: the checkpoint's scheduler_config.json; absent keys have diffusers' defaults.

    Raises:
        BaseModelError: a flow or EDM model, or a schedule or prediction that is not supported.
    """
    class_name = str(scheduler_config.get("_class_name", ""))
    if class_name.startswith(("FlowMatch", "EDM")):
        raise BaseModelError(
            f"the base model's scheduler is {class_name}, which is not a discrete diffusion."
        )
    prediction = scheduler_config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise BaseModelError(
            f'the base model\'s scheduler config has prediction_type = "{prediction}".',
            'Supported are "epsilon" and "v_prediction"; is this an unfinished or a distilled model?',
        )
    abar = torch.cumprod(1 - _betas(scheduler_config), dim=0)
    if scheduler_config.get("rescale_betas_zero_snr", False):
        abar = _zero_terminal(abar)
    return DiscretePath(alphas_cumprod=abar.float(), prediction=prediction)


def flow_path(
    scheduler_config: Mapping[str, Any],
    *,
    sampling: Literal["logit_normal", "uniform"] = "logit_normal",
    image_tokens: int | None = None,
) -> FlowPath:
    """The rectified flow that a checkpoint was trained on.

    Args:
        scheduler_config: the checkpoint's scheduler_config.json (FlowMatchEulerDiscreteScheduler).
        sampling: density of training levels before the shift.
        image_tokens: length of the denoiser's image sequence; needed if the config shifts by resolution.

    Raises:
        BaseModelError: the config is not of a rectified flow that is supported.
    """
    class_name = str(scheduler_config.get("_class_name", "FlowMatchEulerDiscreteScheduler"))
    if not class_name.startswith("FlowMatch") or scheduler_config.get("invert_sigmas", False):
        raise BaseModelError(
            f"the base model's scheduler ({class_name}) is not a rectified flow that is supported."
        )
    shift = float(scheduler_config.get("shift", 1.0))
    if scheduler_config.get("use_dynamic_shifting", False):
        if image_tokens is None:
            raise BaseModelError(
                "the base model's scheduler shifts timesteps by resolution, and the resolution is not known."
            )
        mu = _resolution_mu(scheduler_config, image_tokens)
        shift = (
            math.exp(mu) if scheduler_config.get("time_shift_type", "exponential") == "exponential" else mu
        )
    steps = int(scheduler_config.get("num_train_timesteps", 1000))
    return FlowPath(shift=shift, train_timesteps=steps, sampling=sampling)


def v_from_pair(x0: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """The v target from both ends of the path: v = a eps - s x0 (arXiv 2202.00512)."""
    return a * eps - s * x0


def x0_from_eps(x: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Clean latents from the noise in x = a x0 + s eps; a > 0. Inverse: `eps_from_x0`."""
    return (x - s * eps) / a


def eps_from_x0(x: Tensor, x0: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Noise from the clean latents in x = a x0 + s eps; s > 0. Inverse: `x0_from_eps`."""
    return (x - a * x0) / s


def x0_from_v(x: Tensor, v: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Clean latents from v, for a^2 + s^2 = 1. Inverse: `v_from_x0`."""
    return a * x - s * v


def v_from_x0(x: Tensor, x0: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """The v target from the clean latents, for a^2 + s^2 = 1 and s > 0. Inverse: `x0_from_v`."""
    return (a * x - x0) / s


def eps_from_v(x: Tensor, v: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Noise from v, for a^2 + s^2 = 1. Inverse: `v_from_eps`."""
    return s * x + a * v


def v_from_eps(x: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """The v target from the noise, for a^2 + s^2 = 1 and a > 0. Inverse: `eps_from_v`."""
    return (eps - s * x) / a


def x0_from_flow(x: Tensor, u: Tensor, s: Tensor) -> Tensor:
    """Clean latents from the flow's velocity u = eps - x0. Inverse: `flow_from_x0`."""
    return x - s * u


def flow_from_x0(x: Tensor, x0: Tensor, s: Tensor) -> Tensor:
    """The flow's velocity from clean latents; s > 0. Inverse: `x0_from_flow`."""
    return (x - x0) / s


def eps_from_flow(x: Tensor, u: Tensor, s: Tensor) -> Tensor:
    """Noise from the flow's velocity u = eps - x0. Inverse: `flow_from_eps`."""
    return x + (1 - s) * u


def flow_from_eps(x: Tensor, eps: Tensor, s: Tensor) -> Tensor:
    """The flow's velocity from the noise; s < 1. Inverse: `eps_from_flow`."""
    return (eps - x) / (1 - s)


def _betas(config: Mapping[str, Any]) -> Tensor:
    """[T] float64 betas."""
    trained = config.get("trained_betas")
    if trained is not None:
        return torch.as_tensor(trained, dtype=torch.float64)
    schedule = config.get("beta_schedule", "linear")
    first, last = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    steps = int(config.get("num_train_timesteps", 1000))
    if schedule == "linear":
        return torch.linspace(first, last, steps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
    if schedule == "squaredcos_cap_v2":
        # arXiv 2102.09672 eq. 17, each beta capped at 0.999.
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        abar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    raise BaseModelError(
        f'the base model\'s scheduler config has beta_schedule = "{schedule}".',
        'Supported are "linear", "scaled_linear", "squaredcos_cap_v2" and trained_betas.',
    )


def _zero_terminal(abar_T: Tensor) -> Tensor:
    """Shift and scale sqrt(abar) so that the last timestep is pure noise (arXiv 2305.08891, algorithm 1)."""
    root = abar_T.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def _resolution_mu(config: Mapping[str, Any], image_tokens: int) -> float:
    """FLUX's shift parameter: linear in the image sequence length between two anchors."""
    few, many = float(config.get("base_image_seq_len", 256)), float(config.get("max_image_seq_len", 4096))
    low, high = float(config.get("base_shift", 0.5)), float(config.get("max_shift", 1.15))
    return low + (high - low) * (image_tokens - few) / (many - few)


def _spread(coefficient_B: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B,1,1,1] in the dtype of `like`."""
    return coefficient_B.to(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))
