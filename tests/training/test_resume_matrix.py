"""Interrupted twice and gone on with is never interrupted, byte for byte, in every kind of configuration."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorabooth
from lorabooth.errors import InterruptedRunError
from lorabooth.progress import Silent, Task
from tests.tiny import make_photos
from tests.training import runs

STEPS = 8
CRASH_AFTER, SIGNAL_AFTER = 3, 5


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        optimizer: optim.name.
        prior: prior.mode.
        accumulate: optim.accumulate.
        text_encoder: adapter.text_encoder.
        precision: memory.precision.
        cut: "square", "random", "buckets", "random buckets"; all but the first with flips.
        more: further overrides.
        base: name of the fixture.
    """

    optimizer: str
    prior: str
    accumulate: int
    text_encoder: bool
    precision: str
    cut: str
    more: tuple[str, ...] = ()
    base: str = "tiny_sd"

    def __str__(self) -> str:
        text = "text" if self.text_encoder else "no text"
        parts = (
            self.optimizer,
            self.prior,
            f"x{self.accumulate}",
            text,
            self.precision,
            self.cut,
            *self.more,
        )
        return " ".join(parts) + ("" if self.base == "tiny_sd" else f" {self.base}")

    def overrides(self, photos: Path) -> tuple[str, ...]:
        """For --set."""
        flag = {True: "true", False: "false"}
        return (
            f"optim.name={self.optimizer}",
            f"prior.mode={self.prior}",
            *([f"prior.images={photos}"] if self.prior == "images" else []),
            f"optim.accumulate={self.accumulate}",
            f"adapter.text_encoder={flag[self.text_encoder]}",
            f"memory.precision={self.precision}",
            f"images.crop={'random' if 'random' in self.cut else 'center'}",
            f"images.buckets={flag['buckets' in self.cut]}",
            f"images.flip={flag[self.cut != 'square']}",
            *self.more,
        )


# bitsandbytes keeps 8-bit state of weights with 4096 numbers or more.
RANK_64 = ("adapter.rank=64",)
DROPOUT = ("adapter.dropout=0.3",)
PAIRS = ("optim.batch_size=2",)
ROWS = (
    Row("adamw", "generated", 1, False, "fp32", "square", (*DROPOUT, "run.sample_every=3")),
    Row("adamw", "distill", 2, True, "fp32", "random", DROPOUT),
    Row("adamw8bit", "none", 1, False, "fp32", "square", (*RANK_64, "optim.schedule=cosine")),
    Row("adamw8bit", "generated", 2, True, "bf16", "random", (*RANK_64, *DROPOUT)),
    Row("adamw", "images", 1, False, "fp16", "random buckets", PAIRS),
    Row("adamw", "none", 3, True, "bf16", "buckets", ("optim.warmup_steps=4", "loss.weighting=min_snr")),
    Row("adamw", "images", 3, False, "bf16", "buckets", PAIRS),
    Row("adamw", "distill", 1, False, "fp32", "buckets", ("memory.checkpointing=true",), "tiny_sd2"),
    Row("paged_adamw8bit", "images", 2, True, "fp32", "random", (*RANK_64, "adapter.targets=attn+ff")),
    Row("adamw8bit", "distill", 2, True, "bf16", "random buckets", (*RANK_64, *PAIRS), "tiny_sd2"),
)
# bf16 is emulated, and slow, on most CPUs.
SLOW = (ROWS[3], *ROWS[5:])


class Interrupting(Silent):
    """Ends a run in the middle of its steps.

    Args:
        after: finished steps.
        crash: by an exception that nobody knows, as a killed process: nothing is saved. Else by SIGINT.
    """

    def __init__(self, after: int, *, crash: bool) -> None:
        self.after, self.crash = after, crash

    @contextmanager
    def task(self, label: str, total: int, unit: str = "step", start: int = 0) -> Iterator[Task]:
        """Only the training is interrupted."""
        with super().task(label, total, unit, start) as task:
            yield _Interrupted(self, start) if label == "Training" else task


class _Interrupted:
    def __init__(self, owner: Interrupting, start: int) -> None:
        self.owner, self.done = owner, start

    def advance(self, by: int = 1, **figures: str) -> None:
        self.done += by
        if self.done == self.owner.after:
            if self.owner.crash:
                raise CrashError
            signal.raise_signal(signal.SIGINT)


class CrashError(Exception):
    """Not one of lorabooth's errors."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def mixed_photos(tmp_path: Path) -> Path:
    """Of several shapes, so that buckets differ."""
    make_photos(tmp_path / "photos", n=2, size=(80, 64))
    for path in make_photos(tmp_path / "tall", n=2, size=(48, 96), seed=1):
        path.rename(tmp_path / "photos" / f"tall-{path.name}")
    return tmp_path / "photos"


def content(out: Path) -> dict[str, bytes]:
    """Adapter, checkpoints and samples."""
    kept = [out / "adapter.safetensors", *out.glob("checkpoints/**/*"), *out.glob("samples/**/*")]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in kept if path.is_file()}


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=str(row), marks=[pytest.mark.slow] * (row in SLOW)) for row in ROWS]
)
def test_interrupted_twice_is_never_interrupted(
    row: Row, mixed_photos: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(row.base)
    if "8bit" in row.optimizer:
        pytest.importorskip("bitsandbytes")
    samples = (
        "run.sample_count=1" if any("sample_every" in each for each in row.more) else "run.sample_count=0"
    )
    overrides = (f"optim.steps={STEPS}", samples, "images.resolution=32", *row.overrides(mixed_photos))
    recipe = runs.recipe(base, mixed_photos, *overrides)
    whole = lorabooth.train(recipe, out=tmp_path / "whole")
    with pytest.raises(CrashError):
        lorabooth.train(recipe, out=tmp_path / "run", reporter=Interrupting(CRASH_AFTER, crash=True))
    with pytest.raises(InterruptedRunError):
        lorabooth.train(recipe, out=tmp_path / "run", reporter=Interrupting(SIGNAL_AFTER, crash=False))
    resumed = lorabooth.train(recipe, out=tmp_path / "run")
    assert resumed.resumed_from == SIGNAL_AFTER
    assert runs.metrics(resumed.out) == runs.metrics(whole.out)
    assert [line["step"] for line in runs.metrics(resumed.out)] == list(range(1, STEPS + 1))
    assert sorted(content(resumed.out)) == sorted(content(whole.out))
    differing = [name for name, data in content(resumed.out).items() if data != content(whole.out)[name]]
    assert not differing
    _is_what_the_row_says(row, whole.out)


def _is_what_the_row_says(row: Row, out: Path) -> None:
    """A row that silently trained something else would prove nothing."""
    state = load_file(out / "checkpoints" / f"step-{STEPS:06d}" / "state.safetensors")
    assert ("8bit" in row.optimizer) == any(tensor.dtype == torch.uint8 for tensor in state.values())
    names = set(load_file(out / "adapter.safetensors"))
    assert row.text_encoder == any(name.startswith("lora_te") for name in names)
    lines = runs.metrics(out)
    assert all(("loss_prior" in line) == (row.prior != "none") for line in lines)
    saved = json.loads((out / "checkpoints" / f"step-{STEPS:06d}" / "state.json").read_text("utf-8"))
    assert saved["facts"].get("precision", row.precision) == row.precision
    assert len({line["loss"] for line in lines}) == STEPS


def test_the_rows_have_every_value_of_every_choice() -> None:
    values = {
        "optimizer": {"adamw", "adamw8bit", "paged_adamw8bit"},
        "prior": {"generated", "images", "distill", "none"},
        "accumulate": {1, 2, 3},
        "text_encoder": {True, False},
        "precision": {"fp32", "bf16", "fp16"},
        "cut": {"square", "random", "buckets", "random buckets"},
    }
    for name, wanted in values.items():
        assert {getattr(row, name) for row in ROWS} == wanted
    quick = [row for row in ROWS if row not in SLOW]
    assert {row.prior for row in quick} == values["prior"]
    assert {row.precision for row in quick} == {"fp32", "fp16"}
    assert any("adapter.dropout" in each for row in quick for each in row.more)
