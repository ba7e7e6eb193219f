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
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from lorabooth import durable
from lorabooth.errors import AdapterError, LoraboothError, RecipeError, TrainingError
from lorabooth.progress import Reporter
from lorabooth.training.packed import outline, pack_optimizer, state_bytes, unpack_optimizer

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
        TrainingError: there is no space, the folder cannot be written, or a number is not finite. Earlier
            checkpoints are whole; the message says which is the last.
    """
    folder = run_folder / "checkpoints"
    final = folder / f"step-{step:06d}"
    unfinished = folder / f"{_HIDDEN}{final.name}-{os.getpid()}"
    try:
        durable.make_folder(folder)
        sweep(run_folder)
        _check_space(folder, optimizer)
        unfinished.mkdir()
        _write_files(unfinished, step, adapter_writer, optimizer, facts)
        _put_in_place(unfinished, final)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, (OSError, ValueError, SafetensorError, LoraboothError)):
            raise _not_saved(run_folder, step, error) from error
        raise
    return Checkpoint(final, step, facts)


def newest(run_folder: Path, reporter: Reporter) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None.

    Torn ones (killed machine, full disk, damaged file) are skipped with a warning; nothing is deleted.
    """
    for step, folder in _listed(run_folder):
        problem = _problem(folder, step)
        if not problem:
            return _read(folder, step)
        reporter.warn(f"checkpoint {folder.name} is not whole ({problem}); the one before it is used.")
    return None


def at(run_folder: Path, step: int) -> Checkpoint | None:
    """The whole checkpoint of one step, or None."""
    for number, folder in _listed(run_folder):
        if number == step and not _problem(folder, number):
            return _read(folder, number)
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
    if saved["outline"] != outline(optimizer):
        raise RecipeError(
            f"{checkpoint.folder} was saved with another optimizer, other components or another rank "
            f"({saved['outline']['class']}; now {outline(optimizer)['class']}).",
            "Go on with the recipe in the run's folder, or choose another output folder.",
        )
    unpack_optimizer(saved, safetensors.torch.load_file(checkpoint.folder / _TENSORS), optimizer)
    return checkpoint.step


def sweep(run_folder: Path) -> None:
    """Delete what crashed saves left. Only one process saves into a run, so all of it is stale."""
    for leftover in (run_folder / "checkpoints").glob(f"{_HIDDEN}step-*"):
        shutil.rmtree(leftover)


def checkpoint_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Size of one checkpoint: adapter and optimizer state; before the first step, what they will take."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    size = sum(p.numel() * p.element_size() for p in weights) + state_bytes(optimizer)
    # A twentieth and 1 MiB for headers.
    return int(size * 1.05) + 2**20


def rotate(run_folder: Path, keep: int, spared: Collection[int] = ()) -> list[Path]:
    """Delete checkpoints that are older than the newest `keep` whole ones.

    Call it after a save. Torn ones do not count, so the only good one is never deleted.

    Args:
        run_folder: the run's folder.
        keep: whole checkpoints to keep; 0 keeps everything.
        spared: steps whose checkpoint is kept, whole and however old.

    Returns:
        The folders that are gone.
    """
    if not keep:
        return []
    whole, gone, to_spare = 0, [], set(spared)
    for step, folder in _listed(run_folder):
        is_old = whole >= keep
        if is_old and step not in to_spare:
            _discard(folder)
            gone.append(folder)
        elif not _problem(folder, step):
            whole += 1
            to_spare.discard(step)
    return gone


def _read(folder: Path, step: int) -> Checkpoint:
    facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))["facts"]
    return Checkpoint(folder, step, facts)


def _write_files(
    folder: Path,
    step: int,
    adapter_writer: Callable[[Path], None],
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any],
) -> None:
    packed, tensors = pack_optimizer(optimizer)
    document = {"step": step, "facts": dict(facts), "optimizer": packed}
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


def _check_space(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    needed, free = checkpoint_bytes(optimizer), shutil.disk_usage(folder).free
    if free < needed:
        raise TrainingError(
            f"a checkpoint needs {needed / 2**20:.0f} MiB and {folder} has {free / 2**20:.0f} MiB free",
            f"Free some space on the disk that holds {folder}.",
        )


def _not_saved(run_folder: Path, step: int, error: Exception) -> TrainingError:
    """What stopped a save, whether there is something to go on from, and what to do."""
    folder = run_folder / "checkpoints"
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    reason = error.what if isinstance(error, LoraboothError) else str(error)
    if isinstance(root, OSError):
        reason = root.strerror or str(root)
    if durable.is_full(error):
        fix = f"Free some space on the disk that holds {folder}."
    elif isinstance(error, TrainingError):
        fix = error.fix
    elif isinstance(error, (AdapterError, ValueError)):
        fix = 'Lower optim.lr, or set memory.precision to "bf16" or "fp32".'
    else:
        fix = "Free some space there, or make the folder writable."
    whole = next((path.name for number, path in _listed(run_folder) if not _problem(path, number)), "")
    last = (
        f"The last whole checkpoint is {whole}; the same command goes on from it."
        if whole
        else "There is no whole checkpoint yet; the same command begins with the first step."
    )
    return TrainingError(
        f"the checkpoint of step {step} cannot be saved in {folder}: {reason.rstrip('.')}.", f"{fix} {last}"
    )
