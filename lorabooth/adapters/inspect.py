"""What a weight file is and does, from its header and a few of its tensors: in a second, whatever its size.

Works on adapters of any kind and on base models; what is broken is described as far as it can be read. Needs
numpy, and neither torch nor any model library.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorabooth.adapters import folders, inspect_base, targets
from lorabooth.adapters.findings import by_header
from lorabooth.adapters.gather import FoundModule, from_stored, layout_of
from lorabooth.adapters.inspection import BlockFacts, ComponentFacts, Inspection
from lorabooth.adapters.metadata import Metadata
from lorabooth.adapters.opened import (
    ADAPTER_KINDS,
    OpenedFile,
    family_by_layers,
    gather_all,
    kind_of,
    open_files,
    own_metadata,
)
from lorabooth.adapters.provenance import Provenance, provenance
from lorabooth.adapters.stored import open_adapter
from lorabooth.checkpoints.identify import FAMILY_NAMES
from lorabooth.errors import AdapterError

if TYPE_CHECKING:
    from lorabooth.adapters.norms import Norms

__all__ = ["BlockFacts", "ComponentFacts", "Inspection", "inspect_path"]


def inspect_path(path: Path) -> Inspection:
    """Describe an adapter or a base model: a .safetensors file, or a folder of PEFT's, diffusers' or a run.

    Args:
        path: file or folder.

    Raises:
        AdapterError: absent, unreadable, a pickle, a GGUF, no sound .safetensors file, or a folder that holds
            no weights. What is merely incomplete or broken is described, with `problems`.
    """
    path = Path(path)
    try:
        if path.is_dir() and not _is_adapter_folder(path):
            if (path / "model_index.json").is_file():
                return inspect_base.folder(path)
            if inspect_base.is_component_folder(path):
                return inspect_base.component_folder(path)
        files = open_files(path)
        kind = kind_of(files)
        if kind in ADAPTER_KINDS:
            return _adapter(path, files, kind)
        return inspect_base.file(path, files[0].path, files[0].header)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror or error}.") from error


def _is_adapter_folder(path: Path) -> bool:
    names = (folders.CONFIG_NAME, folders.DIFFUSERS_NAME, folders.RUN_NAME)
    return any((path / name).is_file() for name in names)


def _adapter(path: Path, files: Sequence[OpenedFile], kind: str) -> Inspection:
    from lorabooth.adapters.norms import WITHOUT_NORMS, measure

    own, modules = Metadata(), dict[str, FoundModule]()
    notes, problems = list[str](), list[str]()
    layout = layout_of(files[0].header.entries)
    if kind == "LoRA":
        try:
            adapter = open_adapter(path)
            own, modules, layout = adapter.metadata, from_stored(adapter), adapter.layout
            notes += adapter.notes
        except AdapterError as error:
            problems.append(error.what)
    if not modules:
        gathered = gather_all(files)
        modules = dict(gathered.modules)
        problems = [found.message for found in by_header(files, gathered, kind)] or problems
    norms = measure(modules.values())
    problems += [f"The tensor {key!r} holds NaN or infinity." for key in norms.broken]
    if kind in WITHOUT_NORMS:
        notes.append(f"Norms are left out: the effect of {kind} depends on the base's weights.")
    elif left := _without_norm(modules, norms):
        notes.append(f"The norms of modules of other kinds are left out ({left}).")
    made = provenance(_entries(path, files), own if not problems else own_metadata(files))
    family = made.family or family_by_layers(modules)
    return replace(
        _described(path, files, made, family),
        kind=kind,
        layout=layout,
        variant=_variant(modules.values()),
        modules=len(modules),
        ranks=_ranks(modules.values()),
        targets=targets.count(modules),
        blocks=_blocks(modules.values(), norms),
        sampled=len(norms.values),
        notes=tuple(notes),
        problems=tuple(problems),
    )


def _described(path: Path, files: Sequence[OpenedFile], made: Provenance, family: str) -> Inspection:
    """What holds for adapters of all kinds."""
    entries = {(file.path, key): entry for file in files for key, entry in file.header.entries.items()}
    dtypes: Counter[str] = Counter()
    for (_, key), entry in entries.items():
        if not key.endswith(".alpha"):
            dtypes[entry.dtype] += math.prod(entry.shape)
    return Inspection(
        name=path.name or path.resolve().name,
        is_adapter=True,
        family=family,
        family_name=FAMILY_NAMES.get(family, ""),
        prediction=made.prediction,
        base=made.base,
        trigger_words=made.trigger_words,
        tags=made.tags,
        steps=made.steps,
        facts=dict(made.facts),
        tensors=len(entries),
        parameters=sum(dtypes.values()),
        size_bytes=sum(file.path.stat().st_size for file in files),
        dtypes=dict(dtypes.most_common()),
    )


def _entries(path: Path, files: Sequence[OpenedFile]) -> Mapping[str, str]:
    """String metadata, with what PEFT's configuration says of the base."""
    entries = dict(files[0].header.metadata)
    if path.is_dir():
        config = inspect_base.read_json(files[0].path.parent / folders.CONFIG_NAME)
        if isinstance(base := config.get("base_model_name_or_path"), str):
            entries.setdefault("base_model_name_or_path", base)
    return entries


def _without_norm(modules: Mapping[str, FoundModule], norms: Norms) -> int:
    """Whole modules that were read and whose norm is still not known."""
    read = [modules[name] for name in norms.sampled if name not in norms.values]
    return sum(1 for module in read if not module.missing) - len(norms.broken)


def _variant(modules: Iterable[FoundModule]) -> str:
    kernels = {m.parts["lora_A"].shape[2:] for m in modules if "lora_A" in m.parts}
    return "with 3x3 convolutions (LoCon)" if any(min(kernel, default=1) > 1 for kernel in kernels) else ""


def _ranks(modules: Iterable[FoundModule]) -> tuple[int, int]:
    ranks = [module.rank for module in modules if module.rank]
    return (min(ranks), max(ranks)) if ranks else (0, 0)


def _blocks(modules: Iterable[FoundModule], norms: Norms) -> tuple[BlockFacts, ...]:
    gathered: dict[str, list[FoundModule]] = {}
    for module in modules:
        gathered.setdefault(module.block, []).append(module)
    return tuple(_block(name, gathered[name], norms) for name in sorted(gathered, key=_block_order))


def _block(name: str, modules: Sequence[FoundModule], norms: Norms) -> BlockFacts:
    ranks = _ranks(modules)
    alphas = [m.alpha for m in modules if m.alpha is not None and math.isfinite(m.alpha)]
    values = [norms.values[m.name] for m in modules if m.name in norms.values]
    mean = math.sqrt(sum(value * value for value in values) / len(values)) if values else None
    return BlockFacts(
        name,
        len(modules),
        *ranks,
        min(alphas, default=None),
        max(alphas, default=None),
        len(values),
        mean,
    )


_ORDER = ("conv_in", "time_embedding", "add_embedding", "input_blocks", "down_blocks", "mid", "up_blocks")
_LAST = ("output_blocks", "conv_out", "other", "text_encoder")


def _block_order(name: str) -> tuple[int, str, int]:
    """The order in which a model goes through its blocks."""
    stem, _, number = name.partition(".")
    before = next((i for i, start in enumerate(_ORDER) if name.startswith(start)), None)
    after = next((i for i, start in enumerate(_LAST) if name.startswith(start)), None)
    rank = before if before is not None else len(_ORDER) + (1 + after if after is not None else 0)
    return rank, stem, int(number) if number.isdigit() else -1
