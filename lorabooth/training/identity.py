"""What a run is trained on, by content: digests of photos, captions, own class images and the base.

Written beside recipe.toml as identity.json; names and digests only, no folders, so that a run folder can be
moved to another machine, where the recipe's paths lead elsewhere and the content decides.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabooth.errors import DataError
from lorabooth.families.source import weights_digest
from lorabooth.training import subjects
from lorabooth.training.setting import Setting

_FORMAT = 1
_COMPONENTS = ("unet", "vae", "text_encoder")
_PHOTOS, _CAPTIONS, _CLASS_IMAGES, _BASE = "photos", "captions", "class_images", "base"
# Recipe keys that say where something is; what is there decides instead.
_PLACES = {
    re.compile(r"subjects\[\d+\]\.images"): (_PHOTOS, _CAPTIONS),
    re.compile(r"prior\.images"): (_CLASS_IMAGES,),
    re.compile(r"model\.base"): (_BASE,),
}


@dataclass(frozen=True)
class Identity:
    """Digests by kind and name; photos and captions as "0/01.jpg", the subject's number first.

    Attributes:
        digests: kind -> name -> SHA-256, hexadecimal.
    """

    digests: Mapping[str, Mapping[str, str]]

    @property
    def photos(self) -> Mapping[str, str]:
        """`photo_name` -> SHA-256."""
        return self.digests[_PHOTOS]

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return {"format": _FORMAT, **{kind: dict(found) for kind, found in self.digests.items()}}


def of(setting: Setting) -> Identity:
    """The identity of a run on this footing. Reads all photos and, once a process, the base's weights.

    Raises:
        DataError: a file cannot be read.
    """
    photos: dict[str, str] = {}
    captions: dict[str, str] = {}
    for number, scan in enumerate(setting.photos.scans):
        for record in scan.records:
            name = photo_name(number, record.path)
            photos[name] = file_digest(record.path)
            captions[name] = hashlib.sha256(record.caption.encode()).hexdigest()
    own: dict[str, str] = {}
    if setting.recipe.prior.mode == "images":
        scan = subjects.own_class_images(Path(setting.recipe.prior.images), setting.subjects)
        own = {_normal(record.path.name): file_digest(record.path) for record in scan.records}
    base = {name: weights_digest(setting.parts.source, name) for name in _COMPONENTS}
    base["scheduler"] = _config_digest(setting.parts.scheduler_config)
    return Identity({_PHOTOS: photos, _CAPTIONS: captions, _CLASS_IMAGES: own, _BASE: base})


def photo_name(number: int, path: Path) -> str:
    """What a photo of subject `number` (0 is the first) is called in an identity."""
    return f"{number}/{_normal(path.name)}"


def parse(value: Mapping[str, Any]) -> Identity | None:
    """What `to_json` gave; None if it is something else (an empty or damaged file, another format)."""
    if value.get("format") != _FORMAT:
        return None
    found = {kind: value.get(kind) for kind in (_PHOTOS, _CAPTIONS, _CLASS_IMAGES, _BASE)}
    digests = {kind: part for kind, part in found.items() if isinstance(part, dict)}
    return Identity(digests) if len(digests) == len(found) else None


def changes(old: Identity, new: Identity) -> list[str]:
    """What differs, a line each: "photo 02.jpg has changed"; empty if nothing does."""
    lines = []
    photos = _differing(old.digests[_PHOTOS], new.digests[_PHOTOS])
    for name, how in photos.items():
        lines.append(f"photo {_shown(name)} {how}")
    for name, how in _differing(old.digests[_CAPTIONS], new.digests[_CAPTIONS]).items():
        if photos.get(name, "has changed") == "has changed":  # of a photo that is on both sides
            lines.append(f"the caption of {_shown(name)} {how}")
    for name, how in _differing(old.digests[_CLASS_IMAGES], new.digests[_CLASS_IMAGES]).items():
        lines.append(f"class image {name} {how}")
    base = _differing(old.digests[_BASE], new.digests[_BASE])
    lines += [f"the base model's {name} {how}" for name, how in base.items()]
    return lines


def is_place(key: str, old: Identity, new: Identity) -> bool:
    """Whether a recipe key only says where something is, and what is there is the same."""
    kinds = next((kinds for pattern, kinds in _PLACES.items() if pattern.fullmatch(key)), ())
    return bool(kinds) and all(old.digests[kind] == new.digests[kind] for kind in kinds)


def short(lines: Sequence[str], most: int = 12) -> list[str]:
    """The first lines, and how many more there are."""
    rest = len(lines) - most
    return [*lines[:most], f"and {rest} more"] if rest > 0 else list(lines)


def _differing(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """Name -> "has changed", "is new" or "is gone", for the names that differ."""
    told = {}
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            told[name] = "is new" if name not in old else "is gone" if name not in new else "has changed"
    return told


def _shown(name: str) -> str:
    number, _, file = name.partition("/")
    return file if number == "0" else f"{file} (of subjects[{number}])"


def _normal(name: str) -> str:
    """As macOS and Linux would agree on it; what is no Unicode is escaped."""
    return unicodedata.normalize("NFC", name.encode(errors="backslashreplace").decode())


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}", "Check it.") from error


def _config_digest(config: Mapping[str, Any]) -> str:
    """Of the settings; entries such as "_diffusers_version" are notes."""
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()
