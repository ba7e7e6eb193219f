"""run.json: what a run stood on and what it took, written at its start and at every end."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from lorabooth.errors import TrainingError
from lorabooth.memory.facts import device_facts, versions
from lorabooth.training.clock import Clock
from lorabooth.training.folder import RunFolder, write_json
from lorabooth.training.planned import Planned, memory_facts, peak_memory_bytes
from lorabooth.training.setting import Setting

Status = Literal["running", "finished", "interrupted", "failed"]


@dataclass(frozen=True)
class Ledger:
    """Collects a run's facts; allow-listed ones only: no paths, user names or environment.

    Attributes:
        folder: of the run.
        setting: what it stands on.
        clock: seconds per phase of this process.
        before: run.json as an earlier process of the same run left it; its timings and warnings are kept.
        planned: memory that was predicted for this process, if a plan was made.
        notes: further facts by name.
    """

    folder: RunFolder
    setting: Setting
    clock: Clock
    before: Mapping[str, Any] = field(default_factory=dict)
    planned: Planned | None = None
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
                "peak_memory_bytes": self._peak_memory_bytes(),
                **self._memory(),
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
        # What was read from JSON has lists where a recipe has tuples.
        return bool((list(value) if isinstance(value, tuple) else value) == choice.get("value"))

    def _timings_s(self) -> dict[str, float]:
        """Of all processes that worked on the run."""
        earlier = self.before.get("timings_s", {})
        total = (
            {name: float(seconds) for name, seconds in earlier.items()} if isinstance(earlier, dict) else {}
        )
        for name, seconds in self.clock.seconds.items():
            total[name] = total.get(name, 0.0) + seconds
        return {name: round(seconds, 3) for name, seconds in total.items()}

    def _memory(self) -> dict[str, Any]:
        """Plan and measurement; a process that goes on without planning keeps what was planned before."""
        earlier = {key: self.before[key] for key in ("plan",) if key in self.before}
        now = memory_facts(self.planned, self.clock, self.setting.device)
        stepped = [*self.before.get("stepped_down", []), *now.pop("stepped_down", [])]
        return {**earlier, **now, **({"stepped_down": stepped} if stepped else {})}

    def _peak_memory_bytes(self) -> int | None:
        """The clock starts torch's counter anew for each phase."""
        now = peak_memory_bytes(self.setting.device)
        return now if now is None else max([now, *self.clock.peak_bytes.values()])

    def _warnings(self) -> list[str]:
        """Of all processes that worked on the run, each once."""
        earlier = self.before.get("warnings", [])
        return list(dict.fromkeys([*map(str, earlier), *self.notes.get("warnings", [])]))
