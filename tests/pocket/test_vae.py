from __future__ import annotations

import numpy as np
import torch

from lorabooth.pocket.dataset import pixels_of
from lorabooth.pocket.vae import LATENT_CHANNELS, edge_loss, make_vae, psnr_db, standardise


def test_standardised_autoencoder_decodes_the_same() -> None:
    torch.manual_seed(0)
    vae = make_vae((8, 16, 16)).eval()
    pixels = torch.rand(6, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist
        picture = vae.decode(before.mean).sample
        mean, std = before.mean.mean(dim=(0, 2, 3)), before.mean.std(dim=(0, 2, 3))
        standardise(vae, mean, std)
        after = vae.encode(pixels).latent_dist
        again = vae.decode(after.mean).sample
    assert before.mean.shape == (6, LATENT_CHANNELS, 16, 16)
    assert torch.allclose(after.mean.std(dim=(0, 2, 3)), torch.ones(LATENT_CHANNELS), atol=1e-3)
    assert torch.allclose(after.std * std[:, None, None], before.std, rtol=1e-3, atol=1e-6)
    assert torch.allclose(again, picture, atol=1e-4)


def test_edge_loss_sees_blur_but_not_brightness() -> None:
    sharp = torch.zeros(1, 3, 16, 16)
    sharp[..., 8:] = 1.0
    blurred = torch.nn.functional.avg_pool2d(sharp, 3, stride=1, padding=1)
    assert float(edge_loss(sharp + 0.3, sharp)) < 1e-6
    assert float(edge_loss(blurred, sharp)) > 0.01


def test_psnr_of_a_known_error() -> None:
    images = np.full((2, 64, 64, 3), 100, dtype=np.uint8)
    off = pixels_of(images, torch.device("cpu")) + 0.02  # 0.01 of the full range
    assert abs(psnr_db(off, images) - 40.0) < 0.01
