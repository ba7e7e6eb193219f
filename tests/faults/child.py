"""The real command line in a process that tells of every change it makes on the disk, and dies at one.

    python -m tests.faults.child TELL DIE_AT ROOTS train recipe.toml ...

Nothing in the product knows of this: changes are seen by Python's audit events, and writes by a thin layer
around the files that are opened for writing. Deletions within `shutil.rmtree` are seen too.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

_RENAMES = {"os.rename": "rename", "os.mkdir": "mkdir", "os.remove": "remove", "os.rmdir": "rmdir"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_write, _fsync, _open = os.write, os.fsync, io.open


def die() -> NoReturn:
    """As when the plug is pulled."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL was survived")


class Trap:
    """Tells of each change below some folders just before it is made, and dies at the n-th.

    Args:
        tell: file descriptor that a line "KIND PATH" is written to.
        die_at: number of the change, from 1; a write is half done by then, all else not begun. 0 is never.
        roots: the folders, absolute.
    """

    def __init__(self, tell: int, die_at: int, roots: Sequence[str]) -> None:
        self.tell, self.die_at, self.roots = tell, die_at, tuple(roots)
        self.count = 0

    def install(self) -> None:
        """From here to the end of the process."""
        sys.addaudithook(self._audit)
        builtins.open = io.open = self._opened  # type: ignore[assignment]
        os.write, os.fsync = self._os_write, self._os_fsync

    def note(self, kind: str, path: str) -> bool:
        """Count one change; True if it is a write to die in."""
        self.count += 1
        root = next((root for root in self.roots if path.startswith(root)), "")
        inside = path[len(root) :].lstrip("/") or "."
        _write(self.tell, f"{kind} {inside}\n".encode(errors="backslashreplace"))
        if self.count != self.die_at:
            return False
        if kind != "write":
            die()
        return True

    def holds(self, path: object) -> bool:
        """Whether a path is below the roots."""
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        return str(Path(text).absolute()).startswith(self.roots) if text else False

    def _audit(self, event: str, args: Any) -> None:
        if event == "open":
            path, mode, flags = args
            writes = set(mode or "") & set("wax+") or (not mode and flags & _WRITING)
            if writes and self.holds(path):
                self.note("open", os.fsdecode(path))
        elif event in _RENAMES:
            # Within a folder that is being deleted, names are relative to an open descriptor.
            inside = event in ("os.remove", "os.rmdir") and args[-1] != -1
            if inside or self.holds(args[0]):
                self.note(_RENAMES[event], os.fsdecode(args[1] if event == "os.rename" else args[0]))

    def _opened(self, file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        opened = _open(file, mode, *args, **options)
        if not set(mode) & set("wax+"):
            return opened
        path = self._path_of(opened.fileno())
        return Watched(opened, path, self) if self.holds(path) else opened

    def _os_write(self, descriptor: int, data: bytes) -> int:
        path = self._path_of(descriptor)
        if self.holds(path) and self.note("write", path):
            _write(descriptor, data[: len(data) // 2])
            die()
        return _write(descriptor, data)

    def _os_fsync(self, descriptor: Any) -> None:
        path = self._path_of(descriptor if isinstance(descriptor, int) else descriptor.fileno())
        if self.holds(path):
            self.note("fsync", path)
        _fsync(descriptor)

    @staticmethod
    def _path_of(descriptor: int) -> str:
        try:
            return str(Path(f"/proc/self/fd/{descriptor}").readlink()).removesuffix(" (deleted)")
        except OSError:
            return ""


class Watched:
    """A file opened for writing, whose writes are counted."""

    def __init__(self, file: Any, path: str, trap: Trap) -> None:
        self._file, self._path, self._trap = file, path, trap

    def write(self, data: Any) -> int:
        """Write, or die half-way, with the half on the disk."""
        if self._trap.note("write", self._path):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            die()
        return int(self._file.write(data))

    def writelines(self, lines: Iterable[Any]) -> None:
        """Each of them counts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Watched:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)


def command_line(arguments: Sequence[str]) -> None:
    """The program as its entry point starts it."""
    if limit := os.environ.get("FAULTS_LIMIT_BYTES"):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    sys.argv = ["lorabooth", *arguments]
    from lorabooth.cli.app import main

    main()


if __name__ == "__main__":
    told, at, folders, *rest = sys.argv[1:]
    Trap(int(told), int(at), folders.split(os.pathsep)).install()
    command_line(rest)
