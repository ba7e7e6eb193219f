"""Writing files so that a crash leaves the old or the new content, never a part.

The pattern everywhere: write beside the target, fsync, rename over it, fsync the folder.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorabooth.errors import RecipeError, TrainingError

_TEMPORARY = re.compile(r"\.(.+)\.(\d+)\.(tmp|old)", re.DOTALL)


def write(path: Path, *chunks: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, *chunks: bytes) -> None:
    """Give a file new content in one step; several processes may do so at once.

    Raises:
        OSError: it cannot be written; the old content is whole.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(beside, *chunks)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def save(path: Path, *chunks: bytes) -> None:
    """As `replace`, for files that a user asked for.

    Raises:
        RecipeError: the file cannot be written there.
        TrainingError: the disk is full.
    """
    with user_errors(path):
        replace(path, *chunks)


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A path beside a target, for a file or a folder that is put in its place when the block ends well.

    A file comes in one step; a folder that is there already is moved aside, and back if that fails. After an
    exception, and after Ctrl-C, nothing is left; what a killed process left is removed by the next one.

    Args:
        target: where the result goes; what is there is replaced. Its parent folder must exist.

    Raises:
        OSError: as the file system does.
    """
    sweep(target)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        yield beside
        if beside.is_dir():
            sync_tree(beside)
            if target.exists():
                target.rename(aside)
            try:
                beside.rename(target)
            except OSError:
                if aside.exists():
                    aside.rename(target)
                raise
        else:
            sync_file(beside)
            beside.replace(target)
        sync_folder(target.parent)
    finally:
        _remove(beside)
        _remove(aside)


def sweep(target: Path) -> None:
    """Remove what processes that are gone left beside a target; put back a folder that was moved aside."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)\.(tmp|old)")
    if not target.parent.is_dir():
        return
    for path in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or _is_alive(int(match[1])):
            continue
        if match[2] == "old" and not target.exists():
            path.rename(target)
        else:
            _remove(path)


def is_temporary(name: str) -> bool:
    """Whether a file's or folder's name is one that this module gives to what is not finished."""
    return _TEMPORARY.fullmatch(name) is not None


def sweep_temporaries(folder: Path) -> None:
    """`sweep` for every target in a folder (not in its subfolders)."""
    if not folder.is_dir():
        return
    found = [_TEMPORARY.fullmatch(path.name) for path in folder.iterdir()]
    for name in sorted({match[1] for match in found if match}):
        sweep(folder / name)


def make_folder(folder: Path) -> None:
    """Make a folder with its parents, so that a power cut does not take the new entries back.

    Raises:
        OSError: it cannot be made.
    """
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.absolute().parent)


def is_full(error: BaseException | None) -> bool:
    """Whether a full disk or a used up quota is behind an exception, or behind one it was raised from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            return True
        error = error.__cause__
    return False


@contextmanager
def user_errors(path: Path) -> Iterator[None]:
    """What the file system refuses, as a message to the user.

    Raises:
        RecipeError: the path cannot be written.
        TrainingError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise TrainingError(
                f"No space left to write {path}.", "Free some disk space and run the command again."
            ) from error
        raise RecipeError(
            f"{path} cannot be written: {error.strerror or error}.", "Choose another output."
        ) from error


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        TrainingError: less than `needed_bytes` and a twentieth more are free.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes * 21 // 20:
        raise TrainingError(
            f"{folder}: {free_bytes / 2**30:.2f} GiB are free, {needed_bytes / 2**30:.2f} GiB are needed.",
            "Free some disk space, or write to another disk.",
        )


def _is_alive(pid: int) -> bool:
    import psutil  # type: ignore[import-untyped]

    return bool(psutil.pid_exists(pid))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Wait until a file that someone else wrote is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the folder's entries are on the disk. Windows has no such call and needs none."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until every file in a folder, and the folder itself, is on the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file() and not path.is_symlink():
            sync_file(path)
    sync_folder(folder)
