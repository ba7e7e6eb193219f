"""DreamBench as it is published: `prompts_and_classes.txt`, read as text and never run.

The file has a table "subject_name,class", and two Python lists of prompts, one for objects and one for what
lives, with `'a {0} {1} in the snow'.format(unique_token, class_token),` in every line
(github.com/google/dreambooth, arXiv 2208.12242, section 4.1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lorabooth.errors import DataError
from lorabooth.recipe.rules import printable

FILE_NAME = "prompts_and_classes.txt"
MAX_BYTES = 1 << 20
"""Larger files are no such file, and are not read to their end."""
LIVE_CLASSES = frozenset({"cat", "dog"})
"""The nine subjects of these two classes are the live ones; the file itself does not say it."""

_TABLE_HEAD = "subject_name,class"
_LIST_HEADS = {"object prompts": False, "live subject prompts": True}
_LIST_BEGIN = re.compile(r"prompt_list\s*=\s*\[")
_ROW = re.compile(r"([A-Za-z0-9][\w.-]*)\s*,\s*([^,]*[^\s,])")
_PROMPT = re.compile(
    r"""(?P<quote>['"])(?P<text>(?:\\.|(?!(?P=quote))[^\\])*)(?P=quote)"""
    r"""\s*\.format\(\s*unique_token\s*,\s*class_token\s*\)\s*,?"""
)
_ESCAPE = re.compile(r"\\(.)")


@dataclass(frozen=True, slots=True)
class Published:
    """What the file says.

    Attributes:
        classes: subject's folder -> class noun, in the file's order.
        object_prompts: templates with "{token}" and "{noun}" for objects.
        live_prompts: likewise for what lives.
    """

    classes: Mapping[str, str]
    object_prompts: tuple[str, ...]
    live_prompts: tuple[str, ...]

    def prompts(self, *, live: bool) -> tuple[str, ...]:
        """The list for one kind of subject."""
        return self.live_prompts if live else self.object_prompts


def read(path: Path) -> Published:
    """Read the published file.

    Raises:
        DataError: it cannot be read, or is not of this form; the line is named.
    """
    name = printable(str(path))
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}", "Check the path.") from error
    if len(content) > MAX_BYTES:
        raise DataError(f"{name}: larger than {MAX_BYTES >> 10} KiB, so not DreamBench's file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: byte {error.start} is not UTF-8 text", "Save it as UTF-8.") from None
    return parse(text, name)


def parse(text: str, where: str) -> Published:
    """The file's text as values.

    Args:
        text: all of it.
        where: names the file in errors.

    Raises:
        DataError: a line is in no place where it is understood, or a part is missing.
    """
    classes: dict[str, str] = {}
    lists: dict[bool, list[str]] = {}
    reading: list[str] | dict[str, str] | None = None
    live: bool | None = None
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line in ("Classes", "Prompts"):
            # An empty line ends the table; the lists end with their bracket.
            reading = reading if isinstance(reading, list) and not line else None
        elif line.replace(" ", "") == _TABLE_HEAD:
            reading = classes
        elif line.lower() in _LIST_HEADS:
            live, reading = _LIST_HEADS[line.lower()], None
        elif _LIST_BEGIN.fullmatch(line) and live is not None:
            reading = lists.setdefault(live, [])
        elif line == "]" and isinstance(reading, list):
            reading, live = None, None
        elif isinstance(reading, dict):
            _add_class(reading, line, f"{where}, line {number}")
        elif isinstance(reading, list):
            _add_prompt(reading, line, f"{where}, line {number}")
        else:
            raise _not_understood(line, f"{where}, line {number}", "it belongs to no part of the file")
    missing = [name for name, kind in _LIST_HEADS.items() if not lists.get(kind)]
    if missing or not classes:
        absent = [*([] if classes else [f'the table "{_TABLE_HEAD}"']), *(f'"{name}"' for name in missing)]
        raise DataError(f"{where}: {' and '.join(absent)} not found", "Take the published file.")
    return Published(MappingProxyType(classes), tuple(lists[False]), tuple(lists[True]))


def _add_class(classes: dict[str, str], line: str, where: str) -> None:
    match = _ROW.fullmatch(line)
    if match is None:
        raise _not_understood(line, where, "a row is a subject's folder, a comma and its class noun")
    if match[1] in classes:
        raise _not_understood(line, where, "the subject is in the table twice")
    classes[match[1]] = " ".join(match[2].split())


def _add_prompt(prompts: list[str], line: str, where: str) -> None:
    match = _PROMPT.fullmatch(line)
    if match is None:
        raise _not_understood(line, where, "a prompt is '...{0} {1}...'.format(unique_token, class_token),")
    text = _ESCAPE.sub(r"\1", match["text"])
    template = " ".join(text.replace("{0}", "{token}").replace("{1}", "{noun}").split())
    if absent := [was for was, now in (("{0}", "{token}"), ("{1}", "{noun}")) if now not in template]:
        raise _not_understood(line, where, f"the prompt has no {' and no '.join(absent)}")
    if template in prompts:
        raise _not_understood(line, where, "the prompt is in the list twice")
    prompts.append(template)


def _not_understood(line: str, where: str, why: str) -> DataError:
    return DataError(f"{where}: {why}: {printable(line, 80)}", "Take the published file.")
