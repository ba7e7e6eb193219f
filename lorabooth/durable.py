"""Writing files so that a crash leaves the old or the new content, never a part.

The pattern everywhere: write beside the target, fsync, rename over it, fsync the folder.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from lorabooth.errors import RecipeError, TrainingError


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
    try:
        replace(path, *chunks)
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise TrainingError(
                f"No space left to write {path}.", "Free some disk space and run the command again."
            ) from error
        raise RecipeError(
            f"{path} cannot be written: {error.strerror or error}.", "Choose another output."
        ) from error


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
