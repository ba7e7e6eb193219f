"""Images from a pipeline, without leaving a trace on it: previews, class images and samples come from here.

Image i depends on its own prompt and seed only: every image has its own CPU generator, so batch size and
order do not matter (beyond the rounding of batched arithmetic). Modes, scheduler and devices are put back,
and no global random state is read.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn

from lorabooth.errors import LoraboothError, OutOfMemoryError, RecipeError
from lorabooth.evaluation.guidance import GuidedCall, guided_steps
from lorabooth.memory.in_turn import Decoding, taking_turns
from lorabooth.progress import Reporter, Silent
from lorabooth.types import Interval

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin
    from PIL.Image import Image
    from torch import Tensor

Sampler = Literal["dpm++", "checkpoint"]
Made = TypeVar("Made")

# What diffusers raises for a wrong size, dtype or device. Anything else is a bug of ours and shows itself.
_PIPELINE_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError)


def generate(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    guidance_interval: Interval | None = None,
    height_px: int | None = None,
    width_px: int | None = None,
    sampler: Sampler = "dpm++",
    batch_size: int = 1,
    encoded: Mapping[str, Tensor] | None = None,
    in_turn: bool = False,
    reporter: Reporter | None = None,
    on_image: Callable[[int, Image], None] | None = None,
    on_latent: Callable[[int, Tensor], None] | None = None,
    on_smaller: Callable[[int], None] | None = None,
) -> list[Image]:
    """Draw one image per (prompt, seed) pair.

    Args:
        pipeline: a Stable Diffusion pipeline; parts on other devices than the denoiser visit it and go back.
        prompts: one per image.
        seeds: one per image, 0 <= seed < 2**63.
        steps: sampler steps, >= 1.
        guidance: classifier-free guidance scale; <= 1 is without.
        guidance_interval: noise levels at which it acts; None is all of them.
        height_px: image height, a multiple of 8; None is what the base was trained at.
        width_px: likewise.
        sampler: "dpm++" is DPM-Solver++ 2M (arXiv 2211.01095) on the checkpoint's own noise schedule;
            "checkpoint" the scheduler that the checkpoint names.
        batch_size: most images at once; halved when memory runs out.
        encoded: prompt -> text embedding [tokens, width], and "" for guidance, where the text encoder
            has left memory; None encodes with the pipeline's.
        in_turn: denoiser and VAE are on the device one at a time; the images are the same.
        reporter: hears of the progress.
        on_image: called with (index, image) as soon as an image is there.
        on_latent: called before it with (index, latent [C,h,w] as the denoiser has it, float32 on the CPU).
        on_smaller: called with the new number of images at once when memory has run out.

    Returns:
        RGB images in the order of the prompts. What came out non-finite is black.

    Raises:
        OutOfMemoryError: one image alone does not fit.
        LoraboothError: the pipeline failed otherwise.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts for {len(seeds)} seeds")
    reporter = reporter or Silent()
    images: list[Image] = []
    with ExitStack() as restored, torch.no_grad():
        restored.enter_context(_evaluating(pipeline))
        decoding = restored.enter_context(_places(pipeline, in_turn))
        restored.enter_context(_scheduled(pipeline, sampler))
        restored.enter_context(torch.autocast(pipeline.unet.device.type, enabled=False))
        task = restored.enter_context(reporter.task("Sampling", len(prompts), unit="image"))
        size = max(1, batch_size)
        options = {"height": height_px, "width": width_px, "num_inference_steps": steps}
        acts = guided_steps(pipeline.scheduler, steps, guidance, guidance_interval)
        while len(images) < len(prompts):
            batch = slice(len(images), len(images) + size)
            told = partial(_conditioning, pipeline, prompts[batch], encoded, guidance, acts)
            made = _batch(pipeline, seeds[batch], options, told, decoding)
            if made is None:
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                if size == 1:
                    raise _too_little_memory(height_px, width_px)
                size = max(1, min(size, len(prompts) - len(images)) // 2)
                reporter.warn(f"Memory ran out while sampling; going on with {size} image(s) at once.")
                if on_smaller:
                    on_smaller(size)
                continue
            for image, finite, latent in made:
                if not finite:
                    reporter.warn(f'"{prompts[len(images)]}", seed {seeds[len(images)]}: the base drew NaN.')
                if on_latent:
                    on_latent(len(images), latent)
                if on_image:
                    on_image(len(images), image)
                images.append(image)
                task.advance()
    return images


def dpm_solver(scheduler: SchedulerMixin) -> SchedulerMixin:
    """A fresh DPM-Solver++ 2M with the noise schedule and prediction type of another scheduler.

    Raises:
        RecipeError: the scheduler is no discrete diffusion (a flow model's, for one).
    """
    from diffusers import DPMSolverMultistepScheduler

    prediction = scheduler.config.get("prediction_type", "flow")
    if "beta_schedule" not in scheduler.config or prediction not in ("epsilon", "v_prediction", "sample"):
        raise RecipeError(
            f"DPM-Solver++ cannot draw with this base's noise schedule (prediction type {prediction}).",
            'Choose the sampler "checkpoint".',
        )
    return DPMSolverMultistepScheduler.from_config(
        scheduler.config,
        algorithm_type="dpmsolver++",
        solver_order=2,
        use_karras_sigmas=False,
        thresholding=False,
    )


def _batch(
    pipeline: DiffusionPipeline,
    seeds: Sequence[int],
    options: Mapping[str, Any],
    conditioning: Callable[[], Mapping[str, Any]],
    decoding: Decoding,
) -> list[tuple[Image, bool, Tensor]] | None:
    """Images with "all finite" and latents, or None if memory ran out. All that it held is gone on return."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def draw() -> Tensor:
        given = {**options, **conditioning()}
        with _denoiser_alone(pipeline):
            drawn: Tensor = pipeline(**given, generator=generators, output_type="latent").images
        return drawn

    def decode(latents: Tensor) -> list[tuple[Image, bool, Tensor]]:
        return [
            (*_decode(pipeline, one), one[0].to("cpu", torch.float32, copy=True))
            for one in torch.split(latents, 1)
        ]

    latents = _unless_out_of_memory(draw)
    if latents is None:
        return None
    with decoding():
        return _unless_out_of_memory(partial(decode, latents))


def _unless_out_of_memory(work: Callable[[], Made]) -> Made | None:
    """What comes of it, or None if memory ran out: then all that it held is gone."""
    try:
        return work()
    except _PIPELINE_FAILURES as error:
        if _is_out_of_memory(error):
            return None
        raise LoraboothError(f"Sampling failed: {error}") from error


def _conditioning(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    encoded: Mapping[str, Tensor] | None,
    guidance: float,
    acts: list[bool],
) -> dict[str, Any]:
    """Text embeddings and guidance as the pipeline takes them."""
    positive, negative = _embed(pipeline, prompts, any(acts), encoded)
    return GuidedCall(guidance, acts, positive, negative).options()


def _embed(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    guided: bool,
    encoded: Mapping[str, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """Embeddings of the prompts, and of what is guided away from, in the denoiser's dtype on its device."""
    unet = pipeline.unet
    if encoded is None:
        positive, negative = pipeline.encode_prompt(list(prompts), unet.device, 1, guided)
    else:
        positive = torch.stack([encoded[prompt] for prompt in prompts])
        negative = torch.stack([encoded[""]] * len(prompts)) if guided else None
    if negative is not None:
        negative = negative.to(unet.device, unet.dtype)
    return positive.to(unet.device, unet.dtype), negative


def _decode(pipeline: DiffusionPipeline, latent_1Chw: Tensor) -> tuple[Image, bool]:
    """One latent -> an RGB image, and whether all of it was finite."""
    vae = pipeline.vae
    with _in_float32(vae):
        scaled = latent_1Chw.to(vae.device, vae.dtype) / vae.config.scaling_factor
        pixels = vae.decode(scaled, return_dict=False)[0].float()
    finite = bool(torch.isfinite(pixels).all())
    pixels = torch.nan_to_num(pixels, nan=-1.0, posinf=-1.0, neginf=-1.0)
    return pipeline.image_processor.postprocess(pixels, output_type="pil")[0], finite


@contextmanager
def _denoiser_alone(pipeline: DiffusionPipeline) -> Iterator[None]:
    """The pipeline has no other module: it takes dtype and device of whichever it finds first."""
    text_encoder, vae = pipeline.text_encoder, pipeline.vae
    pipeline.text_encoder = pipeline.vae = None
    try:
        yield
    finally:
        pipeline.text_encoder, pipeline.vae = text_encoder, vae


@contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
    """A decoder in half precision overflows or bands; half -> float32 -> half gives the same bits back."""
    dtype = next(module.parameters()).dtype
    nn.Module.to(module, torch.float32)  # diffusers' own `to` warns of casts
    try:
        yield
    finally:
        nn.Module.to(module, dtype)


@contextmanager
def _evaluating(pipeline: DiffusionPipeline) -> Iterator[None]:
    """All modules in eval mode; each gets its own mode back."""
    modes = [(module, module.training) for part in _modules(pipeline) for module in part.modules()]
    for part in _modules(pipeline):
        part.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _places(pipeline: DiffusionPipeline, takes_turns: bool) -> Iterator[Decoding]:
    """All modules on the denoiser's device, or its VAE in turn with it; what was elsewhere goes back."""
    if not takes_turns:
        with _together(pipeline, _modules(pipeline)):
            yield nullcontext
        return
    others = [part for part in _modules(pipeline) if part is not pipeline.vae]
    with _together(pipeline, others), taking_turns(pipeline.unet, pipeline.vae) as decoding:
        yield decoding


@contextmanager
def _together(pipeline: DiffusionPipeline, parts: Sequence[nn.Module]) -> Iterator[None]:
    """These on the denoiser's device; what was elsewhere goes back."""
    device = pipeline.unet.device
    away = [(part, place) for part in parts if (place := _device(part)) != device]
    try:
        for part, _ in away:
            part.to(device)
        yield
    finally:
        for part, place in away:
            part.to(place)


@contextmanager
def _scheduled(pipeline: DiffusionPipeline, sampler: Sampler) -> Iterator[None]:
    """A scheduler of our own (they keep state) and no progress bar; both are put back."""
    scheduler = pipeline.scheduler
    bar = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.scheduler = (
        dpm_solver(scheduler) if sampler == "dpm++" else type(scheduler).from_config(scheduler.config)
    )
    pipeline.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipeline.scheduler = scheduler
        pipeline.set_progress_bar_config(**bar)


def _modules(pipeline: DiffusionPipeline) -> list[nn.Module]:
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return [part for part in parts if next(part.parameters(), None) is not None]


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _is_out_of_memory(error: BaseException) -> bool:
    # The CPU allocator has no exception type of its own.
    texts = ("can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def _too_little_memory(height_px: int | None, width_px: int | None) -> OutOfMemoryError:
    size = f" of {width_px} x {height_px} px" if height_px and width_px else ""
    return OutOfMemoryError(
        f"There is too little memory to draw a single image{size}.",
        'Try a smaller image, dtype "bf16" or "fp16", or end other programs that use the device.',
    )
