"""One metric as a table's cell: a mean and its interval, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lorabooth.evaluation.backbones import NOT_AVAILABLE
from lorabooth.evaluation.legend import Legend
from lorabooth.evaluation.metrics import Measured

ROW_TITLES: Mapping[str, str] = MappingProxyType(
    {"real": "real images", "without": "adapter off", "adapter": "adapter on"}
)
"""A subject's rows, in their order; the keys are evaluation.json's."""
NOTHING = "–"
"""Where a row has no such number: photos have no prompt, and the base has not drifted from itself."""
NOT_MEASURED = "not measured"
"""Where the backbone is missing; the notes say why."""


def number(value: float, *, sign: bool = False) -> str:
    """A mean: "0.612", or "+0.041" where it is a difference."""
    text = f"{value:+.3f}" if sign else f"{value:.3f}"
    return text.replace("-0.000", "0.000").replace("+0.000", "0.000").replace("-", "−")


def interval(metric: Measured, *, sign: bool = False) -> str:
    """Its ends: "0.59…0.64"; empty where a single value has none."""
    if metric.low is None or metric.high is None:
        return ""
    ends = (f"{end:+.2f}" if sign else f"{end:.2f}" for end in (metric.low, metric.high))
    return "…".join(end.replace("-", "−") for end in ends)


def cell(
    legend: Legend, metric: Measured | None, backbones: Mapping[str, str], *, sign: bool = False
) -> tuple[str, str]:
    """A cell's mean and interval; what stands for a number that is not there."""
    if metric is not None:
        return number(metric.mean, sign=sign), interval(metric, sign=sign)
    return (NOT_MEASURED if backbones.get(legend.backbone) == NOT_AVAILABLE else NOTHING), ""


def backbone_line(backbones: Mapping[str, str]) -> str:
    """What everything was measured with, in one line."""
    titles = {"dino": "DINO and PRES", "clip": "CLIP-I and CLIP-T", "lpips": "DIV and drift"}
    return "; ".join(f"{titles[key]}: {name}" for key, name in backbones.items() if key in titles)
