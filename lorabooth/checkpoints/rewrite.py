"""A copy of a large file in which some spans are computed anew; all else is copied by the kernel.

Spans have fixed places, so that several threads read, compute and write side by side, a few megabytes each.
Where the file system can share blocks (reflink), nothing but the computed spans is written.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

from lorabooth.checkpoints.writeback import writeback

_COPY_BYTES = 32 << 20
_BUFFER_BYTES = 4 << 20
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
    workers: int = 0,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> None:
    """Write `target` as `source` with some spans computed anew. The target is not synced.

    Args:
        source: read only.
        target: made new.
        spans: do not overlap.
        workers: threads; 0 takes the cores that there are, four at most.
        on_bytes: hears how many bytes are done, from the calling thread.

    Raises:
        OSError: reading or writing failed; the target is left as far as it got.
        Exception: whatever a span's functions raise.
    """
    with (
        _Channel(source, os.O_RDONLY) as inward,
        _Channel(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as out,
    ):
        size = os.fstat(inward.descriptor).st_size
        cloned = _clone(inward, out)
        if not cloned:
            _reserve(out, size)
        copies = [] if cloned else [_copy_job(inward, out, *part) for part in _between(spans, size)]
        computed = [_span_job(inward, out, span) for span in sorted(spans, key=lambda one: one.begin)]
        # The first that computes has a library to load: the others copy meanwhile.
        jobs = [*computed[:1], *copies, *computed[1:]]
        with writeback(out.descriptor) as send:
            for job in _run(jobs, workers or min(4, os.cpu_count() or 1)):
                send(job.begin, job.n_bytes)
                on_bytes(job.n_bytes)
        if cloned:
            on_bytes(size - sum(span.end - span.begin for span in spans))


@dataclass(frozen=True, slots=True)
class _Job:
    begin: int
    n_bytes: int
    work: Callable[[], None]


def _run(jobs: Sequence[_Job], workers: int) -> Iterator[_Job]:
    """Do the jobs on threads; yields each that is done. The first failure ends all."""
    stop = threading.Event()

    def guarded(job: _Job) -> _Job:
        if not stop.is_set():
            job.work()
        return job

    with ThreadPoolExecutor(workers, thread_name_prefix="rewrite") as pool:
        futures: list[Future[_Job]] = [pool.submit(guarded, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _span_job(inward: _Channel, out: _Channel, span: Span) -> _Job:
    def work() -> None:
        change = span.open()
        buffer = memoryview(bytearray(min(span.chunk_bytes, span.end - span.begin)))
        for begin in range(span.begin, span.end, span.chunk_bytes):
            chunk = buffer[: span.end - begin]
            inward.read(begin, chunk)
            change(chunk, begin - span.begin)
            out.write(begin, chunk)

    return _Job(span.begin, span.end - span.begin, work)


def _copy_job(inward: _Channel, out: _Channel, begin: int, end: int) -> _Job:
    return _Job(begin, end - begin, lambda: _copy(inward, out, begin, end))


def _between(spans: Sequence[Span], size: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that no span covers, in pieces."""
    at = 0
    for begin, end in [*sorted((span.begin, span.end) for span in spans), (size, size)]:
        for start in range(at, begin, _COPY_BYTES):
            yield start, min(start + _COPY_BYTES, begin)
        at = end


def _copy(inward: _Channel, out: _Channel, begin: int, end: int) -> None:
    at = begin
    if hasattr(os, "copy_file_range"):
        # Across file systems, and on some of them, the kernel refuses: then through a buffer.
        with suppress(OSError):
            while at < end:
                count = os.copy_file_range(inward.descriptor, out.descriptor, end - at, at, at)
                if count == 0:
                    break
                at += count
    if at == end:
        return
    buffer = memoryview(bytearray(min(_BUFFER_BYTES, end - at)))
    while at < end:
        chunk = buffer[: end - at]
        inward.read(at, chunk)
        out.write(at, chunk)
        at += len(chunk)


def _clone(inward: _Channel, out: _Channel) -> bool:
    """Let the target share the source's blocks; False where the file system cannot."""
    if os.name != "posix":
        return False
    import fcntl

    try:
        fcntl.ioctl(out.descriptor, _FICLONE, inward.descriptor)
    except OSError:
        return False
    return True


def _reserve(out: _Channel, size: int) -> None:
    """Claim the room, so that a full disk is noticed before anything is computed."""
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(out.descriptor, 0, size)


class _Channel:
    """A file read and written at offsets from several threads."""

    def __init__(self, path: Path, flags: int) -> None:
        self.descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o644)
        self._name = path.name
        self._lock = threading.Lock()  # where the system has no positioned reads (Windows)

    def __enter__(self) -> _Channel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.descriptor)

    def read(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes at `offset`."""
        at = 0
        while at < len(view):
            if hasattr(os, "preadv"):
                got = os.preadv(self.descriptor, [view[at:]], offset + at)
            else:
                with self._lock:
                    os.lseek(self.descriptor, offset + at, os.SEEK_SET)
                    data = os.read(self.descriptor, len(view) - at)
                view[at : at + len(data)] = data
                got = len(data)
            if got == 0:
                raise OSError(f"{self._name} ends at byte {offset + at}; it was changed while it was read")
            at += got

    def write(self, offset: int, view: memoryview) -> None:
        """Write all of `view` at `offset`."""
        at = 0
        while at < len(view):
            if hasattr(os, "pwrite"):
                at += os.pwrite(self.descriptor, view[at:], offset + at)
            else:
                with self._lock:
                    os.lseek(self.descriptor, offset + at, os.SEEK_SET)
                    at += os.write(self.descriptor, view[at:])
