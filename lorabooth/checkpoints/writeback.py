"""Sending what was written to the disk while more is being computed, so that a later fsync finds it there.

Left alone, the kernel keeps gigabytes in memory, and the fsync at the end waits for all of them.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

_WRITE = 2  # linux/fs.h: SYNC_FILE_RANGE_WRITE, begin writing and do not wait


@contextmanager
def writeback(descriptor: int) -> Iterator[Callable[[int, int], object]]:
    """Within the block, ranges of an open file are sent to the disk on a thread of their own.

    Only a hint: it makes nothing durable, its failures show themselves at the fsync, and where the system
    has no such call (all but Linux) nothing happens.

    Yields:
        Takes the offset of the first byte and the number of bytes that are written and will stay.
    """
    call = _sync_file_range()
    if call is None:
        yield lambda begin, n_bytes: None  # noqa: ARG005 - as the other kind
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="writeback")
    try:
        yield lambda begin, n_bytes: pool.submit(partial(call, descriptor, begin, n_bytes, _WRITE))
    finally:
        # What has not begun is the fsync's: the file may be closed next.
        pool.shutdown(cancel_futures=True)


def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """The C library's sync_file_range(2), if there is one."""
    if not sys.platform.startswith("linux"):
        return None
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is None:
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    call.restype = ctypes.c_int
    found: Callable[[int, int, int, int], int] = call
    return found
