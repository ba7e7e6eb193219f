"""Files that are nearly sound: the same ones for the same seed."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any, TypeAlias

from tests.checkpoints.make_corpus import framed, json_object

Pairs: TypeAlias = list[tuple[str, Any]]

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
_INTEGERS = (0, 1, 2, 3, 7, 8, 255, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -1, -8)
_VALUES = (
    None,
    True,
    False,
    1.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "F32",
    [],
    [[]],
    {},
    {"a": []},
    [0, 0],
)
_KEYS = (
    *(
        "",
        "__metadata__",
        "a",
        "\ud800",
        "\udc00x",
        "\U0001f600",
        "\x00",
        "lora_unet_conv_in.alpha",
        "unet.alpha",
    ),
    *(
        "lora_unet_conv_in.lora_down.weight",
        "lora_unet_conv_in.dora_scale",
        "../../x.lora_A.weight",
        "x" * 300,
    ),
)
_TOKENS = (
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"\\",
        b"\\u",
        b"\\ud800",
        b"\\ud83d\\ude00",
        b"\x00",
        b"\xff",
    ),
    *(
        b"NaN",
        b"-Infinity",
        b"null",
        b"true",
        b"-0",
        b"1e3",
        b"01",
        b"9" * 40,
        b"[" * 50,
        b'{"a":' * 20,
        b" " * 9,
    ),
    *(b"\xef\xbb\xbf", b"\xc3", b"\xed\xa0\x80", b"/**/", b'"__metadata__":{},', b'"shape":[1],', b"\n"),
)


def mutate(choose: random.Random, content: bytes) -> bytes:
    """A file that differs from a sound one in one to three ways."""
    for _ in range(choose.choice((1, 1, 1, 2, 3))):
        kind = choose.random()
        if kind < 0.5:
            content = _in_header(choose, content)
        elif kind < 0.8:
            content = _in_text(choose, content)
        else:
            content = _in_bytes(choose, content)
    return content


def _place(choose: random.Random, content: bytes) -> int:
    return choose.randrange(len(content) + 1)


def _in_bytes(choose: random.Random, content: bytes) -> bytes:
    """Anywhere: flipped, inserted, deleted, cut off, repeated; or another length of the header."""
    at, other = _place(choose, content), _place(choose, content)
    begin, end = min(at, other), min(max(at, other), min(at, other) + 40)
    noise = choose.randbytes(choose.randrange(1, 9))
    return choose.choice(
        (
            content[:at] + bytes([choose.randrange(256)]) + content[at + 1 :],
            content[:at]
            + bytes(b ^ 1 << choose.randrange(8) for b in content[at : at + 1])
            + content[at + 1 :],
            content[:begin] + noise + content[begin:],
            content[:begin] + content[end:],
            content[:begin] + content[begin:end] * 2 + content[end:],
            content[:at],
            content + noise,
            content + bytes(choose.randrange(1, 9)),
            _length_changed(choose, content),
        )
    )


def _length_changed(choose: random.Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    changed = choose.choice(
        (
            *(25_000_001, 2**32, 2**63, 2**64 - 1, choose.getrandbits(64)),
            0,
            1,
            2,
            length - 1,
            length + 1,
            length + choose.randrange(-50, 50),
            len(content),
            len(content) - 8,
        )
    )
    return struct.pack("<Q", changed % 2**64) + content[8:]


def _parts(content: bytes) -> tuple[bytes, bytes]:
    length = min(int.from_bytes(content[:8], "little"), len(content))
    return content[8 : 8 + length], content[8 + length :]


def _in_text(choose: random.Random, content: bytes) -> bytes:
    """In the header's text, its length being right."""
    head, data = _parts(content)
    at = choose.randrange(len(head) + 1)
    begin, end = at, min(len(head), at + choose.randrange(1, 30))
    token = choose.choice(_TOKENS)
    marks = [i for i, byte in enumerate(head) if byte in b'{}[]:,"']
    mark = choose.choice(marks) if marks else at
    head = choose.choice(
        (
            head[:at] + token + head[at:],
            head[:mark] + token + head[mark:],
            head[:mark] + token + head[mark + 1 :],
            head[:mark] + head[mark + 1 :],
            head[:begin] + head[end:],
            head[:begin] + head[begin:end] * 2 + head[end:],
            head[:at] + bytes([choose.randrange(256)]) + head[at + 1 :],
            head + b" " * choose.randrange(9),
        )
    )
    return framed(head, data)


def _in_header(choose: random.Random, content: bytes) -> bytes:
    """In what the header says, its JSON being JSON."""
    head, data = _parts(content)
    try:
        pairs: Pairs = json.loads(head, object_pairs_hook=lambda found: found)
        pairs = [(key, dict(value)) for key, value in pairs]
        entries = [i for i, (key, value) in enumerate(pairs) if key != "__metadata__" and _whole(value)]
    except (ValueError, TypeError, RecursionError):
        return _in_bytes(choose, content)
    if not entries:
        return framed(json_object(_table_changed(choose, pairs)), data)
    i = choose.choice(entries)
    change = choose.choice((_entry_changed, _entry_changed, _moved, _table_of_entry, _rebuilt, _rebuilt))
    pairs, data = change(choose, pairs, i, data)
    return framed(json_object(pairs), data)


def _whole(value: Any) -> bool:
    return (
        {"dtype", "shape", "data_offsets"} <= set(value)
        and isinstance(value["dtype"], str)
        and isinstance(value["shape"], list)
        and isinstance(value["data_offsets"], list)
        and len(value["data_offsets"]) == 2
        and all(type(n) is int for n in (*value["shape"], *value["data_offsets"]))
    )


def _entry_changed(choose: random.Random, pairs: Pairs, i: int, data: bytes) -> tuple[Pairs, bytes]:
    key, value = pairs[i]
    value = dict(value)
    field = choose.choice(("dtype", "shape", "data_offsets"))
    kind = choose.randrange(5)
    if kind == 0:
        value[field] = choose.choice(_VALUES)
    elif kind == 1:
        del value[field]
    elif kind == 2:
        value[choose.choice(("strides", "code", "Shape", ""))] = choose.choice(_VALUES)
    elif field == "dtype":
        value[field] = choose.choice((*_SIZES, "f32", "F4", "C64", "", "F31"))
    else:
        numbers = list(value[field]) or [1]
        at = choose.randrange(len(numbers))
        numbers[at] = choose.choice((*_INTEGERS, numbers[at] + 1, numbers[at] - 1, numbers[at] * 2, *_VALUES))
        value[field] = choose.choice((numbers, numbers[::-1], [*numbers, 1], numbers[1:]))
    return [*pairs[:i], (key, value), *pairs[i + 1 :]], data


def _moved(choose: random.Random, pairs: Pairs, i: int, data: bytes) -> tuple[Pairs, bytes]:
    """A span: shifted, taken from another tensor, or swapped."""
    key, value = pairs[i]
    begin, end = value["data_offsets"]
    by = choose.choice((-8, -1, 1, 4, 8, len(data), 2**32, 2**63))
    others = [v["data_offsets"] for k, v in pairs if k != "__metadata__" and "data_offsets" in v]
    span = choose.choice(
        ([begin + by, end + by], [begin, end + by], [begin + by, end], choose.choice(others))
    )
    return [*pairs[:i], (key, {**value, "data_offsets": span}), *pairs[i + 1 :]], data


def _table_of_entry(choose: random.Random, pairs: Pairs, i: int, data: bytes) -> tuple[Pairs, bytes]:
    return _table_changed(choose, pairs, i), data


def _table_changed(choose: random.Random, pairs: Pairs, i: int = 0) -> Pairs:
    """Keys: renamed, twice, absent, in another order; metadata of any kind."""
    if not pairs:
        return [(choose.choice(_KEYS), choose.choice(_VALUES))]
    key, value = pairs[i % len(pairs)]
    text = {choose.choice(_KEYS): choose.choice((*_KEYS, *_VALUES))}
    shuffled = choose.sample(pairs, len(pairs))
    without = [*pairs[:i], *pairs[i + 1 :]]
    return choose.choice(
        (
            [*pairs, (key, value)],
            [*pairs, (choose.choice(_KEYS), value)],
            [*without, (choose.choice(_KEYS), value)],
            [*without, (key[: choose.randrange(len(key) + 1)], value)],
            without,
            shuffled,
            [*pairs, ("__metadata__", text)],
            [("__metadata__", {**text, "lorabooth.rank": choose.choice(("x", "9" * 5000, "-1"))}), *without],
            [("__metadata__", choose.choice(_VALUES)), *without],
        )
    )


def _rebuilt(choose: random.Random, pairs: Pairs, i: int, data: bytes) -> tuple[Pairs, bytes]:
    """Another shape, dtype or name, with spans and data that fit it: sound, but for another program."""
    changed, parts, at = Pairs(), list[bytes](), 0
    for n, (key, value) in enumerate(pairs):
        if key == "__metadata__" or not _whole(value) or value["dtype"] not in _SIZES:
            changed.append((key, value))
            continue
        begin, end = value["data_offsets"]
        raw, shape, dtype = data[max(0, begin) : max(0, end)], list(value["shape"]), value["dtype"]
        if n == i:
            key, dtype, shape = _other(choose, key, dtype, shape)
            size = _SIZES[dtype]
            for dim in shape:
                size *= dim
            raw = (raw or b"\x01\x02").ljust(1) * (size // max(1, len(raw)) + 1) if size < 9000 else b""
            raw = choose.choice((raw, choose.randbytes(len(raw)), bytes(len(raw))))[:size]
        parts.append(raw)
        changed.append((key, {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(raw)]}))
        at += len(raw)
    return changed, b"".join(parts)


def _other(choose: random.Random, key: str, dtype: str, shape: list[int]) -> tuple[str, str, list[int]]:
    kind = choose.randrange(5)
    if kind == 0:
        return key, choose.choice(list(_SIZES)), shape
    if kind == 1:
        return choose.choice(_KEYS), dtype, shape
    if kind == 2:
        return (
            key.replace(*choose.choice((("lora_up", "lora_down"), ("_A", "_B"), ("alpha", "lora_mid")))),
            dtype,
            shape,
        )
    numbers = shape or [1]
    at = choose.randrange(len(numbers))
    numbers[at] = choose.choice((0, 1, 2, 3, 5, 16))
    return key, dtype, choose.choice((numbers, numbers[::-1], [*numbers, 1], numbers[1:], [1] * 9))


Mutator: TypeAlias = Callable[[random.Random, bytes], bytes]
