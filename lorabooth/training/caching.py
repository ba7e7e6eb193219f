"""What is encoded once before training: latents and text embeddings; then the encoders leave memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lorabooth.data.batches import Orders
from lorabooth.data.cache import Store
from lorabooth.data.encode import LatentIndex, cache_latents, cache_texts
from lorabooth.families.base import Family, Parts
from lorabooth.families.source import weights_digest
from lorabooth.progress import Reporter
from lorabooth.recipe import ImagesSection, Recipe
from lorabooth.training.setting import Setting
from lorabooth.training.subjects import held_out, preview_prompts, selection_prompts
from lorabooth.types import Cond, Record

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Examples:
    """All that is trained on, encoded and in memory.

    Attributes:
        instance: the subject's photos.
        classes: class images, or (distill) the photos under the class prompt; empty without a prior.
        latents: of both.
        conds: caption -> conditioning, or tokens if the text encoder trains.
        orders: remembers the order of an epoch from step to step.
        held_out: photos and class examples that validation keeps from training; empty if it keeps none.
    """

    instance: tuple[Record, ...]
    classes: tuple[Record, ...]
    latents: LatentIndex
    conds: Mapping[str, Cond]
    orders: Orders = field(default_factory=Orders)
    held_out: tuple[Record, ...] = ()

    def without(self, count: int) -> Examples:
        """Without the last `count` photos of each subject, and as many class examples, which are held out.

        What mode "distill" makes of a held-out photo is held out with it.
        """
        if not count:
            return self
        instance, photos = held_out(self.instance, count)
        classes, kept_back = held_out(self.classes, count)
        return replace(self, instance=instance, classes=classes, held_out=(*photos, *kept_back))


def encode_examples(
    family: Family,
    parts: Parts,
    recipe: Recipe,
    instance: Sequence[Record],
    classes: Sequence[Record],
    *,
    store: Store,
    reporter: Reporter,
) -> Examples:
    """Photos, class images and captions through VAE and text encoder, or from the store.

    Class images are cut as a plain square: flips and random crops are for the few photos of a subject.

    Raises:
        RecipeError: the store cannot be written.
        TrainingError: an encoder gave numbers that are not finite, or the disk is full.
    """
    store.sweep()
    resolution_px = int(recipe.images.resolution)
    # Latents of tiles are others than those of whole images.
    tiled = "/tiled" if recipe.memory.vae_tiling else ""

    def latents(
        records: Sequence[Record], images: ImagesSection, label: str, *, sampled: bool = False
    ) -> LatentIndex:
        return cache_latents(
            store,
            records,
            encode=lambda pixels: family.encode_images(parts, pixels),
            encoder_id=f"vae/{weights_digest(parts.source, 'vae')}/fp32/{_device_kind(parts.vae)}{tiled}",
            images=images,
            resolution_px=resolution_px,
            multiple_px=family.resolution_multiple_px(parts),
            seed=recipe.run.seed,
            label=label,
            reporter=reporter,
            sampled=sampled,
        )

    index = latents(instance, recipe.images, "Encoding photos")
    photos = {record.path for record in instance}
    drawn = [record for record in classes if record.path not in photos]
    if drawn:
        plain = recipe.images.model_copy(update={"flip": False, "crop": "center"})
        # Only what was generated here: the user's own images are what their pixels are.
        sampled = recipe.prior.mode == "generated"
        index = index.joined(latents(drawn, plain, "Encoding class images", sampled=sampled))
    prompts = [record.caption for record in (*instance, *classes)]
    if recipe.adapter.text_encoder:
        unique = list(dict.fromkeys(prompts))
        conds: Mapping[str, Cond] = dict(zip(unique, family.tokenize(parts, unique), strict=True))
    else:
        conds = cache_texts(
            store,
            prompts,
            encode=lambda some: family.encode_prompts(parts, some),
            encoder_id=(
                f"text/{weights_digest(parts.source, 'text_encoder')}/{recipe.model.dtype}"
                f"/{_device_kind(parts.text_encoders['text_encoder'])}"
            ),
            reporter=reporter,
        ).conds
    reporter.say(f"latents: {index.computed} encoded, {index.reused} from the cache")
    return Examples(tuple(instance), tuple(classes), index, conds)


def _device_kind(encoder: nn.Module | None) -> str:
    """As in "cpu" or "cuda": they round differently, so their entries are not each other's."""
    if encoder is None:
        raise RuntimeError("the encoder was released already")
    return next(encoder.parameters()).device.type


def cache_and_release(
    setting: Setting, classes: Sequence[Record], store: Store, reporter: Reporter
) -> tuple[Examples, dict[str, Tensor] | None]:
    """Encode everything; then VAE and (unless it trains) text encoder leave memory, which is proven.

    Returns:
        The examples, and the text embeddings of all that will be drawn by prompt, "" included (None while the
        text encoder stays).
    """
    recipe, family = setting.recipe, setting.family
    setting.base.to(setting.device, "vae", *setting.parts.text_encoders)
    examples = encode_examples(
        family, setting.parts, recipe, setting.photos.records, classes, store=store, reporter=reporter
    )
    examples = examples.without(recipe.run.validation_photos)
    if recipe.adapter.text_encoder:
        released = setting.base.release("vae")
        encoded = None
    else:
        prompts = ["", *preview_prompts(recipe, setting.subjects)]
        conds = family.encode_prompts(setting.parts, prompts)
        encoded = {prompt: cond["encoder_hidden_states"] for prompt, cond in zip(prompts, conds, strict=True)}
        # One by one: no more memory than the samples' prompts take, which are not rounded otherwise for them.
        for prompt in selection_prompts(recipe, setting.subjects):
            (cond,) = family.encode_prompts(setting.parts, [prompt])
            encoded.setdefault(prompt, cond["encoder_hidden_states"])
        released = setting.base.release("vae", *setting.parts.text_encoders)
    reporter.say(f"{', '.join(released.names)} left memory: {released.bytes / 2**20:.1f} MiB")
    return examples, encoded
