"""Released parts really leave memory, and a forgotten reference is named."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from lorabooth.families import registry, source
from lorabooth.families.base import Parts
from lorabooth.families.release import assert_released, release, require_fall


def fresh(tiny_sd: Path) -> Parts:
    found = source.resolve(str(tiny_sd))
    return registry.family(found.family).load(found, torch.float32)


def test_released_parts_are_gone(tiny_sd: Path) -> None:
    parts = fresh(tiny_sd)
    family = registry.family("sd1")
    family.encode_prompts(parts, ["a dog"])
    family.encode_images(parts, torch.zeros(1, 3, 64, 64))
    pipeline = family.pipeline(parts)
    vae = weakref.ref(parts.vae)
    size = sum(p.numel() * p.element_size() for p in parts.vae.parameters())
    del pipeline
    parts, released = release(parts, "vae")
    assert_released(released)
    assert vae() is None
    assert released.bytes == size
    assert parts.vae is None
    assert list(parts.text_encoders) == ["text_encoder"]
    parts, released = release(parts, "text_encoder", "vae")
    assert_released(released)
    assert released.names == ("text_encoder",)
    assert list(parts.components()) == ["denoiser"]


@pytest.mark.parametrize("keep", ["list", "parameter", "pipeline"])
def test_a_kept_reference_is_found(tiny_sd: Path, keep: str) -> None:
    parts = fresh(tiny_sd)
    held = {
        "list": lambda: [parts.text_encoders["text_encoder"]],
        "parameter": lambda: next(iter(parts.text_encoders["text_encoder"].parameters())),
        "pipeline": lambda: registry.family("sd1").pipeline(parts),
    }[keep]()
    parts, released = release(parts, "text_encoder")
    with pytest.raises(RuntimeError, match="text_encoder"):
        assert_released(released)
    assert held is not None


def test_the_pipeline_works_without_the_released_parts(tiny_sd: Path) -> None:
    parts = fresh(tiny_sd)
    family = registry.family("sd1")
    cond = family.collate(family.encode_prompts(parts, ["a dog", ""]))["encoder_hidden_states"]
    parts, released = release(parts, "vae", "text_encoder")
    assert_released(released)
    latents = family.pipeline(parts)(
        prompt_embeds=cond[:1], negative_prompt_embeds=cond[1:], num_inference_steps=2, output_type="latent"
    ).images
    assert torch.isfinite(latents).all()


def test_the_devices_own_count_must_fall_by_what_was_released() -> None:
    """A view keeps the memory of a tensor that is gone; only the allocator knows."""
    require_fall("cuda:0", held=100, before=500, after=400)
    require_fall("cuda:0", held=100, before=500, after=380)
    with pytest.raises(RuntimeError, match=r"100 bytes were released on cuda:0, but its memory fell by 60"):
        require_fall("cuda:0", held=100, before=500, after=440)
