"""What the string metadata of a weight file says of its making, whoever wrote it.

Read are lorabooth's own entries, kohya's (sd-scripts `train_network.py`: `ss_...`), ai-toolkit's,
OneTrainer's and Stability AI's ModelSpec 1.0. All of it is hearsay from an unknown file: texts are cut and
cleaned of control characters, and nothing that does not parse is an error.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lorabooth.adapters.family import family_from_metadata
from lorabooth.adapters.metadata import Metadata

Entries = Mapping[str, str]

MAX_TEXT = 160
"""Longer texts are cut, in characters."""
TOP_TAGS = 8
_MAX_JSON_CHARS = 5_000_000

_TRIGGERS = (
    "modelspec.trigger_phrase",
    "ss_trigger_words",
    "trigger_word",
    "trigger_words",
    "trigger_phrase",
    "instance_prompt",
)
_BASES = ("ss_sd_model_name", "ss_base_model_version", "base_model", "base_model_name_or_path")
_FACTS = MappingProxyType(
    {
        "title": ("modelspec.title", "ss_output_name"),
        "author": ("modelspec.author",),
        "license": ("modelspec.license",),
        "architecture": ("modelspec.architecture",),
        "network": ("ss_network_module",),
        "network arguments": ("ss_network_args",),
        "network dim": ("ss_network_dim",),
        "network alpha": ("ss_network_alpha",),
        "epochs": ("ss_epoch", "ss_num_epochs"),
        "learning rate": ("ss_learning_rate",),
        "UNet learning rate": ("ss_unet_lr",),
        "text encoder learning rate": ("ss_text_encoder_lr",),
        "schedule": ("ss_lr_scheduler",),
        "optimizer": ("ss_optimizer", "ss_optimizer_type"),
        "batch size": ("ss_total_batch_size", "ss_batch_size_per_device"),
        "resolution": ("ss_resolution", "modelspec.resolution"),
        "photos": ("ss_num_train_images",),
        "class images": ("ss_num_reg_images",),
        "precision": ("ss_mixed_precision",),
        "clip skip": ("ss_clip_skip",),
        "noise offset": ("ss_noise_offset",),
        "min SNR gamma": ("ss_min_snr_gamma",),
        "comment": ("ss_training_comment", "modelspec.description"),
    }
)
# Written by lorabooth for other programs; said better by its own entries.
_OURS_TOO = frozenset({"network", "network dim", "network alpha", "title", "architecture"})
_NOTHING = frozenset({"", "None", "null", "{}", "[]", "0", "0.0"})
_PREDICTIONS = MappingProxyType(
    {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction", "flow": "flow"}
)


@dataclass(frozen=True)
class Provenance:
    """What a file says of itself; empty where it says nothing.

    Attributes:
        family: of base models.
        base: name or hub id of the base it was trained on.
        trigger_words: phrases that call the subject.
        tags: the most frequent caption tags, with how often.
        steps: optimizer steps.
        prediction: "epsilon", "v_prediction" or "flow".
        facts: label -> value, of training and authorship.
    """

    family: str = ""
    base: str = ""
    trigger_words: tuple[str, ...] = ()
    tags: tuple[tuple[str, int], ...] = ()
    steps: int = 0
    prediction: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


def provenance(entries: Entries, own: Metadata | None = None) -> Provenance:
    """What metadata says.

    Args:
        entries: of a file's header, or of PEFT's configuration.
        own: what lorabooth's entries among them say; it goes before all others.
    """
    own = own or Metadata()
    base = own.base_id or _first(entries, _BASES)
    steps = own.steps or _number(_first(entries, ("ss_steps",))) or _info(entries).get("step", 0)
    return Provenance(
        own.family or family_from_metadata(entries),
        clean(base),
        tuple(map(clean, own.trigger_words)) or _triggers(entries),
        _tags(entries),
        steps if isinstance(steps, int) and not isinstance(steps, bool) else 0,
        _prediction(entries),
        _facts(entries, own),
    )


def clean(text: str) -> str:
    """One line of printable characters, cut to MAX_TEXT: metadata must not steer a terminal."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text[: 8 * MAX_TEXT]).split())
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 3] + "..."


def _first(entries: Entries, keys: tuple[str, ...]) -> str:
    """The first of these entries that says something."""
    values = (entries.get(key, "").strip() for key in keys)
    return next((value for value in values if value not in _NOTHING), "")


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 12 else 0


def _info(entries: Entries) -> Mapping[str, Any]:
    """What ai-toolkit writes: step and epoch."""
    table = _json(entries.get("training_info", ""))
    return table if isinstance(table, dict) else {}


def _json(text: str) -> Any:
    if not text or len(text) > _MAX_JSON_CHARS:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _triggers(entries: Entries) -> tuple[str, ...]:
    text = _first(entries, _TRIGGERS)
    listed = _json(text) if text.startswith("[") else None
    words = listed if isinstance(listed, list) else text.split(",")
    return tuple(found for word in words if isinstance(word, str) and (found := clean(word)))[:TOP_TAGS]


def _tags(entries: Entries) -> tuple[tuple[str, int], ...]:
    """Kohya's `ss_tag_frequency`: folder -> tag -> count."""
    counts: Counter[str] = Counter()
    folders = _json(entries.get("ss_tag_frequency", ""))
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int):
                counts[clean(tag)] += count
    return tuple((tag, count) for tag, count in counts.most_common(TOP_TAGS) if tag)


def _prediction(entries: Entries) -> str:
    said = _PREDICTIONS.get(entries.get("modelspec.prediction_type", "").lower(), "")
    return said or ("v_prediction" if entries.get("ss_v_parameterization") == "True" else "")


def _facts(entries: Entries, own: Metadata) -> dict[str, str]:
    facts = {
        label: clean(text)
        for label, keys in _FACTS.items()
        if (text := _first(entries, keys)) and not (own.lorabooth_version and label in _OURS_TOO)
    }
    if isinstance(epoch := _info(entries).get("epoch"), int) and "epochs" not in facts:
        facts["epochs"] = str(epoch)
    made_by = _json(entries.get("software", ""))
    if any(key.startswith("lorabooth.") for key in entries):
        facts["made by"] = clean(f"lorabooth {own.lorabooth_version}").strip()
        facts.pop("network", None)  # kohya's entry, there for other tools
    elif isinstance(made_by, dict) and isinstance(made_by.get("name"), str):
        facts["made by"] = clean(f"{made_by['name']} {made_by.get('version', '')}")
    elif "ot_branch" in entries or "ot_revision" in entries:
        facts["made by"] = "OneTrainer"
    elif any(key.startswith("ss_") for key in entries):
        facts["made by"] = "kohya's sd-scripts, or a tool that writes its metadata"
    return facts
