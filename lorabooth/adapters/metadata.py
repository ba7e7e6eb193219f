"""What an adapter file says about itself, in the string metadata of its header: true and private."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from lorabooth.errors import AdapterError

FORMAT_VERSION = "1"

_PREFIX = "lorabooth."
# /home/x, ~/x, C:\x, \\server\x, file:///x: at the beginning of a value or of a word in it.
_LOOKS_LIKE_PATH = re.compile(r"""(?:^|[\s"'=(\[,;])(?:/[^\s/]|~[/\\]|[A-Za-z]:[\\/]|\\\\|file:)""")


@dataclass(frozen=True, slots=True)
class Metadata:
    """What an adapter file says about itself. Empty strings and zeros: not known (a foreign file).

    Attributes:
        family: of base models it fits, e.g. "sd1".
        base_id: the base it was trained on: a hub id or a name; never a path.
        base_sha256: digest of that base's denoiser weights.
        rank: of the denoiser's modules (the most frequent).
        alpha: of the denoiser's modules (the most frequent); the scale is alpha / rank.
        targets: preset that was trained, e.g. "attn".
        trigger_words: phrases that call the subject, e.g. ("sks dog",).
        steps: optimizer steps it was trained for.
        lorabooth_version: of the program that wrote it.
        format_version: of this table.
    """

    family: str = ""
    base_id: str = ""
    base_sha256: str = ""
    rank: int = 0
    alpha: float = 0.0
    targets: str = ""
    trigger_words: tuple[str, ...] = ()
    steps: int = 0
    lorabooth_version: str = ""
    format_version: str = FORMAT_VERSION

    def to_dict(self) -> dict[str, str]:
        """Header entries, strings only, keys `lorabooth.<field>`.

        Raises:
            AdapterError: a value looks like a file path; paths tell names and places.
        """
        out: dict[str, str] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            text = json.dumps(list(value), ensure_ascii=False) if isinstance(value, tuple) else str(value)
            if _LOOKS_LIKE_PATH.search(text):
                raise AdapterError(
                    f"The adapter's metadata {field.name!r} would hold a file path ({text}).",
                    "Adapter files are shared: give a name instead of a path.",
                )
            out[_PREFIX + field.name] = text
        return out

    @classmethod
    def from_dict(cls, entries: Mapping[str, str]) -> Metadata:
        """Read header entries; those that are absent (foreign files) keep their defaults.

        Raises:
            AdapterError: an entry is malformed, or the format is newer than this program knows.
        """
        known = {f.name: entries[_PREFIX + f.name] for f in fields(cls) if _PREFIX + f.name in entries}
        if known.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
            raise AdapterError(
                f"The adapter file is of format {known['format_version']}; this is {FORMAT_VERSION}.",
                "Update lorabooth.",
            )
        try:
            words = json.loads(known.get("trigger_words", "[]"))
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise ValueError("trigger_words is not a list of strings")
            return cls(
                rank=int(known.pop("rank", 0)),
                alpha=float(known.pop("alpha", 0.0)),
                steps=int(known.pop("steps", 0)),
                trigger_words=tuple(words),
                **{key: value for key, value in known.items() if key != "trigger_words"},
            )
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"The adapter file's metadata is malformed: {error}.") from error
