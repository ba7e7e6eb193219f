"""The corpus of .safetensors files, tiny: sound ones of every kind, and one for each way to be wrong.

`python -m tests.checkpoints.make_corpus` writes `tests/checkpoints/corpus/`. They are made byte by byte, not
by the library, so that a file can be what no library writes.
"""

from __future__ import annotations

import gzip
import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

CORPUS = Path(__file__).with_name("corpus")
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I8": 1, "BOOL": 1}
_Q = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
_TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
_KOHYA: Tensors = {
    f"lora_unet_{_Q}.lora_down.weight": ("F16", (2, 8)),
    f"lora_unet_{_Q}.lora_up.weight": ("F16", (8, 2)),
    f"lora_unet_{_Q}.alpha": ("F32", ()),
    "lora_unet_conv_in.lora_down.weight": ("F16", (2, 4, 3, 3)),
    "lora_unet_conv_in.lora_up.weight": ("F16", (8, 2, 1, 1)),
    "lora_unet_conv_in.alpha": ("F32", ()),
    f"{_TEXT}.lora_down.weight": ("F16", (2, 8)),
    f"{_TEXT}.lora_up.weight": ("F16", (8, 2)),
    f"{_TEXT}.alpha": ("F32", ()),
}
_DOTTED = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
_UNET = "model.diffusion_model"


def _pair(prefix: str, dtype: str = "F32", rank: int = 2) -> Tensors:
    return {f"{prefix}.lora_A.weight": (dtype, (rank, 8)), f"{prefix}.lora_B.weight": (dtype, (8, rank))}


_SOUND: Mapping[str, tuple[Tensors, Mapping[str, str] | None]] = {
    "kohya": (
        _KOHYA,
        {
            "ss_network_module": "networks.lora",
            "ss_tag_frequency": json.dumps({"5_sks [dog]": {'a "dog"': 5, "{curly}": 2, "[[x]]": 1}}),
            "lorabooth.family": "sd1",
            "lorabooth.trigger_words": '["sks dog"]',
        },
    ),
    "diffusers": (_pair(f"unet.{_DOTTED}") | _pair("unet.conv_in"), {"format": "pt"}),
    "peft": (_pair(f"base_model.model.{_DOTTED}", "BF16"), None),
    "flux": (_pair("transformer.transformer_blocks.0.attn.to_q", "BF16"), {"format": "pt"}),
    "fp8": (_pair(f"unet.{_DOTTED}", "F8_E4M3"), None),
    "fp64": (_pair(f"unet.{_DOTTED}", "F64", 1), None),
    "loha": (
        {
            f"lora_unet_{_Q}.{part}": ("F32", shape)
            for part, shape in {
                **{"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)},
                "alpha": (),
            }.items()
        },
        None,
    ),
    "lokr": (
        {
            f"lora_unet_{_Q}.lokr_w1": ("F32", (2, 2)),
            f"lora_unet_{_Q}.lokr_w2": ("F32", (4, 4)),
            f"lora_unet_{_Q}.alpha": ("F32", ()),
        },
        None,
    ),
    "dora": (_KOHYA | {f"lora_unet_{_Q}.dora_scale": ("F32", (8, 1))}, None),
    "checkpoint": (
        {
            f"{_UNET}.input_blocks.0.0.weight": ("F16", (8, 4, 3, 3)),
            f"{_UNET}.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": ("F16", (8, 16)),
            f"{_UNET}.time_embed.0.weight": ("F16", (8, 8)),
            "first_stage_model.decoder.conv_in.weight": ("F16", (4, 4, 3, 3)),
        },
        {"modelspec.title": "a checkpoint"},
    ),
    "odd_but_sound": (
        {
            "": ("F32", (1,)),
            "\U0001f436 \u00fc\n\\": ("F32", (2, 0, 3)),
            "ids": ("I64", (1, 3)),
            "flags": ("BOOL", (3,)),
            "steps": ("I8", (1, 1, 1, 1, 1, 1, 1, 2)),
        },
        {"\U0001f600": "\u00e9", "": ""},
    ),
    "no_tensors": ({}, {"format": "pt"}),
}


def table_of(
    tensors: Tensors, metadata: Mapping[str, str] | None
) -> tuple[list[tuple[str, Any]], list[bytes]]:
    """The header's pairs, and the tensors' bytes: small finite numbers, the same each time."""
    random = np.random.default_rng(len(tensors))
    pairs: list[tuple[str, Any]] = [] if metadata is None else [("__metadata__", dict(metadata))]
    parts, at = list[bytes](), 0
    for key, (dtype, shape) in tensors.items():
        numbers = random.standard_normal(shape)
        raw = {
            "F64": lambda n=numbers: n.astype("<f8").tobytes(),
            "F32": lambda n=numbers: n.astype("<f4").tobytes(),
            "F16": lambda n=numbers: n.astype("<f2").tobytes(),
            "BF16": lambda n=numbers: (n.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes(),
        }.get(
            dtype, lambda n=numbers, d=dtype: bytes(abs(np.resize(n, n.size * _BYTES[d]) * 9).astype("u1"))
        )()
        parts.append(raw)
        pairs.append((key, {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(raw)]}))
        at += len(raw)
    return pairs, parts


def json_object(pairs: list[tuple[str, Any]]) -> bytes:
    """JSON in which a key may occur twice; ASCII, so that a lone surrogate becomes an escape."""
    return ("{" + ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in pairs) + "}").encode()


def framed(head: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of a header and data."""
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def sound() -> dict[str, bytes]:
    """Name -> a file that is to be read."""
    out = {}
    for name, (tensors, metadata) in _SOUND.items():
        pairs, parts = table_of(tensors, metadata)
        out[name] = framed(json_object(pairs), b"".join(parts))
    pairs, parts = table_of(*_SOUND["kohya"])
    out["indented"] = framed(json.dumps(dict(pairs), indent=4, ensure_ascii=False).encode(), b"".join(parts))
    out["padded"] = framed(json_object(pairs) + b" " * 13 + b"\n\t\r", b"".join(parts))
    out["backwards"] = framed(json_object(pairs[::-1]), b"".join(parts))
    return out


def refused() -> dict[str, tuple[bytes, str]]:
    """Name -> a file that is to be refused, and a word of why."""
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}

    def one(key: str = "a", /, **changed: object) -> bytes:
        return framed(json_object([(key, {**entry, **changed})]), bytes(24))

    def two(begin: int, end: int, size: int) -> bytes:
        return framed(
            json_object([("a", entry), ("b", {**entry, "data_offsets": [begin, end]})]), bytes(size)
        )

    def text(value: str, data: int = 0) -> bytes:
        return framed(value.encode("utf-8", "surrogatepass"), bytes(data))

    archive = BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(zipfile.ZipInfo("data.pkl"), pickle.dumps({"a": [1, 2]}))
    empty = BytesIO()
    zipfile.ZipFile(empty, "w").close()
    simple = '"dtype":"F32","shape":[1],"data_offsets":[0,4]'
    return {
        **{f"pickle_{n}": (pickle.dumps({"a": (1, [2])}, n) + bytes(9), "pickled") for n in range(6)},
        "pickle_code": (b"cos\nsystem\n(S'true'\ntR.", "pickled"),
        "pickle_zip": (archive.getvalue(), "pickled"),
        "pickle_zip_empty": (empty.getvalue(), "pickled"),
        "pickle_gzip": (gzip.compress(pickle.dumps([1, 2]), mtime=0), "pickled"),
        "empty": (b"", "0 bytes"),
        "seven_bytes": (bytes(7), "7 bytes"),
        "no_header": (bytes(8), "JSON object"),
        "length_beyond_the_file": (framed(b"{}", length=3), "truncated"),
        "length_huge": (framed(b"{}", length=2**63), "truncated"),
        "not_an_object": (framed(b"[]"), "JSON object"),
        "space_first": (framed(b" {}"), "JSON object"),
        "bom_first": (framed(b"\xef\xbb\xbf{}"), "JSON object"),
        "two_objects": (framed(b"{}{}"), "more follows"),
        "zero_padded": (framed(b"{}\0\0"), "more follows"),
        "trailing_comma": (text('{"a":{' + simple + "},}", 4), "valid JSON"),
        "single_quotes": (text("{'a':{" + simple + "}}", 4), "valid JSON"),
        "unterminated_key": (text('{"a'), "valid JSON"),
        "unterminated_entry": (text('{"a":{' + simple, 4), "exactly"),
        "nested": (text('{"a":{"dtype":{"dtype":"F32"},"shape":[],"data_offsets":[0,4]}}', 4), "exactly"),
        "deep": (text('{"a":{"dtype":' + "[" * 1500 + "}}"), "valid JSON"),
        "deeper": (text('{"a":' + "[" * 9000), "exactly"),
        "nan": (text('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', 4), "valid JSON"),
        "infinity": (text('{"a":{"dtype":"F32","shape":[-Infinity],"data_offsets":[0,4]}}', 4), "valid JSON"),
        "huge_integer": (one(shape=[int("9" * 1500)]), "shape"),
        "huger_integer": (text('{"a":{"dtype":"F32","shape":[' + "9" * 9000 + "]}}"), "exactly"),
        "minus_zero": (text('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', 4), "data_offsets"),
        "leading_zero": (text('{"a":{"dtype":"F32","shape":[01],"data_offsets":[0,4]}}', 4), "valid JSON"),
        "fraction": (one(shape=[2.0, 3]), "shape"),
        "exponent": (text('{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}', 4), "shape"),
        "boolean": (one(shape=[True, 6]), "shape"),
        "negative": (one(shape=[-2, -3]), "shape"),
        "shape_null": (one(shape=None), "shape"),
        "shape_text": (one(shape="23"), "shape"),
        "nine_dims": (one(shape=[2, 3] + [1] * 7), "shape"),
        "overflow": (one(shape=[2**62, 4, 0], data_offsets=[0, 0]), "beyond any memory"),
        "wraps_around": (one(shape=[2**32, 2**32, 2**2]), "beyond any memory"),
        "four_tebibytes": (one(shape=[2**20, 2**20], data_offsets=[0, 2**42]), "span"),
        "wrong_dtype": (one(dtype="F16"), "does not fill"),
        "unknown_dtype": (one(dtype="F31"), "dtype"),
        "small_dtype": (one(dtype="f32"), "dtype"),
        "dtype_list": (one(dtype=["F32"]), "dtype"),
        "no_offsets": (text('{"a":{"dtype":"F32","shape":[1]}}', 4), "exactly"),
        "more_fields": (one(code="x"), "exactly"),
        "offsets_backwards": (one(data_offsets=[24, 0]), "does not fill"),
        "offsets_three": (one(data_offsets=[0, 24, 24]), "data_offsets"),
        "same_span": (two(0, 24, 24), "begins at"),
        "overlap": (two(12, 36, 36), "begins at"),
        "hole": (two(28, 52, 52), "begins at"),
        "begins_late": (
            framed(json_object([("a", {**entry, "data_offsets": [4, 28]})]), bytes(28)),
            "begins at",
        ),
        "data_missing": (framed(json_object([("a", entry)]), bytes(23)), "truncated"),
        "data_too_long": (framed(json_object([("a", entry)]), bytes(25)), "padded"),
        "twice": (framed(json_object([("a", entry), ("a", entry)]), bytes(24)), "twice"),
        "twice_escaped": (text('{"a":{' + simple + '},"\\u0061":{' + simple + "}}", 4), "twice"),
        "twice_in_entry": (text('{"a":{"dtype":"F16",' + simple + "}}", 4), "twice"),
        "twice_metadata": (framed(json_object([("__metadata__", {}), ("__metadata__", {})])), "twice"),
        "twice_in_metadata": (text('{"__metadata__":{"a":"1","a":"2"}}'), "twice"),
        "metadata_number": (framed(b'{"__metadata__":{"a":1}}'), "strings"),
        "metadata_nested": (framed(b'{"__metadata__":{"a":{"b":"c"}}}'), "strings"),
        "metadata_list": (framed(b'{"__metadata__":["a"]}'), "strings"),
        "value_list": (framed(json_object([("a", [1])])), "exactly"),
        "offsets_one": (one(data_offsets=[0]), "data_offsets"),
        "metadata_null": (framed(b'{"__metadata__":null}'), "strings"),
        "surrogate_metadata": (framed(b'{"__metadata__":{"a":"x\\ud800y"}}'), "UTF-8"),
        "surrogate_metadata_key": (framed(b'{"__metadata__":{"\\udfff":""}}'), "UTF-8"),
        "surrogate_key": (one("\udcff"), "UTF-8"),
        "surrogates_swapped": (one(b"\\ude00\\ud83d".decode("unicode_escape")), "UTF-8"),
        "surrogate_raw": (text('{"\ud800":{' + simple + "}}", 4), "UTF-8"),
        "latin_1": (framed(b'{"__metadata__":{"a":"\xe9"}}'), "UTF-8"),
        "overlong": (framed(b'{"__metadata__":{"a":"\xc0\xaf"}}'), "UTF-8"),
        "control_character": (framed(b'{"__metadata__":{"a":"\n"}}'), "valid JSON"),
        "bad_escape": (framed(b'{"__metadata__":{"a":"\\x41"}}'), "valid JSON"),
    }


def write(folder: Path = CORPUS) -> None:
    """All of them, as files."""
    for kind, files in (("sound", sound()), ("refused", {k: v for k, (v, _) in refused().items()})):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / kind / f"{name}.safetensors").write_bytes(content)


if __name__ == "__main__":
    write()
