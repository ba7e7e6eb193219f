"""lorabooth: learn one subject from 3-5 photos into a small adapter, without forgetting its class.

The public API; each name is imported when it is first used, so that `import lorabooth` is cheap.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

# On processors with bf16 bitsandbytes reports at import, which peft and diffusers cause, that an optional
# kernel is missing; what works is `lorabooth doctor`'s to say.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from lorabooth.adapters.blend_files import BlendReport, blend_files
    from lorabooth.adapters.check import CheckReport
    from lorabooth.adapters.convert import ConvertReport, convert_file
    from lorabooth.adapters.extract import ExtractReport
    from lorabooth.adapters.inspect import inspect_path
    from lorabooth.adapters.inspection import Inspection
    from lorabooth.adapters.merge_match import Merging
    from lorabooth.adapters.merge_report import MergeReport
    from lorabooth.adapters.resize_file import ResizeReport, resize_file
    from lorabooth.api import RunResult, plan, train
    from lorabooth.errors import LoraboothError
    from lorabooth.evaluation.apply import AdapterHandle, load_adapter
    from lorabooth.evaluation.sample import SampleResult, sample
    from lorabooth.exchange import check, extract, merge
    from lorabooth.planning.memory_plan import MemoryPlan
    from lorabooth.progress import Reporter
    from lorabooth.protocol.compare import Comparison, compare
    from lorabooth.protocol.results import Evaluation
    from lorabooth.protocol.run import evaluate
    from lorabooth.recipe import Recipe
    from lorabooth.training.plan import Plan
    from lorabooth.version import __version__

__all__ = [
    "AdapterHandle",
    "BlendReport",
    "CheckReport",
    "Comparison",
    "ConvertReport",
    "Evaluation",
    "ExtractReport",
    "Inspection",
    "LoraboothError",
    "MemoryPlan",
    "MergeReport",
    "Merging",
    "Plan",
    "Recipe",
    "Reporter",
    "ResizeReport",
    "RunResult",
    "SampleResult",
    "__version__",
    "blend_files",
    "check",
    "compare",
    "convert_file",
    "evaluate",
    "extract",
    "inspect_path",
    "load_adapter",
    "merge",
    "plan",
    "resize_file",
    "sample",
    "train",
]

_HOME = {
    "AdapterHandle": "evaluation.apply",
    "BlendReport": "adapters.blend_files",
    "CheckReport": "adapters.check",
    "Comparison": "protocol.compare",
    "ConvertReport": "adapters.convert",
    "Evaluation": "protocol.results",
    "ExtractReport": "adapters.extract",
    "Inspection": "adapters.inspection",
    "LoraboothError": "errors",
    "MemoryPlan": "planning.memory_plan",
    "MergeReport": "adapters.merge_report",
    "Merging": "adapters.merge_match",
    "Plan": "training.plan",
    "Recipe": "recipe",
    "Reporter": "progress",
    "ResizeReport": "adapters.resize_file",
    "RunResult": "api",
    "SampleResult": "evaluation.sample",
    "__version__": "version",
    "blend_files": "adapters.blend_files",
    "check": "exchange",
    "compare": "protocol.compare",
    "convert_file": "adapters.convert",
    "evaluate": "protocol.run",
    "extract": "exchange",
    "inspect_path": "adapters.inspect",
    "load_adapter": "evaluation.apply",
    "merge": "exchange",
    "plan": "api",
    "resize_file": "adapters.resize_file",
    "sample": "evaluation.sample",
    "train": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
