"""What of an adapter file another layout cannot express: kept in one header entry, restored on the way back.

Kohya's files say nothing of PEFT's configurations, diffusers' have no alpha tensors. A conversion writes what
is lost as a record into the new file's header, on top of those of earlier conversions; a conversion to a
layout that has a record takes it, and those above it, off. So a file that returns to its layout is as it was.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from lorabooth.adapters import fused, layouts, lora_config, names
from lorabooth.adapters.stored import StoredAdapter
from lorabooth.checkpoints.header import read_header
from lorabooth.errors import AdapterError

KEY = "lorabooth.converted_from"
"""Header entry that holds the records, as JSON, oldest first."""

OWNED = (
    *("format", "adapter_config", lora_config.HEADER_KEY),
    *(layouts.COMPONENT_KEY, fused.HEADER_KEY, KEY),
)
"""Header entries that belong to a layout: they are written anew, all others travel."""

_MOST_RECORDS = 8


@dataclass(frozen=True)
class Record:
    """What was special about a file.

    Attributes:
        layout: that it was in.
        entries: of its header, those that belong to the layout.
        configs: component -> PEFT's configuration, where each has a file of its own.
        alpha_dtype: of kohya's alpha tensors, by safetensors' name; "" when there were none, None when they
            differ or the layout has none.
        alpha_shape: of these, () or (1,).
        kohya_family: whose kohya names it had, where nothing else tells the family.
        text_model: PEFT's names of text encoders began with `text_model.`.
    """

    layout: str
    entries: dict[str, str] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    alpha_dtype: str | None = None
    alpha_shape: tuple[int, ...] = ()
    kohya_family: str = ""
    text_model: bool = False


def record_of(adapter: StoredAdapter) -> Record:
    """The record of a file or folder. Holds no absolute paths.

    Raises:
        AdapterError: it cannot be read any more.
    """
    entries = {
        key: adapter.entries[key] for key in ("format", lora_config.HEADER_KEY) if key in adapter.entries
    }
    if text := entries.get(lora_config.HEADER_KEY, ""):
        entries[lora_config.HEADER_KEY] = _private(text)
    if adapter.layout == "kohya":
        dtype, shape = _alphas(adapter)
        family = "" if adapter.family else _kohya_family(adapter)
        return Record("kohya", entries, alpha_dtype=dtype, alpha_shape=shape, kohya_family=family)
    if adapter.layout == "peft":
        configs = {name: dict(config) for name, config in adapter.configs.items()}
        nested = any(".model.text_model." in module.down.key for module in adapter.modules.values())
        return Record("peft", entries, json.loads(_private(json.dumps(configs))), text_model=nested)
    return Record(adapter.layout, entries)


def records_in(entries: Mapping[str, str]) -> tuple[Record, ...]:
    """The records in a file's header; none where they are malformed, since the file is whole without."""
    try:
        table = json.loads(entries.get(KEY, "[]"))
        return tuple(_checked(one) for one in table[:_MOST_RECORDS])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ()


def entry(records: Sequence[Record]) -> dict[str, str]:
    """The header entry that holds records."""
    if not records:
        return {}
    empty = asdict(Record(""))
    packed = [{key: value for key, value in asdict(one).items() if value != empty[key]} for one in records]
    return {KEY: json.dumps(packed, sort_keys=True, separators=(",", ":"), ensure_ascii=False)}


def turn(records: Sequence[Record], source: Record, to: str) -> tuple[Record | None, tuple[Record, ...]]:
    """What to restore in the new file, and the records to leave in its header.

    Args:
        records: of the source's header.
        source: the source's own.
        to: layout of the new file.
    """
    if source.layout == to:
        return source, tuple(records)
    for i, one in enumerate(records):
        if one.layout == to:
            return one, tuple(records[:i])
    return None, (*records, source)


def _checked(table: dict[str, Any]) -> Record:
    record = Record(**{**table, "alpha_shape": tuple(table.get("alpha_shape", ()))})
    strings = (record.layout, record.kohya_family, *record.entries, *record.entries.values())
    tables = all(isinstance(config, dict) for config in record.configs.values())
    if not tables or not all(isinstance(text, str) for text in strings):
        raise ValueError("a record of wrong types")
    if record.alpha_shape not in ((), (1,)) or not isinstance(record.alpha_dtype, str | None):
        raise ValueError("a record of wrong alphas")
    return record


def _alphas(adapter: StoredAdapter) -> tuple[str | None, tuple[int, ...]]:
    """The dtype and the shape of all alpha tensors, as far as they agree."""
    path = next(iter(adapter.modules.values())).down.path
    found = {
        key: (one.dtype, one.shape)
        for key, one in read_header(path).entries.items()
        if key.endswith(".alpha")
    }
    if not found:
        return "", ()
    stems = {module.down.key.rpartition(".lora_")[0] for module in adapter.modules.values()}
    (dtype, shape), count = Counter(found.values()).most_common(1)[0]
    return (dtype, shape) if count == len(found) == len(stems) else (None, ())


def _kohya_family(adapter: StoredAdapter) -> str:
    """A family whose kohya names are the file's."""
    for family in ("sd1", "sdxl"):
        try:
            if all(
                module.down.key.partition(".")[0] == names.kohya_name(name, family)
                for name, module in adapter.modules.items()
            ):
                return family
        except AdapterError:
            continue
    return ""


def _private(text: str) -> str:
    """JSON without absolute paths in its strings; the same text where there are none."""
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        return "{}"
    cleaned = _without_paths(table)
    return text if cleaned == table else json.dumps(cleaned, indent=2, sort_keys=True)


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return None if isinstance(value, str) and _is_path(value) else value


def _is_path(text: str) -> bool:
    absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return absolute or bool(re.match(r"~|\.{1,2}[/\\]|file:|\\", text))
