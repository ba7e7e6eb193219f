"""The pocket base's autoencoder: 64 x 64 pixels <-> 8 x 16 x 16 latents, trained for sharp edges."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

from lorabooth.pocket.dataset import batch_indices, pixels_of
from lorabooth.pocket.trainer import ALONE, Hyper, Shard
from lorabooth.rng import generator_for, seed_for

LATENT_CHANNELS = 8
HYPER = Hyper(
    lr=2e-3, warmup_steps=100, final_lr_ratio=0.02, weight_decay=0.0, betas=(0.9, 0.99), ema_decay=0.998
)
BATCH = 16
SQUARE_WEIGHT, EDGE_WEIGHT, FEATURE_WEIGHT, KL_WEIGHT = 4.0, 0.5, 0.3, 1e-6


def make_vae(channels: tuple[int, int, int] = (24, 48, 64)) -> AutoencoderKL:
    """An untrained autoencoder with two halvings; `channels` are multiples of 8."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


class RandomFeatures(nn.Module):
    """Fixed random convolutions that tell fine structure apart: a perceptual loss without training.

    Random filters with rectification keep edge and texture energy that a pixel loss averages away.
    """

    filters_0: Tensor
    filters_1: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed_for(seed, 0, 0, "random features"))
        shapes = ((32, 3, 5, 5), (64, 32, 3, 3))
        for index, shape in enumerate(shapes):
            filters = torch.randn(shape, generator=generator)
            filters = filters / filters.flatten(1).norm(dim=1)[:, None, None, None]
            self.register_buffer(f"filters_{index}", filters)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Responses at full and half size."""
        first = F.relu(F.conv2d(x_BCHW, self.filters_0, padding=2, stride=2))
        second = F.relu(F.conv2d(first, self.filters_1, padding=1, stride=2))
        return [first, second]


def _edges(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    return x_BCHW[..., 1:] - x_BCHW[..., :-1], x_BCHW[..., 1:, :] - x_BCHW[..., :-1, :]


def edge_loss(output_BCHW: Tensor, target_BCHW: Tensor, scales: int = 2) -> Tensor:
    """Mean absolute difference of the horizontal and vertical differences, at `scales` halved sizes."""
    total = output_BCHW.new_zeros(())
    for scale in range(scales):
        if scale:
            output_BCHW, target_BCHW = F.avg_pool2d(output_BCHW, 2), F.avg_pool2d(target_BCHW, 2)
        for out, aim in zip(_edges(output_BCHW), _edges(target_BCHW), strict=True):
            total = total + (out - aim).abs().mean()
    return total / scales


def vae_losses(
    vae: AutoencoderKL, images: NDArray[np.uint8], device: torch.device, seed: int, shard: Shard = ALONE
) -> Callable[[int], Mapping[str, Tensor]]:
    """The losses of a step: absolute and squared error, edges, random features and a whisper of KL.

    The absolute error keeps edges sharp; the squared one does not let a small thing have the wrong colour.

    Args:
        vae: the module that trains.
        images: uint8 [N,64,64,3].
        device: where it trains.
        seed: of batches, posterior noise and features.
        shard: this process's share of the batch of `BATCH` examples.
    """
    features = RandomFeatures(seed).to(device)

    def losses(step: int) -> Mapping[str, Tensor]:
        picks = batch_indices(seed, step * shard.world + shard.rank, "vae", len(images), BATCH // shard.world)
        target = pixels_of(images[picks], device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=generator_for(seed, step, shard.rank, "vae noise")).to(
                device
            )
            output = vae.decode(mean + torch.exp(0.5 * logvar) * noise).sample.float()
        with torch.autocast(device.type, torch.bfloat16):
            pairs = zip(features(output), features(target), strict=True)
        perceived = sum(((a - b).abs().float().mean() for a, b in pairs), mean.new_zeros(()))
        pixel = (output - target).abs().mean()
        edge = edge_loss(output, target)
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3)).mean()
        square = (output - target).square().mean()
        loss = (
            pixel + SQUARE_WEIGHT * square + EDGE_WEIGHT * edge + FEATURE_WEIGHT * perceived + KL_WEIGHT * kl
        )
        mse = ((output - target) / 2).square().mean(dim=(1, 2, 3))
        return {"loss": loss, "l1": pixel, "edge": edge, "psnr_db": -10 * torch.log10(mse).mean(), "kl": kl}

    return losses


@torch.no_grad()
def standardise(vae: AutoencoderKL, mean_C: Tensor, std_C: Tensor) -> None:
    """Give every latent channel mean 0 and deviation 1, by folding both into the 1x1 convolutions.

    Pictures decode as before; a scaling factor of 1 is then right.

    Args:
        vae: changed in place.
        mean_C: [C] means of the latents that it gives now.
        std_C: [C] their deviations.
    """
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] * mean_C).sum(dim=1)
    post.weight *= std_C[None, :, None, None]
    channels = len(mean_C)
    quant.weight[:channels] /= std_C[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean_C) / std_C
    quant.bias[channels:] -= 2 * torch.log(std_C)


@torch.no_grad()
def encode_all(
    vae: AutoencoderKL, images: NDArray[np.uint8], device: torch.device, batch: int = 250
) -> Tensor:
    """Posterior means of all pictures, unscaled: float16 [N,8,16,16] on the CPU."""
    parts: list[Tensor] = []
    for start in range(0, len(images), batch):
        with torch.autocast(device.type, torch.bfloat16):
            moments = vae.encode(pixels_of(images[start : start + batch], device)).latent_dist
        parts.append(moments.mean.to("cpu", torch.float16))
    return torch.cat(parts)


@torch.no_grad()
def reconstruct(
    vae: AutoencoderKL, images: NDArray[np.uint8], device: torch.device, batch: int = 100
) -> Tensor:
    """Pictures through the autoencoder: float32 [N,3,64,64] in [-1, 1] on the CPU."""
    parts: list[Tensor] = []
    for start in range(0, len(images), batch):
        means = vae.encode(pixels_of(images[start : start + batch], device)).latent_dist.mean
        parts.append(vae.decode(means).sample.clamp(-1, 1).cpu())
    return torch.cat(parts)


def psnr_db(output_BCHW: Tensor, images: NDArray[np.uint8]) -> float:
    """Mean peak signal-to-noise ratio in dB of pictures in [-1, 1] against uint8 [N,64,64,3]."""
    target = pixels_of(images, torch.device("cpu"))
    mse = ((output_BCHW - target) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * torch.log10(mse)).mean())
