"""The phases before training, rehearsed on shapes, and the drawing of images that previews do as well.

Legend of shape suffixes: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from lorabooth.families.base import Parts
from lorabooth.families.recast import recast
from lorabooth.memory import apply
from lorabooth.memory.in_turn import leaving
from lorabooth.memory.meter import Meter, Usage
from lorabooth.memory.stream import is_streamed, stream, streamed_tensors
from lorabooth.planning import components as things
from lorabooth.planning.components import Scene
from lorabooth.planning.visits import Ahead
from lorabooth.training import subjects
from lorabooth.training.class_images import group_of
from lorabooth.types import Cond

_PROMPTS_AT_ONCE = 16


def before(scene: Scene, wanted: Collection[str]) -> dict[str, Usage]:
    """Class images and caching, each with the parts that it needs on the device.

    Args:
        scene: what is rehearsed.
        wanted: of "class images" and "caching"; class images only of a recipe that has them generated.
    """
    found: dict[str, Usage] = {}
    draws = scene.recipe.prior.mode == "generated"
    with scene.world():
        parts = things.skeleton(scene)
        if scene.recipe.memory.stream:
            stream(parts.denoiser, things.SHAPES_ON)
        with scene.meter() as meter:
            # A streamed denoiser that has drawn leaves the unit that would have come next.
            if draws and ("class images" in wanted or scene.streams):
                _class_images(scene, parts, meter)
                found["class images"] = meter.usage()
            if "caching" in wanted:
                _place(scene, parts, meter, things.VAE, things.TEXT_ENCODER)
                _caching(scene, parts)
                found["caching"] = meter.usage()
    return found


def _place(scene: Scene, parts: Parts, meter: Meter, *components: str) -> None:
    """Count these components as on the device, and no others, from now on.

    Where host and device are one memory, all parts are there in any case.
    """
    if scene.is_cuda:
        meter.drop(*things.tensors_of(parts))
        things.hold(meter, parts, components, but=streamed_tensors(parts.denoiser) if scene.streams else ())
    else:
        things.hold(meter, parts)
    meter.reset_peak()


def _class_images(scene: Scene, parts: Parts, meter: Meter) -> None:
    """The base draws a group of class images: denoiser at twice the group, then the VAE one by one."""
    count = group_of(scene.recipe, scene.device.kind)
    _place(scene, parts, meter, things.TEXT_ENCODER)
    with torch.no_grad():
        encoded = scene.family.encode_tokens(parts, things.blank_tokens(scene.family, parts, count))
    # As the run does: the denoiser that draws may be a copy in fewer bits, beside the one that trains.
    artist = recast(parts, apply.DTYPES[scene.recipe.prior.dtype])
    # The prompt's and the empty one's wait in host memory.
    encoded = things.blank_like(encoded, 2)
    if scene.is_cuda:
        meter.drop(*encoded.values())
    _place(scene, artist, meter, things.DENOISER, *(() if scene.takes_turns else (things.VAE,)))
    if artist is not parts and not scene.is_cuda:
        things.hold(meter, parts, (things.DENOISER,))
    if scene.streams:
        Ahead(artist.denoiser, meter, things.DENOISER)
    draw(scene, artist, meter, count, guidance=float(scene.recipe.prior.guidance), cond=encoded)


def _caching(scene: Scene, parts: Parts) -> None:
    """Photos through the VAE and prompts through the text encoder, one by one."""
    recipe = scene.recipe
    with torch.no_grad():
        pixels = torch.empty(1, 3, *(scene.side_px(parts),) * 2)
        # A GPU gets the photo's pixels; a CPU's memory has them twice.
        photo = None if scene.is_cuda else torch.empty_like(pixels)
        scene.family.encode_images(parts, pixels)
        del pixels, photo
        if not recipe.adapter.text_encoder:
            prompts = ["", *subjects.preview_prompts(recipe, subjects.subjects_of(recipe))]
            count = min(len(prompts), _PROMPTS_AT_ONCE)
            scene.family.encode_tokens(parts, things.blank_tokens(scene.family, parts, count))


def draw(
    scene: Scene, parts: Parts, meter: Meter, count: int, *, guidance: float, cond: Cond | None = None
) -> None:
    """A sampler step for `count` images at once, and the decoding of one; without autocast, as `generate`."""
    family = scene.family
    rows = 2 * count if guidance > 1 else count
    shape = scene.latent_shape(parts)
    # Only from the second step on are a streamed denoiser's units copied ahead.
    steps = 2 if scene.streams and is_streamed(parts.denoiser) else 1
    with torch.no_grad():
        if cond is None:
            cond = family.encode_tokens(parts, things.blank_tokens(family, parts, count))
        # What was encoded, the pipeline's copies of it, and both of these as one batch.
        copies = [things.blank_like(cond, rows, parts.dtype) for _ in range(2)]
        cond = things.blank_like(cond, rows, parts.dtype)
        # DPM-Solver++ of order 2 keeps two predictions in float32 beside the latents.
        history = [torch.empty((count, *shape)) for _ in range(2)]
        latents = torch.empty((count, *shape), dtype=parts.dtype)
        inputs = torch.cat([latents] * (rows // count))
        level_B = torch.zeros(rows, dtype=torch.int64)
        for _ in range(steps):
            output = family.predict(parts, inputs, level_B, cond, (scene.geometry(parts),) * rows)
            del output
        del cond, copies, inputs, history
        with _decoding(scene, parts, meter):
            family.decode_latents(parts, latents[:1])


@contextmanager
def _decoding(scene: Scene, parts: Parts, meter: Meter) -> Iterator[None]:
    """Where they take turns, the VAE is on the device inside and the denoiser is not."""
    if not scene.takes_turns or parts.vae is None:
        yield
        return
    waiting = leaving(parts.denoiser, things.SHAPES_ON)
    meter.drop(*waiting)
    meter.watch(things.VAE, parts.vae)
    yield
    meter.drop(*parts.vae.parameters(), *parts.vae.buffers())
    meter.watch(things.DENOISER, *waiting)
