"""The typed recipe: its schema, TOML in and out, and everything that can be wrong with one, told at once."""

from __future__ import annotations

from lorabooth.recipe.check import check
from lorabooth.recipe.io import (
    CHANGEABLE,
    differences,
    dump,
    fingerprint,
    from_mapping,
    load,
    loads,
    with_overrides,
)
from lorabooth.recipe.schema import (
    AdapterSection,
    Auto,
    EvaluationSection,
    ImagesSection,
    LossSection,
    MemorySection,
    ModelSection,
    OptimSection,
    PriorSection,
    Recipe,
    RunSection,
    Section,
    SpeedSection,
    SubjectSection,
)

__all__ = [
    "CHANGEABLE",
    "AdapterSection",
    "Auto",
    "EvaluationSection",
    "ImagesSection",
    "LossSection",
    "MemorySection",
    "ModelSection",
    "OptimSection",
    "PriorSection",
    "Recipe",
    "RunSection",
    "Section",
    "SpeedSection",
    "SubjectSection",
    "check",
    "differences",
    "dump",
    "fingerprint",
    "from_mapping",
    "load",
    "loads",
    "with_overrides",
]
