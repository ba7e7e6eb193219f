from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorabooth.errors import AdapterError, BaseModelError, DataError, RecipeError
from lorabooth.evaluation.backbones import open_backbones
from lorabooth.protocol.results import Evaluation, read_evaluation
from lorabooth.protocol.run import evaluate
from tests.protocol.conftest import FEW, TWO


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.int64)


def test_every_metric_is_there_with_the_values_of_every_image(evaluated: Evaluation) -> None:
    for scores in (evaluated.adapter, evaluated.without):
        for key, count in (("dino", 4), ("clip_i", 4), ("clip_t", 4), ("pres", 2), ("div", 2)):
            metric = getattr(scores, key)
            assert len(metric.values) == count, key
            assert np.isfinite(metric.mean)
    assert evaluated.adapter.drift is not None
    assert evaluated.adapter.drift.mean > 0
    assert evaluated.without.drift is None
    assert evaluated.real.dino is not None
    assert len(evaluated.real.dino.values) == 5
    assert evaluated.notes == ()
    assert evaluated.backbones["clip"] == "the pocket CLIP"
    assert "encoder" in evaluated.backbones["dino"]


def test_the_prompts_are_drawn_with_the_token_and_compared_without_it(evaluated: Evaluation) -> None:
    assert evaluated.prompts == ("a photo of a qzx mug in the snow", "a painting of a qzx mug")
    assert [one.caption for one in evaluated.per_prompt] == [
        "a photo of a mug in the snow",
        "a painting of a mug",
    ]
    total = evaluated.adapter.clip_t
    assert total is not None
    own = [one.adapter["clip_t"] for one in evaluated.per_prompt]
    assert np.mean([value for value in own if value is not None]) == pytest.approx(total.mean, abs=1e-6)


def test_on_and_off_are_the_same_noise_and_not_the_same_image(evaluated: Evaluation) -> None:
    home = evaluated.path.parent
    pictures = evaluated.subjects[0].pictures
    assert [picture.kind for picture in pictures] == ["subject"] * 4 + ["class"] * 2 + ["unrelated"]
    changes = [np.abs(opened(home / one.adapter) - opened(home / one.without)).mean() for one in pictures]
    assert min(changes) > 0
    other_noise = np.abs(opened(home / pictures[0].without) - opened(home / pictures[1].without)).mean()
    assert min(changes) < other_noise


def test_an_adapter_of_strength_0_scores_exactly_like_the_base(
    trained_run: Path, encoder: Path, evaluated: Evaluation, tmp_path: Path
) -> None:
    found = evaluate(
        trained_run,
        **FEW,
        dino=str(encoder),
        strength=0.0,
        out=tmp_path,
        base_images=evaluated.path.parent / "evaluation" / "base",
    )
    assert replace(found.adapter, drift=None) == found.without == evaluated.without
    assert found.adapter.drift is not None
    assert found.adapter.drift.mean == pytest.approx(0, abs=1e-6)
    assert found.adapter != evaluated.adapter
    # The base's images were there; what was drawn is not beside the run.
    assert sorted(path.name for path in (tmp_path / "evaluation").iterdir()) == ["adapter"]
    assert (tmp_path / "evaluation.html").is_file()


def test_started_again_it_draws_nothing_and_finds_the_same(
    run_copy: Callable[[], Path], encoder: Path, evaluated: Evaluation
) -> None:
    run = run_copy()
    images = {path: path.stat().st_mtime_ns for path in (run / "evaluation").rglob("*.png")}
    assert len(images) == 14
    again = evaluate(run, **FEW, dino=str(encoder))
    assert {path: path.stat().st_mtime_ns for path in (run / "evaluation").rglob("*.png")} == images
    assert again.subjects == evaluated.subjects


def test_what_no_backbone_can_measure_is_not_drawn(trained_run: Path, tmp_path: Path) -> None:
    """With CLIP alone there is neither PRES nor drift, so images of the class or of other things are idle."""
    clip = replace(open_backbones(base="pocket"), subject=None, distance=None)
    found = evaluate(trained_run, **FEW, backbones=clip, out=tmp_path / "out")
    (subject,) = found.subjects
    assert subject.adapter.clip_t is not None
    missing = (subject.adapter.pres, subject.adapter.drift, subject.adapter.dino)
    assert missing == (None, None, None)
    assert {picture.kind for picture in subject.pictures} == {"subject"}
    drawn = list((tmp_path / "out" / "evaluation" / "adapter").rglob("*.png"))
    assert len(drawn) == len(TWO.subject) * FEW["images_per_prompt"]
    assert "DINO" in (tmp_path / "out" / "evaluation.html").read_text(encoding="utf-8")


def test_what_is_written_reads_back_and_tells_nothing_of_the_machine(evaluated: Evaluation) -> None:
    back = read_evaluation(evaluated.path.parent)
    assert back.backbones == evaluated.backbones
    assert back.adapter.dino is not None
    assert evaluated.adapter.dino is not None
    assert back.adapter.dino.values == pytest.approx(evaluated.adapter.dino.values, abs=1e-5)
    assert back.subjects[0].pictures == evaluated.subjects[0].pictures
    raw = json.loads(evaluated.path.read_text("utf-8"))
    assert raw["schema"] == 1
    assert raw["versions"]["lorabooth"]
    for text in (evaluated.path.read_text("utf-8"), evaluated.page.read_text("utf-8")):
        assert str(evaluated.path.parent.parent) not in text
        assert str(Path.home()) + "/" not in text


def test_the_run_s_report_shows_the_table_and_leads_to_the_page(
    evaluated: Evaluation, run_copy: Callable[[], Path]
) -> None:
    text = (evaluated.path.parent / "report.html").read_text("utf-8")
    assert 'href="evaluation.html"' in text
    assert evaluated.adapter.dino is not None
    assert f"{evaluated.adapter.dino.mean:.3f}" in text
    # Numbers of another adapter are not this run's.
    from lorabooth.recipe import load
    from lorabooth.run_report import write_run_report
    from lorabooth.training.folder import RunFolder

    folder = RunFolder(run_copy())
    raw = json.loads((folder.root / "evaluation.json").read_text("utf-8"))
    raw["facts"]["adapter"] = "0" * 16
    (folder.root / "evaluation.json").write_text(json.dumps(raw), "utf-8")
    write_run_report(folder, load(folder.recipe), 4)
    assert "evaluation.html" not in folder.report.read_text("utf-8")


def test_the_page_holds_everything_it_shows(evaluated: Evaluation) -> None:
    text = evaluated.page.read_text("utf-8")
    assert text.count("<img ") == 2 * 7 + 5
    assert text.count('src="data:image/') == text.count("<img ")
    assert "http" not in text
    assert "<script" not in text
    for part in (
        "the pocket CLIP",
        "PRES ↓",
        "DINO ↑",
        "a painting of a qzx mug",
        "real images",
        "adapter off",
    ):
        assert part in text


def test_a_run_of_two_subjects_has_a_block_of_each(run_copy: Callable[[], Path], encoder: Path) -> None:
    from lorabooth.recipe import dump, load

    run = run_copy()
    recipe = load(run / "recipe.toml")
    second = recipe.subjects[0].model_copy(update={"token": "sks", "noun": "cat"})
    both = recipe.model_copy(update={"subjects": (recipe.subjects[0], second)})
    (run / "recipe.toml").write_text(dump(both, run), "utf-8")
    one = replace(TWO, subject=TWO.subject[:1], unrelated=())
    found = evaluate(run, **{**FEW, "prompts": one, "class_images": 0, "steps": 1}, dino=str(encoder))
    assert [each.subject for each in found.subjects] == ["qzx mug", "sks cat"]
    assert [each.prompts[0][1] for each in found.subjects] == [
        "a photo of a mug in the snow",
        "a photo of a cat in the snow",
    ]
    assert found.subjects[0].adapter != found.subjects[1].adapter
    for page in (found.page, run / "report.html"):
        assert "sks cat" in page.read_text("utf-8")
    assert len(read_evaluation(run).subjects) == 2


# ---- bad input: one message, nothing drawn ----


def spoiled(run: Path) -> set[Path]:
    return set(run.rglob("*"))


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is no run folder"):
        evaluate(tmp_path)


@pytest.mark.parametrize("status", ["running", "interrupted", None])
def test_an_unfinished_run(run_copy: Callable[[], Path], status: str | None) -> None:
    run = run_copy()
    facts = json.loads((run / "run.json").read_text("utf-8"))
    if status is None:
        (run / "run.json").unlink()
    else:
        (run / "run.json").write_text(json.dumps({**facts, "status": status}), "utf-8")
    before = spoiled(run)
    with pytest.raises(RecipeError, match="is not finished") as error:
        evaluate(run, **FEW)
    assert "lorabooth train" in error.value.fix
    assert spoiled(run) == before


def test_an_adapter_that_is_gone_or_broken(run_copy: Callable[[], Path]) -> None:
    run = run_copy()
    adapter = run / "adapter.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:200])
    with pytest.raises(AdapterError):
        evaluate(run, **FEW)
    adapter.unlink()
    with pytest.raises(AdapterError, match="is gone"):
        evaluate(run, **FEW)


def test_photos_that_are_gone_are_named_and_may_be_elsewhere(
    run_copy: Callable[[], Path], trained_run: Path, encoder: Path, tmp_path: Path, evaluated: Evaluation
) -> None:
    run, photos = run_copy(), tmp_path / "photos"
    shutil.copytree(trained_run.parent / "photos", photos)
    found = evaluate(run, **FEW, dino=str(encoder), images=photos)
    assert found.real == evaluated.real
    (photos / "02.png").unlink()
    with pytest.raises(DataError, match=r"02\.png"):
        evaluate(run, **FEW, dino=str(encoder), images=photos)
    # A photo that came later was not learned from; one that has changed is told.
    shutil.copy(photos / "01.png", photos / "06.png")
    shutil.copy(photos / "01.png", photos / "02.png")
    again = evaluate(run, **FEW, dino=str(encoder), images=photos)
    assert again.real.dino is not None
    assert len(again.real.dino.values) == 5
    assert any("02.png" in note for note in again.notes)
    assert again.subjects[0].photos != found.subjects[0].photos


def test_a_backbone_that_is_asked_for_and_absent_is_an_error_before_anything_is_drawn(
    run_copy: Callable[[], Path], tmp_path: Path
) -> None:
    run = run_copy()
    before = spoiled(run)
    with pytest.raises(RecipeError, match=r"evaluation\.dino"):
        evaluate(run, **{**FEW, "steps": 1}, dino=str(tmp_path / "none"))
    assert spoiled(run) == before


def test_a_base_without_any_backbone_can_measure_nothing(run_copy: Callable[[], Path], tiny_sd: Path) -> None:
    run = run_copy()
    before = spoiled(run)
    with pytest.raises(BaseModelError, match="nothing can be measured"):
        evaluate(run, **FEW, base=str(tiny_sd))
    assert spoiled(run) == before


def test_another_base_than_the_run_s_is_told(trained_run: Path, encoder: Path, tmp_path: Path) -> None:
    from lorabooth.pocket.base import pocket_dir

    base = Path(shutil.copytree(pocket_dir(), tmp_path / "base"))
    (base / "unet" / "config.json").touch()
    found = evaluate(
        trained_run,
        prompts=replace(TWO, subject=TWO.subject[:1], unrelated=(), classes=()),
        images_per_prompt=1,
        steps=1,
        dino=str(encoder),
        base=str(base),
        out=tmp_path / "out",
    )
    # The same weights elsewhere are no other base; and one image has no pairs, nothing else was asked.
    assert not any("base" in note for note in found.notes)
    assert found.adapter.dino is not None
    assert found.adapter.dino.low is None
    assert found.adapter.pres is found.adapter.div is found.adapter.drift is None
