"""Writing files so that a crash leaves the old or the new content, never a part.

The pattern everywhere: write beside the target, fsync, rename over it, fsync the folder.
"""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, data: bytes) -> None:
    """Give a file new content in one step."""
    beside = path.with_name(f".{path.name}.tmp")
    write(beside, data)
    beside.replace(path)
    sync_folder(path.parent)


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
