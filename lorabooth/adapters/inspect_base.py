"""What a base model is, or a part of one: a single file in any layout, a diffusers folder, a part's folder.

Told from headers and configs; of the tensors themselves only a few pieces are read, to see broken numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorabooth.adapters.inspection import ComponentFacts, Inspection
from lorabooth.adapters.provenance import clean, provenance
from lorabooth.checkpoints.header import PICKLE_SUFFIXES, Entry, Header, read_header
from lorabooth.checkpoints.identify import (
    COMPONENT_PREFIXES,
    FAMILY_NAMES,
    Identity,
    component_of,
    identify,
    quantization,
)
from lorabooth.errors import AdapterError

MAX_CONFIG_BYTES = 10_000_000
_SAMPLED_TENSORS = 48
_SAMPLED_PIECE_BYTES = 65_536
_DENOISERS = ("unet", "transformer", "prior", "decoder")
_WEIGHTED = (*_DENOISERS, "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")
_VARIANT = re.compile(r"^[\w-]+\.(\w+)(?:-\d{5}-of-\d{5})?\.safetensors$")


@dataclass(frozen=True)
class _Weights:
    """A component's weight files: those of its first variant, and what other variants there are."""

    headers: tuple[tuple[Path, Header], ...]
    variants: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def entries(self) -> dict[str, Entry]:
        return {key: entry for _, header in self.headers for key, entry in header.entries.items()}


def file(shown: Path, path: Path, header: Header) -> Inspection:
    """Describe a .safetensors file that is no adapter.

    Args:
        shown: what the user asked for: the file, or the folder that holds it.
        path: the file.
        header: its header.
    """
    entries = header.entries
    identity = identify({key: entry.shape for key, entry in entries.items()})
    made = provenance(header.metadata)
    parts: dict[str, dict[str, Entry]] = {}
    for key, entry in entries.items():
        parts.setdefault(_part(key, identity), {})[key] = entry
    if identity.kind != "checkpoint":
        parts = {_alone(identity): dict(entries)}
    order = {name: i for i, name in enumerate(dict.fromkeys(COMPONENT_PREFIXES.values()))}
    components = [_component(name, parts[name]) for name in sorted(parts, key=lambda n: order.get(n, 99))]
    family = identity.family or made.family
    said = identity.prediction or made.prediction or _said_beside(path)
    return replace(
        _summary(shown, identity, family, components, [(path, header)]),
        prediction=said,
        facts=dict(made.facts),
        trigger_words=made.trigger_words,
        ema="denoiser EMA" in parts,
        problems=_broken([(path, header)]),
        notes=_notes(identity),
    )


def folder(path: Path) -> Inspection:
    """Describe a diffusers folder: every component that its model_index.json names."""
    index = read_json(path / "model_index.json")
    problems: list[str] = [] if index else ["model_index.json is not readable."]
    components, found, identity = list[ComponentFacts](), list[tuple[Path, Header]](), Identity()
    for name, entry in index.items():
        if not isinstance(entry, list) or len(entry) != 2 or entry == [None, None]:
            continue
        if not (path / name).is_dir():
            problems.append(f"The folder {name} is missing, which model_index.json names.")
            continue
        weights = _weights(path / name)
        problems += [f"{name}: {problem}" for problem in weights.problems]
        if not weights.headers:
            if name in _WEIGHTED and not weights.problems:
                problems.append(f"{name}: there are no .safetensors weights.")
            continue
        found += weights.headers
        facts = _component(name, weights.entries, str(entry[1]), weights)
        components.append(_with_config(facts, read_json(path / name / "config.json")))
        if name in _DENOISERS and not identity.kind:
            identity = identify({key: entry.shape for key, entry in weights.entries.items()})
    identity = replace(identity, kind="checkpoint", layout="diffusers")
    said = str(read_json(path / "scheduler" / "scheduler_config.json").get("prediction_type", ""))
    pipeline = clean(str(index.get("_class_name", "")))
    return replace(
        _summary(path, identity, identity.family, components, found),
        prediction=clean(said) or identity.prediction,
        facts={"pipeline": pipeline} if pipeline else {},
        ema=any(facts.name.endswith("_ema") for facts in components),
        notes=_notes(identity),
        problems=(*problems, *_broken(found)),
    )


def component_folder(path: Path) -> Inspection:
    """Describe the folder of one component, such as `unet` of a diffusers folder."""
    weights = _weights(path)
    config = read_json(path / "config.json")
    identity = identify({key: entry.shape for key, entry in weights.entries.items()})
    named = str(config.get("_class_name") or next(iter(config.get("architectures") or []), ""))
    facts = _component(path.name or path.resolve().name, weights.entries, named, weights)
    return replace(
        _summary(path, identity, identity.family, [_with_config(facts, config)], weights.headers),
        prediction=identity.prediction,
        problems=(*weights.problems, *_broken(weights.headers)),
    )


def is_component_folder(path: Path) -> bool:
    """Whether a folder holds one component's config and weights."""
    config = read_json(path / "config.json")
    return bool(config.get("_class_name") or config.get("architectures")) and any(path.glob("*.safetensors"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is none."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            return {}
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _notes(identity: Identity) -> tuple[str, ...]:
    if not identity.kind:
        return ("Names and shapes are of no kind that is known here.",)
    if not identity.certain:
        return ("Its widths are of no published model; the family is the one whose layers have such shapes.",)
    return ()


def _part(key: str, identity: Identity) -> str:
    name = component_of(key)
    if name == "text_encoder" and identity.family == "sdxl-refiner":
        return "text_encoder_2"
    return name


def _alone(identity: Identity) -> str:
    """What the table calls a file that is a single component."""
    names = {"UNet": "denoiser", "transformer": "denoiser", "VAE": "vae", "text encoder": "text_encoder"}
    return names.get(identity.kind, identity.kind or "tensors")


def _component(
    name: str, entries: Mapping[str, Entry], class_name: str = "", weights: _Weights | None = None
) -> ComponentFacts:
    dtypes: Counter[str] = Counter()
    for entry in entries.values():
        dtypes[entry.dtype] += math.prod(entry.shape)
    return ComponentFacts(
        name=name,
        class_name=clean(class_name),
        tensors=len(entries),
        parameters=sum(dtypes.values()),
        size_bytes=sum(entry.end - entry.begin for entry in entries.values()),
        dtypes=dict(dtypes.most_common()),
        quantization=quantization(entries),
        variants=weights.variants if weights else (),
        files=len(weights.headers) if weights else 1,
    )


def _with_config(facts: ComponentFacts, config: Mapping[str, Any]) -> ComponentFacts:
    """Quantization as a config tells it, where the tensors do not."""
    told = config.get("quantization_config")
    if facts.quantization or not isinstance(told, dict):
        return facts
    return replace(facts, quantization=clean(str(told.get("quant_method", "as its config says"))))


def _summary(
    shown: Path,
    identity: Identity,
    family: str,
    components: Sequence[ComponentFacts],
    files: Sequence[tuple[Path, Header]],
) -> Inspection:
    dtypes: Counter[str] = Counter()
    for component in components:
        dtypes.update(component.dtypes)
    return Inspection(
        name=shown.name or shown.resolve().name,
        kind=identity.kind,
        family=family,
        family_name=FAMILY_NAMES.get(family, ""),
        layout=identity.layout,
        variant=identity.variant,
        tensors=sum(component.tensors for component in components),
        parameters=sum(component.parameters for component in components),
        size_bytes=sum(path.stat().st_size for path, _ in files),
        dtypes=dict(dtypes.most_common()),
        quantization=", ".join(dict.fromkeys(c.quantization for c in components if c.quantization)),
        components=tuple(components),
    )


def _weights(directory: Path) -> _Weights:
    """The weight files of a folder: full precision first, other variants named."""
    sets: dict[str, list[Path]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        match = _VARIANT.match(path.name)
        sets.setdefault(match[1] if match else "", []).append(path)
    problems = []
    headers: list[tuple[Path, Header]] = []
    variant = min(sets, default="")
    for path in sets.get(variant, []):
        try:
            headers.append((path, read_header(path)))
        except AdapterError as error:
            problems.append(error.what)
    if not sets and any(path.suffix in PICKLE_SUFFIXES for path in directory.glob("*")):
        problems.append("its weights are a pickled checkpoint, which is never opened.")
    for index in sorted(directory.glob("*.safetensors.index*.json")):
        named = read_json(index).get("weight_map", {})
        missing = sorted({str(name) for name in named.values() if not (directory / str(name)).is_file()})
        if missing:
            problems.append(f"{len(missing)} shards are missing, the first is {clean(missing[0])}.")
    others = tuple(name or "full precision" for name in sorted(sets) if name != variant)
    return _Weights(tuple(headers), others, tuple(problems))


def _said_beside(path: Path) -> str:
    """Prediction type from configs beside a single file: lorabooth's folder, or the original .yaml."""
    said = read_json(path.with_suffix("") / "scheduler" / "scheduler_config.json").get("prediction_type", "")
    yaml = path.with_suffix(".yaml")
    if not said and yaml.is_file() and yaml.stat().st_size < MAX_CONFIG_BYTES:
        text = yaml.read_text("utf-8", errors="replace")
        said = "v_prediction" if re.search(r"""parameterization:\s*["']?v["']?\s*$""", text, re.M) else ""
    return clean(str(said))


def _broken(files: Sequence[tuple[Path, Header]]) -> tuple[str, ...]:
    """Sentences on tensors that hold NaN or infinity, among a few of each file."""
    from lorabooth.adapters.norms import broken_of

    count = max(2, _SAMPLED_TENSORS // max(1, len(files)))
    out: list[str] = []
    for path, header in files:
        bad = broken_of(path, header.data_start, header.entries, count, _SAMPLED_PIECE_BYTES)
        out += [f"The tensor {key!r} in {path.name} holds NaN or infinity." for key in bad]
    return tuple(out)
