"""Which checkpoint becomes the result, and that choosing it changes nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import lorabooth
from lorabooth.adapters import file as adapter_file
from lorabooth.errors import InterruptedRunError, LoraboothError, RecipeError
from lorabooth.pocket.base import pocket_dir
from lorabooth.training import going_on, selection, work
from lorabooth.training.folder import RunFolder
from lorabooth.training.selection import Scored, is_over, ranked
from lorabooth.training.subjects import subjects_of
from tests.training import referees, runs
from tests.training.sessions import Listener
from tests.training.test_resume_matrix import CrashError, Interrupting, content

QUICK = ("prior.mode=none",)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return referees.real(tmp_path_factory.mktemp("backbones"))


def scored(*values: float) -> list[Scored]:
    """DINO at steps 10, 20, ..."""
    return [Scored(10 * number, value, 0.5) for number, value in enumerate(values, start=1)]


def told(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text("utf-8"))
    return found


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "selection.jsonl").read_text("utf-8").splitlines()]


def steps_of(out: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))


# ---- what decides ----


def test_each_criterion_and_its_best() -> None:
    pair = [Scored(1, 0.9, 0.1), Scored(2, 0.5, 0.5), Scored(3, 0.1, 0.9)]
    found = {name: ranked(pair, name)[0].step for name in ("balanced", "subject", "prompt")}
    assert found == {"balanced": 2, "subject": 1, "prompt": 3}
    assert pair[1].by("balanced") == 0.25
    assert Scored(1, -0.5, -0.5).by("balanced") == 0, "two bad cosines are no good product"
    assert [one.step for one in ranked(scored(0.3, 0.3, 0.1), "subject")] == [10, 20, 30]


@pytest.mark.parametrize(
    ("values", "patience", "over"),
    [
        ((0.5, 0.4, 0.3), 2, True),
        ((0.5, 0.4, 0.3), 3, False),
        ((0.5, 0.4, 0.45), 2, True),  # better than the one before, worse than the best
        ((0.5, 0.4, 0.5), 2, False),  # as good as the best
        ((0.5, 0.4, 0.6, 0.5), 2, False),
        ((0.5, 0.4), 2, False),
        ((0.5, 0.4, 0.3), 0, False),
        ((), 1, False),
    ],
)
def test_when_a_run_only_gets_worse(
    values: tuple[float, ...], patience: int, over: bool, tmp_path: Path
) -> None:
    recipe = runs.recipe(tmp_path, tmp_path, "run.select=subject")
    run = recipe.run.model_copy(update={"stop_early": patience})
    assert is_over(scored(*values), recipe.model_copy(update={"run": run})) == over


def test_shots_have_seeds_of_their_own_and_captions_without_the_token(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, tmp_path, "run.select=balanced", "run.select_images=3")
    (subject,) = subjects_of(recipe)
    shots = selection.shots_of(recipe, subject, 0)
    assert len(shots) == 3 * 4
    assert len({shot.seed for shot in shots}) == len(shots)
    assert min(shot.seed for shot in shots) > 1000, "samples have seeds 0, 1, 2 ..."
    assert shots[0].prompt == "a photo of a sks dog on the beach"
    assert shots[0].caption == "a photo of a dog on the beach"
    assert {shot.seed for shot in shots}.isdisjoint(
        shot.seed for shot in selection.shots_of(recipe, subject, 1)
    )


# ---- whole runs, measured by real models ----


def test_the_best_checkpoint_is_the_result(
    tiny_sd: Path, photos: Path, tmp_path: Path, measured: Sequence[str]
) -> None:
    out = tmp_path / "run"
    result = runs.train(tiny_sd, photos, out, *measured, *QUICK, "run.select=subject", "run.keep=0")
    found = lines(out)
    assert [line["step"] for line in found] == [2, 4, 6]
    assert len({line["dino"] for line in found}) == 3, "the weights differ, and so do the images"
    best = max(found, key=lambda line: line["dino"])["step"]
    assert result.chosen == best
    assert result.steps == 6
    checkpoint = out / "checkpoints" / f"step-{best:06d}" / "adapter.safetensors"
    assert result.adapter.read_bytes() == checkpoint.read_bytes()
    assert adapter_file.read(result.adapter).metadata.steps == best
    facts = told(out)["selection"]
    assert facts["chosen"] == best
    assert [one["step"] for one in facts["curve"]] == [2, 4, 6]
    assert "vit" in facts["backbones"]["dino"]
    page = result.report.read_text("utf-8")
    assert "Choosing the checkpoint" in page
    assert f"step {best}: highest DINO of 3 checkpoints" in page
    assert "selection" in told(out)["timings_s"]


def test_choosing_leaves_no_trace_on_the_training(
    tiny_sd: Path, photos: Path, tmp_path: Path, measured: Sequence[str]
) -> None:
    """Dropout draws from torch's state, and the text encoder trains: both are used in drawing as well."""
    more = (*QUICK, "adapter.dropout=0.3", "adapter.text_encoder=true", "run.keep=0", "optim.steps=4")
    runs.train(tiny_sd, photos, tmp_path / "off", *more)
    runs.train(tiny_sd, photos, tmp_path / "on", *more, *measured, "run.select=balanced")
    assert runs.metrics(tmp_path / "off") == runs.metrics(tmp_path / "on")
    off, on = content(tmp_path / "off"), content(tmp_path / "on")
    last = [name for name in off if name.startswith("checkpoints")]
    assert last
    assert [off[name] for name in last] == [on[name] for name in last]
    assert not (tmp_path / "off" / "selection.jsonl").exists()


@pytest.mark.slow
def test_interrupted_twice_it_chooses_the_same(
    tiny_sd: Path, photos: Path, tmp_path: Path, measured: Sequence[str]
) -> None:
    chosen = ("run.select=balanced", "run.keep=1", "optim.steps=8")
    held = ("run.validation_every=2", "run.validation_photos=1", "adapter.dropout=0.3")
    recipe = runs.recipe(tiny_sd, photos, *measured, *QUICK, *chosen, *held)
    whole = lorabooth.train(recipe, out=tmp_path / "whole")
    with pytest.raises(CrashError):
        lorabooth.train(recipe, out=tmp_path / "run", reporter=Interrupting(3, crash=True))
    with pytest.raises(InterruptedRunError):
        lorabooth.train(recipe, out=tmp_path / "run", reporter=Interrupting(5, crash=False))
    resumed = lorabooth.train(recipe, out=tmp_path / "run")
    assert resumed.resumed_from == 5
    assert resumed.chosen == whole.chosen
    assert lines(resumed.out) == lines(whole.out)
    assert content(resumed.out) == content(whole.out)
    assert runs.metrics(resumed.out) == runs.metrics(whole.out)
    assert [line["step"] for line in runs.metrics(whole.out) if "val_loss" in line] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    "where",
    [
        "before it is measured",
        pytest.param("before old ones go", marks=pytest.mark.slow),
        pytest.param("before the result", marks=pytest.mark.slow),
    ],
)
def test_killed_around_a_measurement(
    tiny_sd: Path,
    photos: Path,
    tmp_path: Path,
    measured: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    recipe = runs.recipe(
        tiny_sd, photos, *measured, *QUICK, "run.select=prompt", "run.keep=1", "run.sample_count=1"
    )
    whole = lorabooth.train(recipe, out=tmp_path / "whole")
    out = tmp_path / "run"
    owner: Any
    owner, name = {
        "before it is measured": (selection.Selection, "judge"),
        "before old ones go": (work, "rotate"),
        "before the result": (going_on, "deliver"),
    }[where]
    own = getattr(owner, name)

    def dies(*arguments: Any) -> Any:
        if where == "before the result" or len(lines_if_any(out)) == {"judge": 1, "rotate": 2}[name]:
            raise CrashError
        return own(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, dies)
        with pytest.raises(CrashError):
            lorabooth.train(recipe, out=out)
    assert not (out / "adapter.safetensors").exists()
    resumed = lorabooth.train(recipe, out=out)
    assert resumed.resumed_from == (6 if where == "before the result" else 4)
    assert lines(out) == lines(whole.out)
    assert content(out) == content(whole.out)


def lines_if_any(out: Path) -> list[dict[str, Any]]:
    return lines(out) if (out / "selection.jsonl").exists() else []


# ---- whole runs with figures that are given ----


def test_the_best_survives_and_is_drawn(
    tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = referees.scripted(monkeypatch, [0.2, 0.9, 0.3, 0.5, 0.4])
    wanted = (*QUICK, "run.select=balanced", "run.keep=1", "optim.steps=10", "run.sample_count=1")
    out = tmp_path / "run"
    result = runs.train(tiny_sd, photos, out, *wanted, *referees.FEW)
    assert len(given) == 5
    assert steps_of(out) == [4, 10]
    assert result.chosen == 4
    assert result.grid == out / "samples" / "step-000004" / "grid.png"
    assert {place.name for place in (out / "samples").iterdir()} == {"before", "step-000004", "step-000010"}
    why = "step 4: highest DINO x CLIP-T of 5 checkpoints, 0.4500; the last one, step 10, has 0.2000"
    assert told(out)["selection"]["why"] == why
    # The result again, where somebody has removed it: from the chosen checkpoint, not from the last.
    whole = result.adapter.read_bytes()
    result.adapter.unlink()
    again = runs.train(tiny_sd, photos, out, *wanted, *referees.FEW)
    assert again.finished_before
    assert again.chosen == 4
    assert again.adapter.read_bytes() == whole


def test_a_run_that_only_gets_worse_ends_and_is_done(
    tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = referees.scripted(monkeypatch, [0.5, 0.9, 0.8, 0.7, 0.6, 1.0])
    wanted = (*QUICK, "run.select=subject", "run.stop_early=2", *referees.FEW, "optim.steps=12")
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(going_on, "deliver", crash)
        with pytest.raises(CrashError):
            runs.train(tiny_sd, photos, out, *wanted)
    assert told(out)["status"] == "failed"
    result = runs.train(tiny_sd, photos, out, *wanted)
    assert result.resumed_from == result.steps == 8, "no step was added after the end"
    assert len(given) == 4
    assert result.chosen == adapter_file.read(result.adapter).metadata.steps == 4
    assert len(runs.metrics(out)) == 8
    facts = told(out)
    assert facts["status"] == "finished"
    assert facts["selection"]["stopped_early"] == {"step": 8, "of": 12, "after": 2}
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    listener = Listener()
    recipe = runs.recipe(tiny_sd, photos, *wanted)
    assert lorabooth.train(recipe, out=out, reporter=listener).finished_before
    assert any("8 steps of 12; run.stop_early ended it" in line for line in listener.said)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    longer = runs.train(tiny_sd, photos, out, *wanted[:-1], "optim.steps=12", "run.stop_early=0")
    assert (longer.resumed_from, longer.steps, longer.chosen) == (8, 12, 12)


def crash(*_: object) -> None:
    raise CrashError


def test_what_cannot_be_measured_is_told_and_not_chosen(
    tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    referees.scripted(monkeypatch, [0.5, float("nan"), 0.4])
    listener = Listener()
    recipe = runs.recipe(tiny_sd, photos, *QUICK, "run.select=subject", *referees.FEW)
    result = lorabooth.train(recipe, out=tmp_path / "run", reporter=listener)
    assert [line["step"] for line in lines(result.out)] == [2, 6]
    assert result.chosen == 2
    assert any("step 4 could not be measured" in line for line in listener.warnings)


def test_nothing_measured_is_the_last_one(
    tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    referees.scripted(monkeypatch, [float("inf")] * 3)
    result = runs.train(tiny_sd, photos, tmp_path / "run", *QUICK, "run.select=subject", *referees.FEW)
    assert result.chosen == 6
    assert "no checkpoint could be measured" in told(result.out)["selection"]["why"]
    assert "no checkpoint could be measured" in result.report.read_text("utf-8")


def test_other_prompts_are_another_measure(
    tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    referees.scripted(monkeypatch, [0.9, 0.8, 0.1, 0.3, 0.2])
    out, wanted = tmp_path / "run", (*QUICK, "run.select=subject", *referees.FEW)
    first = runs.train(tiny_sd, photos, out, *wanted, "optim.steps=4")
    assert first.chosen == 2
    longer = runs.train(tiny_sd, photos, out, *wanted, "run.select_images=2", "optim.steps=8")
    assert [(line["step"], line["dino"]) for line in lines(out)] == [(4, 0.1), (6, 0.3), (8, 0.2)]
    assert longer.chosen == 6, "what one measure says is not held against what another says"


def test_without_backbones_nothing_is_trained(
    tiny_sd: Path, photos: Path, tmp_path: Path, measured: Sequence[str]
) -> None:
    dino = [line for line in measured if "evaluation.dino" in line]
    recipe = runs.recipe(tiny_sd, photos, *dino, "run.select=balanced", "evaluation.clip=nobody/nothing")
    for dry in (False, True):
        with pytest.raises(RecipeError) as caught:
            lorabooth.train(recipe, out=tmp_path / "run", dry_run=dry)  # type: ignore[call-overload]
        message = str(caught.value)
        assert "evaluation.clip" in message
        assert "evaluation.dino" not in message
        assert "nobody/nothing" in message
        assert 'run.select to "last", or to "subject" (DINO alone)' in message
    assert not RunFolder(tmp_path / "run").recipe.exists()
    assert not RunFolder(tmp_path / "run").metrics.exists()
    # With what is there, the other choice works.
    alone = ("run.select=subject", "evaluation.clip=nobody/nothing", "optim.steps=2", *QUICK)
    result = runs.train(tiny_sd, photos, tmp_path / "run", *measured, *alone)
    assert lines(result.out)[0]["clip_t"] is None
    assert "not measured" in result.report.read_text("utf-8")


def test_training_alone_measures_nothing(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    from lorabooth.progress import Silent
    from lorabooth.training.run import run
    from lorabooth.training.studio import Studio

    recipe = runs.recipe(tiny_sd, photos, *QUICK, "run.select=subject")
    nobody: Any = None
    studio = Studio(nobody, nobody, nobody)
    with pytest.raises(LoraboothError, match="nobody does here"):
        run(recipe, out=tmp_path / "run", studio=studio, reporter=Silent())


@pytest.mark.slow
def test_a_run_that_learns_too_hard_is_ended(tmp_path: Path) -> None:
    """The pocket base at five times the learning rate that suits it, measured by its own backbones."""
    recipe = runs.recipe(
        Path("pocket"),
        pocket_dir().parent / "demo" / "photos",
        "subjects.0.noun=mug",
        "model.base=pocket",
        "prior.mode=none",
        "prior.sampler_steps=8",
        "adapter.rank=8",
        "adapter.targets=attn+ff",
        "optim.lr=1e-2",
        "optim.steps=400",
        "run.checkpoint_every=10",
        "run.select=balanced",
        "run.stop_early=2",
        "run.keep=1",
    )
    result = lorabooth.train(recipe, out=tmp_path / "run")
    facts = told(result.out)["selection"]
    assert facts["stopped_early"]["of"] == 400
    assert result.steps == facts["stopped_early"]["step"] <= 200
    assert result.chosen == result.steps - 20 == adapter_file.read(result.adapter).metadata.steps
    score = {one["step"]: one["score"] for one in facts["curve"]}
    assert max(score[result.steps], score[result.steps - 10]) < score[result.chosen] == max(score.values())
    assert steps_of(result.out) == [result.chosen, result.steps]
    assert "pocket" in facts["backbones"]["dino"]
