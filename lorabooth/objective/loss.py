"""Per-example losses, weights over noise levels, and the prior-preservation sum (DreamBooth eq. 2).

Legend of shape suffixes: B batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabooth.objective.paths import Prediction
from lorabooth.recipe import LossSection

Weighting = Callable[[Tensor], Tensor]
"""Signal-to-noise ratio [B] float32 -> weight [B] float32, finite and >= 0 for every ratio in [0, inf]."""


@dataclass(frozen=True, slots=True)
class LossTerms:
    """One micro-batch's share of an optimizer step's loss; shares add up to the step's loss.

    Attributes:
        total: [] float32 with gradient: instance term + lambda * prior term.
        instance: [] float32, detached: the subject's term.
        prior: [] float32, detached: the class term, not multiplied by lambda; 0 without class examples.
    """

    total: Tensor
    instance: Tensor
    prior: Tensor


def per_example_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each example, in float32.

    Args:
        prediction: [B, ...] any floating dtype.
        target: the same shape.

    Returns:
        [B] float32.
    """
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def weighting(section: LossSection, prediction: Prediction) -> Weighting:
    """The weight of an example's error as a function of its signal-to-noise ratio.

    "min_snr" is min(SNR, gamma) on the error of x0 (arXiv 2303.09556), written for the error of what the
    denoiser predicts: epsilon min(SNR, gamma) / SNR; v min(SNR, gamma) / (SNR + 1); flow
    min(SNR, gamma) * s^2 with s = 1 / (1 + sqrt(SNR)).

    Args:
        section: the recipe's loss section.
        prediction: the noise path's kind of target.
    """
    if section.weighting == "none":
        return torch.ones_like
    gamma = section.snr_gamma

    def epsilon(snr_B: Tensor) -> Tensor:
        # gamma / SNR rather than min(SNR, gamma) / SNR: finite at SNR 0, where the weight is 1.
        return (gamma / snr_B).clamp(max=1)

    def v(snr_B: Tensor) -> Tensor:
        return snr_B.clamp(max=gamma) / (snr_B + 1)

    def flow(snr_B: Tensor) -> Tensor:
        return snr_B.clamp(max=gamma) / (1 + snr_B.sqrt()) ** 2

    return {"epsilon": epsilon, "v_prediction": v, "flow": flow}[prediction]


def step_loss(
    errors_B: Tensor,
    level_weight_B: Tensor,
    is_instance_B: Tensor,
    weight_B: Tensor,
    *,
    n_instance: int,
    n_class: int,
) -> LossTerms:
    """A micro-batch's share of the step's loss.

    total = sum over instance b of weight_b w_b e_b / n_instance
          + sum over class b of weight_b w_b e_b / n_class,
    where weight_b is 1 for the subject and lambda for the class. Because the counts are those of the
    whole optimizer step, the shares of all micro-batches and ranks simply add up, however they are split.

    Args:
        errors_B: [B] float32 errors e_b.
        level_weight_B: [B] float32 weights w_b of the noise levels.
        is_instance_B: [B] bool.
        weight_B: [B] float32 weights of the examples.
        n_instance: subject examples in the whole optimizer step, accumulation and ranks included; may be 0.
        n_class: class examples likewise; 0 without prior preservation.
    """
    leveled_B = level_weight_B * errors_B
    # where, not a product with the mask: a non-finite example must show up in its own term only.
    instance_B = torch.where(is_instance_B, leveled_B, 0.0) / max(n_instance, 1)
    prior_B = torch.where(is_instance_B, 0.0, leveled_B) / max(n_class, 1)
    total = (weight_B * (instance_B + prior_B)).sum()
    return LossTerms(total=total, instance=instance_B.sum().detach(), prior=prior_B.sum().detach())
