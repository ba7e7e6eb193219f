"""Recipes survive writing and reading exactly; overrides and comparisons mean what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabooth.errors import RecipeError
from lorabooth.recipe import (
    CHANGEABLE,
    Recipe,
    SubjectSection,
    differences,
    dump,
    fingerprint,
    from_mapping,
    load,
    loads,
    with_overrides,
)
from lorabooth.recipe.check import sections
from lorabooth.recipe.io import _float_text

SUBJECT = '[[subjects]]\nimages = "photos"\nnoun = "dog"\n'


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return loads(f"[optim]\nlr = 1e-4\n{SUBJECT}", tmp_path / "r.toml")


def test_from_toml_resolves_paths_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    file = tmp_path / "r.toml"
    text = f'[model]\nbase = "base"\n[run]\nout = "../out"\n[prior]\nmode="images"\nimages = "/c"\n{SUBJECT}'
    file.write_text(text, encoding="utf-8")
    recipe = Recipe.from_toml(file)
    assert recipe.subjects[0].images == str(tmp_path / "photos")
    assert recipe.run.out == str(tmp_path.parent / "out")
    assert recipe.model.base == str(tmp_path / "base")
    assert recipe.prior.images == "/c"


def test_metric_backbones_are_paths_where_they_look_like_paths_or_are_there(tmp_path: Path) -> None:
    (tmp_path / "models" / "clip").mkdir(parents=True)
    text = '[evaluation]\ndino = "./dino"\nclip = "models/clip"\nlpips = "some-org/lpips"\n' + SUBJECT
    recipe = loads(text, tmp_path / "r.toml")
    assert recipe.evaluation.dino == str(tmp_path / "dino")
    assert recipe.evaluation.clip == str(tmp_path / "models" / "clip")
    assert recipe.evaluation.lpips == "some-org/lpips"
    own = with_overrides(recipe, ["evaluation.dino=pocket", "evaluation.clip=auto"])
    assert (own.evaluation.dino, own.evaluation.clip) == ("pocket", "auto")
    written = dump(recipe, tmp_path)
    assert 'dino = "./dino"' in written
    assert loads(written, tmp_path / "r.toml") == recipe
    assert fingerprint(own) == fingerprint(recipe)  # what is measured with changes nothing that is learned


def test_what_is_no_path_stays(tmp_path: Path) -> None:
    recipe = loads(f'[model]\nbase = "some-org/some-model"\n{SUBJECT}', tmp_path / "r.toml")
    assert recipe.model.base == "some-org/some-model"
    assert recipe.run.out == "auto"
    assert loads(SUBJECT, tmp_path / "r.toml").model.base == "pocket"
    assert recipe.prior.images == ""


def test_byte_order_mark_and_other_scripts(tmp_path: Path) -> None:
    file = tmp_path / "é 狗.toml"
    file.write_bytes(b"\xef\xbb\xbf" + '[[subjects]]\nimages = "фото"\nnoun = "狗"\n'.encode())
    recipe = load(file)
    assert recipe.subjects[0].noun == "狗"
    assert recipe.subjects[0].images == str(tmp_path / "фото")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[optim]\nlr = = 2\n", r"r.toml: not valid TOML at line 2, column 6"),
        (b"[optim\n", r"not valid TOML at line 1, column"),
        (b"a = [1,", r"at the end of the file \(line 1\)"),
        (b"\xff\xfea\x00", r"byte 0 is not UTF-8"),
        (b"[optim]\nlr = 1\nlr = 2\n", r"line 3"),
    ],
)
def test_broken_files_name_the_place(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "r.toml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=expected):
        load(file)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe file"):
        load(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="is a folder"):
        load(tmp_path)


def test_dump_is_commented_readable_and_never_empty_handed(recipe: Recipe) -> None:
    text = dump(recipe)
    assert "lr = 1e-4\n" in text
    assert 'rank = "auto"' in text
    assert "weight_decay = 0.01" in text
    assert "None" not in text
    for kind in sections().values():
        for field in kind.model_fields.values():
            assert f"# {field.description}" in text
    assert loads(text, "elsewhere/r.toml") == recipe


def test_a_run_folder_can_be_moved(recipe: Recipe, tmp_path: Path) -> None:
    there = with_overrides(recipe, [f"run.out={tmp_path / 'runs' / 'a'}"])
    text = dump(there, tmp_path / "runs" / "a")
    assert 'out = "."\n' in text
    assert loads(text, tmp_path / "runs" / "a" / "recipe.toml") == there
    moved = loads(text, tmp_path / "moved" / "recipe.toml")
    assert moved.run.out == str(tmp_path / "moved")
    assert moved.subjects == there.subjects
    assert 'images = "./photos"' in dump(there, tmp_path)


NUMBERS = st.floats(min_value=1e-300, max_value=1, exclude_min=True, allow_nan=False)
WORDS = st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="{}"), min_size=1).map(
    str.strip
)


@settings(max_examples=150, deadline=None)
@given(NUMBERS, st.floats(0, 10), WORDS.filter(bool), st.lists(WORDS.filter(bool), max_size=3), st.booleans())
def test_any_recipe_round_trips(lr: float, decay: float, noun: str, prompts: list[str], flip: bool) -> None:
    raw: dict[str, Any] = {
        "subjects": [{"images": "/a/b", "noun": noun}, {"images": "/a/c", "noun": noun, "captions": True}],
        "optim": {"lr": lr, "weight_decay": decay, "steps": 10},
        "run": {"sample_prompts": prompts, "seed": 2**63 - 1},
        "images": {"flip": flip},
    }
    recipe = from_mapping(raw, (), "test")
    again = loads(dump(recipe), "x/r.toml")
    assert again == recipe
    assert dump(again) == dump(recipe)
    assert fingerprint(again) == fingerprint(recipe)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-4, "1e-4"),
        (5e-6, "5e-6"),
        (1.5e-5, "1.5e-5"),
        (0.01, "0.01"),
        (0.0, "0.0"),
        (1e20, "1e20"),
        (3.0, "3.0"),
    ],
)
def test_numbers_are_written_as_people_do(value: float, text: str) -> None:
    assert _float_text(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_read_back_exactly(value: float) -> None:
    assert float(_float_text(value)) == value


def test_overrides_are_toml_or_plain_words(recipe: Recipe) -> None:
    changed = with_overrides(
        recipe,
        [
            "optim.lr=1e-5",
            "subjects.0.noun=cat",
            "subjects[0].template=a drawing of {token} {noun}",
            "run.sample_prompts=['a','b = c']",
            "images.flip=true",
            "optim.schedule = 'cosine'",
            "model.base=./models/x",
            "subjects.1.noun=dog",
            "subjects.1.images=/d",
        ],
    )
    assert changed.optim.lr == 1e-5
    assert changed.subjects[0].noun == "cat"
    assert changed.subjects[0].images == recipe.subjects[0].images
    assert changed.subjects[0].template == "a drawing of {token} {noun}"
    assert changed.run.sample_prompts == ("a", "b = c")
    assert changed.images.flip is True
    assert changed.optim.schedule == "cosine"
    assert changed.model.base == str(Path.cwd() / "models" / "x")
    assert changed.subjects[1].images == "/d"
    assert recipe.optim.lr == 1e-4


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr", "is not KEY=VALUE"),
        ("=3", "is not KEY=VALUE"),
        ("lr=3", "lr: unknown key; `lr` belongs to [optim]"),
        ("optim.lr=fast", 'optim.lr: "fast" is not allowed'),
        ("optim.lr.x=1", "a key is section.key"),
        ("subjects.5.noun=x", "there are 1 subjects"),
        ("subjects.noun=x", "name one subject by its number"),
        ("0.noun=x", "a key begins with a section"),
        ("optim.lr=1\nrun.seed=2", "optim.lr"),
    ],
)
def test_wrong_overrides_name_the_key(recipe: Recipe, override: str, expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        with_overrides(recipe, [override])
    assert str(error.value).startswith("--set: 1 problem\n")
    assert expected in str(error.value)


def test_an_override_mends_a_file(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text("[optim]\nlr = 'x'\n[[subjects]]\nimages='p'\n", encoding="utf-8")
    recipe = load(file, ["optim.lr=0.5", "subjects.0.noun=dog"])
    assert recipe.optim.lr == 0.5


def test_differences_are_empty_exactly_when_fingerprints_agree(recipe: Recipe) -> None:
    later = with_overrides(
        recipe,
        [
            "optim.steps=7",
            "run.out=/elsewhere",
            "run.keep=0",
            "run.sample_prompts=['a']",
            "speed.compile=on",
        ],
    )
    assert differences(recipe, later) == []
    assert fingerprint(recipe) == fingerprint(later)
    assert {key for key, _, _ in differences(recipe, later, changeable=True)} <= CHANGEABLE
    other = with_overrides(recipe, ["optim.lr=1e-5", "subjects.0.noun=cat", "optim.steps=9"])
    assert differences(recipe, other) == [("subjects[0].noun", "dog", "cat"), ("optim.lr", 1e-4, 1e-5)]
    assert fingerprint(recipe) != fingerprint(other)


def test_differences_leave_out_what_is_ignored(recipe: Recipe) -> None:
    two = with_overrides(recipe, ["subjects.1.images=/b", "subjects.1.noun=cat"])
    other = with_overrides(
        two, ["subjects.0.images=/x", "subjects.1.images=/y", "model.base=/z", "run.keep=1", "optim.lr=0.5"]
    )
    keys = ["model.base", "subjects[0].images", "subjects[1].images", "optim.lr"]
    assert [key for key, _, _ in differences(two, other)] == keys
    assert [key for key, _, _ in differences(two, other, ignore=["subjects[1].images"])] == [
        "model.base",
        "subjects[0].images",
        "optim.lr",
    ]
    assert [key for key, _, _ in differences(two, other, ignore={"subjects.images", "optim.lr"})] == [
        "model.base"
    ]
    assert [key for key, _, _ in differences(two, other, changeable=True, ignore=keys)] == ["run.keep"]


def test_differences_in_the_number_of_subjects(recipe: Recipe) -> None:
    more = recipe.model_copy(update={"subjects": (*recipe.subjects, SubjectSection(images="b", noun="cat"))})
    assert ("subjects[1].noun", None, "cat") in differences(recipe, more)
    assert ("subjects[1].noun", "cat", None) in differences(more, recipe)


def test_changeable_keys_exist() -> None:
    known = {f"{name}.{field}" for name, kind in sections().items() for field in kind.model_fields}
    assert known >= CHANGEABLE


def test_numbers_of_a_list_stand_on_one_line() -> None:
    recipe = loads(f"[prior]\nguidance_interval = [0.28, 5.42]\n{SUBJECT}", "recipe.toml")
    assert "guidance_interval = [0.28, 5.42]\n" in dump(recipe)
    assert loads(dump(recipe), "recipe.toml") == recipe
