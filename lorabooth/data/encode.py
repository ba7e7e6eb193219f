"""Photos and prompts through the encoders, once: what the store has is read, what it lacks is computed.

Each goes through its encoder alone. Batched arithmetic rounds by the size of the batch, and which entries a
store lacks depends on what was killed or run before: an entry must be a function of its key, nothing else.
Encoders come in as callables and are not kept: after a call returns, the caller can release their weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lorabooth.data.cache import CachedLatent, Store, latents_key, sampled_key, text_key
from lorabooth.data.images import Variant, fit, target_for, variants
from lorabooth.data.photo import PhotoError, read
from lorabooth.errors import TrainingError
from lorabooth.progress import Reporter, Silent, Task
from lorabooth.recipe import ImagesSection
from lorabooth.recipe.rules import printable
from lorabooth.rng import generator_for
from lorabooth.types import Cond, Geometry, Moments, Record

IN_MEMORY_BYTES = 16 * 2**20
"""Latents of a call beyond this (some hundred) are read when they are drawn: memory does not grow."""


@dataclass(frozen=True, slots=True)
class StoredLatent:
    """A latent that stays in the store until it is drawn."""

    store: Store
    key: str

    def load(self) -> CachedLatent:
        """Read it.

        Raises:
            TrainingError: it is there no more.
        """
        latent = self.store.moments(self.key)
        if latent is None:
            where = self.store.path("latents", self.key)
            raise TrainingError(
                f"an encoded image is gone from the cache, or damaged: {where}",
                "The same command encodes it again, and goes on from the last checkpoint.",
            )
        return latent


@dataclass(frozen=True)
class LatentIndex:
    """All encoded photos of a run: the first in memory, the others where they are.

    Attributes:
        latents: by photo; one entry per variant.
        computed: how many entries were encoded now.
        reused: how many came from the store.
    """

    latents: Mapping[Path, tuple[CachedLatent | StoredLatent, ...]]
    computed: int
    reused: int

    def of(self, record: Record, variant: int) -> CachedLatent:
        """The record's photo in one of its variants.

        Raises:
            TrainingError: it is not in memory, and cannot be read any more.
        """
        found = self.latents[record.path][variant]
        return found.load() if isinstance(found, StoredLatent) else found

    def joined(self, other: LatentIndex) -> LatentIndex:
        """Both; where they share a photo, the one with more variants."""
        latents = dict(self.latents)
        for path, cuts in other.latents.items():
            latents[path] = max(latents.get(path, ()), cuts, key=len)
        return LatentIndex(latents, self.computed + other.computed, self.reused + other.reused)


@dataclass(frozen=True)
class TextIndex:
    """Conditioning by prompt, and how much of it was computed now or came from the store."""

    conds: Mapping[str, Cond]
    computed: int
    reused: int


@dataclass(frozen=True)
class _Job:
    """One variant of one photo that the store lacks."""

    path: Path
    index: int
    key: str
    pixels: Tensor
    geometry: Geometry


@dataclass(frozen=True)
class _Cutting:
    """How photos are cut; what `cache_latents` was told, in one value."""

    images: ImagesSection
    resolution_px: int
    multiple_px: int
    seed: int
    encoder_id: str
    variants: tuple[Variant, ...] = field(default=())

    def key(self, sha256: str, variant: Variant) -> str:
        return latents_key(
            sha256,
            variant=variant,
            images=self.images,
            resolution_px=self.resolution_px,
            multiple_px=self.multiple_px,
            encoder_id=self.encoder_id,
            seed=self.seed,
        )

    def is_whole(self, geometry: Geometry) -> bool:
        """Whether an image of this size is trained on as it is, in one variant."""
        height_px, width_px = geometry.original_px
        target_px = target_for(height_px, width_px, self.images, self.resolution_px, self.multiple_px)
        return len(self.variants) == 1 and target_px == geometry.original_px == geometry.target_px


def cache_latents(
    store: Store,
    records: Sequence[Record],
    *,
    encode: Callable[[Tensor], list[Moments]],
    encoder_id: str,
    images: ImagesSection,
    resolution_px: int,
    multiple_px: int,
    seed: int,
    label: str = "Encoding photos",
    reporter: Reporter | None = None,
    sampled: bool = False,
    in_memory_bytes: int = IN_MEMORY_BYTES,
) -> LatentIndex:
    """Moments of every photo in every variant, from the store where it has them.

    A photo is its bytes: renamed it is found again, changed under its name it is computed anew. Random crops
    are a function of (seed, bytes, variant).

    Args:
        store: where results are kept.
        records: photos; a path that comes twice is encoded once.
        encode: pixels [1,3,H,W] float32 in [-1,1] -> the moments of that photo.
        encoder_id: identifies the encoder's weights and precision.
        images: crop, flip, buckets; its `resolution` is not looked at.
        resolution_px: resolved resolution.
        multiple_px: what sides must be a multiple of.
        seed: the run's.
        label: of the progress bar.
        reporter: progress and warnings; silent by default.
        sampled: where the store has the latent that an image was decoded from (`sampled_key`), and the image
            is trained on whole, that is taken: decoding and encoding it again would only lose.
        in_memory_bytes: what the index holds in memory; the rest is read when it is drawn.

    Raises:
        PhotoError: a photo cannot be decoded (`images.check` finds these before models are loaded).
        RecipeError: the store cannot be written.
        TrainingError: the encoder gave numbers that are not finite (the photo is named), or the disk is full;
            what was encoded before is kept.
    """
    say = reporter or Silent()
    cutting = _Cutting(images, resolution_px, multiple_px, seed, encoder_id, variants(images))
    paths = list(dict.fromkeys(record.path for record in records))
    found = _Found(store, in_memory_bytes)
    total = len(paths) * len(cutting.variants)
    computed = 0
    with say.task(label, total, "photo") as task, torch.no_grad():
        for job in _missing(store, paths, cutting, found, task, say, sampled=sampled):
            latent = _encode(job, encode)
            store.put_moments(job.key, latent)
            found.add(job.path, job.index, job.key, latent)
            computed += 1
            task.advance()
    return LatentIndex(found.index(), computed, total - computed)


def cache_texts(
    store: Store,
    prompts: Iterable[str],
    *,
    encode: Callable[[Sequence[str]], list[Cond]],
    encoder_id: str,
    reporter: Reporter | None = None,
) -> TextIndex:
    """Conditioning of every different prompt, from the store where it has it.

    Args:
        store: where results are kept.
        prompts: may repeat.
        encode: prompts (one a call) -> one unbatched dict of tensors each.
        encoder_id: identifies tokenizers, text encoders and precision.
        reporter: progress and warnings; silent by default.

    Raises:
        RecipeError: the store cannot be written.
        TrainingError: the encoder gave numbers that are not finite (the prompt is named), or the disk is
            full; what was encoded before is kept.
    """
    say = reporter or Silent()
    unique = list(dict.fromkeys(prompts))
    known = {prompt: store.cond(text_key(prompt, encoder_id), say) for prompt in unique}
    conds: dict[str, Cond] = {prompt: cond for prompt, cond in known.items() if cond is not None}
    missing = [prompt for prompt in unique if prompt not in conds]
    with say.task("Encoding prompts", len(unique), "prompt", start=len(conds)) as task, torch.no_grad():
        for prompt in missing:
            (cond,) = encode([prompt])
            own = {name: _own(tensor) for name, tensor in cond.items()}
            if not all(bool(torch.isfinite(tensor).all()) for tensor in own.values()):
                raise _not_finite("text encoder", repr(prompt))
            store.put_cond(text_key(prompt, encoder_id), own)
            conds[prompt] = own
            task.advance()
    return TextIndex({prompt: conds[prompt] for prompt in unique}, len(missing), len(unique) - len(missing))


@dataclass
class _Found:
    """Latents by photo and variant; so many bytes of them in memory."""

    store: Store
    room_bytes: int
    entries: dict[Path, dict[int, CachedLatent | StoredLatent]] = field(default_factory=dict)

    def add(self, path: Path, variant: int, key: str, latent: CachedLatent) -> None:
        self.room_bytes -= latent.moments.mean.nbytes + latent.moments.std.nbytes
        held = latent if self.room_bytes >= 0 else StoredLatent(self.store, key)
        self.entries.setdefault(path, {})[variant] = held

    def index(self) -> dict[Path, tuple[CachedLatent | StoredLatent, ...]]:
        return {path: tuple(cut for _, cut in sorted(cuts.items())) for path, cuts in self.entries.items()}


def _missing(
    store: Store,
    paths: Sequence[Path],
    cutting: _Cutting,
    found: _Found,
    task: Task,
    reporter: Reporter,
    *,
    sampled: bool,
) -> Iterator[_Job]:
    """Fill `found` from the store; yield the rest, each photo decoded once and only if needed."""
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise PhotoError(path, f"cannot be read: {error.strerror or error}") from error
        sha256 = hashlib.sha256(content).hexdigest()
        keys = [cutting.key(sha256, variant) for variant in cutting.variants]
        drawn = store.moments(sampled_key(sha256), reporter) if sampled else None
        if drawn is not None and cutting.is_whole(drawn.geometry):
            found.add(path, 0, sampled_key(sha256), drawn)
            task.advance()
            continue
        lacking = []
        for index, key in enumerate(keys):
            latent = store.moments(key, reporter)
            if latent is None:
                lacking.append(index)
            else:
                found.add(path, index, key, latent)
        task.advance(len(keys) - len(lacking))
        if not lacking:
            continue
        pixels_u8 = read(path, content).pixels
        height_px, width_px = pixels_u8.shape[:2]
        target_px = target_for(
            height_px, width_px, cutting.images, cutting.resolution_px, cutting.multiple_px
        )
        for index in lacking:
            variant = cutting.variants[index]
            generator = generator_for(cutting.seed, 0, 0, f"crop-{sha256}", variant.crop_index)
            pixels, geometry = fit(
                pixels_u8, target_px, crop=cutting.images.crop, flip=variant.flipped, generator=generator
            )
            yield _Job(path, index, keys[index], pixels, geometry)


def _encode(job: _Job, encode: Callable[[Tensor], list[Moments]]) -> CachedLatent:
    (moments,) = encode(torch.stack([job.pixels]))
    own = Moments(_own(moments.mean).float(), _own(moments.std).float())
    if not (torch.isfinite(own.mean).all() and torch.isfinite(own.std).all()):
        raise _not_finite("image encoder (VAE)", printable(str(job.path)))
    return CachedLatent(own, job.geometry)


def _own(tensor: Tensor) -> Tensor:
    """A copy on the CPU that shares no memory: a view would keep a whole batch, or a GPU's memory, alive."""
    return tensor.detach().to("cpu", copy=True).contiguous().clone()


def _not_finite(encoder: str, name: str) -> TrainingError:
    return TrainingError(
        f"the {encoder} gave numbers that are not finite for {name}",
        'Run it in float32 (model.dtype = "fp32"); if that is so already, its weights are damaged.',
    )
