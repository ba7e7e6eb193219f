"""A base model by its configs alone: what a prediction needs, before any weight is on this machine."""

from __future__ import annotations

from pathlib import Path

from lorabooth.errors import BaseModelError
from lorabooth.families import registry, source
from lorabooth.families.base import Source
from lorabooth.families.sd import POCKET_ID
from lorabooth.progress import Reporter


def resolve_configs(
    base: str,
    *,
    revision: str = "",
    family: str = "auto",
    allow_download: bool = True,
    reporter: Reporter | None = None,
) -> Source:
    """As `source.resolve`, but only the configs need to be there: of a hub model nothing else is downloaded.

    A single-file checkpoint is there whole or not at all; it needs no vocabulary beside it.

    Raises:
        BaseModelError: absent, or of a kind that is not supported.
        RecipeError: the family is unknown, or a revision is given for a base that is not from the hub.
    """
    if family != "auto":
        registry.family(family)
    path, commit = source.locate(
        base, revision=revision, allow_download=allow_download, reporter=reporter, configs_only=True
    )
    detected = registry.inspect(path)
    if family not in ("auto", detected.family) and detected.certain:
        raise BaseModelError(
            f"{base}: this base is {detected.family}, but model.family says {family!r}.",
            "Leave model.family at 'auto', or choose another base.",
        )
    is_named = base == POCKET_ID or not Path(base).expanduser().exists()
    own_name = path.resolve().name if path.is_dir() else path.name
    found = detected.family if family == "auto" else family
    return Source(path, base if is_named else own_name, found, commit)
