"""An optimizer step decided on the device, or captured, is the one that the host decides on, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorabooth.errors import InterruptedRunError, RecipeError, TrainingError
from lorabooth.recipe import Recipe
from lorabooth.training import optim, update
from lorabooth.training.alarms import DEAD_AFTER_STEPS, Watch
from lorabooth.training.graphed import Graphed, signature
from lorabooth.training.log import FiniteGuard
from lorabooth.training.loop import Session
from lorabooth.training.prefetch import Forwards, make
from lorabooth.training.speed import captured
from lorabooth.types import Batch
from tests.training import runs, sessions
from tests.training.sessions import run

Make = Callable[..., Session]
STEPS = 8


@pytest.fixture
def compose(tiny_sd: Path, photos: Path, tmp_path: Path) -> Make:
    return lambda *overrides: sessions.session(tiny_sd, photos, tmp_path / "cache", *overrides)


class OnTheSpot:
    """A device whose recordings are run anew: same addresses, same inputs, no CUDA."""

    def eager(self, run: Callable[[], Tensor]) -> Tensor:
        return run()

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return run


def late(session: Session) -> Session:
    assert update.can_decide_on_device(session.optimizer, session.scaler)
    return replace(session, late=True)


def graphed(session: Session) -> Session:
    session = late(session)
    for group in session.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    return replace(session, graph=captured(session, OnTheSpot()))


def spoiled(session: Session, steps: Sequence[int]) -> Session:
    """Whose latents are NaN in some steps."""

    def batches(step: int) -> Sequence[Sequence[Batch]]:
        drawn = session.batches(step)
        if step not in steps:
            return drawn
        return [[replace(batch, latents=batch.latents * float("nan")) for batch in micro] for micro in drawn]

    return replace(session, batches=batches)


def ended(
    session: Session, folder: Path, **more: Any
) -> tuple[list[Tensor], list[dict[str, Any]], Any, Watch]:
    folder.mkdir()
    watch = run(session, folder, range(STEPS), **more)
    state = session.optimizer.state_dict()["state"]
    moments = [tensor for entry in state.values() for tensor in entry.values()]
    weights = [parameter.detach().clone() for parameter in session.parameters]
    return [*weights, *moments], runs.metrics(folder), watch.state_dict(), watch


@pytest.mark.parametrize("change", [late, graphed])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("optim.accumulate=2", "optim.schedule=cosine", "optim.warmup_steps=2"),
        ("adapter.text_encoder=true",),
        ("images.buckets=true", "optim.batch_size=2"),
        ("optim.max_grad_norm=0",),
    ],
)
def test_decided_on_the_device_is_decided_on_the_host(
    compose: Make, tmp_path: Path, overrides: tuple[str, ...], change: Callable[[Session], Session]
) -> None:
    bad = (2, 3, 6)
    at_once = ended(spoiled(compose(*overrides), bad), tmp_path / "once")
    changed = spoiled(change(compose(*overrides)), bad)
    later = ended(changed, tmp_path / "late")
    for ours, theirs in zip(later[0], at_once[0], strict=True):
        assert torch.equal(ours, theirs)
    assert later[1:3] == at_once[1:3]
    assert [line.get("skipped", False) for line in later[1]] == [step in bad for step in range(STEPS)]
    if change is graphed:
        assert isinstance(changed.graph, Graphed)
        assert changed.graph.replayed >= 1


@contextmanager
def no_read() -> Iterator[list[str]]:
    """Whatever would wait for a device is noted: reads of numbers, and shapes that depend on them."""
    found: list[str] = []
    waiting = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique")

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__.split(".")[-1].startswith(waiting):
                found.append(str(function))
            return function(*args, **(kwargs or {}))

    plain = {name: getattr(Tensor, name) for name in ("tolist", "numpy", "cpu", "__array__")}

    def noted(name: str) -> Callable[..., Any]:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return plain[name](tensor, *args, **kwargs)

        return read

    with pytest.MonkeyPatch.context() as patch, Noting():
        for name in plain:
            patch.setattr(Tensor, name, noted(name))
        yield found


@pytest.mark.parametrize("overrides", [(), ("adapter.text_encoder=true",), ("memory.checkpointing=true",)])
def test_the_step_has_no_host_synchronisation(compose: Make, overrides: tuple[str, ...]) -> None:
    session = late(compose(*overrides))

    def step(number: int) -> update.Launched:
        forwards = make(session.batches, session.step_parts.path, session.seed, number, pin=False)
        optim.set_lr(session.optimizer, session.section, number, 9)
        with no_read() as found:
            launched = update.launch(session, number, forwards, asked=[], want_up_norms=number == 1)
        assert found == []
        return launched

    for number in range(3):
        figures = step(number)()
        assert figures.applied
        assert figures.line["loss"] > 0
        assert bool(figures.up_norms) == (number == 1)
    with no_read() as found:
        torch.ones(1).item()
        bool(torch.ones(1) > 0)
        torch.ones(2).tolist()
    assert len(found) == 3, "this test finds no read"


def test_late_figures_are_told_before_a_save_and_one_step_late_otherwise(
    compose: Make, tmp_path: Path
) -> None:
    session = late(compose())
    lines_when: list[int] = []
    seen: list[int] = []

    def save(step: int) -> None:
        lines_when.append(len(runs.metrics(tmp_path)))

    def pace(done: int, stop: int, seconds: float) -> None:
        path = tmp_path / "metrics.jsonl"
        seen.append(len(runs.metrics(tmp_path)) if path.exists() else 0)

    between = replace(sessions.hooks([]), checkpoint=save, checkpoint_every=3)
    run(replace(session, pace=pace), tmp_path, range(7), between=between)
    assert lines_when == [3, 6, 7]
    assert seen == [0, 1, 3, 3, 4, 6, 7]


def test_a_late_run_that_stays_not_finite_stops_and_saves_nothing(compose: Make, tmp_path: Path) -> None:
    saved: list[int] = []
    session = spoiled(late(compose()), range(2, 100))
    with pytest.raises(TrainingError, match="3 optimizer steps in a row up to step 5"):
        run(
            session,
            tmp_path,
            range(50),
            between=sessions.hooks(saved),
            watch=Watch(guard=FiniteGuard(limit=3)),
        )
    assert saved == []
    assert len(runs.metrics(tmp_path)) == 5


def test_a_late_run_is_interrupted_after_a_whole_step(compose: Make, tmp_path: Path) -> None:
    import os
    import signal

    session, saved = late(compose()), []

    def pace(done: int, stop: int, seconds: float) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRunError, match="after step 3 of 9"):
        run(replace(session, pace=pace), tmp_path, range(9), between=sessions.hooks(saved))
    assert saved == [3]
    assert len(runs.metrics(tmp_path)) == 3


def test_an_adapter_that_stays_zero_is_told_late_as_well(compose: Make, tmp_path: Path) -> None:
    session = late(compose())
    for group in session.optimizer.param_groups:
        group["base_lr"] = 0.0
    watch = run(session, tmp_path, range(DEAD_AFTER_STEPS + 3))
    assert len(watch.warnings) == 1
    assert "every lora_B of denoiser is still zero" in watch.warnings[0]


def test_what_cannot_be_decided_on_the_device_is_not(compose: Make) -> None:
    assert not update.can_decide_on_device(
        compose("memory.precision=fp16").optimizer, torch.amp.GradScaler("cpu")
    )
    assert not update.can_decide_on_device(
        compose("optim.name=adamw8bit").optimizer, torch.amp.GradScaler("cpu", enabled=False)
    )


def _forwards(session: Session, step: int) -> Forwards:
    return make(session.batches, session.step_parts.path, session.seed, step, pin=False)


def test_each_signature_has_a_graph_and_there_are_only_so_many(compose: Make) -> None:
    session = late(compose("optim.batch_size=2"))
    recorded: list[int] = []

    class Recording(OnTheSpot):
        def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
            recorded.append(len(recorded))
            return run

    graph = Graphed(
        lambda forwards: update.decide_on_device(session, 0, forwards, keep_gradients=True),
        session.parameters,
        Recording(),
        torch.device("cpu"),
        warm_up_steps=1,
        most=2,
    )
    whole = _forwards(session, 0)
    shapes = [whole, [[_first(whole[0][0], 1)]], [[*whole[0], *whole[0]]]]
    assert len({signature(each) for each in shapes}) == 3
    for _ in range(3):
        for each in shapes:
            graph(each)
    assert recorded == [0, 1]
    assert graph.captured == 2
    assert graph.replayed == 4


def _first(ready: Any, rows: int) -> Any:
    batch = ready.batch
    return replace(
        ready,
        batch=replace(
            batch,
            latents=batch.latents[:rows],
            cond={name: tensor[:rows] for name, tensor in batch.cond.items()},
            geometry=batch.geometry[:rows],
            weight=batch.weight[:rows],
            is_instance=batch.is_instance[:rows],
        ),
        eps=ready.eps[:rows],
        level=ready.level[:rows],
    )


def test_a_step_that_reads_the_geometry_cannot_be_captured(compose: Make) -> None:
    session = late(compose())
    predict = session.step_parts.predict

    def reading(x: Tensor, level: Tensor, cond: Any, geometry: Any) -> Tensor:
        return predict(x * geometry[0].target_px[0], level, cond, geometry)

    session = replace(session, step_parts=replace(session.step_parts, predict=reading))
    graph = captured(session, OnTheSpot())
    # What is captured here runs when it is replayed.
    with pytest.raises((RecipeError, AttributeError), match="target_px"):  # noqa: PT012 - one of the calls
        for _ in range(5):
            graph(_forwards(session, 0))


def test_the_recipe_says_what_a_recording_cannot_do(tmp_path: Path, photos: Path) -> None:
    def recipe(*overrides: str) -> Recipe:
        return runs.recipe(tmp_path, photos, "speed.cuda_graph=true", *overrides)

    assert recipe().speed.cuda_graph
    for overrides, named in (
        (("optim.name=adamw8bit",), "optim.name"),
        (("memory.precision=fp16",), "memory.precision"),
        (("adapter.dropout=0.1",), "adapter.dropout"),
        (("speed.compile=auto",), "speed.compile"),
    ):
        with pytest.raises(RecipeError, match=r"speed\.cuda_graph") as raised:
            recipe(*overrides)
        assert named in str(raised.value)


def test_a_graph_on_a_cpu_is_refused_before_anything_is_loaded(
    tiny_sd: Path, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="needs a CUDA GPU, and this run is on cpu"):
        runs.train(tiny_sd, photos, tmp_path / "run", "speed.cuda_graph=true")
    assert not (tmp_path / "run").exists()
