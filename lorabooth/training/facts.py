"""run.json: what a run stood on and what it took, written at its start and at its end."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch

from lorabooth.memory.facts import device_facts, versions
from lorabooth.training.folder import RunFolder, write_json
from lorabooth.training.setting import Clock, Setting


@dataclass(frozen=True)
class Ledger:
    """Collects a run's facts; allow-listed ones only: no paths, user names or environment.

    Attributes:
        folder: of the run.
        setting: what it stands on.
        clock: seconds per phase.
        notes: further facts by name.
    """

    folder: RunFolder
    setting: Setting
    clock: Clock
    notes: dict[str, Any] = field(default_factory=dict)

    def note(self, name: str, value: Any) -> None:
        """Remember one fact (a JSON value)."""
        self.notes[name] = value

    def write(self, status: str) -> None:
        """Write run.json.

        Args:
            status: "running" or "finished".
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
                "choices": [
                    {"key": choice.key, "value": choice.value, "reason": choice.reason}
                    for choice in setting.choices
                ],
                "timings_s": {name: round(seconds, 3) for name, seconds in self.clock.seconds.items()},
                "peak_memory_bytes": peak_memory_bytes(setting.device),
                **self.notes,
            },
        )


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory so far: allocated on a GPU, else the resident set; None where neither is known."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
