"""What the metrics are measured with: found, opened, named; and what to do about those that are not there."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from lorabooth.errors import BaseModelError, RecipeError
from lorabooth.families.quiet import quiet_libraries
from lorabooth.progress import Reporter, Silent

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from PIL.Image import Image

    from lorabooth.evaluation.embedders import SubjectEmbedder

DINO_ID = "facebook/dino-vits16"
"""The paper's: DINO ViT-S/16. "facebook/dinov2-small" is a newer one of the same size."""
CLIP_ID = "openai/clip-vit-base-patch32"
"""What open evaluations use."""
NOT_AVAILABLE = "not available"

_POCKET = "pocket"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_Key = Literal["dino", "clip", "lpips"]
_METRICS: dict[_Key, tuple[str, ...]] = {
    "dino": ("DINO", "PRES"),
    "clip": ("CLIP-I", "CLIP-T"),
    "lpips": ("DIV", "drift"),
}
_T = TypeVar("_T")


class ImageEmbedder(Protocol):
    """Images to vectors. A new one needs no more than this."""

    name: str

    def __call__(self, images: Sequence[Image], /) -> NDArray[np.float32]:
        """Unit vectors [N,D]."""
        ...


class TextImageEmbedder(Protocol):
    """Images and texts to vectors that can be compared."""

    name: str

    def images(self, images: Sequence[Image], /) -> NDArray[np.float32]:
        """Unit vectors [N,D]."""
        ...

    def texts(self, prompts: Sequence[str], /) -> NDArray[np.float32]:
        """Unit vectors [N,D]."""
        ...


class Perceptual(Protocol):
    """How different images look."""

    name: str

    def __call__(self, first: Sequence[Image], second: Sequence[Image], /) -> NDArray[np.float32]:
        """The distance of pair i, [N], >= 0."""
        ...


@dataclass(frozen=True)
class Backbones:
    """What was opened.

    Attributes:
        subject: for DINO and PRES; None: they are not measured.
        clip: for CLIP-I and CLIP-T.
        distance: for DIV and drift: LPIPS, or what stands in for it; its name says which.
        notes: what is missing or stands in, why, what to do about it, and which metrics remain; sentences
            for the user.
    """

    subject: ImageEmbedder | None
    clip: TextImageEmbedder | None
    distance: Perceptual | None
    notes: tuple[str, ...] = ()

    def names(self) -> dict[str, str]:
        """{"dino": ..., "clip": ..., "lpips": ...}, for every output; `NOT_AVAILABLE` for what is missing."""
        parts = {"dino": self.subject, "clip": self.clip, "lpips": self.distance}
        return {key: NOT_AVAILABLE if part is None else part.name for key, part in parts.items()}

    def metrics(self) -> tuple[str, ...]:
        """What can be measured, as people call it: "DINO", "CLIP-T", ..."""
        parts = {"dino": self.subject, "clip": self.clip, "lpips": self.distance}
        return tuple(name for key, part in parts.items() if part is not None for name in _METRICS[key])  # type: ignore[index]


def open_backbones(
    dino: str = "auto",
    clip: str = "auto",
    lpips: str = "auto",
    *,
    base: str,
    device: str | torch.device = "cpu",
    reporter: Reporter | None = None,
    strict: bool = False,
) -> Backbones:
    """Open what the metrics need; what cannot be had is None and a note, never a traceback.

    Args:
        dino: a hub id, a local folder, "pocket" (the pocket base's own), or "auto": the own one of a base
            that has it, else `DINO_ID`.
        clip: likewise; else `CLIP_ID`.
        lpips: a hub id, folder or file with the weights of `lpips.AlexLpips`; "auto": LPIPS's formula
            unweighted on the subject encoder's stages, or 1 - its cosine where it has none.
        base: what the recipe calls its base: "pocket", or a folder with subject_encoder/ and clip/ beside its
            other parts, brings its own.
        device: where they compute.
        reporter: told of downloads, and of captions that are cut.
        strict: a key that is not "auto" and cannot be had is an error.

    Raises:
        RecipeError: strict, and a given backbone cannot be had; names the key and what to do.
    """
    import torch

    opener = _Opener(base, torch.device(device), reporter or Silent(), strict)
    with quiet_libraries():
        subject = opener.attempt("dino", dino, opener.subject)
        text_image = opener.attempt("clip", clip, opener.clip)
        distance: Perceptual | None = None
        if lpips != "auto":
            distance = opener.attempt("lpips", lpips, opener.lpips)
        if distance is None and subject is not None:
            distance = opener.stand_in(subject, lpips)
    found = Backbones(subject, text_image, distance)
    return Backbones(subject, text_image, distance, (*opener.notes, *_what_remains(found)))


class _Opener:
    """Opens one key after the other, and keeps the notes."""

    def __init__(self, base: str, device: torch.device, reporter: Reporter, strict: bool) -> None:
        self.notes: list[str] = []
        self._base = base
        self._device = device
        self._reporter = reporter
        self._strict = strict

    def attempt(self, key: _Key, value: str, opened: Callable[[str], _T]) -> _T | None:
        """What a key stands for, or None and a note."""
        try:
            return opened(value)
        except BaseModelError as error:
            fix = error.fix or _fix(key, value)
            if self._strict and value != "auto":
                raise RecipeError(f'evaluation.{key} = "{value}": {error.what}', fix) from error
            self.notes.append(f"evaluation.{key}: {error.what} {fix}")
            return None

    def subject(self, value: str) -> SubjectEmbedder:
        from lorabooth.evaluation.embedders import open_subject

        if home := self._home(value, "subject_encoder"):
            return open_subject(home / "subject_encoder", "the pocket subject encoder", self._device)
        folder, name = self._files(DINO_ID if value == "auto" else value, "image")
        return open_subject(folder, name, self._device)

    def clip(self, value: str) -> TextImageEmbedder:
        from lorabooth.evaluation.embedders import open_clip, open_pocket_clip

        if home := self._home(value, "clip"):
            return open_pocket_clip(home, "the pocket CLIP", self._device, self._reporter)
        folder, name = self._files(CLIP_ID if value == "auto" else value, "clip")
        return open_clip(folder, name, self._device, self._reporter)

    def lpips(self, value: str) -> Perceptual:
        from lorabooth.evaluation.lpips import open_lpips

        path = Path(value).expanduser()
        return open_lpips(path if path.exists() else self._files(value, "lpips")[0], self._device)

    def stand_in(self, subject: SubjectEmbedder, value: str) -> Perceptual:
        """LPIPS's formula on the subject encoder's stages, or else 1 - its cosine."""
        from PIL import Image

        from lorabooth.evaluation.embedders import CosineDistance
        from lorabooth.evaluation.lpips import MapDistance

        distance: Perceptual
        if subject.stages([Image.new("RGB", (64, 64))]):
            name = f"unweighted LPIPS formula on the stages of {subject.name}"
            distance = MapDistance(name, subject.stages)
        else:
            distance = CosineDistance(subject)
        if not (value == "auto" and self._home("auto", "subject_encoder")):
            self.notes.append(
                f"evaluation.lpips: DIV and drift are measured with {distance.name}. For LPIPS itself, give"
                " its weights as safetensors; docs/evaluation.md says how to make that file."
            )
        return distance

    def _home(self, value: str, part: str) -> Path | None:
        """The pocket folder that a value means, or None."""
        if value not in ("auto", _POCKET):
            return None
        if _POCKET in (value, self._base):
            from lorabooth.pocket.base import pocket_dir

            return Path(pocket_dir())
        folder = Path(self._base).expanduser()
        return folder if (folder / part / "config.json").is_file() else None

    def _files(self, value: str, kind: Literal["image", "clip", "lpips"]) -> tuple[Path, str]:
        """Folder and name of a local folder or a hub id."""
        from lorabooth.evaluation.downloads import model_folder

        path = Path(value).expanduser()
        if path.exists() or not _HUB_ID.fullmatch(value):
            return path, f"folder {path.resolve().name}"
        folder, commit = model_folder(value, kind, self._reporter)
        return folder, f"{value}@{commit[:10]}"


def _fix(key: _Key, value: str) -> str:
    """What to do about a backbone that cannot be had."""
    if key == "lpips":
        return 'docs/evaluation.md says how to make LPIPS\'s file; evaluation.lpips = "auto" does without it.'
    if value == _POCKET:
        return "Reinstall lorabooth."
    hub_id = DINO_ID if key == "dino" else CLIP_ID
    return f"Give a folder of a transformers model with model.safetensors, or a hub id such as {hub_id}."


def _what_remains(found: Backbones) -> tuple[str, ...]:
    """One sentence on what is not measured and what still is, if anything is missing."""
    remain = found.metrics()
    lost = [name for names in _METRICS.values() for name in names if name not in remain]
    if not lost:
        return ()
    still = f"measured: {', '.join(remain)}" if remain else "nothing is measured"
    return (f"Not measured: {', '.join(lost)}; {still}.",)
