"""The pocket base's denoiser: a small UNet with cross-attention, trained on v-prediction with min-SNR."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor

from lorabooth.pocket.clip import TEXT_WIDTH, tokenize
from lorabooth.pocket.dataset import batch_indices
from lorabooth.pocket.scenes import Scene
from lorabooth.pocket.trainer import ALONE, Hyper, Shard
from lorabooth.pocket.vae import LATENT_CHANNELS
from lorabooth.pocket.vocabulary import draw_caption, identifiers
from lorabooth.rng import generator_for, seed_for

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

HYPER = Hyper(
    lr=1e-3, warmup_steps=200, final_lr_ratio=0.01, weight_decay=0.01, betas=(0.9, 0.99), ema_decay=0.9993
)
BATCH = 48
CAPTION_DROPOUT = 0.1
SNR_GAMMA, LEAST_WEIGHT = 5.0, 0.3


def make_unet() -> UNet2DConditionModel:
    """An untrained denoiser of 16 x 16 latents: attention at 16 x 16 and 8 x 8, convolutions at 4 x 4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128, 112),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4, 4),
        norm_num_groups=16,
        use_linear_projection=True,
    )


def make_scheduler() -> DPMSolverMultistepScheduler:
    """Stable Diffusion's noise schedule with v-prediction; 20 steps of DPM-Solver++ by default."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
    )


class ExplicitAttention:
    """Softmax attention from plain matrix products, for training on a CPU.

    There the fused kernel's bfloat16 backward is several times slower. The result is the same.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,  # noqa: ARG002 (diffusers calls every processor with it)
    ) -> Tensor:
        """Attend from hidden_states [B,N,C] to themselves or to encoder_hidden_states [B,M,D]; no masks."""
        if attention_mask is not None:
            raise ValueError("ExplicitAttention has no mask")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, heads = len(hidden_states), attn.heads
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        width = query.shape[-1] // heads
        query = query.view(batch, -1, heads, width).transpose(1, 2).reshape(batch * heads, -1, width)
        key = key.view(batch, -1, heads, width).permute(0, 2, 3, 1).reshape(batch * heads, width, -1)
        value = value.view(batch, -1, heads, width).transpose(1, 2).reshape(batch * heads, -1, width)
        scores = torch.bmm(query * width**-0.5, key)
        mixed = torch.bmm(torch.softmax(scores, dim=-1, dtype=scores.dtype), value)
        mixed = mixed.view(batch, heads, -1, width).transpose(1, 2).reshape(batch, -1, heads * width)
        out: Tensor = attn.to_out[1](attn.to_out[0](mixed))
        return out


def alphas_cumprod() -> Tensor:
    """The schedule's cumulative signal power, float32 [1000]."""
    scheduler = DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    power: Tensor = scheduler.alphas_cumprod
    return power


def loss_weight(snr: Tensor) -> Tensor:
    """Min-SNR in its v form (Hang et al. 2023): min(snr, 5) / (snr + 1), at least 0.3.

    The floor is there for the noisiest levels: on 16 x 16 latents they decide class and place.
    """
    return torch.clamp(torch.clamp(snr, max=SNR_GAMMA) / (snr + 1.0), min=LEAST_WEIGHT)


def draw_prompts(scenes: Sequence[Scene], rng: np.random.Generator, names: Sequence[str]) -> list[str]:
    """A caption a scene, empty in `CAPTION_DROPOUT` of the draws."""
    return ["" if rng.random() < CAPTION_DROPOUT else draw_caption(scene, rng, names) for scene in scenes]


def unet_losses(
    unet: Callable[..., Any],
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    scenes: Sequence[Scene],
    device: torch.device,
    seed: int,
    shard: Shard = ALONE,
) -> Callable[[int], Mapping[str, Tensor]]:
    """The losses of a step: weighted squared error of v.

    Args:
        unet: the denoiser, in training mode.
        encoder: the frozen text half.
        tokenizer: its tokenizer.
        latents: [N,8,16,16], scaled to unit deviation.
        scenes: N scenes, from which captions are drawn anew every time.
        device: where it trains.
        seed: of batches, captions, noise and timesteps.
        shard: this process's share of the batch of `BATCH` examples.
    """
    names = identifiers()
    power = alphas_cumprod().to(device)
    local = BATCH // shard.world

    def losses(step: int) -> Mapping[str, Tensor]:
        picks = batch_indices(seed, step * shard.world + shard.rank, "unet", len(latents), local)
        rng = np.random.default_rng(seed_for(seed, step, shard.rank, "unet captions"))
        ids = tokenize(tokenizer, draw_prompts([scenes[i] for i in picks], rng, names), device)
        generator = generator_for(seed, step, shard.rank, "unet noise")
        clean = latents[torch.from_numpy(picks)].float().to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        level = torch.randint(0, len(power), (local,), generator=generator).to(device)
        signal, sigma = (
            power[level].sqrt()[:, None, None, None],
            (1 - power[level]).sqrt()[:, None, None, None],
        )
        target = signal * noise - sigma * clean
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                cond = encoder(ids)[0]
            output = unet(signal * clean + sigma * noise, level, cond, return_dict=False)[0]
        error = (output.float() - target).square().mean(dim=(1, 2, 3))
        snr = power[level] / (1 - power[level])
        return {"loss": (loss_weight(snr) * error).mean(), "v_error": error.mean()}

    return losses
