"""Small real metric models with random weights, written as the hub has them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

from tests.tiny import MAX_TOKENS, write_tokenizer

SIZE_PX = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(count: int, size_px: int = SIZE_PX, seed: int = 0) -> list[Image.Image]:
    """Different noise in each."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (size_px, size_px, 3), np.uint8)) for _ in range(count)]


def normalised(image: Image.Image) -> torch.Tensor:
    """An image of the model's own size as the model takes it, by hand: [1,3,H,W]."""
    x = (np.asarray(image, np.float64) / 255 - MEAN) / STD
    return torch.from_numpy(x.transpose(2, 0, 1)[None]).float()


def _processor(folder: Path, kind: str, **more: object) -> None:
    # The older names and the size as one number, as the repositories of 2021 have them.
    settings = {
        "feature_extractor_type": kind,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "resample": 3,
        "size": SIZE_PX,
        **more,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def make_vit(folder: Path) -> Path:
    """Of DINO's class; without the pooler that its repository lacks."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = ViTConfig(**small, image_size=SIZE_PX, patch_size=8, initializer_range=0.3)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    _processor(folder, "ViTFeatureExtractor")
    return folder


def make_dinov2(folder: Path) -> Path:
    torch.manual_seed(1)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    config = Dinov2Config(**small, image_size=SIZE_PX, patch_size=8, initializer_range=0.3)
    Dinov2Model(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": SIZE_PX}, "crop_size": {"height": SIZE_PX, "width": SIZE_PX}}
    _processor(folder, "BitImageProcessor", do_center_crop=True, do_rescale=True, **size)
    return folder


def make_resnet(folder: Path) -> Path:
    """Of the pocket subject encoder's class."""
    torch.manual_seed(2)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", hidden_act="relu"
    )
    model = ResNetModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder)
    size = {"size": {"height": SIZE_PX, "width": SIZE_PX}}
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_processor_type": "ViTImageProcessor", "image_mean": MEAN, "image_std": STD, **size}
        )
    )
    return folder


def make_clip(folder: Path) -> Path:
    torch.manual_seed(3)
    words = write_tokenizer(folder)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "projection_dim": 12}
    text = {
        "hidden_size": 16,
        "vocab_size": words,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
        "pad_token_id": words - 1,
    }
    vision = {"hidden_size": 16, "image_size": SIZE_PX, "patch_size": 8}
    config = CLIPConfig(text_config=small | text, vision_config=small | vision, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    _processor(folder, "CLIPFeatureExtractor", do_center_crop=True, crop_size=SIZE_PX)
    return folder


def lpips_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """AlexNet-LPIPS, a few channels wide, as torchvision and the lpips package name its tensors."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {0: (4, 3, 11), 3: (6, 4, 5), 6: (5, 6, 3), 8: (4, 5, 3), 10: (3, 4, 3)}
    tensors = {}
    for k, (n, (out, into, side)) in enumerate(shapes.items()):
        weight = torch.randn(out, into, side, side, generator=generator) / (into * side**2) ** 0.5
        tensors[f"features.{n}.weight"] = weight
        tensors[f"features.{n}.bias"] = 0.1 * torch.randn(out, generator=generator)
        tensors[f"lin{k}.model.1.weight"] = torch.rand(1, out, 1, 1, generator=generator)
    return tensors


def make_lpips(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file(lpips_tensors(), folder / "model.safetensors")
    return folder
