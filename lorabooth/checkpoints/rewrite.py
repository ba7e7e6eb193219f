"""A copy of a large file in which some spans are computed anew.

Spans have fixed places, so that several threads read, compute and write side by side, a few megabytes each.
Where the file system can share blocks (reflink), nothing but the computed spans is written.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from lorabooth.checkpoints.channel import Buffer, Channel

_WRITE_BYTES = 16 << 20
_COPY_THREADS = 4
_DIRECT_FROM_BYTES = 64 << 20  # of the file; a smaller one is written sooner than the disk answers
_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)

ChunkFunction: TypeAlias = Callable[[memoryview, int], None]
"""Changes the bytes of a chunk in place; told the chunk's offset within its span."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file that are computed anew.

    Attributes:
        begin: offset of the first byte in the file.
        end: offset behind the last.
        chunk_bytes: how many are computed at a time, e.g. some rows of a matrix.
        open: called once, before the first chunk; gives the function that changes the chunks.
    """

    begin: int
    end: int
    chunk_bytes: int
    open: Callable[[], ChunkFunction]


def rewrite(
    source: Path,
    target: Path,
    spans: Sequence[Span] = (),
    *,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> None:
    """Write `target` as `source` with some spans computed anew. The target is not synced.

    Args:
        source: read only.
        target: made new.
        spans: do not overlap.
        on_bytes: hears how many bytes are done, from the calling thread.

    Raises:
        OSError: reading or writing failed; the target is left as far as it got.
        Exception: whatever a span's functions raise.
    """
    size = source.stat().st_size
    with (
        Channel(source, os.O_RDONLY) as inward,
        Channel(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, direct=size >= _DIRECT_FROM_BYTES) as out,
    ):
        cloned = _clone(inward, out)
        if not cloned:
            _reserve(out, size)
        run = _Jobs(inward, out)
        computed = [partial(run.compute, span) for span in sorted(spans, key=lambda one: one.begin)]
        copies = [] if cloned else [partial(run.copy, *part) for part in _between(spans, size)]
        for n_bytes in run.all(computed, copies):
            on_bytes(n_bytes)
        if cloned:
            on_bytes(size - sum(span.end - span.begin for span in spans))


class _Jobs:
    """What threads do with a file and its copy, each in memory of its own."""

    def __init__(self, inward: Channel, out: Channel) -> None:
        self._inward, self._out = inward, out
        self._stop = threading.Event()
        self._local = threading.local()

    def all(
        self, computed: Sequence[Callable[[], int]], copies: Sequence[Callable[[], int]]
    ) -> Iterator[int]:
        """Do the jobs; yields the bytes of each that is done. The first failure ends all.

        One more thread computes than there are cores, as one waits for the disk now and then. Copying has
        threads of its own: those that compute have a library to load first.
        """
        with (
            ThreadPoolExecutor(min(4, os.cpu_count() or 1) + 1, thread_name_prefix="compute") as computing,
            ThreadPoolExecutor(_COPY_THREADS, thread_name_prefix="copy") as copying,
        ):
            futures = [computing.submit(self._guarded, job) for job in computed]
            futures += [copying.submit(self._guarded, job) for job in copies]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                self._stop.set()
                computing.shutdown(wait=False, cancel_futures=True)
                copying.shutdown(wait=False, cancel_futures=True)

    def _guarded(self, job: Callable[[], int]) -> int:
        if self._stop.is_set():
            return 0
        try:
            return job()
        except BaseException:
            self._stop.set()
            raise

    def copy(self, begin: int, end: int) -> int:
        """Bytes as they are."""
        view = self._memory(begin, end)
        self._inward.read(begin, view)
        self._out.write(begin, view)
        return end - begin

    def compute(self, span: Span) -> int:
        """Bytes of a span, several chunks a write."""
        change = span.open()
        # Chunks stay in a core's cache, writes are large.
        step = span.chunk_bytes * max(1, _WRITE_BYTES // span.chunk_bytes)
        for begin in range(span.begin, span.end, step):
            if self._stop.is_set():
                return 0
            end = min(begin + step, span.end)
            view = self._memory(begin, end)
            for at in range(begin, end, span.chunk_bytes):
                chunk = view[at - begin : at - begin + span.chunk_bytes]
                self._inward.read(at, chunk)
                change(chunk, at - span.begin)
            self._out.write(begin, view)
        return span.end - span.begin

    def _memory(self, begin: int, end: int) -> memoryview:
        """This thread's memory, for a range of the file."""
        buffer: Buffer | None = getattr(self._local, "buffer", None)
        if buffer is None or buffer.n_bytes < end - begin:
            buffer = self._local.buffer = Buffer(max(end - begin, _WRITE_BYTES))
        return buffer.of(begin, end)


def _between(spans: Sequence[Span], size: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that no span covers, in pieces."""
    at = 0
    for begin, end in [*sorted((span.begin, span.end) for span in spans), (size, size)]:
        while at < begin:
            until = min((at // _WRITE_BYTES + 1) * _WRITE_BYTES, begin)
            yield at, until
            at = until
        at = end


def _clone(inward: Channel, out: Channel) -> bool:
    """Let the target share the source's blocks; False where the file system cannot."""
    if os.name != "posix":
        return False
    import fcntl

    try:
        fcntl.ioctl(out.descriptor, _FICLONE, inward.descriptor)
    except OSError:
        return False
    return True


def _reserve(out: Channel, size: int) -> None:
    """Claim the room, so that a full disk is noticed before anything is computed."""
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(out.descriptor, 0, size)
