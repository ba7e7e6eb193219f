"""One run from recipe to report: the phases in order, each timed, each resumable.

photos -> base -> class images -> caches -> adapter -> steps -> samples -> report
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lorabooth.adapters import file as adapter_file
from lorabooth.adapters import inject
from lorabooth.data import images as data_images
from lorabooth.data.cache import Store, default_root
from lorabooth.errors import LoraboothError
from lorabooth.families import registry, source, tokens
from lorabooth.families.base import Family, Parts
from lorabooth.memory import apply, facts
from lorabooth.progress import Reporter
from lorabooth.recipe import Recipe
from lorabooth.recipe_check import check
from lorabooth.training import compose, state, subjects
from lorabooth.training.folder import RunFolder, check_writable, claim, default_out, fresh_beside, write_recipe
from lorabooth.training.log import MetricsLog
from lorabooth.training.loop import Hooks, Session, StepLog, run_steps
from lorabooth.training.plan import Plan
from lorabooth.training.resolve import Choice, DeviceFacts, Resolved, resolve
from lorabooth.training.studio import Studio
from lorabooth.types import Record


@dataclass
class Clock:
    """Seconds per phase, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside; adds up when entered again."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
