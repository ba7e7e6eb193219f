"""Two subjects, two steps, a tiny base: trained, drawn and measured for real."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorabooth.errors import DataError, RecipeError
from lorabooth.protocol.jobs import Job, Settings, load_recipe, make_job, require_for_many
from lorabooth.protocol.many import require_all, run_protocol, table
from lorabooth.protocol.summary import PUBLISHED, ProtocolResult
from lorabooth.protocol.workers import leave_launch, taken
from lorabooth.recipe import Recipe, from_mapping
from tests.tiny import make_photos

TEMPLATES = ("a {token} {noun} in the snow", "a red {token} {noun}")
SETTINGS = Settings(images_per_prompt=2, class_images=2, unrelated_images=1)


@dataclass(frozen=True)
class World:
    """Two subjects and a recipe, as files.

    Attributes:
        home: of everything.
        subjects: a dog and a mug.
        recipe: file.
        prompts: file of TEMPLATES.
    """

    home: Path
    subjects: Path
    recipe: Path
    prompts: Path

    def job(self, out: Path, *overrides: str, subjects: Path | None = None, **more: Any) -> Job:
        return make_job(
            subjects or self.subjects,
            load_recipe(self.recipe, overrides),
            out,
            settings=SETTINGS,
            templates=TEMPLATES,
            **more,
        )


class Listener:
    """A reporter that remembers."""

    def __init__(self) -> None:
        from lorabooth.progress import Silent

        self.task = Silent().task
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)

    warn = say


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path, encoder: Path) -> World:
    home = tmp_path_factory.mktemp("many")
    for number, name in enumerate(("rex", "mine")):
        make_photos(home / "subjects" / name, 3, seed=number)
    (home / "subjects" / "rex" / "class.txt").write_text("dog")
    (home / "subjects" / "mine" / "class.txt").write_text("mug")
    (home / "prompts.txt").write_text("\n".join(TEMPLATES))
    (home / "recipe.toml").write_text(
        f'model.base = "{tiny_sd}"\nprior = {{count = 2, sampler_steps = 1}}\nadapter.rank = 2\n'
        "optim = {steps = 2, lr = 1e-2}\nrun = {sample_count = 0, checkpoint_every = 1}\n"
        f'evaluation = {{dino = "{encoder}", clip = "pocket"}}\n'
    )
    return World(home, home / "subjects", home / "recipe.toml", home / "prompts.txt")


@pytest.fixture(scope="module")
def told() -> Listener:
    return Listener()


@pytest.fixture(scope="module")
def done(world: World, told: Listener) -> ProtocolResult:
    return run_protocol(world.job(world.home / "out"), reporter=told)


@pytest.fixture
def copied(done: ProtocolResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done.job.out, tmp_path / "out"))


def numbers(out: Path) -> dict[str, Any]:
    """The table, without what a clock wrote."""
    found = json.loads((out / "protocol.json").read_text("utf-8"))
    del found["timings_s"]
    return dict(found)


def test_the_cost_is_told_before_anything_is_done(done: ProtocolResult, told: Listener) -> None:
    cost = next(index for index, line in enumerate(told.lines) if line.startswith("to do:"))
    first = next(index for index, line in enumerate(told.lines) if line.startswith("--- "))
    assert cost < first
    assert "2 trainings of 2 steps = 4 steps" in told.lines[cost]
    # 2 prompts x 2, the class x 2, unrelated things x 1, with and without the adapter, of two subjects.
    drawn = sum(2 * len(one.evaluation.subjects[0].pictures) for one in done.done if one.evaluation)
    assert f"{drawn} images to measure by" in told.lines[cost]
    assert "4 class images" in told.lines[cost]


def test_one_table_over_all_subjects(done: ProtocolResult) -> None:
    assert [one.name for one in done.done] == ["mine", "rex"]
    found = numbers(done.job.out)
    assert [one["name"] for one in found["subjects"]] == ["mine", "rex"]
    for side in ("adapter", "without", "real"):
        each = [one[side]["dino"]["mean"] for one in found["subjects"]]
        mean = found["means"][side]["dino"]
        assert mean["mean"] == pytest.approx(sum(each) / 2, rel=1e-4)
        assert min(each) - 1e-5 <= mean["low"] <= mean["mean"] <= mean["high"] <= max(each) + 1e-5
        assert mean["groups"] == ["mine", "rex"]
    assert found["means"]["adapter"]["pres"] is not None
    assert found["means"]["adapter"]["div"] is not None
    assert found["means"]["real"]["clip_t"] is None
    assert set(found["backbones"]) == {"dino", "clip", "lpips"}
    assert len(found["published"]["rows"]) == len(PUBLISHED)


def test_the_table_for_people(done: ProtocolResult) -> None:
    text = (done.job.out / "protocol.md").read_text("utf-8")
    for words in ("| mine |", "| rex |", "| mean, with adapter |", "| mean, real images |", "0.668"):
        assert words in text
    assert "do not compare" in text


def test_the_contact_sheet_shows_every_subject_and_nothing_from_elsewhere(done: ProtocolResult) -> None:
    text = done.page.read_text("utf-8")
    assert text.count('class="subject"') == 2
    # Three photos and two prompts each.
    assert text.count('src="data:image/') == 2 * (3 + 2)
    assert "<script" not in text
    assert 'src="http' not in text
    assert 'href="rex/evaluation.html"' in text
    assert (done.job.out / "rex" / "evaluation.html").is_file()


def test_no_path_of_this_machine_is_in_the_results(done: ProtocolResult, world: World, tiny_sd: Path) -> None:
    for name in ("protocol.json", "protocol.md", "protocol.html"):
        text = (done.job.out / name).read_text("utf-8")
        assert str(world.home) not in text
        assert str(tiny_sd.parent) not in text


def test_the_same_command_again_touches_nothing(done: ProtocolResult, world: World, copied: Path) -> None:
    runs = [path for path in copied.rglob("*") if path.is_file() and path.parent != copied]
    runs = [path for path in runs if path.name != "job.json"]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in runs}
    heard = Listener()
    again = run_protocol(world.job(copied), reporter=heard)
    assert "all 2 subjects are done already" in heard.lines
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in runs} == before
    assert numbers(copied) == numbers(done.job.out)
    assert again.means == done.means


def test_a_subject_that_stopped_half_way_goes_on_and_ends_the_same(
    done: ProtocolResult, world: World, copied: Path
) -> None:
    # As a kill leaves it while images are drawn: the run is there, half of the images, no numbers.
    (copied / ".protocol" / "endings" / "rex.json").unlink()
    (copied / "rex" / "evaluation.json").unlink()
    images = sorted((copied / "rex" / "evaluation" / "adapter").glob("*.png"))
    for path in images[::2]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in images[1::2]}
    adapter = (copied / "rex" / "adapter.safetensors").stat().st_mtime_ns
    assert [one.status for one in table(world.job(copied)).subjects] == ["done", "unfinished"]
    run_protocol(world.job(copied))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (copied / "rex" / "adapter.safetensors").stat().st_mtime_ns == adapter
    assert numbers(copied) == numbers(done.job.out)


@pytest.mark.slow
def test_a_subject_that_fails_keeps_no_other_from_its_turn(
    done: ProtocolResult, world: World, copied: Path, tmp_path: Path
) -> None:
    subjects = Path(shutil.copytree(world.subjects, tmp_path / "subjects"))
    make_photos(subjects / "broken", 2, seed=7)
    (subjects / "broken" / "class.txt").write_text("boot")
    photo = next(iter(sorted((subjects / "broken").glob("*.png"))))
    whole = photo.read_bytes()
    photo.write_bytes(whole[:200])
    shutil.rmtree(copied / "rex")
    found = run_protocol(world.job(copied, subjects=subjects))
    assert [(one.name, one.status) for one in found.subjects] == [
        ("broken", "failed"),
        ("mine", "done"),
        ("rex", "done"),
    ]
    with pytest.raises(Exception, match="1 of 3 subjects failed") as caught:
        require_all(found)
    assert caught.value.exit_code == DataError.exit_code  # type: ignore[attr-defined]
    text = (copied / "protocol.json").read_text("utf-8")
    assert photo.name in text
    assert str(tmp_path) not in text
    assert "failed" in found.page.read_text("utf-8")
    assert "broken: failed" in (copied / "protocol.md").read_text("utf-8")
    # Mended, the same command does what is left.
    photo.write_bytes(whole)
    mended = run_protocol(world.job(copied, subjects=subjects))
    assert [one.status for one in mended.subjects] == ["done"] * 3
    require_all(mended)


def test_photos_that_changed_are_no_subject_that_is_done(world: World, copied: Path, tmp_path: Path) -> None:
    subjects = Path(shutil.copytree(world.subjects, tmp_path / "subjects"))
    make_photos(subjects / "rex", 3, seed=5)
    found = run_protocol(world.job(copied, subjects=subjects))
    failed = {one.name: one for one in found.failed}
    assert list(failed) == ["rex"]
    assert "holds a run of another recipe" in failed["rex"].reason
    assert str(tmp_path.parent) not in (copied / "protocol.json").read_text("utf-8")
    assert (copied / "rex" / "evaluation.json").is_file()


def test_another_recipe_in_the_same_folder_is_refused(done: ProtocolResult, world: World) -> None:
    before = numbers(done.job.out)
    for overrides, told in ((["optim.lr=2e-2"], "optim.lr"), (["optim.steps=3"], "optim.steps")):
        with pytest.raises(RecipeError, match="holds another protocol") as caught:
            world.job(done.job.out, *overrides)
        assert told in str(caught.value)
    with pytest.raises(RecipeError, match="rex: a dog there, a puppy now"):
        world.job(done.job.out, told={"rex": "puppy"})
    world.job(done.job.out, "memory.checkpointing=true")  # what may change in a run, may change here
    assert numbers(done.job.out) == before


def test_more_subjects_may_come(world: World, tmp_path: Path) -> None:
    from lorabooth.protocol.jobs import write_job

    write_job(world.job(tmp_path / "out", only=["rex"]))
    assert len(world.job(tmp_path / "out", "optim.steps=9", only=["mine"]).asked) == 1  # nothing had begun
    (tmp_path / "out" / "rex").mkdir()
    both = world.job(tmp_path / "out", only=["mine"])
    assert [one.subject.name for one in both.asked] == ["mine", "rex"]
    assert [one.subject.name for one in both.todo] == ["mine"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"subjects": [{"images": "a", "noun": "dog"}, {"images": "b", "noun": "cat"}]}, "2 subjects"),
        ({"subjects": [{"images": "a", "noun": "dog", "captions": True}]}, "captions"),
        ({"prior": {"mode": "images", "images": "dogs"}}, "prior.mode"),
        ({"prior": {"prompt": "a photo of a dog"}}, "prior.prompt"),
    ],
)
def test_recipes_that_cannot_be_those_of_many(change: dict[str, Any], told: str) -> None:
    raw = {"subjects": [{"images": "a", "noun": "dog"}], **change}
    with pytest.raises(RecipeError, match="cannot be used for many subjects") as caught:
        require_for_many(from_mapping(raw, (), "test"))
    assert told in str(caught.value)


def test_the_recipes_own_subject_is_replaced(world: World, tmp_path: Path) -> None:
    raw = {"subjects": [{"images": "x", "noun": "cat", "token": "sks", "template": "one {token} {noun}"}]}
    job = make_job(world.subjects, from_mapping(raw, (), "test"), tmp_path / "out", templates=TEMPLATES)
    recipes: dict[str, Recipe] = {one.subject.name: job.recipe_for(one.subject) for one in job.todo}
    subject = recipes["rex"].subjects[0]
    assert (subject.noun, subject.token, subject.template) == ("dog", "sks", "one {token} {noun}")
    assert subject.images == str(world.subjects / "rex")


# ---- several processes ----


def test_a_launchers_process_becomes_a_single_one() -> None:
    launched = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "none",
        "ACCELERATE_USE_CPU": "true",
        "PATH": "/bin",
    }
    position = leave_launch(launched)
    assert (position.index, position.count) == (3, 4)
    assert launched == {"ACCELERATE_USE_CPU": "true", "PATH": "/bin"}
    alone = {"PATH": "/bin"}
    assert leave_launch(alone) == leave_launch({"WORLD_SIZE": "1", "RANK": "0"})


def test_one_lock_one_owner(tmp_path: Path) -> None:
    with taken(tmp_path / "rex.lock") as first, taken(tmp_path / "rex.lock") as second:
        assert (first, second) == (True, False)
    with taken(tmp_path / "rex.lock") as later:
        assert later


@pytest.fixture(scope="module")
def words(world: World) -> Callable[[Path], list[str]]:
    """The command that does what `done` does, but for the images of class and unrelated prompts."""

    def command(out: Path) -> list[str]:
        options = ["--subjects", str(world.subjects), "--recipe", str(world.recipe)]
        options += ["--prompts", str(world.prompts), "--images-per-prompt", "2", "--out", str(out)]
        return ["lorabooth", "evaluate", "protocol", *options]

    return command


def _run(*command: str, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["ACCELERATE_USE_CPU"] = "true"  # as `accelerate launch --cpu` does
    return subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=False, env=environment, **more
    )


@pytest.fixture(scope="module")
def whole(words: Callable[[Path], list[str]], world: World) -> Path:
    """What the command gives when nothing comes in between."""
    found = _run(*words(world.home / "whole"))
    assert found.returncode == 0, found.stderr
    return world.home / "whole"


@pytest.mark.slow
def test_killed_again_and_again_the_command_gives_the_same_table(
    words: Callable[[Path], list[str]], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # Killed when the first run is under way, when its images are, when the second subject is.
    for sign in ("*/metrics.jsonl", "*/evaluation/adapter/*.png", "*/evaluation.json"):
        process = subprocess.Popen([sys.executable, "-m", *words(out)], stderr=subprocess.PIPE)
        while process.poll() is None and not list(out.glob(sign)):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = _run(*words(out))
    assert last.returncode == 0, last.stderr
    assert numbers(out) == numbers(whole)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--processes", "launcher"])
def test_two_processes_share_the_subjects_and_each_trains_alone(
    how: str, words: Callable[[Path], list[str]], whole: Path, tmp_path: Path
) -> None:
    if how == "launcher":
        # What `accelerate launch` starts for several GPUs; on a CPU it would start a single process.
        launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
        found = _run(*launch, *words(tmp_path / "out"))
    else:
        found = _run(*words(tmp_path / "out"), "--processes", "2")
    assert found.returncode == 0, found.stderr
    assert numbers(tmp_path / "out") == numbers(whole)
    for name in ("rex", "mine"):
        facts = json.loads((tmp_path / "out" / name / "run.json").read_text("utf-8"))
        assert facts["status"] == "finished"
    endings = [json.loads(path.read_text()) for path in (tmp_path / "out" / ".protocol/endings").iterdir()]
    assert {ending["worker"] for ending in endings} == {0, 1}
    # The table is printed once.
    assert found.stdout.count("protocol.json") == 1
