"""A file read and written at offsets by several threads, its bytes handed to the disk past the page cache.

Gigabytes that nobody reads back soon cost more in the page cache than they are worth: memory is found for
every page, the bytes are copied there, one thread at a time may write to the file, and the fsync at the end
waits for all of it. Where the system lets a program write from its own memory (O_DIRECT on Linux), none of
that happens, and threads write side by side.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

_BLOCK_BYTES = 4096
"""What offset, length and memory of a direct write are multiples of; no common disk asks for more."""


class Buffer:
    """Memory for a range of a file, at an address that a direct write of that range can be made from."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._memory = memoryview(mmap.mmap(-1, n_bytes + _BLOCK_BYTES))

    def of(self, begin: int, end: int) -> memoryview:
        """Room for the bytes from offset `begin` to `end`, `n_bytes` at most; what was there is lost."""
        start = begin % _BLOCK_BYTES
        return self._memory[start : start + end - begin]


class Channel:
    """An open file.

    Args:
        path: of the file.
        flags: of os.open.
        direct: write whole blocks past the page cache where the system and the file system can.
    """

    def __init__(self, path: Path, flags: int, *, direct: bool = False) -> None:
        self.descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o644)
        self._direct = -1
        self._name = path.name
        self._lock = threading.Lock()  # where the system has no positioned reads (Windows)
        if direct and (flag := getattr(os, "O_DIRECT", 0)) and hasattr(os, "pwrite"):
            with suppress(OSError):
                self._direct = os.open(path, os.O_WRONLY | flag)

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in (self._direct, self.descriptor):
            if descriptor >= 0:
                os.close(descriptor)

    def read(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes at `offset`.

        Raises:
            OSError: it cannot be read, or ends before.
        """
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
        """Write all of `view` at `offset`; directly where it is memory of a `Buffer` for that offset.

        Raises:
            OSError: it cannot be written.
        """
        first = min(-offset % _BLOCK_BYTES, len(view))
        last = max(len(view) - (offset + len(view)) % _BLOCK_BYTES, first)
        if self._direct < 0 or first == last:
            first = last = len(view)
        self._write(self.descriptor, offset, view[:first])
        try:
            self._write(self._direct, offset + first, view[first:last])
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Some file systems agree when the file is opened, and refuse now.
            self._write(self.descriptor, offset + first, view[first:last])
        self._write(self.descriptor, offset + last, view[last:])

    def _write(self, descriptor: int, offset: int, view: memoryview) -> None:
        at = 0
        while at < len(view):
            if hasattr(os, "pwrite"):
                at += os.pwrite(descriptor, view[at:], offset + at)
            else:
                with self._lock:
                    os.lseek(descriptor, offset + at, os.SEEK_SET)
                    at += os.write(descriptor, view[at:])
