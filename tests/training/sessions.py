"""Sessions composed as a run composes them, on a tiny base, for tests of the loop."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from lorabooth.data.cache import Store
from lorabooth.progress import Silent
from lorabooth.training.alarms import Watch
from lorabooth.training.caching import cache_and_release
from lorabooth.training.compose import attach, compose
from lorabooth.training.log import MetricsLog
from lorabooth.training.loop import Hooks, Session, run_steps
from lorabooth.training.setting import Clock, open_setting
from tests.training import runs


class Listener(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def session(base: Path, photos: Path, cache: Path, *overrides: str) -> Session:
    """Without a prior; overrides as for --set."""
    recipe = runs.recipe(base, photos, "prior.mode=none", *overrides)
    setting = open_setting(recipe, Clock(), Silent())
    examples, _ = cache_and_release(setting, (), Store(cache), Silent())
    accelerator = Accelerator()
    attached = attach(setting, accelerator.device, Silent())
    return compose(setting, examples, attached, accelerator=accelerator, reporter=Silent())


def hooks(saved: list[int]) -> Hooks:
    """Only the end is saved, and noted."""
    return Hooks(checkpoint=saved.append, preview=lambda step: None, checkpoint_every=0, preview_every=0)


def run(
    composed: Session,
    folder: Path,
    steps: range,
    *,
    between: Hooks | None = None,
    reporter: Silent | None = None,
    watch: Watch | None = None,
) -> Watch:
    """Run the steps; metrics.jsonl in a folder."""
    return run_steps(
        composed,
        between or hooks([]),
        MetricsLog(folder / "metrics.jsonl"),
        start=steps.start,
        stop=steps.stop,
        reporter=reporter or Silent(),
        watch=watch,
    )
