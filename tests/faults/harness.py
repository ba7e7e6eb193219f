"""Runs of the real command that are killed again and again, and what must be true of them afterwards.

bench = prepare(folder, real)       # the run that nobody kills
story = bench.torture("a", [Moment(17), Moment(40, delay_s=0.1)])
assert not story.torn and not story.differences
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.faults.moments import NEVER, Ended, Moment, watch

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = ROOT / "lorabooth" / "pocket" / "demo" / "photos"

Start = Callable[[Sequence[str], Sequence[Path], Mapping[str, str], Moment], Ended]
"""(arguments, folders whose changes count, environment, when to kill) -> how it ended."""

RECIPE = """
[model]
base = "pocket"
[[subjects]]
images = "photos"
noun = "mug"
token = "sks"
[prior]
mode = "generated"
count = 4
sampler_steps = 2
[adapter]
rank = 2
dropout = 0.1
[optim]
steps = 6
lr = 2e-3
schedule = "cosine"
[images]
resolution = 32
[run]
checkpoint_every = 2
sample_every = 3
sample_count = 1
sample_prompts = ["a photo of a {token} {noun}"]
"""

CLOCKED = ("step_s",)
"""What a clock writes into a line of the metrics."""
UNEQUAL = ("run.json", "report.html")
"""Files with times in them; they must be whole and say that the run is finished, but may differ."""


def real(arguments: Sequence[str], roots: Sequence[Path], env: Mapping[str, str], moment: Moment) -> Ended:
    """A process started as a user does."""
    told, tell = os.pipe()
    places = os.pathsep.join(map(str, roots))
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.child", str(tell), str(moment.die_at), places, *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            pass_fds=[tell],
        )
        os.close(tell)
        process.returncode, changes = watch(process.pid, told, moment)
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    return Ended(process.returncode, tuple(changes), said)


@dataclass
class Story:
    """What became of one run.

    Attributes:
        kills: the last change that was begun before each kill.
        torn: files found broken after a kill, and checkpoints lost.
        left: files that the undisturbed run does not leave.
        differences: of the end from the undisturbed run's.
    """

    kills: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """A folder in which the same recipe is run, each time in a run folder and with a cache of its own.

    Attributes:
        folder: with photos, recipe, and the undisturbed run in "reference".
        start: runs the command line once: `real`, or a nursery's.
        overrides: "KEY=VALUE" for the recipe.
        changes: what the undisturbed run changed on the disk.
        environment: further variables; FAULTS_LIMIT_BYTES is the most that one file may have.
    """

    folder: Path
    start: Start
    overrides: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def attempt(self, name: str, moment: Moment = NEVER) -> Ended:
        """The command, once."""
        place = self.folder / name
        place.mkdir(parents=True, exist_ok=True)
        options = [word for each in self.overrides for word in ("--set", each)]
        return self.start(
            ["train", str(self.folder / "recipe.toml"), "--out", str(place / "run"), "--quiet", *options],
            [place],
            {"LORABOOTH_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1", **self.environment},
            moment,
        )

    def torture(self, name: str, moments: Iterable[Moment], story: Story | None = None) -> Story:
        """Kill a run at each of the moments in turn, starting it again in between, until it is done.

        Args:
            name: of the run.
            moments: when; the last attempt is left alone.
            story: told on the way, so that others may read it meanwhile.
        """
        story = story or Story()
        place, reached = self.folder / name, 0
        for moment in (*moments, NEVER):
            ended = self.attempt(name, moment)
            if not ended.killed:
                if ended.code:
                    story.differences.append(f"exit code {ended.code}: {ended.said.strip()[-1500:]}")
                break
            story.kills.append(ended.changes[-1] if ended.changes else "start")
            story.torn += torn_files(place)
            now = last_checkpoint(place / "run")
            if now < reached:
                story.torn.append(f"checkpoint {reached} is gone, {now} is the newest")
            reached = now
        story.torn += torn_files(place)
        story.left += left_behind(self.folder / "reference", place)
        story.differences += differences(self.folder / "reference", place)
        return story


def prepare(folder: Path, start: Start, *overrides: str) -> Bench:
    """Write photos and recipe, and do the run that nobody kills.

    Raises:
        AssertionError: it did not end well.
    """
    (folder / "photos").mkdir(parents=True)
    for photo in sorted(PHOTOS.glob("*.png"))[:3]:
        shutil.copy(photo, folder / "photos")
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    bench = Bench(folder, start, overrides)
    ended = bench.attempt("reference")
    if ended.code:
        raise AssertionError(f"the run that nobody killed ended with {ended.code}:\n{ended.said}")
    return replace(bench, changes=ended.changes)


def torn_files(place: Path) -> list[str]:
    """Files under their final names, hidden ones aside, that cannot be read to their end."""
    found = []
    for path in sorted(place.rglob("*")):
        inside = path.relative_to(place)
        if path.is_file() and not any(part.startswith(".") for part in inside.parts):
            try:
                _read(path)
            except Exception as error:
                found.append(f"{inside}: {type(error).__name__} {error}")
    return found


def _read(path: Path) -> None:
    from PIL import Image
    from safetensors import safe_open

    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                file.get_tensor(key)
    elif path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".toml":
        tomllib.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".jsonl":
        # A line is appended; what was begun last may be torn, which the next start drops.
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            json.loads(line)
    elif path.suffix == ".html":
        assert path.read_text(encoding="utf-8").rstrip().endswith("</html>"), "no end"
    else:
        raise AssertionError("a file that no run writes")


def last_checkpoint(run: Path) -> int:
    """Step of the newest checkpoint under its final name."""
    return max((int(path.name[5:11]) for path in run.glob("checkpoints/step-??????")), default=0)


def left_behind(reference: Path, place: Path) -> list[str]:
    """Files that a run folder or cache has and another has not."""
    return sorted(_files(place) - _files(reference))


def differences(reference: Path, place: Path) -> list[str]:
    """What a run folder and cache lack of another's, or have with other content."""
    ours, theirs = _files(place), _files(reference)
    found = [f"missing: {name}" for name in sorted(theirs - ours)]
    for name in sorted(ours & theirs):
        mine, other = place / name, reference / name
        if name.endswith("metrics.jsonl"):
            if metrics(mine) != metrics(other):
                steps = [line["step"] for line in metrics(mine)]
                found.append(f"other lines: {name}, steps {steps}")
        elif not name.endswith(UNEQUAL) and _placeless(mine, place) != _placeless(other, reference):
            found.append(f"other bytes: {name}")
    facts = place / "run" / "run.json"
    if not facts.is_file() or json.loads(facts.read_text(encoding="utf-8")).get("status") != "finished":
        found.append("run.json does not say that the run is finished")
    return found


def _placeless(path: Path, place: Path) -> bytes:
    """A file's bytes; in a recipe, which has the photos' path, without the folder that all is in."""
    content = path.read_bytes()
    return content.replace(str(place.parent).encode(), b"") if path.suffix == ".toml" else content


def _files(place: Path) -> set[str]:
    return {path.relative_to(place).as_posix() for path in place.rglob("*") if not path.is_dir()}


def metrics(path: Path) -> list[dict[str, Any]]:
    """A run's lines, without what a clock wrote."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCKED} for line in lines]
