"""One process at a time works in a run folder."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from types import TracebackType

import filelock

from lorabooth.errors import RecipeError


class RunLock:
    """Holds a run folder for this process, as a context manager.

    The lock is the operating system's, so it ends with the process however that ends: a lock file that a
    crash has left behind holds nobody up. A file beside it says who holds it.

    Args:
        run_folder: made if it is not there.

    Raises:
        RecipeError: on entering: another process holds it, or it cannot be written.
    """

    def __init__(self, run_folder: Path) -> None:
        self.run_folder = run_folder
        self._lock = filelock.FileLock(run_folder / ".lock", timeout=0)
        self._owner = run_folder / ".lock-owner.json"

    def __enter__(self) -> RunLock:
        """Take the lock, or refuse at once."""
        try:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            facts = {"pid": os.getpid(), "host": platform.node()}
            self._owner.write_text(json.dumps(facts), encoding="utf-8")
        except filelock.Timeout as error:
            raise RecipeError(
                f"{self.run_folder} is in use by another run ({self._holder()}).",
                "Wait for it, stop it, or choose another output folder (--out).",
            ) from error
        except OSError as error:
            self._lock.release()
            raise RecipeError(
                f"{self.run_folder} cannot be written: {error.strerror or error}.",
                "Choose another output folder (--out).",
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lock back."""
        self._owner.unlink(missing_ok=True)
        self._lock.release()

    def _holder(self) -> str:
        try:
            facts = json.loads(self._owner.read_text(encoding="utf-8"))
            return f"process {facts['pid']} on {facts['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "its process is not known"
