"""Checkpoints: saved whole or not at all, the newest whole one found, the optimizer restored bit for bit.

    RUN/checkpoints/step-000100/{adapter.safetensors, state.safetensors, state.json, manifest.json}

A checkpoint is written in a hidden folder beside its place, every file is on the disk before manifest.json
(sizes and digests) is, and only then is the folder renamed. Safetensors and JSON only; no pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lorabooth import durable
from lorabooth.errors import RecipeError, TrainingError
from lorabooth.progress import Reporter

ADAPTER = "adapter.safetensors"
_TENSORS, _FACTS, _MANIFEST = "state.safetensors", "state.json", "manifest.json"
_FILES = (ADAPTER, _TENSORS, _FACTS)
_FORMAT = 1
_HIDDEN = ".unfinished-"
# "-replaced" is where a checkpoint waits for an instant while another of the same step takes its place.
_NAME = re.compile(r"step-(\d{6,})(-replaced)?")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole.

    Attributes:
        folder: where it is.
        step: finished optimizer steps.
        facts: what `save` was given (grad scaler, ...).
    """

    folder: Path
    step: int
    facts: Mapping[str, Any]

    @property
    def adapter(self) -> Path:
        """The adapter's weights at this step."""
        return self.folder / ADAPTER


def save(
    run_folder: Path,
    *,
    step: int,
    adapter_writer: Callable[[Path], None],
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> Checkpoint:
    """Save one checkpoint; a crash at any point leaves all earlier ones whole and this one whole or absent.

    Args:
        run_folder: the run's folder; one process at a time may save into it.
        step: finished optimizer steps.
        adapter_writer: writes the adapter to the path that it is given.
        optimizer: whose state is saved.
        facts: further state as plain JSON values, e.g. the grad scaler's.

    Raises:
        TrainingError: there is no space, or the folder cannot be written. Earlier checkpoints are whole.
    """
    folder = run_folder / "checkpoints"
    final = folder / f"step-{step:06d}"
    unfinished = folder / f"{_HIDDEN}{final.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        _check_space(folder, optimizer)
        unfinished.mkdir()
        _write_files(unfinished, step, adapter_writer, optimizer, facts)
        _put_in_place(unfinished, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise TrainingError(
            f"the checkpoint of step {step} cannot be saved in {folder}: {error}.",
            "Free some space there, or make the folder writable; the same command goes on from the last "
            "checkpoint, which is whole.",
        ) from error
    return Checkpoint(final, step, facts)


def newest(run_folder: Path, reporter: Reporter) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None.

    Torn ones (killed machine, full disk, damaged file) are skipped with a warning; nothing is deleted.
    """
    for step, folder in _listed(run_folder):
        problem = _problem(folder, step)
        if not problem:
            facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))["facts"]
            return Checkpoint(folder, step, facts)
        reporter.warn(f"checkpoint {folder.name} is not whole ({problem}); the one before it is used.")
    return None


def restore(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> int:
    """Put the saved state into a fresh optimizer over the same parameters, bit for bit.

    Hyperparameters (learning rate, weight decay) stay those of the recipe.

    Returns:
        Finished optimizer steps, from which the run goes on.

    Raises:
        RecipeError: the checkpoint is of another optimizer or of other parameters.
    """
    saved = json.loads((checkpoint.folder / _FACTS).read_text(encoding="utf-8"))["optimizer"]
    if saved["outline"] != _outline(optimizer):
        raise RecipeError(
            f"{checkpoint.folder} was saved with another optimizer, other components or another rank "
            f"({saved['outline']['class']}; now {_outline(optimizer)['class']}).",
            "Go on with the recipe in the run's folder, or choose another output folder.",
        )
    tensors = safetensors.torch.load_file(checkpoint.folder / _TENSORS)
    state = {int(index): _unpack(packed, tensors) for index, packed in saved["state"].items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    _page_again(optimizer)
    return checkpoint.step


def rotate(run_folder: Path, keep: int) -> list[Path]:
    """Delete checkpoints that are older than the newest `keep` whole ones.

    Call it after a save. Torn ones do not count, so the only good one is never deleted.

    Args:
        run_folder: the run's folder.
        keep: whole checkpoints to keep; 0 keeps everything.

    Returns:
        The folders that are gone.
    """
    whole, gone = 0, []
    for step, folder in _listed(run_folder):
        if keep and whole >= keep:
            _discard(folder)
            gone.append(folder)
        elif not _problem(folder, step):
            whole += 1
    return gone


def _write_files(
    folder: Path,
    step: int,
    adapter_writer: Callable[[Path], None],
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any],
) -> None:
    tensors: dict[str, Tensor] = {}
    packed = {
        str(index): _pack(state, str(index), tensors)
        for index, state in optimizer.state_dict()["state"].items()
    }
    document = {
        "step": step,
        "facts": dict(facts),
        "optimizer": {"outline": _outline(optimizer), "state": packed},
    }
    adapter_writer(folder / ADAPTER)
    durable.sync_file(folder / ADAPTER)
    durable.write(folder / _TENSORS, safetensors.torch.save(tensors))
    durable.write(folder / _FACTS, json.dumps(document, allow_nan=False).encode())
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in _FILES
    }
    manifest = {"format": _FORMAT, "step": step, "files": files}
    durable.write(folder / _MANIFEST, json.dumps(manifest, indent=1).encode())
    durable.sync_folder(folder)


def _put_in_place(unfinished: Path, final: Path) -> None:
    """Rename; one of the same step (a run that went on from before it) is set aside until then."""
    aside = final.with_name(f"{final.name}-replaced")
    if final.exists():
        if aside.exists():
            _discard(aside)
        final.rename(aside)
    unfinished.rename(final)
    durable.sync_folder(final.parent)
    if aside.exists():
        _discard(aside)


def _listed(run_folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all checkpoints, newest first, one set aside after the one of its step."""
    folder = run_folder / "checkpoints"
    if not folder.is_dir():
        return []
    found = [
        (match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    found.sort(key=lambda pair: (int(pair[0][1]), pair[0][2] is None), reverse=True)
    return [(int(match[1]), path) for match, path in found]


def _problem(folder: Path, step: int) -> str:
    """What is wrong with a checkpoint; "" if it is whole."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT or manifest["step"] != step:
            return f"{_MANIFEST} is of another format or step"
        for name in _FILES:
            expected = manifest["files"][name]
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if _sha256(folder / name) != expected["sha256"]:
                return f"{name} is damaged"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (ValueError, KeyError, TypeError, OSError) as error:
        return f"{_MANIFEST} cannot be read: {error}"
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _discard(folder: Path) -> None:
    """Delete a checkpoint's folder; hidden first, so that a crash half-way leaves no torn checkpoint."""
    hidden = folder.with_name(f"{_HIDDEN}{folder.name}-{os.getpid()}")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _sweep(folder: Path) -> None:
    """Delete what crashed saves left. Only one process saves into a run, so all of it is stale."""
    for leftover in folder.glob(f"{_HIDDEN}step-*"):
        shutil.rmtree(leftover)


def _check_space(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    # The adapter's weights and the optimizer's state; a twentieth and 1 MiB for headers.
    sizes = [t.numel() * t.element_size() for t in (*weights, *_tensors_in(optimizer.state))]
    needed, free = int(sum(sizes) * 1.05) + 2**20, shutil.disk_usage(folder).free
    if free < needed:
        raise TrainingError(
            f"a checkpoint needs {needed / 2**20:.0f} MiB and {folder} has {free / 2**20:.0f} MiB free.",
            "Free some space; the same command goes on from the last checkpoint, which is whole.",
        )


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _tensors_in(member)


def _outline(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What must agree between a saved and a fresh optimizer: its class, components and shapes."""
    return {
        "class": type(optimizer).__name__,
        "groups": [
            {"name": group.get("name", ""), "shapes": [list(p.shape) for p in group["params"]]}
            for group in optimizer.param_groups
        ],
    }


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """State as JSON: tensors go to `tensors` under their path and leave {"tensor": path} behind."""
    if isinstance(value, Tensor):
        # A copy: bitsandbytes shares one quantization map between parameters, safetensors shares nothing.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"map": {key: _pack(member, f"{name}/{key}", tensors) for key, member in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"optimizer state {name} is a {type(value).__name__}, which cannot be saved")


def _unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        # A copy: what safetensors loads may be a view of the file, which rotation deletes.
        return tensors[packed["tensor"]].clone()
    return {key: _unpack(member, tensors) for key, member in packed["map"].items()}


def _page_again(optimizer: torch.optim.Optimizer) -> None:
    """Move restored state of a paged bitsandbytes optimizer back into paged memory.

    Its `load_state_dict` leaves plain device tensors, which would take the memory that paging is to save.
    """
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for key in ("state1", "state2"):
            plain = state.get(key)
            if plain is None:
                continue
            buffer = optimizer.get_state_buffer(parameter, dtype=plain.dtype)  # type: ignore[attr-defined]
            if getattr(buffer, "is_paged", False):
                buffer.copy_(plain)
                state[key] = buffer
