"""A copy with spans computed anew: every byte in its place, through the page cache and past it."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from lorabooth.checkpoints import channel, rewrite
from lorabooth.checkpoints.rewrite import Span

SIZE = 3_000_001


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture(autouse=True)
def _small_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many writes, and every file is large enough for the disk."""
    monkeypatch.setattr(rewrite, "_WRITE_BYTES", 1 << 16)
    monkeypatch.setattr(rewrite, "_DIRECT_FROM_BYTES", 0)


def inverted(begin: int, end: int, chunk_bytes: int) -> Span:
    """Every bit the other way round."""

    def change(chunk: memoryview, offset: int) -> None:
        assert offset % chunk_bytes == 0
        chunk[:] = bytes(255 - byte for byte in chunk)

    return Span(begin, end, chunk_bytes, lambda: change)


SPANS = [
    (0, 5, 2),  # at the beginning, far less than a block
    (5, 6, 1),  # right behind it
    (4095, 4097, 2),  # over the edge of a block
    (8192, 16384, 512),  # whole blocks
    (100_001, 400_003, 1000),  # more than a write, whose size is no multiple of the chunk
    (900_000, 1_200_000, 100_000),  # a chunk is larger than a write
    (SIZE - 7, SIZE, 7),  # to the end
]


def expected(content: bytes) -> bytes:
    result = bytearray(content)
    for begin, end, _ in SPANS:
        result[begin:end] = bytes(255 - byte for byte in result[begin:end])
    return bytes(result)


def all_spans() -> list[Span]:
    return [inverted(*numbers) for numbers in SPANS]


def test_direct_and_buffered_writes_give_the_same_bytes(source, tmp_path, monkeypatch):
    opened: list[int] = []
    real = os.open

    def spy(path, flags, *more):
        opened.append(flags)
        return real(path, flags, *more)

    monkeypatch.setattr(channel.os, "open", spy)
    done: list[int] = []
    rewrite.rewrite(source, tmp_path / "direct", all_spans(), on_bytes=done.append)
    assert (tmp_path / "direct").read_bytes() == expected(source.read_bytes())
    assert sum(done) == SIZE
    if hasattr(os, "O_DIRECT"):
        assert any(flags & os.O_DIRECT for flags in opened)

    monkeypatch.setattr(rewrite, "_DIRECT_FROM_BYTES", SIZE + 1)
    opened.clear()
    rewrite.rewrite(source, tmp_path / "buffered", all_spans())
    assert (tmp_path / "buffered").read_bytes() == expected(source.read_bytes())
    assert not any(flags & getattr(os, "O_DIRECT", 0) for flags in opened)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system has no direct writes")
@pytest.mark.parametrize("refused", ["open", "write"])
def test_a_file_system_without_direct_writes(source, tmp_path, monkeypatch, refused):
    """Some refuse when the file is opened, some only when it is written."""
    real_open, real_write = os.open, os.pwrite
    direct: list[int] = []

    def open_(path, flags, *more):
        if flags & os.O_DIRECT and refused == "open":
            raise OSError(errno.EINVAL, "no direct writes here")
        descriptor = real_open(path, flags, *more)
        if flags & os.O_DIRECT:
            direct.append(descriptor)
        return descriptor

    def write(descriptor, data, offset):
        if descriptor in direct:
            raise OSError(errno.EINVAL, "no direct writes here")
        return real_write(descriptor, data, offset)

    monkeypatch.setattr(channel.os, "open", open_)
    monkeypatch.setattr(channel.os, "pwrite", write)
    rewrite.rewrite(source, tmp_path / "out", all_spans())
    assert (tmp_path / "out").read_bytes() == expected(source.read_bytes())
    assert len(direct) == (refused == "write")


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system has no direct writes")
def test_a_full_disk_is_told_from_a_direct_write_too(source, tmp_path, monkeypatch):
    real = os.pwrite

    def write(descriptor, data, offset):
        if offset > SIZE // 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(channel.os, "pwrite", write)
    with pytest.raises(OSError, match="No space left"):
        rewrite.rewrite(source, tmp_path / "out", all_spans())


@pytest.mark.skipif(not hasattr(os, "pwrite"), reason="this is how it always is here")
def test_without_positioned_reads_and_writes(source, tmp_path, monkeypatch):
    """As on Windows."""
    for name in ("preadv", "pwrite"):
        monkeypatch.delattr(channel.os, name)
    rewrite.rewrite(source, tmp_path / "out", all_spans())
    assert (tmp_path / "out").read_bytes() == expected(source.read_bytes())


def test_what_a_span_raises_ends_it(source, tmp_path):
    begun: list[int] = []

    def broken(chunk: memoryview, offset: int) -> None:
        begun.append(offset)
        raise ValueError("not a number")

    spans = [Span(begin, begin + 100, 10, lambda: broken) for begin in range(0, 100_000, 100)]
    with pytest.raises(ValueError, match="not a number"):
        rewrite.rewrite(source, tmp_path / "out", spans)
    assert len(begun) < len(spans)


def test_a_source_that_shrinks_is_told(source, tmp_path):
    def shrink() -> rewrite.ChunkFunction:
        os.truncate(source, 1000)
        return lambda chunk, offset: None

    spans = [Span(SIZE - 10, SIZE, 10, shrink)]
    with pytest.raises(OSError, match="changed while it was read"):
        rewrite.rewrite(source, tmp_path / "out", spans)


def test_an_empty_file(tmp_path):
    (tmp_path / "empty").touch()
    rewrite.rewrite(tmp_path / "empty", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b""
