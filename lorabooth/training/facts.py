"""run.json: what a run stood on and what it took, written at its start and at every end."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lorabooth.errors import TrainingError
from lorabooth.memory.facts import device_facts, versions
from lorabooth.training.folder import RunFolder, write_json
from lorabooth.training.setting import Clock, Setting

Status = Literal["running", "finished", "interrupted", "failed"]


@dataclass(frozen=True)
class Ledger:
    """Collects a run's facts; allow-listed ones only: no paths, user names or environment.

    Attributes:
        folder: of the run.
        setting: what it stands on.
        clock: seconds per phase of this process.
        before: run.json as an earlier process of the same run left it; its timings and warnings are kept.
        notes: further facts by name.
    """

    folder: RunFolder
    setting: Setting
    clock: Clock
    before: Mapping[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def note(self, name: str, value: Any) -> None:
        """Remember one fact (a JSON value)."""
        self.notes[name] = value

    def write(self, status: Status) -> None:
        """Write run.json.

        Raises:
            TrainingError: it cannot be written.
        """
        setting = self.setting
        write_json(
            self.folder.facts,
            {
                "status": status,
                "versions": versions(),
                "device": device_facts(setting.device),
                "base": {
                    "id": setting.parts.source.base_id,
                    "family": setting.parts.source.family,
                    "sha256": setting.parts.source.sha256,
                    "revision": setting.parts.source.revision,
                },
                "subjects": [subject.name for subject in setting.subjects],
                "photos": [record.path.name for record in setting.photos.records],
                "long_captions": setting.long_caption_facts,
                "choices": self._choices(),
                "timings_s": self._timings_s(),
                "peak_memory_bytes": peak_memory_bytes(setting.device),
                **self.notes,
                "warnings": self._warnings(),
            },
        )

    def write_if_possible(self, status: Status) -> None:
        """As `write`, where something has gone wrong already, which is to be told rather than this."""
        with suppress(TrainingError):
            self.write(status)

    def _choices(self) -> list[dict[str, Any]]:
        """What "auto" became; a run that goes on by its own recipe.toml has no "auto" left to tell of."""
        now = [
            {"key": choice.key, "value": choice.value, "reason": choice.reason}
            for choice in self.setting.choices
        ]
        keys = {choice["key"] for choice in now}
        earlier = self.before.get("choices", [])
        told = [each for each in earlier if isinstance(each, dict) and each.get("key") not in keys]
        # What was chosen once and is given by hand now (optim.steps) is no choice of ours any more.
        return now + [each for each in told if self._is_still(each)]

    def _is_still(self, choice: Mapping[str, Any]) -> bool:
        value: Any = self.setting.recipe
        for part in re.findall(r"\w+", str(choice.get("key", ""))):
            try:
                value = value[int(part)] if part.isdecimal() else getattr(value, part)
            except (AttributeError, IndexError, TypeError):
                return False
        return bool(value == choice.get("value"))

    def _timings_s(self) -> dict[str, float]:
        """Of all processes that worked on the run."""
        earlier = self.before.get("timings_s", {})
        total = (
            {name: float(seconds) for name, seconds in earlier.items()} if isinstance(earlier, dict) else {}
        )
        for name, seconds in self.clock.seconds.items():
            total[name] = total.get(name, 0.0) + seconds
        return {name: round(seconds, 3) for name, seconds in total.items()}

    def _warnings(self) -> list[str]:
        """Of all processes that worked on the run, each once."""
        earlier = self.before.get("warnings", [])
        return list(dict.fromkeys([*map(str, earlier), *self.notes.get("warnings", [])]))


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory so far: allocated on a GPU, else the resident set; None where neither is known."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
