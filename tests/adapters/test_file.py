"""The file: what is written, and everything that is refused on reading."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lorabooth.adapters import file
from lorabooth.adapters.metadata import Metadata
from lorabooth.checkpoints.header import read_header
from lorabooth.errors import AdapterError, LoraboothError, RecipeError, TrainingError

META = Metadata(
    family="sd1",
    base_id="someone/some-model",
    base_sha256="ab" * 32,
    rank=2,
    alpha=3.0,
    targets="attn",
    trigger_words=("sks dog", "zwx and/or cat"),
    steps=400,
    lorabooth_version="0.1.0",
)


def adapter() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    out = {}
    for module, kernel in (("denoiser.mid_block.attentions.0.proj_in", (1, 1)), ("denoiser.conv_in", (3, 3))):
        out[f"{module}.lora_A"] = torch.randn(2, 4, *kernel, generator=generator)
        out[f"{module}.lora_B"] = torch.randn(6, 2, 1, 1, generator=generator)
        out[f"{module}.alpha"] = torch.tensor(3.0)
    return out


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    file.write(tmp_path / "a.safetensors", adapter(), META)
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_round_trip(tmp_path, layout):
    path = tmp_path / "a.safetensors"
    file.write(path, adapter(), META, layout)
    got = file.read(path)
    assert got.layout == layout
    assert got.metadata == META
    assert got.notes == ()
    assert got.tensors.keys() == adapter().keys()
    assert all(torch.equal(got.tensors[k], v) for k, v in adapter().items())
    assert list(tmp_path.iterdir()) == [path]


def test_same_input_same_bytes(tmp_path, saved):
    other = tmp_path / "b.safetensors"
    shuffled = dict(reversed(adapter().items()))
    file.write(other, shuffled, META)
    assert other.read_bytes() == saved.read_bytes()


def test_written_entries_are_true_strings(saved):
    with safe_open(saved, "pt") as opened:
        entries = opened.metadata()
        keys = set(opened.keys())
    assert {k.partition(".")[2] for k in keys} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert entries["ss_network_module"] == "networks.lora"
    assert entries["ss_network_dim"] == "2"
    assert float(entries["ss_network_alpha"]) == 3
    assert entries["ss_base_model_version"] == "sd_v1"
    assert entries["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert entries["lorabooth.family"] == "sd1"
    text = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    mixed = adapter() | {
        f"{text}.lora_A": torch.ones(1, 3),
        f"{text}.lora_B": torch.ones(3, 1),
        f"{text}.alpha": torch.tensor(1.0),
    }
    file.write(saved, mixed, Metadata(family="sd2"))
    header = read_header(saved).metadata
    assert not {"ss_network_alpha", "ss_network_dim"} & set(header)
    assert header["ss_v2"] == "True"
    assert "ss_base_model_version" not in header
    file.write(saved, adapter(), Metadata(family="sd1", base_id="pocket"))
    assert "modelspec.architecture" not in read_header(saved).metadata


def test_dtype_is_chosen_and_alpha_stays_float32(saved):
    file.write(saved, adapter(), META, dtype=torch.float16)
    entries = read_header(saved).entries
    assert {e.dtype for k, e in entries.items() if not k.endswith("alpha")} == {"F16"}
    assert {e.dtype for k, e in entries.items() if k.endswith("alpha")} == {"F32"}
    got = file.read(saved).tensors
    assert got["denoiser.conv_in.lora_A"].dtype == torch.float16


@pytest.mark.parametrize(
    "value",
    [
        "/home/someone/models/x",
        "C:\\Users\\someone",
        "~/models",
        "file:///x",
        "\\\\server\\x",
        "D:/x",
        "see /root/x",
    ],
)
@pytest.mark.parametrize("field", ["base_id", "trigger_words", "targets"])
def test_paths_stay_out(tmp_path, field, value):
    metadata = Metadata(family="sd1", **{field: (value,) if field == "trigger_words" else value})
    with pytest.raises(AdapterError, match=field):
        file.write(tmp_path / "a.safetensors", adapter(), metadata)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_is_neither_written_nor_read(saved, value):
    before = saved.read_bytes()
    bad = adapter()
    bad["denoiser.conv_in.lora_B"][1, 0] = value
    with pytest.raises(AdapterError, match=r"denoiser\.conv_in\.lora_B"):
        file.write(saved, bad, META)
    assert saved.read_bytes() == before
    name = "lora_unet_conv_in"
    save_file(
        {
            f"{name}.lora_down.weight": bad["denoiser.conv_in.lora_A"],
            f"{name}.lora_up.weight": bad["denoiser.conv_in.lora_B"],
        },
        saved,
    )
    with pytest.raises(AdapterError, match="lora_B"):
        file.read(saved)


def test_a_value_beyond_half_precision_is_refused_when_written_as_such(saved):
    big = adapter() | {"denoiser.conv_in.lora_A": torch.full((2, 4, 3, 3), 1e6)}
    with pytest.raises(AdapterError, match="infinity"):
        file.write(saved, big, META, dtype=torch.float16)


def test_a_failing_disk_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def full(_fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match="space"):
        file.write(saved, adapter() | {"denoiser.conv_in.alpha": torch.tensor(9.0)}, META)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_unwritable_place_and_nothing_to_save(tmp_path):
    with pytest.raises(RecipeError, match="cannot be written"):
        file.write(tmp_path / "absent" / "a.safetensors", adapter(), META)
    with pytest.raises(AdapterError, match="no tensors"):
        file.write(tmp_path / "a.safetensors", {}, META)
    for name, layout in (("a.ckpt", "kohya"), ("a.safetensors", "peft")):
        with pytest.raises(AdapterError):
            file.write(tmp_path / name, adapter(), META, layout)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("kind", ["zip", "pickle", "torch", "legacy"])
def test_pickles_are_refused_and_never_opened(tmp_path, suffix, kind):
    path = tmp_path / f"a{suffix}"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data.pkl", pickle.dumps(Bomb()) * 20)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps([Bomb()] * 9))
    else:
        torch.save({"x": torch.ones(100)}, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(AdapterError, match=r"(?s)pickled.*safetensors"):
        file.read(path)
    assert not (tmp_path / "ran").exists()


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(
    begin: int = 0, end: int = 24, dtype: object = "F32", shape: object = (2, 3), **more: object
) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


A, B = "lora_unet_conv_in.lora_down.weight", "lora_unet_conv_in.lora_up.weight"


@pytest.mark.parametrize(
    ("header", "data", "word"),
    [
        (b'{"a":', b"", "exactly"),
        (b"{\xff}", b"", "valid UTF-8"),
        (b'{"x":' + b"[" * 100_000, b"", "exactly"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":1}', bytes(4), "twice"),
        ({"__metadata__": {"a": 1}}, b"", "strings"),
        ({A: entry(dtype="F31")}, bytes(24), "dtype"),
        ({A: entry(shape=[1] * 99 + [6])}, bytes(24), "shape"),
        ({A: entry(0, -24)}, bytes(24), "data_offsets"),
        ({A: entry(shape=[2, 4])}, bytes(24), "does not fill"),
        ({A: entry(shape=[2**40, 2**40], end=2**62)}, bytes(24), "does not fill"),
        ({A: entry(shape=[2**20, 2**20], end=2**42)}, bytes(24), "span"),  # a 4 TiB tensor
        ({A: entry(), B: entry()}, bytes(24), "begins at"),
        ({A: entry(), B: entry(12, 36)}, bytes(36), "begins at"),
        ({A: entry()}, bytes(23), "span"),
        ({A: entry()}, bytes(25), "span"),
        ({f"x{i}": entry(0, 0, shape=[0]) for i in range(20_001)}, b"", "more than"),
    ],
)
def test_headers_that_lie(tmp_path, header, data, word):
    path = raw(tmp_path / "a.safetensors", header, data)
    with pytest.raises(AdapterError, match=word):
        read_header(path)


def test_header_length_is_bounded_before_it_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    for content in (b"", b"\x01\x00", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 3) + b"{}"):
        path.write_bytes(content)
        with pytest.raises(AdapterError):
            read_header(path)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", 26_000_000) + b"{")
        out.truncate(30_000_000)
    with pytest.raises(AdapterError, match="more than"):
        read_header(path)
    with pytest.raises(AdapterError, match="cannot be read"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(AdapterError, match="cannot be read"):
        read_header(tmp_path)


def test_text_that_no_file_can_hold_is_neither_written_nor_read(tmp_path, saved):
    before = saved.read_bytes()
    for words in (("caf\udce9",), ("\ud83d",)):  # as file names in another encoding give it
        with pytest.raises(AdapterError, match="valid UTF-8"):
            file.write(saved, adapter(), replace(META, trigger_words=words))
    with pytest.raises(AdapterError, match="valid UTF-8"):
        file.save_safetensors(saved, {"caf\udce9": torch.ones(1)}, {})
    assert saved.read_bytes() == before
    assert list(tmp_path.iterdir()) == [saved]
    # As found in the world: the text is well-formed JSON, what it says is not text.
    head = json.loads(before[8 : 8 + struct.unpack("<Q", before[:8])[0]])
    head["__metadata__"]["ss_output_name"] = "caf\udce9"
    data = before[8 + struct.unpack("<Q", before[:8])[0] :]
    with pytest.raises(AdapterError, match=r"valid UTF-8.*surrogate"):
        file.read(raw(tmp_path / "b.safetensors", head, data))
    head["__metadata__"]["ss_output_name"] = "caf\u00e9 \U0001f436"  # escapes of a pair are a character
    assert file.read(raw(tmp_path / "b.safetensors", head, data)).metadata == META


def test_every_truncation_is_refused(saved):
    whole = saved.read_bytes()
    for size in [*range(0, 40), *range(40, len(whole), 37), len(whole) - 1]:
        saved.write_bytes(whole[:size])
        with pytest.raises(AdapterError):
            file.read(saved)


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 4000), value=st.integers(0, 255))
def test_a_flipped_byte_never_gives_another_error(tmp_path_factory, at, value):
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    file.write(path, adapter(), META)
    content = bytearray(path.read_bytes())
    content[at % len(content)] = value
    path.write_bytes(content)
    try:
        found = file.read(path)
    except LoraboothError:
        return
    # What is accepted is a whole, finite adapter of the same modules and shapes.
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {
        name: tensor.shape for name, tensor in adapter().items()
    }
    assert all(bool(tensor.isfinite().all()) for tensor in found.tensors.values())


@settings(max_examples=150, deadline=None)
@given(noise=st.binary(max_size=200))
def test_noise_never_gives_another_error(tmp_path_factory, noise):
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    for content in (noise, struct.pack("<Q", len(noise)) + noise):
        path.write_bytes(content)
        with pytest.raises(AdapterError):
            file.read(path)


def test_ranks_dtypes_and_foreign_metadata(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({A: torch.ones(5000, 5000, dtype=torch.float16), B: torch.ones(2, 5000)}, path)
    with pytest.raises(AdapterError, match="rank"):
        file.read(path)
    save_file({A: torch.ones(2, 3, dtype=torch.int32), B: torch.ones(2, 2)}, path)
    with pytest.raises(AdapterError, match="I32"):
        file.read(path)
    save_file({A: torch.ones(2, 3), B: torch.ones(4, 2)}, path, {"ss_output_name": "x"})
    got = file.read(path)
    assert (got.metadata.rank, got.metadata.alpha, got.metadata.family) == (2, 2.0, "")
    assert got.notes
    for wrong in (
        {"format_version": "99"},
        {"rank": "many"},
        {"trigger_words": "sks"},
        {"trigger_words": "[1]"},
    ):
        save_file(
            {A: torch.ones(2, 3), B: torch.ones(4, 2)}, path, {f"lorabooth.{k}": v for k, v in wrong.items()}
        )
        with pytest.raises(AdapterError):
            file.read(path)


def test_header_is_read_without_torch(saved):
    code = (
        "import sys; from lorabooth.adapters import stored; from pathlib import Path; "
        f"a = stored.open_adapter(Path({str(saved)!r})); "
        "print(a.layout, a.metadata.steps); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'transformers', 'peft')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "kohya 400\n"), done.stderr
