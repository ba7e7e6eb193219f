"""Headers: what is read, what is refused, and that refusing costs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import safetensors

from lorabooth.checkpoints.header import (
    MAX_ENTRY_CHARS,
    MAX_HEADER_BYTES,
    MAX_METADATA,
    MAX_TENSORS,
    read_header,
)
from lorabooth.errors import AdapterError, BaseModelError
from tests.checkpoints.make_corpus import CORPUS, framed, json_object, refused, sound

SOUND, REFUSED = sound(), refused()
MIB = 2**20


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_are_read_as_the_library_reads_them(name: str) -> None:
    path = CORPUS / "sound" / f"{name}.safetensors"
    content = path.read_bytes()
    header = read_header(path)
    opened = dict(safetensors.deserialize(content))
    assert header.entries.keys() == opened.keys()
    for key, entry in header.entries.items():
        theirs = opened[key]
        assert (entry.dtype, list(entry.shape)) == (theirs["dtype"], list(theirs["shape"]))
        begin = header.data_start
        assert content[begin + entry.begin : begin + entry.end] == bytes(theirs["data"])
    with safetensors.safe_open(path, "np") as file:
        assert dict(header.metadata) == (file.metadata() or {})


@pytest.mark.parametrize("name", REFUSED)
def test_each_way_to_be_wrong_is_refused_and_named(name: str) -> None:
    with pytest.raises(AdapterError, match=REFUSED[name][1]) as found:
        read_header(CORPUS / "refused" / f"{name}.safetensors")
    assert len(str(found.value)) < 800
    with pytest.raises(BaseModelError):
        read_header(CORPUS / "refused" / f"{name}.safetensors", BaseModelError)


def test_the_corpus_on_the_disk_is_the_one_that_is_made() -> None:
    made = {f"sound/{name}": content for name, content in SOUND.items()}
    made |= {f"refused/{name}": content for name, (content, _) in REFUSED.items()}
    kept = {str(path.relative_to(CORPUS).with_suffix("")): path for path in CORPUS.rglob("*.safetensors")}
    assert kept.keys() == made.keys()
    for name, content in made.items():
        if "/pickle_" not in name:  # those depend on the versions of pickle, zip and gzip
            assert kept[name].read_bytes() == content, name


def _entry(name: str) -> str:
    return f'"{name}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'


N = 24_000_000
BOMBS = {
    "lists": lambda: b'{"a":[' + b"[]," * (N // 3) + b"[]]}",
    "lists_without_key": lambda: b"{" + b"[]," * (N // 3) + b"}",
    "objects": lambda: b'{"a":{' + b'"b":{},' * (N // 7) + b'"c":{}}}',
    "empty_strings": lambda: b"{" + b'"",' * (N // 3) + b"}",
    "lists_in_an_entry": lambda: b'{"a":{"dtype":"F32","shape":[' + b"[]," * (N // 3) + b"[]]}}",
    "dims": lambda: b'{"a":{"dtype":"F32","shape":[' + b"1," * (N // 2) + b'1],"data_offsets":[0,4]}}',
    "digits": lambda: b'{"a":{"dtype":"F32","shape":[' + b"9" * N + b'],"data_offsets":[0,4]}}',
    "deep_lists": lambda: b'{"a":' + b"[" * N,
    "deep_objects": lambda: b'{"a":' * (N // 5),
    "tensors": lambda: ("{" + ",".join(_entry(f"x{i}") for i in range(400_000)) + "}").encode(),
    "metadata": lambda: (
        '{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(2_000_000)) + "}}"
    ).encode(),
    "metadata_of_lists": lambda: b'{"__metadata__":{"a":' + b"[]," * (N // 3) + b'""}}',
    "unterminated": lambda: b'{"' + b'\\"' * (N // 2),
    "key": lambda: b'{"' + b"k" * N + b'":1}',
    "space": lambda: b'{"a":{' + b" " * N + b"}}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_for_the_price_of_reading_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    head = BOMBS[name]()
    path.write_bytes(framed(head))
    size = len(head)
    del head
    assert size < MAX_HEADER_BYTES
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError) as found:
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The bytes, their text, and one string out of it; json.loads would take up to 30 times the bytes.
    assert peak < 3 * size + 16 * MIB
    assert len(str(found.value)) < 800


def test_a_header_s_claims_are_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tera = {"dtype": "F32", "shape": [2**20, 2**18], "data_offsets": [0, 2**40]}
    for content in (
        framed(json_object([("a", tera)])),
        framed(b"{}", length=2**62),
        framed(b"{}", length=MAX_HEADER_BYTES + 1),
    ):
        path.write_bytes(content)
        with path.open("rb+") as file:
            file.truncate(40 * MIB)  # a hole: it takes no space, and would take memory if it were read
        tracemalloc.start()
        try:
            with pytest.raises(AdapterError):
                read_header(path)
            assert tracemalloc.get_traced_memory()[1] < MIB
        finally:
            tracemalloc.stop()


def test_comparisons_do_not_grow_with_the_square_of_the_keys(tmp_path: Path) -> None:
    class Counted(str):
        """A key that knows how often it was compared."""

        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Counted.compared += 1
            return str.__eq__(self, other)

    from lorabooth.checkpoints import header_json

    pairs = [(Counted(f"x{i}"), i) for i in range(5_000)] + [(Counted("x4999"), 0)]
    with pytest.raises(ValueError, match="twice"):
        header_json._unique(pairs)
    assert Counted.compared < 10 * len(pairs)
    many = ",".join(_entry(f"x{i}") for i in range(MAX_TENSORS - 1))
    path = tmp_path / "a.safetensors"
    path.write_bytes(framed(f"{{{many},{_entry('x19998')}}}".encode()))
    with pytest.raises(AdapterError, match=r"'x19998' occurs twice"):
        read_header(path)


def test_as_many_tensors_as_allowed_and_a_rich_trainer_s_metadata_are_read(tmp_path: Path) -> None:
    tags = {
        f"{i}_sks [dog] {{x}}": {f'tag "{j}" [[{j}]], {{{j}}}': j for j in range(100)} for i in range(1000)
    }
    metadata = {
        "ss_tag_frequency": json.dumps(tags),
        "ss_bucket_info": json.dumps({"buckets": {str(i): {"resolution": [i, i]} for i in range(5000)}}),
        "ss_dataset_dirs": json.dumps({"\U0001f436" * 100: {"n_repeats": 1}}, ensure_ascii=False),
        **{f"ss_{i}": "None" for i in range(MAX_METADATA - 3)},
    }
    assert len(metadata["ss_tag_frequency"]) > 3_000_000
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    pairs = [("__metadata__", metadata), *((f"x{i}", empty) for i in range(MAX_TENSORS))]
    path = tmp_path / "a.safetensors"
    path.write_bytes(framed(json_object(pairs)))
    header = read_header(path)
    assert dict(header.metadata) == metadata
    assert len(header.entries) == MAX_TENSORS
    path.write_bytes(framed(json_object([*pairs, ("one_more", empty)])))
    with pytest.raises(AdapterError, match="more than"):
        read_header(path)
    pairs[0] = ("__metadata__", {**metadata, "one_more": ""})
    path.write_bytes(framed(json_object(pairs)))
    with pytest.raises(AdapterError, match="more than"):
        read_header(path)


def test_an_entry_may_be_spread_out_but_not_without_end(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for space, fits in ((MAX_ENTRY_CHARS - 100, True), (MAX_ENTRY_CHARS, False)):
        path.write_bytes(
            framed(b'{"a":{"dtype":' + b" " * space + b'"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4))
        )
        if fits:
            assert read_header(path).entries["a"].shape == (1,)
        else:
            with pytest.raises(AdapterError, match="exactly"):
                read_header(path)


# What a file may be instead of a file; each in a process of its own, as what is wrong would wait for ever.
_READ = (
    "import sys; from pathlib import Path; from lorabooth.checkpoints.header import read_header\n"
    "from lorabooth.errors import AdapterError\n"
    "try: print(len(read_header(Path(sys.argv[1])).entries))\n"
    "except AdapterError as error: print('refused:', error.what)"
)


def _read_apart(path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _READ, str(path)], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


@pytest.mark.skipif(os.name != "posix", reason="POSIX has pipes and devices among files")
def test_pipes_and_devices_are_refused_and_links_to_files_are_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    link = tmp_path / "link.safetensors"
    link.symlink_to(pipe)
    zero = tmp_path / "zero.safetensors"
    zero.symlink_to("/dev/zero")
    for path in (pipe, link, zero):
        assert "a pipe or a device" in _read_apart(path)
    for target in (link, "loop.safetensors"):  # as the hub's cache: a link to a blob
        (tmp_path / "loop.safetensors").unlink(missing_ok=True)
        (tmp_path / "loop.safetensors").symlink_to(target)
    assert "cannot be read" in _read_apart(tmp_path / "loop.safetensors")
    snapshot = tmp_path / "snapshot.safetensors"
    snapshot.symlink_to(CORPUS / "sound" / "kohya.safetensors")
    assert _read_apart(snapshot).strip() == "9"


def test_folders_absent_files_and_impossible_names_are_plain_errors(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="it is a folder"):
        read_header(tmp_path)
    with pytest.raises(AdapterError, match="No such file"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(AdapterError, match="cannot be read"):
        read_header(tmp_path / "zero\0byte.safetensors")


def test_a_pickle_s_first_bytes_may_be_a_header_s_length(tmp_path: Path) -> None:
    # 0x0280 = 640, 0x6428 = 25640: as lengths they are as good as any other.
    for start in (b"\x80\x02", b"(d", b"]q", b"\x1f\x8b"):
        length = int.from_bytes(start, "little")
        path = tmp_path / "a.safetensors"
        path.write_bytes(framed(b"{}".ljust(length)))
        assert path.read_bytes().startswith(start)
        assert not read_header(path).entries
