"""Adapters as they lie on the disk: a file, a PEFT folder or a run folder, opened by their headers alone.

Opening reads names, shapes and alphas; factors are read one by one when they are asked for. Needs no torch
until then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorabooth.adapters import formats, layouts, lora_config, names
from lorabooth.adapters.family import family_from_metadata, family_of
from lorabooth.adapters.metadata import Metadata
from lorabooth.checkpoints.header import Entry, Header, read_header
from lorabooth.checkpoints.tensors import FLOAT_DTYPES, read_scalar, read_tensor
from lorabooth.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

MAX_RANK = 4096


@dataclass(frozen=True, slots=True)
class StoredFactor:
    """One factor in a file.

    Attributes:
        path: the file.
        key: the tensor's name in it.
        entry: its dtype, its shape and its span.
        data_start: offset of the file's data part, in bytes.
        rows: [begin, end) where the factor is only these rows of the tensor.
        swapped: its two halves of rows are stored in the other order.
    """

    path: Path
    key: str
    entry: Entry
    data_start: int
    rows: tuple[int, int] | None
    swapped: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the factor."""
        if self.rows is None:
            return self.entry.shape
        return (self.rows[1] - self.rows[0], *self.entry.shape[1:])

    def read(self) -> Tensor:
        """The factor in the file's dtype, on the CPU.

        Raises:
            AdapterError: the file cannot be read any more.
        """
        try:
            found = read_tensor(self.path, self.data_start, self.entry, self.rows)
        except OSError as error:
            raise AdapterError(f"The adapter file {self.path} cannot be read: {error}.") from error
        return found.roll(found.shape[0] // 2, 0) if self.swapped else found


@dataclass(frozen=True, slots=True)
class StoredModule:
    """One module's adapter in a file: effect `strength * alpha / rank * up @ down`.

    Attributes:
        rank: inner dimension.
        alpha: as stored, or as assumed (see StoredAdapter.notes).
        down: lora_A [r,in] or [r,in,k,k].
        up: lora_B [out,r] or [out,r,1,1].
    """

    rank: int
    alpha: float
    down: StoredFactor
    up: StoredFactor


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """An adapter on the disk.

    Attributes:
        path: as it was given: a file or a folder.
        layout: "kohya", "diffusers" or "peft".
        modules: canonical module name -> what is stored of it.
        metadata: as far as the file has it; rank, alpha and family are always filled in.
        entries: the file's own string metadata, unchanged (the first file's, of several).
        configs: component -> LoRA configuration of diffusers' or PEFT's, where there is one.
        notes: what had to be assumed, for the user.
    """

    path: Path
    layout: str
    modules: Mapping[str, StoredModule]
    metadata: Metadata
    entries: Mapping[str, str]
    configs: Mapping[str, Mapping[str, object]]
    notes: tuple[str, ...]

    @property
    def family(self) -> str:
        """Of base models it fits, "" when it cannot be told."""
        return self.metadata.family

    @property
    def components(self) -> tuple[str, ...]:
        """Components that it adapts, in order."""
        return tuple(dict.fromkeys(names.split_module(module)[0] for module in self.modules))

    def tensors(self) -> dict[str, Tensor]:
        """Canonical tensors: factors in the file's dtypes, alphas [] float32, all on the CPU.

        Raises:
            AdapterError: unreadable, or NaN or infinity in them.
        """
        import torch

        out: dict[str, Tensor] = {}
        for module, stored in self.modules.items():
            out[f"{module}.lora_A"] = stored.down.read()
            out[f"{module}.lora_B"] = stored.up.read()
            out[f"{module}.alpha"] = torch.tensor(stored.alpha, dtype=torch.float32)
        formats.require_finite(out, self.path.name)
        return out


def open_adapter(path: Path, *, component: str = "denoiser", config: str = "") -> StoredAdapter:
    """Open an adapter: a .safetensors file, a folder of PEFT's or diffusers', or a run folder.

    Args:
        path: file or folder.
        component: whose adapter a file in PEFT's layout is (it does not say), unless its names tell.
        config: text of PEFT's adapter_config.json, for such a file alone.

    Raises:
        AdapterError: absent, unreadable, pickled, broken, or no plain LoRA.
    """
    from lorabooth.adapters import folders

    path = Path(path)
    if path.is_dir():
        return folders.open_folder(path)
    if not config and path.name == folders.WEIGHTS_NAME and path.with_name(folders.CONFIG_NAME).is_file():
        return replace(folders.open_folder(path.parent), path=path)  # one of PEFT's, given by its weights
    return open_file(path, component=component, config=config)


def open_file(path: Path, *, component: str = "denoiser", config: str = "") -> StoredAdapter:
    """As `open_adapter`, of one file."""
    header = read_header(path)
    layout = layouts.detect(header.entries)
    _check_numbers(path.name, header)
    if layout == "peft":
        component = layouts.peft_component(header.entries, header.metadata, component)
    shapes = {key: entry.shape for key, entry in header.entries.items()}
    parts = formats.locate(shapes, layout, component, header.metadata)
    entries = {**header.metadata, "adapter_config": config} if config else header.metadata
    configs = lora_config.parse(layout, entries, component)
    factors = {
        name: StoredFactor(
            path, part.key, header.entries[part.key], header.data_start, part.rows, part.swapped
        )
        for name, part in parts.items()
    }
    modules, notes = formats.complete(
        {name: factor.shape for name, factor in factors.items()}, _alphas(path, header, parts), configs
    )
    stored = {
        module: StoredModule(rank, alpha, factors[f"{module}.lora_A"], factors[f"{module}.lora_B"])
        for module, (rank, alpha) in modules.items()
    }
    metadata = completed(Metadata.from_dict(header.metadata), stored, header.metadata)
    return StoredAdapter(path, layout, stored, metadata, header.metadata, configs, notes)


def completed(
    metadata: Metadata, modules: Mapping[str, StoredModule], entries: Mapping[str, str]
) -> Metadata:
    """Metadata with the most frequent rank and alpha of the denoiser, and the family if it was not said.

    Shapes tell the family; where they leave it open, what other tools wrote into `entries` does.
    """
    denoiser = [m for name, m in modules.items() if name.startswith("denoiser.")] or list(modules.values())
    values = [(module.rank, module.alpha) for module in denoiser]
    rank, alpha = Counter(values).most_common(1)[0][0]
    shapes = {name: (module.down.shape, module.up.shape) for name, module in modules.items()}
    family = metadata.family or family_of(shapes) or family_from_metadata(entries)
    return replace(metadata, rank=rank, alpha=alpha, family=family)


def _check_numbers(name: str, header: Header) -> None:
    for key, entry in header.entries.items():
        if entry.dtype not in FLOAT_DTYPES and len(entry.shape) > 0 and entry.shape != (1,):
            raise AdapterError(
                f"{name}: tensor {key!r} has dtype {entry.dtype}; adapters hold floating point numbers."
            )
        if len(entry.shape) > 1 and min(entry.shape[:2]) > MAX_RANK:
            raise AdapterError(f"{name}: tensor {key!r} has a rank above {MAX_RANK} ({list(entry.shape)}).")


def _alphas(path: Path, header: Header, parts: Mapping[str, formats.Part]) -> dict[str, float]:
    """Canonical module -> alpha, of those that have a tensor; NaN where it is no single number."""
    wanted = {name.removesuffix(".alpha"): part for name, part in parts.items() if name.endswith(".alpha")}
    out: dict[str, float] = {}
    for module, value in zip(wanted, _scalars(path, header, [p.key for p in wanted.values()]), strict=True):
        out[module] = float("nan") if value is None else value
    return out


def _scalars(path: Path, header: Header, keys: list[str]) -> Iterator[float | None]:
    with path.open("rb", buffering=0) as file:
        for key in keys:
            yield read_scalar(file.fileno(), header.data_start, header.entries[key])
