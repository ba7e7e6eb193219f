"""Content-addressed store of latents and text embeddings: what did not change is not computed again.

A key is a hash of everything that a result depends on (bytes of the photo or the prompt, how it was cut,
the encoder, the version of the code), so an entry is never stale and never needs to be thrown away.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lorabooth import durable
from lorabooth.data.images import TRANSFORM_VERSION, Variant
from lorabooth.errors import RecipeError, TrainingError
from lorabooth.progress import Reporter, Silent
from lorabooth.recipe import ImagesSection
from lorabooth.types import Cond, Geometry, Moments

# Part of every key: raised when the same facts would give other numbers. 2: nothing is encoded in batches.
FORMAT_VERSION = 2
_DIGEST = "digest"


@dataclass(frozen=True, slots=True)
class CachedLatent:
    """One photo, cut in one way and encoded."""

    moments: Moments
    geometry: Geometry


def default_root() -> Path:
    """Where caches go: LORABOOTH_CACHE, else "lorabooth" in the system's folder for caches."""
    if chosen := os.environ.get("LORABOOTH_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "lorabooth" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lorabooth"
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative paths ignored.
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "lorabooth"


def latents_key(
    image_sha256: str,
    *,
    variant: Variant,
    images: ImagesSection,
    resolution_px: int,
    multiple_px: int,
    encoder_id: str,
    seed: int,
) -> str:
    """Key of one photo's moments.

    Args:
        image_sha256: hex digest of the photo file's bytes.
        variant: which crop, mirrored or not.
        images: of its settings, those that decide the pixels count.
        resolution_px: side of the square crop, or root of the bucket's area.
        multiple_px: what sides are a multiple of.
        encoder_id: identifies the VAE's weights and how they are run.
        seed: of the run; only counts for random crops.
    """
    facts = {
        "image": image_sha256,
        "buckets": images.buckets,
        "crop": images.crop,
        "crop_index": variant.crop_index,
        "flipped": variant.flipped,
        "resolution_px": resolution_px,
        "multiple_px": multiple_px,
        "seed": seed if images.crop == "random" else None,
        "transform": TRANSFORM_VERSION,
        "encoder": encoder_id,
    }
    return _key("latents", facts)


def pool_key(tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> str:
    """Key of what a frozen denoiser makes of given inputs.

    Args:
        tensors: its inputs, on the CPU.
        facts: what identifies the denoiser, how it is run and what is kept of it.
    """
    return _key("pool", {**facts, "inputs": _digest("", tensors)})


def sampled_key(image_sha256: str) -> str:
    """Key of the latent that an image was decoded from; `image_sha256` is the digest of its file's bytes."""
    return _key("latents", {"image": image_sha256, "encoder": "sampler"})


def text_key(prompt: str, encoder_id: str) -> str:
    """Key of one prompt's conditioning; `encoder_id` identifies tokenizers and text encoders."""
    return _key("text", {"prompt": prompt, "encoder": encoder_id})


@dataclass(frozen=True, slots=True)
class Store:
    """Entries on disk, one safetensors file each: `root`/<kind>/<start of the key>/<key>.safetensors.

    Writes are atomic, so a killed process leaves no half entry; several processes may write the same one.
    Reads trust nothing: a torn, foreign or altered entry counts as absent, with a warning.
    """

    root: Path

    def moments(self, key: str, reporter: Reporter | None = None) -> CachedLatent | None:
        """The photo's moments and geometry, or None if they are not in the store."""
        path = self.path("latents", key)
        tensors = _read(path, key, reporter or Silent())
        if tensors is None:
            return None
        try:
            return _as_latent(tensors)
        except ValueError as error:
            _distrust(path, str(error), reporter or Silent())
            return None

    def put_moments(self, key: str, latent: CachedLatent) -> None:
        """Keep moments ([C,h,w] float32 on the CPU) and geometry."""
        cut = latent.geometry
        numbers = [*cut.original_px, *cut.crop_px, *cut.target_px, int(cut.flipped)]
        tensors = {
            "mean": latent.moments.mean,
            "std": latent.moments.std,
            "geometry": torch.tensor(numbers, dtype=torch.int64),
        }
        _write(self.path("latents", key), key, tensors)

    def cond(self, key: str, reporter: Reporter | None = None) -> Cond | None:
        """The prompt's conditioning, or None if it is not in the store."""
        return _read(self.path("text", key), key, reporter or Silent())

    def put_cond(self, key: str, cond: Cond) -> None:
        """Keep one prompt's unbatched tensors (on the CPU, not sharing memory)."""
        _write(self.path("text", key), key, cond)

    def tensors(self, kind: str, key: str, reporter: Reporter | None = None) -> dict[str, Tensor] | None:
        """Tensors of an entry of any kind, or None if it is not in the store or not whole."""
        return _read(self.path(kind, key), key, reporter or Silent())

    def put_tensors(self, kind: str, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors (on the CPU, not sharing memory)."""
        _write(self.path(kind, key), key, tensors)

    def sweep(self) -> None:
        """Remove what killed processes left half written, class images included; living ones keep theirs."""
        for folder in sorted(self.root.glob("*/*")):
            # What cannot be removed is in nobody's way: no entry has such a name.
            with suppress(OSError):
                durable.sweep_temporaries(folder)

    def path(self, kind: str, key: str) -> Path:
        """Where an entry is; `kind` is "latents", "text" or "pool"."""
        return self.root / kind / key[:2] / f"{key}.safetensors"


def _key(kind: str, facts: Mapping[str, object]) -> str:
    text = json.dumps({"kind": kind, "format": FORMAT_VERSION, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _as_latent(tensors: Mapping[str, Tensor]) -> CachedLatent:
    if tensors.keys() != {"mean", "std", "geometry"}:
        raise ValueError("it does not hold mean, std and geometry")
    mean, std, geometry = tensors["mean"], tensors["std"], tensors["geometry"]
    if mean.dtype != torch.float32 or std.dtype != torch.float32 or mean.ndim != 3 or mean.shape != std.shape:
        raise ValueError("mean and std are not float32 [C,h,w]")
    if geometry.dtype != torch.int64 or geometry.shape != (7,):
        raise ValueError("geometry is not seven whole numbers")
    oh, ow, top, left, th, tw, flipped = geometry.tolist()
    return CachedLatent(Moments(mean, std), Geometry((oh, ow), (top, left), (th, tw), bool(flipped)))


def _digest(key: str, tensors: Mapping[str, Tensor]) -> str:
    """Of the key and all names, types, shapes and bytes: tells torn, altered and misplaced entries."""
    state = hashlib.sha256(key.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"/{name}/{tensor.dtype}/{tuple(tensor.shape)}/".encode())
        state.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def _read(path: Path, key: str, reporter: Reporter) -> dict[str, Tensor] | None:
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        _distrust(path, f"cannot be read: {error.strerror or error}", reporter)
        return None
    try:
        tensors: dict[str, Tensor] = load(content)
        told = _told_digest(content)
        # Types that torch cannot look at as bytes fail in here.
        real = _digest(key, tensors)
    except (SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        _distrust(path, f"not a whole safetensors file ({error})", reporter)
        return None
    if told != real:
        _distrust(path, "its content does not match its checksum", reporter)
        return None
    return tensors


def _told_digest(content: bytes) -> str | None:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    # safetensors takes null for its metadata.
    metadata = header.get("__metadata__")
    return metadata.get(_DIGEST) if isinstance(metadata, dict) else None


def _distrust(path: Path, why: str, reporter: Reporter) -> None:
    reporter.warn(f"cache entry {path.name} is not used and computed again: {why}")


def _write(path: Path, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Write to a temporary file beside the target, flush to disk, rename.

    Raises:
        RecipeError: the folder cannot be written.
        TrainingError: no space.
    """
    content = save(dict(tensors), metadata={_DIGEST: _digest(key, tensors)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.replace(path, content)
    except OSError as error:
        what = f"the cache cannot be written: {path.parent}: {error.strerror or error}"
        if durable.is_full(error):
            raise TrainingError(
                what,
                "Free some disk space and run the command again: what was encoded is kept. What other "
                f"runs put in {path.parents[2]} may be deleted, it is computed again; or set "
                "LORABOOTH_CACHE to a folder on another disk.",
            ) from error
        raise RecipeError(what, "Set LORABOOTH_CACHE to a folder that can be written.") from error
