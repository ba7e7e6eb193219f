"""10,000 files that are nearly sound: no crash, and nothing is accepted that is not whole."""

from __future__ import annotations

import json
import random
import re
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabooth.adapters.check import check_adapter
from lorabooth.adapters.inspect import inspect_path
from lorabooth.adapters.stored import StoredAdapter, open_adapter
from lorabooth.checkpoints.header import Header, read_header
from lorabooth.checkpoints.inventory import open_base
from lorabooth.errors import AdapterError, BaseModelError
from tests.checkpoints.make_corpus import framed, refused, sound
from tests.checkpoints.mutations import mutate

MUTATIONS = 10_000
COMMANDS = 500
_PEAK_BYTES = 1_000_000

# What the library takes and lorabooth does not, each on purpose.
_STRICTER = re.compile(r"unknown dtype|not a table of strings|no proper shape|not a JSON object|beyond any")


def _seeds() -> list[bytes]:
    wrong = [content for content, _ in refused().values() if content]
    # Sound files are changed more often: a change to what is wrong already says little.
    return [*sound().values()] * 20 + wrong


def _write(path: Path, content: bytes) -> None:
    # Emptying a file first, as "wb" does, makes ext4 write to the disk each time: minutes, for all of them.
    path.touch()
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def _read(path: Path) -> tuple[Header | None, str]:
    try:
        return read_header(path), ""
    except AdapterError as error:
        return None, str(error)


def _opened(path: Path) -> tuple[StoredAdapter | None, dict[str, torch.Tensor]]:
    try:
        adapter = open_adapter(path)
        return adapter, adapter.tensors()
    except AdapterError:
        return None, {}


def _lax(content: bytes) -> bool:
    """Whether the library forgets a part: of equal keys all but the last, and fields it does not know."""
    found = list[bool]()

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found.append(len(dict(pairs)) < len(pairs))
        return dict(pairs)

    table = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")], object_pairs_hook=look)
    entries = [value for key, value in table.items() if key != "__metadata__"]
    return any(found) or any(set(value) > {"dtype", "shape", "data_offsets"} for value in entries)


def _judge(path: Path, content: bytes, *, weighed: bool = False) -> Header | None:
    """The header as it was read; an assertion fails where the library sees something else."""
    _write(path, content)
    try:
        opened = dict(safetensors.deserialize(content))
    except safetensors.SafetensorError:
        opened = None
    if weighed:
        tracemalloc.start()
    try:
        header, refusal = _read(path)
        assert not weighed or tracemalloc.get_traced_memory()[1] < _PEAK_BYTES, content
    finally:
        tracemalloc.stop()
    if header is None:
        assert opened is None or _STRICTER.search(refusal) or _lax(content), (content, refusal)
        assert 0 < len(refusal) < 800
        return None
    assert opened is not None, content
    assert header.entries.keys() == opened.keys(), content
    at = header.data_start
    for key, entry in header.entries.items():
        theirs = opened[key]
        assert (entry.dtype, list(entry.shape)) == (theirs["dtype"], list(theirs["shape"])), content
        assert content[at + entry.begin : at + entry.end] == bytes(theirs["data"]), content
    with safetensors.safe_open(path, "np") as file:
        assert dict(header.metadata) == (file.metadata() or {}), content
    return header


def test_ten_thousand_mutations_are_read_as_the_library_reads_them_or_refused(tmp_path: Path) -> None:
    choose, seeds = random.Random(20), _seeds()
    path = tmp_path / "a.safetensors"
    counts: Counter[str] = Counter()
    for i in range(MUTATIONS):
        header = _judge(path, mutate(choose, choose.choice(seeds)), weighed=i % 20 == 0)
        counts["refused" if header is None else "read"] += 1
    # Neither of them by default: the mutations are near enough to what is sound.
    assert counts["read"] > MUTATIONS // 10
    assert counts["refused"] > MUTATIONS // 3


def _check_everywhere(path: Path) -> str:
    """What opens, inspects and checks a file, each with a sound result or a plain error."""
    try:
        inspected = inspect_path(path)
        assert inspected.tensors == len(read_header(path).entries)
    except AdapterError:
        inspected = None
    report = check_adapter(path)
    assert all(found.message for found in report.problems)
    try:
        base = open_base(path)
        assert base.slots
    except BaseModelError:
        pass
    adapter, tensors = _opened(path)
    if adapter is None:
        assert not (report.sound and report.kind == "LoRA"), path.read_bytes()
        return "refused"
    assert inspected is not None
    assert len(tensors) == 3 * len(adapter.modules) > 0
    for name, module in adapter.modules.items():
        down, up = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
        assert down.shape[0] == up.shape[1] == module.rank >= 1
        assert bool(down.double().isfinite().all())
        assert bool(up.double().isfinite().all())
    return "opened"


def test_the_commands_on_mutations_give_a_sound_result_or_a_plain_error(tmp_path: Path) -> None:
    choose, seeds = random.Random(21), _seeds()
    path = tmp_path / "a.safetensors"
    counts: Counter[str] = Counter()
    while sum(counts.values()) < COMMANDS:
        _write(path, mutate(choose, choose.choice(seeds)))
        if _read(path)[0] is None and choose.random() < 0.95:  # such files are all alike to a command
            continue
        counts[_check_everywhere(path)] += 1
    assert min(counts["opened"], counts["refused"]) > COMMANDS // 10


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=12,
)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I64", "U8"]) | _JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | _JSON,
        "data_offsets": st.tuples(st.integers(0, 16), st.integers(0, 64)) | _JSON,
    }
)


@settings(max_examples=150)
@given(
    table=st.dictionaries(st.text(max_size=6), _ENTRY | _JSON, max_size=3),
    metadata=_JSON | st.dictionaries(st.text(max_size=6), st.text(max_size=20)),
    data=st.binary(max_size=64),
    as_ascii=st.booleans(),
)
def test_any_json_is_read_as_the_library_reads_it_or_refused(
    tmp_path_factory, table, metadata, data, as_ascii
) -> None:
    text = json.dumps({"__metadata__": metadata, **table}, ensure_ascii=as_ascii)
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    _judge(path, framed(text.encode("utf-8", "surrogatepass"), data), weighed=True)
