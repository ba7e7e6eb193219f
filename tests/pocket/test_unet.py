from __future__ import annotations

import numpy as np
import pytest
import torch

from lorabooth.pocket.scenes import sample_scene
from lorabooth.pocket.unet import (
    CAPTION_DROPOUT,
    ExplicitAttention,
    alphas_cumprod,
    draw_prompts,
    loss_weight,
    make_scheduler,
    make_unet,
)
from lorabooth.pocket.vocabulary import identifiers


def test_explicit_attention_is_the_ordinary_one() -> None:
    torch.manual_seed(0)
    unet = make_unet().eval()
    x, cond = torch.randn(2, 8, 16, 16), torch.randn(2, 32, 128)
    with torch.no_grad():
        usual = unet(x, 7, cond).sample
        unet.set_attn_processor(ExplicitAttention())
        explicit = unet(x, 7, cond).sample
    assert torch.allclose(explicit, usual, atol=1e-4)


def test_explicit_attention_refuses_a_mask() -> None:
    with pytest.raises(ValueError, match="no mask"):
        ExplicitAttention()(None, torch.zeros(1, 1, 1), attention_mask=torch.zeros(1, 1))


def test_unet_fits_the_size_of_the_base() -> None:
    assert sum(p.numel() for p in make_unet().parameters()) < 5_600_000


def test_schedule_of_training_and_sampling_agree() -> None:
    assert torch.allclose(alphas_cumprod(), make_scheduler().alphas_cumprod)


def test_weights_are_min_snr_with_a_floor() -> None:
    weights = loss_weight(torch.tensor([0.001, 1.0, 5.0, 100.0]))
    assert torch.allclose(weights, torch.tensor([0.3, 0.5, 5 / 6, 0.3]))


def test_captions_are_dropped_in_the_stated_share() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(1500)]
    prompts = draw_prompts(scenes, rng, identifiers())
    assert abs(prompts.count("") / len(prompts) - CAPTION_DROPOUT) < 0.03
