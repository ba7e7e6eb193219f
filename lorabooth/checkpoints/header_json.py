"""JSON of a .safetensors header, read piece by piece and as strictly as the safetensors library reads it.

`json.loads` builds all that a text unfolds to before anything can be judged: 24 MB of `[],[],...` become
660 MB. Here whoever reads says which piece may come next, and each piece is bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_SPACES = (" ", "\t", "\n", "\r")
_SPACE = re.compile(r"[ \t\n\r]+")
_SHOWN_CHARS = 120


class HeaderJSONError(Exception):
    """Where and why a text is not what was expected."""


def quoted(value: object) -> str:
    """A value for a message: on one line, and shortened where it is long."""
    text = repr(value[: 2 * _SHOWN_CHARS] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


class Cursor:
    """A place in a JSON text. Each method reads one piece there and goes on behind it.

    Args:
        raw: the text in UTF-8.

    Raises:
        HeaderJSONError: here and in all methods: the text is not what was expected.
    """

    def __init__(self, raw: bytes) -> None:
        try:
            self._text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise HeaderJSONError(f"its header is not valid UTF-8 ({error.reason})") from error
        self._at = 0

    def at(self, mark: str) -> bool:
        """Whether this character comes next, after white space."""
        self._skip_space()
        return self._text[self._at : self._at + 1] == mark

    def members(self) -> Iterator[str]:
        """The keys of an object, each once; who takes a key reads its value before asking for the next."""
        self._take("{")
        seen: set[str] = set()
        while seen or not self.at("}"):
            key = self.string()
            if key in seen:
                raise HeaderJSONError(f"its header is not valid JSON (the key {quoted(key)} occurs twice)")
            seen.add(key)
            self._take(":")
            yield key
            if not self.at(","):
                break
            self._take(",")
        self._take("}")

    def string(self) -> str:
        """A string; lone surrogates are refused, as no UTF-8 text can hold them."""
        if not self.at('"'):
            raise self._unexpected('"')
        try:
            found, self._at = _STRING.raw_decode(self._text, self._at)
        except ValueError as error:
            raise HeaderJSONError(f"its header is not valid JSON ({error})") from error
        text: str = found
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise HeaderJSONError(
                    f"its header is not valid UTF-8 (a lone surrogate in {quoted(text)})"
                ) from error
        return text

    def small_object(self, max_chars: int) -> dict[str, Any] | None:
        """An object that holds no other; None when there is no such one here of at most `max_chars`.

        Integers that are negative or have more than 19 digits, and -0, are None in it.
        """
        end = self._text.find("}", self._at, self._at + max_chars) if self.at("{") else -1
        if end < 0 or "{" in self._text[self._at + 1 : end]:
            return None
        try:
            found, _ = _SMALL.raw_decode(self._text[self._at : end + 1])
        except (ValueError, RecursionError) as error:
            raise HeaderJSONError(f"its header is not valid JSON ({error})") from error
        self._at = end + 1
        value: dict[str, Any] = found
        return value

    def end(self) -> None:
        """Nothing but white space follows."""
        self._skip_space()
        if self._at != len(self._text):
            raise HeaderJSONError(f"its header is not valid JSON (more follows at character {self._at})")

    def _take(self, mark: str) -> None:
        if not self.at(mark):
            raise self._unexpected(mark)
        self._at += 1

    def _skip_space(self) -> None:
        if self._text[self._at : self._at + 1] in _SPACES and (found := _SPACE.match(self._text, self._at)):
            self._at = found.end()

    def _unexpected(self, mark: str) -> HeaderJSONError:
        return HeaderJSONError(f"its header is not valid JSON (no {mark} at character {self._at})")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError(f"a key of {quoted(list(table))} occurs twice")
    return table


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _natural(digits: str) -> int | None:
    return int(digits) if len(digits) < 20 and not digits.startswith("-") else None


_STRING = json.JSONDecoder()
_SMALL = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_natural)
