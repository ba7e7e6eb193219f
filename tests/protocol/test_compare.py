from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lorabooth.errors import RecipeError
from lorabooth.evaluation.metrics import measured
from lorabooth.evaluation.scoring import Scores
from lorabooth.protocol.compare import compare
from lorabooth.protocol.results import Evaluation, SubjectEvaluation, read_evaluation

CAPTIONS = ("a mug in the snow", "a painting of a mug")
NAMES = {"dino": "an encoder", "clip": "a clip", "lpips": "a distance"}


def one_subject(token: str, dino: list[float], pres: list[float]) -> SubjectEvaluation:
    prompts = tuple((caption.replace("mug", f"{token} mug"), caption) for caption in CAPTIONS)
    groups = [prompt for prompt, _ in prompts for _ in range(2)]
    scores = Scores(dino=measured(dino, groups), pres=measured(pres, ["a photo of a mug"] * len(pres)))
    real = Scores(dino=measured([0.8, 0.9]))
    return SubjectEvaluation(
        f"{token} mug", scores, Scores(), real, prompts, ("a photo of a mug",), ("a cat",), "ab"
    )


def an_evaluation(run: str, *subjects: SubjectEvaluation, path: Path = Path("evaluation.json")) -> Evaluation:
    return Evaluation(run, "pocket", subjects, NAMES, (), 2, 2, 1, {"steps": "2"}, path=path)


FIRST = an_evaluation("first", one_subject("qzx", [0.5, 0.6, 0.7, 0.8], [0.3, 0.4]))
SECOND = an_evaluation("second", one_subject("sks", [0.6, 0.8, 0.9, 0.7], [0.3, 0.6]))


def test_differences_are_paired_by_caption_and_seed_whatever_the_token_is() -> None:
    found = compare([FIRST, SECOND])
    assert found.names == ("first", "second")
    (subject,) = found.subjects
    (gap,) = subject.differences
    assert gap.dino is not None
    assert np.allclose(gap.dino.values, [0.1, 0.2, 0.2, -0.1])
    assert gap.dino.mean == pytest.approx(0.1)
    # Two prompts whose mean differences are 0.15 and 0.05: no resample of whole prompts leaves these.
    assert gap.dino.low == pytest.approx(0.05)
    assert gap.dino.high == pytest.approx(0.15)
    assert gap.pres is not None
    assert gap.pres.mean == pytest.approx(0.1)
    assert gap.clip_t is None


def test_a_run_against_itself_differs_by_nothing() -> None:
    (subject,) = compare([FIRST, replace(FIRST, run="again")]).subjects
    gap = subject.differences[0].dino
    assert gap is not None
    assert (gap.mean, gap.low, gap.high) == (0, 0, 0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"backbones": {**NAMES, "clip": "another"}}, "clip was measured with a clip, and with another"),
        ({"images_per_prompt": 4}, "images per prompt: 2, and 4"),
        ({"class_images": 9}, "class images: 2, and 9"),
        ({"unrelated_images": 5}, "images per unrelated prompt: 1, and 5"),
        ({"subjects": SECOND.subjects * 2}, "subjects: 1, and 2"),
        (
            {
                "subjects": (
                    replace(SECOND.subjects[0], prompts=(("a", "a"), *SECOND.subjects[0].prompts[1:])),
                )
            },
            'only the first was asked the prompt "a mug in the snow"',
        ),
        ({"subjects": (replace(SECOND.subjects[0], unrelated=("a dog",)),)}, 'unrelated prompt "a dog"'),
        (
            {"subjects": (replace(SECOND.subjects[0], prompts=SECOND.subjects[0].prompts[::-1]),)},
            "the prompts are the same in another order",
        ),
    ],
)
def test_what_cannot_be_compared_is_named(change: dict[str, object], told: str) -> None:
    with pytest.raises(RecipeError) as error:
        compare([FIRST, replace(SECOND, **change)])
    assert told in str(error.value)
    assert "first and second" in str(error.value)


def test_what_may_be_meant_to_differ_is_a_note() -> None:
    other = replace(
        SECOND,
        base="another",
        sampler={"steps": "9"},
        subjects=(replace(SECOND.subjects[0], photos="cd"),),
    )
    notes = "\n".join(compare([FIRST, other]).notes)
    assert "pocket, and another" in notes
    assert "steps 2, and 9" in notes
    assert "different photos" in notes
    assert compare([FIRST, SECOND]).notes == ()


def test_one_run_is_no_comparison_and_a_run_that_was_not_evaluated_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="at least two"):
        compare([FIRST])
    with pytest.raises(RecipeError, match="lorabooth evaluate"):
        compare([FIRST, tmp_path])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "no JSON"),
        ("[]", "another kind"),
        ('{"kind": "lorabooth evaluation", "schema": 99}', "schema is 99"),
        ('{"kind": "lorabooth evaluation", "schema": 1}', "missing or wrong"),
    ],
)
def test_a_damaged_file_is_one_message(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(text)
    with pytest.raises(RecipeError, match=told):
        read_evaluation(file)


def test_files_and_folders_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    for name, one in (("a", FIRST), ("b", SECOND)):
        place = tmp_path / name / "run"
        place.mkdir(parents=True)
        replace(one, run="run", path=place / "evaluation.json").write()
    found = compare([tmp_path / "a" / "run", tmp_path / "b" / "run" / "evaluation.json"])
    assert found.names == ("a/run", "b/run")
    assert found.subjects[0].differences == compare([FIRST, SECOND]).subjects[0].differences


def test_the_same_numbers_in_every_form() -> None:
    found = compare([FIRST, SECOND])
    raw = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert raw["subjects"][0]["differences"][0]["dino"]["mean"] == pytest.approx(0.1)
    text = found.markdown()
    assert "| second − first | +0.100 (+0.05…+0.15) |" in text
    console = Console(width=80)
    with console.capture() as captured:
        console.print(found.terminal())
    shown = captured.get()
    assert "+0.100" in shown
    assert "an encoder" in shown
    assert max(map(len, shown.splitlines())) <= 80
