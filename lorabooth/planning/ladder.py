"""The techniques that save memory, in the order of what they cost in speed: a literal table.

What a rung saves is not written here: it is the difference of two forecasts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lorabooth.memory.facts import Device
from lorabooth.recipe import Recipe

COUNTED = "memory.checkpoint_blocks"
"""The key whose number the forecast decides."""
_IMAGES = ("class images", "previews")
_STEPS = ("training",)


@dataclass(frozen=True)
class Rung:
    """One technique.

    Attributes:
        name: in a few words.
        keys: what it sets in a recipe; dotted keys.
        phases: that it can make smaller, by the names of a forecast.
        reason: what it does and what it costs, one line.
        exact: a run may take it up midway: the gradient stays what it was, within rounding.
        problem: (recipe without "auto", device) -> why it does not apply, or "".
    """

    name: str
    keys: Mapping[str, object]
    phases: tuple[str, ...]
    reason: str
    exact: bool = True
    problem: Callable[[Recipe, Device], str] = lambda recipe, device: ""  # noqa: ARG005


def _of(**keys: object) -> Mapping[str, object]:
    return MappingProxyType({name.replace("__", "."): value for name, value in keys.items()})


def _fewer_images(count: int) -> Rung:
    return Rung(
        name=f"{count} image{'s' * (count > 1)} at once",
        keys=_of(memory__images_at_once=count),
        phases=_IMAGES,
        reason="class images and samples are drawn in smaller groups; the steps stay as they are",
        exact=False,  # the last bits of class images differ by the group
    )


def _on_cuda(recipe: Recipe, device: Device) -> str:  # noqa: ARG001
    return "" if device.kind == "cuda" else f"on {device.kind}, host and device are one memory"


def _bitsandbytes(recipe: Recipe, device: Device) -> str:
    if device.kind != "cuda":
        return "bitsandbytes' 8-bit optimizers are for CUDA"
    return "" if recipe.optim.name == "adamw" else f"the optimizer is {recipe.optim.name} already"


def _half(recipe: Recipe, device: Device) -> str:
    if device.kind == "cuda":
        return "on a GPU it is the default"
    return "" if recipe.memory.precision == "fp32" else f"the precision is {recipe.memory.precision} already"


def _few_bits(recipe: Recipe, device: Device) -> str:  # noqa: ARG001
    if recipe.memory.precision == "fp32":
        return "not with arithmetic in fp32"
    return ""


def _streamable(recipe: Recipe, device: Device) -> str:
    return _on_cuda(recipe, device) or ("" if recipe.speed.compile == "off" else "not with speed.compile")


def _movable(recipe: Recipe, device: Device) -> str:
    return _on_cuda(recipe, device) or ("not with speed.cuda_graph" if recipe.speed.cuda_graph else "")


LADDER: tuple[Rung, ...] = (
    Rung(
        "one part at a time",
        _of(memory__in_turn=True),
        _IMAGES,
        "the VAE waits in host memory while the denoiser draws, the denoiser while it decodes; same images",
        problem=_movable,
    ),
    _fewer_images(4),
    _fewer_images(2),
    _fewer_images(1),
    Rung(
        "VAE slicing",
        _of(memory__vae_slicing=True),
        ("class images", "caching", "previews"),
        "the VAE takes images one at a time; the steps stay as they are",
    ),
    Rung(
        "VAE tiling",
        _of(memory__vae_tiling=True),
        ("class images", "caching", "previews"),
        "the VAE takes images in tiles: slightly other latents; the steps stay as they are",
    ),
    Rung(
        "checkpointing",
        _of(memory__checkpointing=True, memory__checkpoint_blocks="auto"),
        _STEPS,
        "activations are computed again in the backward pass, outermost blocks first; same gradient",
    ),
    Rung(
        "8-bit optimizer",
        _of(optim__name="adamw8bit"),
        ("training", "previews", "saving"),
        "optimizer state in 8 bits (bitsandbytes)",
        exact=False,
        problem=_bitsandbytes,
    ),
    Rung(
        "bf16",
        _of(memory__precision="bf16"),
        ("training", "previews", "saving"),
        "half the bytes for the base and most activations; slow on a CPU without native bf16",
        exact=False,
        problem=_half,
    ),
    Rung(
        "int8 base",
        _of(memory__base_precision="int8"),
        ("training", "previews", "saving"),
        "frozen weights in 8 bits, unpacked layer by layer; slightly other predictions",
        exact=False,
        problem=_few_bits,
    ),
    Rung(
        "NF4 base",
        _of(memory__base_precision="nf4"),
        ("training", "previews", "saving"),
        "frozen weights in 4 bits (bitsandbytes); coarser predictions",
        exact=False,
        problem=_few_bits,
    ),
    Rung(
        "checkpoint offload",
        _of(memory__checkpoint_offload=True, memory__checkpointing=True),
        _STEPS,
        "what checkpoints keep waits in host memory; same gradient, two copies per block",
        problem=_on_cuda,
    ),
    Rung(
        "streamed base",
        _of(memory__stream=True, memory__checkpointing=True, memory__checkpoint_blocks="auto"),
        ("class images", "caching", "training", "previews", "saving"),
        "frozen weights wait in host memory and are copied block by block in every step",
        problem=_streamable,
    ),
)
"""In the order in which a plan takes them.

Base in bf16 or fp16, torch's attention kernels, cached latents and text embeddings cost no speed: they are
the defaults, and no rungs. fp8 takes as many bytes as int8 and is coarser (3 bits of fraction, against steps
of 1/127 of a row's largest weight), so no plan chooses it. Hollowing and smaller batches change what is
learned: a plan names them, and leaves them to the user.
"""
