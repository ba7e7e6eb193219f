"""From what a recipe calls its base to files on this machine: "pocket", a folder, a file, or a hub id."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from pathlib import Path

from lorabooth.errors import BaseModelError, RecipeError
from lorabooth.families import hub, registry, single_file
from lorabooth.families.base import Source
from lorabooth.families.folder import PICKLE_SUFFIXES, component_weights, pickle_error, similar_names
from lorabooth.families.sd import POCKET_ID
from lorabooth.progress import Reporter, Silent

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HASH_CHUNK_BYTES = 1 << 22


def resolve(
    base: str,
    *,
    revision: str = "",
    family: str = "auto",
    allow_download: bool = True,
    reporter: Reporter | None = None,
    configs_only: bool = False,
) -> Source:
    """Find a base model and tell what it is. Its weights are not read.

    Args:
        base: "pocket", a diffusers folder, a .safetensors checkpoint, or a hub id "owner/name".
        revision: hub branch, tag or commit; empty is the default branch. Only for hub ids.
        family: "auto", or a family's name to insist on.
        allow_download: False uses only what is on this machine (so does HF_HUB_OFFLINE=1).
        reporter: told of downloads.
        configs_only: for a prediction: weights and a single file's vocabulary need not be there, and of a hub
            model nothing but configs is downloaded.

    Returns:
        The source, without its digest (see `weights_digest`).

    Raises:
        BaseModelError: absent, incomplete, unsafe, or of a kind that is not supported.
        RecipeError: the family is unknown, or a revision is given for a base that is not from the hub.
    """
    if family != "auto":
        registry.family(family)
    path, commit = locate(
        base, revision=revision, allow_download=allow_download, reporter=reporter, configs_only=configs_only
    )
    is_named = base == POCKET_ID or not Path(base).expanduser().exists()
    own_name = path.resolve().name if path.is_dir() else path.name
    source = _source(path, base if is_named else own_name, family, commit, configs_only=configs_only)
    if path.is_file() and not configs_only:
        single_file.require_vocabulary(path, allow_download=allow_download and not hub.is_offline())
    return source


def locate(
    base: str,
    *,
    revision: str = "",
    allow_download: bool = True,
    reporter: Reporter | None = None,
    configs_only: bool = False,
) -> tuple[Path, str]:
    """Where a base model's files are, of whatever family, and the hub commit ("" for local ones).

    Args:
        base: "pocket", a folder, a file, or a hub id "owner/name".
        revision: hub branch, tag or commit; empty is the default branch.
        allow_download: False uses only what is on this machine.
        reporter: told of downloads.
        configs_only: weights need not be there; none are downloaded.

    Raises:
        BaseModelError: absent, unsafe, or not to be had.
        RecipeError: a revision is given for a base that is not from the hub.
    """
    if base == POCKET_ID:
        from lorabooth.pocket.base import pocket_dir  # here, because the other bases do not need it

        return Path(pocket_dir()), ""
    path = Path(base).expanduser()
    if path.exists():
        if revision:
            raise RecipeError(
                f"model.revision = {revision!r}: {base} is on this machine and has no revisions.",
                "Leave model.revision empty.",
            )
        return path, ""
    if path.suffix.casefold() in PICKLE_SUFFIXES:
        raise pickle_error(path)
    if not _HUB_ID.fullmatch(base):
        raise _not_there(path)
    online = allow_download and not hub.is_offline()
    return hub.get(base, revision, online, reporter or Silent(), configs_only=configs_only)


def weights_digest(source: Source, component: str = "unet") -> str:
    """SHA-256 of a component's weight files, streamed; hexadecimal.

    For one file it is that file's own SHA-256 (as model sites show it); for shards, the SHA-256 of their
    SHA-256s in name order. A single-file checkpoint has one digest for all components. Within a process a
    file is read again only if its size or modification time changed.

    Args:
        source: the base.
        component: "unet", "vae" or "text_encoder".
    """
    files = (source.path,) if source.path.is_file() else component_weights(source.path, component).files
    digests = [_file_sha256(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


@lru_cache(maxsize=64)
def _file_sha256(path: str, size: int, mtime_ns: int) -> str:  # noqa: ARG001 (parts of the cache key)
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _source(path: Path, base_id: str, family: str, revision: str, *, configs_only: bool) -> Source:
    detected = registry.inspect(path)
    if path.is_dir() and not configs_only:
        for part in ("unet", "vae", "text_encoder"):
            component_weights(path, part)
    if family not in ("auto", detected.family) and detected.certain:
        raise BaseModelError(
            f"{base_id}: this base is {detected.family}, but model.family says {family!r}.",
            "Leave model.family at 'auto', or choose another base.",
        )
    return Source(path, base_id, detected.family if family == "auto" else family, revision)


def _not_there(path: Path) -> BaseModelError:
    close = similar_names(path)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    if not path.parent.exists():
        hint = f"The folder {path.parent} does not exist either. "
    return BaseModelError(
        f"{path}: there is no such base model.",
        f"{hint}A base is a diffusers folder, a .safetensors checkpoint, a hub id (owner/name), or 'pocket'.",
    )
