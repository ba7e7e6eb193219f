"""lorabooth: learn one subject from 3-5 photos into a small adapter, without forgetting its class.

The public API; each name is imported when it is first used, so that `import lorabooth` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorabooth.api import RunResult, train
    from lorabooth.errors import LoraboothError
    from lorabooth.evaluation.apply import AdapterHandle, load_adapter
    from lorabooth.evaluation.sample import SampleResult, sample
    from lorabooth.progress import Reporter
    from lorabooth.recipe import Recipe
    from lorabooth.training.plan import Plan
    from lorabooth.version import __version__

__all__ = [
    "AdapterHandle",
    "LoraboothError",
    "Plan",
    "Recipe",
    "Reporter",
    "RunResult",
    "SampleResult",
    "__version__",
    "load_adapter",
    "sample",
    "train",
]

_HOME = {
    "AdapterHandle": "evaluation.apply",
    "LoraboothError": "errors",
    "Plan": "training.plan",
    "Recipe": "recipe",
    "Reporter": "progress",
    "RunResult": "api",
    "SampleResult": "evaluation.sample",
    "__version__": "version",
    "load_adapter": "evaluation.apply",
    "sample": "evaluation.sample",
    "train": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
