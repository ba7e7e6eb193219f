"""An adapter in another layout: names and metadata change, the numbers do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabooth import durable
from lorabooth.adapters import adapter_folder, formats, fused, layouts, lora_config, names, stash
from lorabooth.adapters import file as adapter_file
from lorabooth.adapters.folders import CONFIG_NAME, WEIGHTS_NAME
from lorabooth.adapters.layout_files import Files, Job, Weights, files_of
from lorabooth.adapters.stored import StoredAdapter, open_adapter
from lorabooth.errors import AdapterError
from lorabooth.progress import Reporter, Silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Hashes of the tensors' bytes: kohya's, ModelSpec's.
_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What was converted into what.

    Attributes:
        source: the adapter that was read, a file or a folder.
        layout: that it is in.
        family: of base models, "" when it cannot be told.
        components: that it adapts.
        n_modules: number of adapted modules.
        ranks: smallest and largest.
        dtypes: of its factors, by safetensors' names.
        to: layout that was written.
        out: file or folder that was written.
        files: in it.
        n_bytes: of these together.
        warnings: sentences for the user.
    """

    source: Path
    layout: str
    family: str
    components: tuple[str, ...]
    n_modules: int
    ranks: tuple[int, int]
    dtypes: tuple[str, ...]
    to: str
    out: Path
    files: tuple[Path, ...]
    n_bytes: int
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {key: getattr(self, key) for key in self.__dataclass_fields__}
        paths = {"source": str(self.source), "out": str(self.out), "files": [str(f) for f in self.files]}
        return plain | paths


def convert_file(
    file: Path,
    out: Path,
    *,
    to: str,
    overwrite: bool = False,
    level_alphas: bool = False,
    dtype: torch.dtype | None = None,
    family: str = "",
    reporter: Reporter | None = None,
) -> ConvertReport:
    """Write an adapter in another layout. A bijection: converted back it has the same tensors and metadata.

    Args:
        file: an adapter of any layout, a file or a folder.
        out: a file if it ends in .safetensors, else a folder, in which files have the layout's usual names.
        to: "kohya", "diffusers" or "peft".
        overwrite: replace `out`, if it is an adapter; never the input.
        level_alphas: give all modules of a component one alpha, see `formats.level_alphas`.
        dtype: of the factors; None keeps each tensor's.
        family: decides kohya's names, if the adapter does not tell: "sd1", "sd2", "sdxl", "sd3", "flux".
        reporter: progress and warnings.

    Raises:
        AdapterError: no readable adapter, not finite, a layout that cannot hold it, or an output that exists.
        RecipeError: the output cannot be written.
        TrainingError: the disk is full.
    """
    reporter = reporter or Silent()
    file, out = Path(file), Path(out)
    if to not in layouts.LAYOUTS:
        raise AdapterError(f"{to!r} is not a known layout ({', '.join(layouts.LAYOUTS)}).")
    adapter = open_adapter(file)
    adapter_folder.check(out, _inputs(adapter), overwrite=overwrite)
    tensors = _read(adapter, reporter)
    if level_alphas:
        tensors = formats.level_alphas(tensors)
    if dtype is not None:
        tensors = _cast(tensors, dtype)
    job = _job(adapter, out, to, family, kept=dtype is None and not level_alphas)
    files = files_of(tensors, to, job)
    warnings = (*adapter.notes, *(_misread_by_diffusers(tensors) if to == "kohya" else ()))
    for warning in warnings:
        reporter.warn(warning)
    written = _write(out, files)
    ranks = [module.down.shape[0] for module in adapter.modules.values()]
    return ConvertReport(
        source=file,
        layout=adapter.layout,
        family=job.family,
        components=tuple(name for name in names.COMPONENTS if name in adapter.components),
        n_modules=len(adapter.modules),
        ranks=(min(ranks), max(ranks)),
        dtypes=tuple(sorted({module.up.entry.dtype for module in adapter.modules.values()})),
        to=to,
        out=out,
        files=written,
        n_bytes=sum(path.stat().st_size for path in written),
        warnings=warnings,
    )


def _job(adapter: StoredAdapter, out: Path, to: str, family: str, *, kept: bool) -> Job:
    restored, left = stash.turn(stash.records_in(adapter.entries), stash.record_of(adapter), to)
    entries = {key: value for key, value in adapter.entries.items() if key not in stash.OWNED}
    if not kept:
        entries = {key: value for key, value in entries.items() if key not in _HASHES}
    family = family or adapter.family
    family = family or (restored.kohya_family if restored else "")
    path = adapter.path.resolve()
    name = path.name if path.is_dir() else path.stem
    return Job(out, f"{name}.safetensors", family, restored, {**entries, **stash.entry(left)}, kept)


def _inputs(adapter: StoredAdapter) -> set[Path]:
    """Files that the adapter lies in, and the folder if it was given as one."""
    weights = {factor.path for module in adapter.modules.values() for factor in (module.down, module.up)}
    configs = {path.with_name(CONFIG_NAME) for path in weights if path.name == WEIGHTS_NAME}
    return weights | configs | {adapter.path}


def _read(adapter: StoredAdapter, reporter: Reporter) -> dict[str, Tensor]:
    """Canonical tensors, those of FLUX's and SD3's layers as they were before they were put together."""
    import torch

    out: dict[str, Tensor] = {}
    with reporter.task(f"Reading {adapter.path.name}", len(adapter.modules), "module") as task:
        for name, module in adapter.modules.items():
            out[f"{name}.lora_A"] = module.down.read()
            out[f"{name}.lora_B"] = module.up.read()
            out[f"{name}.alpha"] = torch.tensor(module.alpha, dtype=torch.float32)
            task.advance()
    formats.require_finite(out, adapter.path.name)
    together = [name for name, module in adapter.modules.items() if module.up.rows is not None]
    return fused.separated(out, adapter.entries, together)


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Factors in another dtype.

    Raises:
        AdapterError: its range is too small for them.
    """
    out = {key: value if key.endswith(".alpha") else value.to(dtype) for key, value in tensors.items()}
    bad = [key for key, value in out.items() if not bool(value.isfinite().all())]
    if bad:
        raise AdapterError(
            f"{len(bad)} of {len(out)} tensors hold numbers that are too large for {dtype}, e.g. {bad[0]!r}.",
            "Use --dtype bf16 or fp32.",
        )
    return out


def _misread_by_diffusers(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What diffusers (0.42) does not read in kohya's layout as it is meant; ComfyUI and A1111 do."""
    modules = formats.ranks_and_alphas(tensors)
    out = []
    for component in lora_config.owners(modules):
        own = _of(modules, component)
        found = Counter(alpha for _, alpha in own.values())
        if len(found) > 1:
            common, count = found.most_common(1)[0]
            out.append(
                f"{len(own) - count} modules of {component} have another alpha than the other {count} "
                f"({common:g}). ComfyUI and A1111 read each one's, but diffusers (0.42) gives attention "
                "layers the common one. --level-alphas folds the difference into lora_B."
            )
        attention = [path for path in own if ".self_attn." in path]
        if component.startswith("text_encoder") and attention and not any("out_proj" in p for p in attention):
            out.append(
                f"{component}'s attention is adapted without any out_proj: diffusers (0.42) refuses that or "
                "leaves it out in kohya's layout. ComfyUI and A1111 read it; it itself does in its own."
            )
    return tuple(out)


def _of(modules: Mapping[str, tuple[int, float]], component: str) -> dict[str, tuple[int, float]]:
    split = {names.split_module(module): value for module, value in modules.items()}
    return {path: value for (owner, path), value in split.items() if owner == component}


def _write(out: Path, files: Files) -> tuple[Path, ...]:
    """Write a file, or a folder that is whole or not there."""
    n_bytes = sum(_size(content) for content in files.values())
    durable.require_space(out.parent, n_bytes)
    with durable.user_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    if adapter_folder.is_file(out):
        (content,) = files.values()
        assert isinstance(content, Weights)
        adapter_file.save_safetensors(out, content.tensors, content.entries)
        return (out,)
    with durable.user_errors(out), durable.staged(out) as beside:
        for name, content in files.items():
            target = beside / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Weights):
                durable.write(target, *adapter_file.chunks(content.tensors, content.entries))
            else:
                durable.write(target, content.encode())
    return tuple(out / name for name in files)


def _size(content: Weights | str) -> int:
    if isinstance(content, str):
        return len(content.encode())
    return sum(tensor.numel() * tensor.element_size() for tensor in content.tensors.values())
