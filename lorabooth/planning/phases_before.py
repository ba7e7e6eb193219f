"""The phases before training, rehearsed on shapes, and the drawing of images that previews do as well.

Legend of shape suffixes: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

import torch

from lorabooth.families.base import Parts
from lorabooth.memory.meter import Usage
from lorabooth.planning import components as things
from lorabooth.planning.components import Scene
from lorabooth.training import subjects
from lorabooth.training.class_images import group_of
from lorabooth.types import Cond

_PROMPTS_AT_ONCE = 16


def class_images(scene: Scene) -> Usage:
    """The base draws a group of class images: denoiser at twice the group, then the VAE one by one."""
    with scene.world():
        parts = things.skeleton(scene)
        meter = scene.meter()
        with meter:
            things.hold(meter, parts)
            count = group_of(scene.recipe, scene.device.kind)
            draw(scene, parts, count, guidance=float(scene.recipe.prior.guidance))
        return meter.usage()


def caching(scene: Scene) -> Usage:
    """Photos through the VAE and prompts through the text encoder, one by one."""
    recipe = scene.recipe
    with scene.world():
        parts, meter = things.skeleton(scene), scene.meter()
        # A denoiser that has drawn class images is still there; else it has not left the host.
        is_away = scene.is_cuda and recipe.prior.mode != "generated"
        with meter, torch.no_grad():
            things.hold(meter, parts, but=parts.denoiser.parameters() if is_away else ())
            pixels = torch.empty(1, 3, *(scene.side_px(parts),) * 2)
            # A GPU gets the photo's pixels; a CPU's memory has them twice.
            photo = None if scene.is_cuda else torch.empty_like(pixels)
            scene.family.encode_images(parts, pixels)
            del pixels, photo
            if not recipe.adapter.text_encoder:
                prompts = ["", *subjects.preview_prompts(recipe, subjects.subjects_of(recipe))]
                count = min(len(prompts), _PROMPTS_AT_ONCE)
                scene.family.encode_tokens(parts, things.blank_tokens(scene.family, parts, count))
        return meter.usage()


def draw(scene: Scene, parts: Parts, count: int, *, guidance: float, cond: Cond | None = None) -> None:
    """A sampler step for `count` images at once, and the decoding of one; without autocast, as `generate`."""
    family = scene.family
    rows = 2 * count if guidance > 1 else count
    shape = scene.latent_shape(parts)
    with torch.no_grad():
        if cond is None:
            cond = family.encode_tokens(parts, things.blank_tokens(family, parts, count))
        # What was encoded, the pipeline's copies of it, and both of these as one batch.
        copies = [things.blank_like(cond, rows) for _ in range(2)]
        cond = things.blank_like(cond, rows)
        # DPM-Solver++ of order 2 keeps two predictions in float32 beside the latents.
        history = [torch.empty((count, *shape)) for _ in range(2)]
        latents = torch.empty((count, *shape), dtype=parts.dtype)
        inputs = torch.cat([latents] * (rows // count))
        level_B = torch.zeros(rows, dtype=torch.int64)
        output = family.predict(parts, inputs, level_B, cond, (scene.geometry(parts),) * rows)
        del cond, copies, inputs, output, history
        family.decode_latents(parts, latents[:1])
