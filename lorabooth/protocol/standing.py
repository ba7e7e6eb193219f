"""How the subjects of a protocol stand: done, failed or neither, by what is on the disk."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorabooth import durable
from lorabooth.errors import DataError
from lorabooth.protocol.jobs import Asked, Job
from lorabooth.protocol.results import read_evaluation
from lorabooth.protocol.subjects import photos_digest
from lorabooth.protocol.summary import SubjectResult


@dataclass
class Standing:
    """How the subjects of a protocol stand, by what is on the disk.

    Attributes:
        job: the protocol.
        since_s: subjects that failed before this time are open again.
    """

    job: Job
    since_s: float
    _done: set[str] = field(default_factory=set)

    def is_settled(self, asked: Asked) -> bool:
        """Whether nothing is left to do for a subject: it is done, or has failed in this command."""
        name = asked.subject.name
        if name in self._done:
            return True
        ending = self._ending(name)
        if ending.get("status") == "failed":
            return float(ending.get("at_s", 0)) >= self.since_s
        if ending.get("status") != "done" or not self._evaluation(asked).is_file():
            return False
        try:
            same = photos_digest(asked.subject.photos) == ending.get("photos")
        except DataError:
            same = False
        if same:
            self._done.add(name)
        return same

    def result(self, asked: Asked) -> SubjectResult:
        """How a subject has ended, with its numbers."""
        ending = self._ending(asked.subject.name)
        if ending.get("status") == "failed":
            return SubjectResult(
                asked, "failed", str(ending.get("reason", "")), int(ending.get("exit_code", 1))
            )
        if ending.get("status") == "done" and self._evaluation(asked).is_file():
            return SubjectResult(asked, "done", evaluation=read_evaluation(self._evaluation(asked)))
        return SubjectResult(asked, "unfinished")

    def end(self, asked: Asked, ending: Mapping[str, Any]) -> None:
        """Write down how a subject ended.

        Raises:
            RecipeError, TrainingError: it cannot be written.
        """
        path = self._path(asked.subject.name)
        with durable.user_errors(path):
            durable.make_folder(path.parent)
        durable.save(path, json.dumps({**ending, "at_s": time.time()}, indent=1).encode())

    def _ending(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads(self._path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _path(self, name: str) -> Path:
        return self.job.state / "endings" / f"{name}.json"

    def _evaluation(self, asked: Asked) -> Path:
        return self.job.run_folder(asked.subject) / "evaluation.json"
