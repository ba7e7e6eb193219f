"""Many small computations side by side: a thread a core, each computing on that core alone.

Torch's own threads share one computation, which is slower for thousands of small ones, and many times slower
when another program keeps a core busy.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_all_cores(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """The results of a function on all items, in their order. Leaving early cancels what has not begun."""
    with one_thread_each() as ready, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        ready()
        waiting = deque(pool.submit(work, item) for item in items)
        try:
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread_each() -> Iterator[Callable[[], None]]:
    """Within the block every thread computes on one core; afterwards torch is as it was.

    Torch is imported beside the block, as that takes a second or two which copying can use. Yields a function
    that waits for it; who computes calls that first.
    """
    before: list[int] = []

    def load() -> None:
        import torch

        before.append(torch.get_num_threads())
        torch.set_num_threads(1)

    loading = threading.Thread(target=load, name="import torch")
    loading.start()
    try:
        yield loading.join
    finally:
        loading.join()
        for number in before:
            import torch

            torch.set_num_threads(number)
