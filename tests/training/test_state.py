"""Checkpoints: exact, atomic, found again; killed at every write of a save, for real."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from lorabooth.adapters import file as adapter_file
from lorabooth.adapters.metadata import Metadata
from lorabooth.errors import LoraboothError, RecipeError, TrainingError
from lorabooth.progress import Silent
from lorabooth.recipe import OptimSection
from lorabooth.training import optim, state

posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")


class Listener(Silent):
    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, message: str) -> None:
        self.warned.append(message)


class Run:
    """Two components on a small regression, with everything that a run saves."""

    def __init__(self, name: str = "adamw", rank: int = 80) -> None:
        torch.manual_seed(0)
        self.big, self.small = nn.Parameter(torch.randn(rank, 64)), nn.Parameter(torch.randn(5))
        self.section = OptimSection(name=name, lr=1e-2, text_encoder_lr=1e-3, schedule="cosine")
        groups = optim.groups({"denoiser": [self.big], "text_encoder": [self.small]}, self.section)
        self.optimizer = optim.make(self.section, groups, torch.device("cpu"), strict=True, reporter=Silent())

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            optim.set_lr(self.optimizer, self.section, step, 20)
            generator = torch.Generator().manual_seed(step)
            for weight in (self.big, self.small):
                weight.grad = torch.randn(weight.shape, generator=generator) * 0.1 + weight.detach()
            self.optimizer.step()

    def weights(self) -> dict[str, torch.Tensor]:
        return {"big": self.big.detach().clone(), "small": self.small.detach().clone()}

    def write_adapter(self, path: Path) -> None:
        safetensors.torch.save_file(self.weights(), path)

    def save(self, folder: Path, step: int, **facts) -> state.Checkpoint:
        return state.save(
            folder, step=step, adapter_writer=self.write_adapter, optimizer=self.optimizer, facts=facts
        )

    def resume(self, folder: Path) -> int:
        checkpoint = state.newest(folder, Silent())
        assert checkpoint is not None
        saved = safetensors.torch.load_file(checkpoint.adapter)
        with torch.no_grad():
            self.big.copy_(saved["big"])
            self.small.copy_(saved["small"])
        return state.restore(checkpoint, self.optimizer)


def in_child(work) -> int:
    """Run `work` in a forked process; its wait status, 0 if it ended well."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_resuming_equals_never_having_stopped_bit_for_bit(tmp_path, name):
    straight = Run(name)
    straight.train(0, 12)
    first = Run(name)
    first.train(0, 5)
    first.save(tmp_path, 5)
    second = Run(name)
    assert second.resume(tmp_path) == 5
    second.train(5, 9)
    second.save(tmp_path, 9)
    third = Run(name)  # resuming a resumed run
    assert third.resume(tmp_path) == 9
    third.train(9, 12)
    for key, weight in straight.weights().items():
        assert torch.equal(third.weights()[key], weight)
    if name == "adamw8bit":
        assert third.optimizer.state[third.big]["state1"].dtype == torch.uint8


def test_without_the_optimizer_state_it_would_differ(tmp_path):
    """The test above can fail: weights alone are not enough."""
    straight, stopped = Run(), Run()
    straight.train(0, 8)
    stopped.train(0, 4)
    fresh = Run()
    with torch.no_grad():
        fresh.big.copy_(stopped.big)
    fresh.train(4, 8)
    assert not torch.equal(fresh.big, straight.big)


def test_state_before_the_first_step_can_be_saved(tmp_path):
    Run().save(tmp_path, 0)
    assert Run().resume(tmp_path) == 0


def test_layout_facts_and_no_pickle(tmp_path):
    run = Run()
    run.train(0, 3)
    facts = {"grad_scaler": {"scale": 65536.0 / 3, "growth_factor": 2.0, "_growth_tracker": 7}}
    saved = run.save(tmp_path, 3, **facts)
    assert saved.folder == tmp_path / "checkpoints" / "step-000003"
    assert sorted(p.name for p in saved.folder.iterdir()) == [
        "adapter.safetensors",
        "manifest.json",
        "state.json",
        "state.safetensors",
    ]
    found = state.newest(tmp_path, Silent())
    assert found == state.Checkpoint(saved.folder, 3, facts)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_no_run_folder_no_checkpoint(tmp_path):
    assert state.newest(tmp_path / "absent", Silent()) is None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flipped bit", "gone"])
@pytest.mark.parametrize("name", ["adapter.safetensors", "state.safetensors", "state.json", "manifest.json"])
def test_a_torn_checkpoint_is_skipped_with_a_warning(tmp_path, name, damage):
    run, listener = Run(), Listener()
    for step in (1, 2):
        run.train(step - 1, step)
        saved = run.save(tmp_path, step)
    if name == "manifest.json" and damage is flip:
        damage = cut  # one bit of white space may not matter; a cut manifest is no JSON
    damage(saved.folder / name)
    found = state.newest(tmp_path, listener)
    assert found is not None
    assert found.step == 1
    assert len(listener.warned) == 1
    assert "step-000002" in listener.warned[0]
    assert name in listener.warned[0]
    assert saved.folder.is_dir()


def test_all_torn_is_none_and_says_so(tmp_path):
    saved, listener = Run().save(tmp_path, 1), Listener()
    cut(saved.adapter)
    assert state.newest(tmp_path, listener) is None
    assert len(listener.warned) == 1


def test_more_than_a_million_steps_sort_as_numbers(tmp_path):
    run = Run()
    for step in (999_999, 1_000_001):
        run.save(tmp_path, step)
    assert state.newest(tmp_path, Silent()).step == 1_000_001


def test_the_same_step_again_replaces(tmp_path):
    run = Run()
    run.save(tmp_path, 4, take=1)
    run.save(tmp_path, 4, take=2)
    assert state.newest(tmp_path, Silent()).facts == {"take": 2}
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize("other", [lambda: Run("adamw8bit"), lambda: Run(rank=81)], ids=["optimizer", "rank"])
def test_state_of_another_run_is_refused(tmp_path, other):
    run = Run()
    run.train(0, 1)
    run.save(tmp_path, 1)
    with pytest.raises(RecipeError, match="another optimizer"):
        state.restore(state.newest(tmp_path, Silent()), other().optimizer)


def test_rotation_keeps_the_newest_whole_ones(tmp_path):
    run = Run()
    folders = [run.save(tmp_path, step).folder for step in (1, 2, 3, 4)]
    assert state.rotate(tmp_path, 0) == []
    cut(folders[3] / "adapter.safetensors")
    assert sorted(state.rotate(tmp_path, 2)) == [folders[0]]
    assert [folder.exists() for folder in folders] == [False, True, True, True]
    assert state.newest(tmp_path, Silent()).step == 3


def test_rotation_spares_what_it_is_told_to(tmp_path):
    run = Run()
    folders = [run.save(tmp_path, step).folder for step in (1, 2, 3, 4)]
    assert sorted(state.rotate(tmp_path, 1, (2,))) == [folders[0], folders[2]]
    assert [folder.exists() for folder in folders] == [False, True, False, True]
    assert state.at(tmp_path, 2).folder == folders[1]
    assert state.at(tmp_path, 3) is None
    cut(folders[1] / "state.safetensors")
    assert state.at(tmp_path, 2) is None, "not whole"
    assert state.rotate(tmp_path, 1) == [folders[1]]


def test_rotation_never_deletes_the_only_whole_one(tmp_path):
    run = Run()
    folders = [run.save(tmp_path, step).folder for step in (1, 2, 3)]
    for folder in folders[1:]:
        cut(folder / "state.safetensors")
    assert state.rotate(tmp_path, 1) == []
    assert state.newest(tmp_path, Silent()).step == 1


def test_leftovers_of_crashed_saves_are_cleaned_by_the_next_save(tmp_path):
    leftover = tmp_path / "checkpoints" / ".unfinished-step-000001-12345"
    leftover.mkdir(parents=True)
    (leftover / "adapter.safetensors").write_bytes(b"half")
    Run().save(tmp_path, 2)
    assert not leftover.exists()


def test_no_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    run = Run()
    run.save(tmp_path, 1)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(state.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(TrainingError, match=r"needs \d+ MiB and .* has 0 MiB free") as caught:
        run.save(tmp_path, 2)
    assert caught.value.exit_code == 7
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


@posix
@pytest.mark.parametrize("limit_bytes", [10_000, 30_000], ids=["in the adapter", "in the state"])
def test_a_disk_that_fills_during_the_save_leaves_the_old_checkpoint(tmp_path, limit_bytes):
    """The system refuses to write more than so many bytes to a file, as a full disk or quota does."""
    resource = pytest.importorskip("resource")
    run = Run()
    run.train(0, 1)
    run.save(tmp_path, 1)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        with pytest.raises(TrainingError, match="step 2 cannot be saved") as caught:
            run.save(tmp_path, 2)
        assert "Free some space" in caught.value.fix

    assert in_child(fill) == 0
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert state.newest(tmp_path, Silent()).step == 1


def test_a_file_where_the_folder_should_be_is_one_message(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(TrainingError, match="cannot be saved"):
        Run().save(tmp_path, 1)
    assert (tmp_path / "checkpoints").read_text() == "mine"


@posix
@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "the same step again"])
def test_killed_at_every_system_call_of_a_save(tmp_path, step):
    """SIGKILL just before the n-th open, rename, mkdir or delete, for every n until the save ends."""
    run = Run()
    run.train(0, 1)

    def killed_at(count: int):
        left = [count]

        def audit(event: str, args: object) -> None:
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
                if event == "open" and str(tmp_path) not in str(args[0]):
                    return
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        run.save(tmp_path, step, take="new")

    for count in range(200):
        state.save(  # what stood there before
            tmp_path, step=1, adapter_writer=run.write_adapter, optimizer=run.optimizer, facts={"take": "old"}
        )
        status = in_child(lambda n=count: killed_at(n))
        listener = Listener()
        found = state.newest(tmp_path, listener)
        assert found is not None
        assert not listener.warned
        assert state.restore(found, Run().optimizer) == found.step
        assert found.facts["take"] in ("old", "new")
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        for path in (tmp_path / "checkpoints").glob("step-000002*"):
            state._discard(path)
    else:
        pytest.fail("the save never ended by itself")
    assert count > 10
    assert found.step == step
    assert found.facts["take"] == "new"


@posix
def test_killed_at_random_moments_while_saving_and_rotating(tmp_path):
    run = Run(rank=400)
    run.train(0, 1)
    run.save(tmp_path, 1)

    def forever(first: int, tell: int) -> None:
        step = first
        while True:
            step += 1
            run.save(tmp_path, step, mirror=step)
            os.write(tell, b".")
            state.rotate(tmp_path, 2)

    chance, reached = random.Random(0), 1
    for _ in range(12):
        hear, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                forever(reached, tell)
            finally:
                os._exit(1)
        os.close(tell)
        assert os.read(hear, 1) == b"."
        began_s = time.perf_counter()
        assert os.read(hear, 1) == b"."
        # Anywhere within the save or rotation that follows.
        time.sleep(chance.uniform(0, 1.2) * (time.perf_counter() - began_s))
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        os.close(hear)
        listener = Listener()
        found = state.newest(tmp_path, listener)
        assert found is not None
        assert not listener.warned
        assert found.step >= reached + 2
        assert found.facts == {"mirror": found.step}
        assert json.loads((found.folder / "manifest.json").read_text())["step"] == found.step
        # Rotation was killed too: what is listed is whole or gone.
        assert all(not state._problem(folder, step) for step, folder in state._listed(tmp_path))
        reached = found.step


class RealWriter:
    """The adapter writer that a run uses, which raises errors of our own."""

    def __init__(self, number: float = 1.0) -> None:
        self.tensors = {
            "denoiser.down_blocks.0.attn.to_q.lora_A": torch.full((4, 8), number),
            "denoiser.down_blocks.0.attn.to_q.lora_B": torch.zeros(8, 4),
            "denoiser.down_blocks.0.attn.to_q.alpha": torch.tensor(4.0),
        }

    def __call__(self, path: Path) -> None:
        adapter_file.write(path, self.tensors, Metadata(family="sd1", rank=4, alpha=4.0))


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_dead_adapter_stops_the_run_and_leaves_the_old_checkpoint_and_no_litter(tmp_path):
    run = Run()
    run.save(tmp_path, 1)
    with pytest.raises(TrainingError, match=r"step 2 cannot be saved.*NaN or infinity") as caught:
        state.save(tmp_path, step=2, adapter_writer=RealWriter(float("nan")), optimizer=run.optimizer)
    assert caught.value.exit_code == 7
    assert "optim.lr" in caught.value.fix
    assert "step-000001" in caught.value.fix
    assert checkpoints(tmp_path) == ["step-000001"]


def test_the_message_does_not_promise_a_checkpoint_that_is_not_there(tmp_path):
    run = Run()
    with pytest.raises(TrainingError) as caught:
        state.save(tmp_path, step=1, adapter_writer=RealWriter(float("inf")), optimizer=run.optimizer)
    assert "no whole checkpoint yet" in caught.value.fix
    assert checkpoints(tmp_path) == []
    cut(run.save(tmp_path, 1).adapter)
    with pytest.raises(TrainingError, match="step 2") as caught:
        state.save(tmp_path, step=2, adapter_writer=RealWriter(float("inf")), optimizer=run.optimizer)
    assert "no whole checkpoint yet" in caught.value.fix, "the torn one is none to go on from"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_a_disk_error_in_the_real_adapter_writer_is_exit_7(tmp_path, monkeypatch, code):
    run = Run()
    run.save(tmp_path, 1)

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(TrainingError, match=os.strerror(code)) as caught:
        state.save(tmp_path, step=2, adapter_writer=RealWriter(), optimizer=run.optimizer)
    monkeypatch.undo()
    assert caught.value.exit_code == 7
    assert ("Free some space on the disk" in caught.value.fix) == (code == errno.ENOSPC)
    assert checkpoints(tmp_path) == ["step-000001"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_any_other_exception_leaves_no_litter_and_stays_what_it_is(tmp_path, error):
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    with pytest.raises(type(error)) as caught:
        state.save(tmp_path, step=2, adapter_writer=fail, optimizer=Run().optimizer)
    assert not isinstance(caught.value, LoraboothError)
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_non_finite_optimizer_state_never_reaches_a_checkpoint(tmp_path, name):
    run = Run(name)
    run.train(0, 1)
    run.save(tmp_path, 1)
    moment = "absmax2" if name == "adamw8bit" else "exp_avg_sq"
    run.optimizer.state[run.big][moment].view(-1)[3] = float("nan")
    with pytest.raises(TrainingError, match=f"NaN or infinity in 1 of .* e.g. 0/.*{moment}") as caught:
        run.save(tmp_path, 2)
    assert caught.value.exit_code == 7
    assert checkpoints(tmp_path) == ["step-000001"]


def test_a_non_finite_fact_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="cannot be saved"):
        Run().save(tmp_path, 1, scale=float("inf"))
    assert checkpoints(tmp_path) == []


def test_keeping_everything_reads_nothing(tmp_path, monkeypatch):
    run = Run()
    for step in (1, 2, 3):
        run.save(tmp_path, step)

    def read(path: Path) -> str:
        raise AssertionError(f"{path} is read")

    monkeypatch.setattr(state, "_sha256", read)
    assert state.rotate(tmp_path, 0) == []
    with pytest.raises(AssertionError, match="is read"):  # the test can fail
        state.rotate(tmp_path, 1)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_size_of_a_checkpoint_is_known_before_the_first_step(tmp_path, name):
    run = Run(name, rank=40_000)
    predicted = state.checkpoint_bytes(run.optimizer)
    run.train(0, 1)
    saved = run.save(tmp_path, 1)
    written = sum(path.stat().st_size for path in saved.folder.iterdir())
    assert written <= predicted < 1.2 * written
