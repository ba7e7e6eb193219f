"""The pocket base's CLIP: a text half that conditions the denoiser, an image half that scores pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

from lorabooth.pocket.dataset import Rendered, batch_indices, pixels_of
from lorabooth.pocket.trainer import ALONE, Hyper, Shard
from lorabooth.pocket.vocabulary import CONTEXT_TOKENS, draw_caption, identifiers
from lorabooth.rng import seed_for

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

TEXT_WIDTH = 128
HYPER = Hyper(lr=1e-3, warmup_steps=100, final_lr_ratio=0.02, weight_decay=0.02, ema_decay=0.998)
BATCH = 128
TOKEN_WEIGHT = 0.1


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP for 64-pixel pictures and the pocket tokenizer."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT_TOKENS,
        "projection_dim": 64,
        "pad_token_id": tokenizer.pad_token_id,
        **ids,
    }
    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "projection_dim": 64,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    config._attn_implementation = "eager"
    return CLIPModel(config)


def text_half(clip: CLIPModel) -> CLIPTextModel:
    """The text encoder of a CLIP, as a pipeline wants it; weights are copied."""
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(clip.text_model.state_dict())
    return encoder.eval()


def save_clip_rest(clip: CLIPModel, folder: Path) -> None:
    """Write what the text encoder lacks, in half precision: image half, projections, temperature."""
    folder.mkdir(parents=True, exist_ok=True)
    clip.config.save_pretrained(folder)
    rest = {
        n: t.detach().half().contiguous()
        for n, t in clip.state_dict().items()
        if not n.startswith("text_model.")
    }
    save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})


def load_clip(folder: Path) -> CLIPModel:
    """The CLIP of a pocket folder in float32: its text_encoder/ and its clip/ put together again."""
    clip = CLIPModel(CLIPConfig.from_pretrained(folder / "clip"))
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    tensors = load_file(folder / "clip" / "model.safetensors")
    tensors |= {f"text_model.{name}": tensor for name, tensor in encoder.state_dict().items()}
    clip.load_state_dict(tensors)
    return clip.float().eval()


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str], device: torch.device) -> Tensor:
    """Prompts padded as a pipeline pads them: int64 [N, 32]."""
    batch = tokenizer(
        prompts, padding="max_length", max_length=CONTEXT_TOKENS, truncation=True, return_tensors="pt"
    )
    ids: Tensor = batch["input_ids"].to(device)
    return ids


def clip_losses(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    data: Rendered,
    device: torch.device,
    seed: int,
    shard: Shard = ALONE,
) -> Callable[[int], Mapping[str, Tensor]]:
    """The losses of a step: CLIP's contrast, and a reading of every token from its own output.

    The second keeps words in the per-token outputs that the denoiser attends to; the contrast alone trains
    only what flows to the end token. Pictures with the same caption are not told apart.
    """
    names = identifiers()

    def losses(step: int) -> Mapping[str, Tensor]:
        place = step * shard.world + shard.rank
        picks = batch_indices(seed, place, "clip", len(data.images), BATCH // shard.world)
        rng = np.random.default_rng(seed_for(seed, step, shard.rank, "clip captions"))
        prompts = [draw_caption(data.scenes[i], rng, names) for i in picks]
        ids = tokenize(tokenizer, prompts, device)
        with torch.autocast(device.type, torch.bfloat16):
            hidden = clip.text_model(ids)
            texts = clip.text_projection(hidden.pooler_output).float()
            images = clip.visual_projection(
                clip.vision_model(pixels_of(data.images[picks], device)).pooler_output
            )
        texts, images = F.normalize(texts, dim=-1), F.normalize(images.float(), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=100.0) * texts @ images.T
        same = np.array(prompts)[:, None] == np.array(prompts)[None, :]
        twins = torch.from_numpy(same).to(device) & ~torch.eye(len(prompts), dtype=torch.bool, device=device)
        logits = logits.masked_fill(twins, -1e4)
        aims = torch.arange(len(prompts), device=device)
        contrast = (F.cross_entropy(logits, aims) + F.cross_entropy(logits.T, aims)) / 2
        table = clip.text_model.get_input_embeddings().weight
        read = hidden.last_hidden_state.float() @ table.T
        token = F.cross_entropy(read.flatten(0, 1), ids.flatten())
        right = (logits.argmax(dim=1) == aims).float().mean()
        return {"loss": contrast + TOKEN_WEIGHT * token, "contrast": contrast, "token": token, "top1": right}

    return losses


@torch.no_grad()
def retrieval_top1(
    clip: CLIPModel, tokenizer: CLIPTokenizer, images: NDArray[np.uint8], prompts: list[str]
) -> float:
    """The share of prompts whose own picture is the best match among all given."""
    device = next(clip.parameters()).device
    output = clip(input_ids=tokenize(tokenizer, prompts, device), pixel_values=pixels_of(images, device))
    best = output.logits_per_text.argmax(dim=1).cpu()
    return float((best == torch.arange(len(prompts))).float().mean())
