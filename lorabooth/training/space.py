"""Whether what a run will write fits on its disks: told before the first step, not in the last night."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorabooth.errors import TrainingError

MARGIN = 1.05
"""What is predicted, and a twentieth for what is not."""
_METRICS_LINE_BYTES = 400
# A PNG of a photo takes about two thirds of its pixels' bytes; grids are at most 4096 px wide and high.
_PNG_SHARE = 0.7
_GRID_BYTES = 4096 * 4096 * 3
_REPORT_BYTES = 2**21


@dataclass(frozen=True)
class Amounts:
    """What decides how much a run writes.

    Attributes:
        checkpoint_bytes: of one checkpoint, see `state.checkpoint_bytes`.
        adapter_bytes: of the result.
        steps: of the whole run.
        checkpoint_every: steps; 0 saves only the end.
        keep: checkpoints kept; 0 keeps all.
        sample_every: steps between previews; 0 draws only before and after.
        images: of one preview; 0 for none at all.
        side_px: of an image.
        chosen: the best checkpoint so far is kept beside the newest, and drawn at the end.
    """

    checkpoint_bytes: int
    adapter_bytes: int
    steps: int
    checkpoint_every: int
    keep: int
    sample_every: int
    images: int
    side_px: int
    chosen: bool = False

    @property
    def checkpoints(self) -> int:
        """Most checkpoints at one time: an old one goes only when the new one is whole."""
        ever = 1 + (max(0, self.steps - 1) // self.checkpoint_every if self.checkpoint_every else 0)
        return ever if self.keep == 0 else min(ever, self.keep + 1 + self.chosen)

    @property
    def previews(self) -> int:
        """Folders of samples: before, between, after."""
        if not self.images:
            return 0
        between = max(0, self.steps - 1) // self.sample_every if self.sample_every else 0
        return 2 + between + self.chosen


def predict(run_folder: Path, amounts: Amounts) -> dict[Path, int]:
    """Bytes that the whole run will have written, by the place where they go.

    Args:
        run_folder: of the run.
        amounts: of everything.
    """
    image = int(amounts.side_px**2 * 3 * _PNG_SHARE)
    # The grid enlarges small images up to four times in each direction.
    enlarged = 16 if amounts.side_px < 192 else 1
    grid = min(image * amounts.images * enlarged * 2, _GRID_BYTES)
    return {
        run_folder / "checkpoints": amounts.checkpoints * amounts.checkpoint_bytes,
        run_folder / "samples": amounts.previews * (image * amounts.images + grid),
        run_folder: amounts.adapter_bytes + amounts.steps * _METRICS_LINE_BYTES + _REPORT_BYTES,
    }


def require(run_folder: Path, amounts: Amounts) -> None:
    """Refuse to begin what a disk cannot hold; each file system is counted by itself.

    What an earlier part of the run has written already counts as done.

    Raises:
        TrainingError: says what needs how much, and what to free or change.
    """
    total = predict(run_folder, amounts)
    needed = {place: max(0, size - _present(place, run_folder)) for place, size in total.items()}
    # However much is there: one checkpoint is always written before an old one goes.
    folder = run_folder / "checkpoints"
    needed[folder] = max(needed[folder], amounts.checkpoint_bytes)
    for places in _by_disk(needed).values():
        wanted = int(sum(needed[place] for place in places) * MARGIN)
        free = shutil.disk_usage(_existing(places[0])).free
        if free < wanted:
            raise TrainingError(
                f"the disk that holds {places[0]} has {_size(free)} free, and the run needs {_size(wanted)}: "
                + _shares(places, needed, amounts)
                + ". No step was done.",
                "Free some space there; or keep fewer checkpoints (--set run.keep=1), draw fewer samples "
                "(run.sample_every, run.sample_count), or give an --out on another disk.",
            )


def _shares(places: list[Path], needed: Mapping[Path, int], amounts: Amounts) -> str:
    names = {
        "checkpoints": f"{amounts.checkpoints} checkpoints of {_size(amounts.checkpoint_bytes)}",
        "samples": f"{amounts.previews} previews of {amounts.images} images",
    }
    return ", ".join(
        f"{_size(needed[place])} for {names.get(place.name, 'the adapter and the logs')}"
        for place in places
        if needed[place]
    )


def _by_disk(needed: Mapping[Path, int]) -> dict[int, list[Path]]:
    disks: dict[int, list[Path]] = {}
    for place in needed:
        disks.setdefault(_existing(place).stat().st_dev, []).append(place)
    return disks


def _existing(place: Path) -> Path:
    return next(path for path in (place, *place.absolute().parents) if path.exists())


def _present(place: Path, run_folder: Path) -> int:
    """Bytes of the files there; of the run folder only those that lie directly in it."""
    if not place.is_dir():
        return 0
    files = place.iterdir() if place == run_folder else place.rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
