"""Seconds and, on CUDA, memory of each phase of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class _Open:
    """A phase that is under way; its time runs only while no phase within it does."""

    name: str
    since_s: float


@dataclass(frozen=True)
class Clock:
    """Seconds per phase, in order; of phases within each other, each has its own alone.

    Attributes:
        seconds: by phase.
        peak_bytes: most that torch's allocator held on the current CUDA device, by phase; empty without CUDA.
        failed: the phase that an exception came out of, if any; the innermost.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    _open: list[_Open] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside; adds up when entered again."""
        self._note()
        self._open.append(_Open(name, time.perf_counter()))
        try:
            yield
        except BaseException:
            if not self.failed:
                self.failed.append(name)
            raise
        finally:
            self._note()
            self._open.pop()
            if self._open:
                self._open[-1].since_s = time.perf_counter()

    def so_far_s(self, name: str) -> float:
        """Seconds of a phase until now, though it be under way."""
        running = self._open[-1] if self._open and self._open[-1].name == name else None
        return self.seconds.get(name, 0.0) + (time.perf_counter() - running.since_s if running else 0.0)

    def _note(self) -> None:
        """What passed since the last phase began or ended belongs to the innermost one."""
        peak = _peak_bytes()
        if not self._open:
            return
        current = self._open[-1]
        passed = time.perf_counter() - current.since_s
        self.seconds[current.name] = self.seconds.get(current.name, 0.0) + passed
        if peak is not None:
            self.peak_bytes[current.name] = max(peak, self.peak_bytes.get(current.name, 0))


def _peak_bytes() -> int | None:
    """Most that was allocated since the last call; None without CUDA."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    peak = int(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return peak
