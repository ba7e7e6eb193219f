from __future__ import annotations

from pathlib import Path

import pytest

from lorabooth.errors import DataError, RecipeError
from lorabooth.protocol import dreambench
from lorabooth.protocol.prompts import LIVE_PROMPTS, OBJECT_PROMPTS
from lorabooth.protocol.subjects import parse_class, photos_digest, read_subjects
from tests.tiny import make_photos

REAL = Path(__file__).resolve().parents[3] / "shared" / "dreambench"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="DreamBench is not here")

TEXT = """Classes

subject_name,class
rex,dog
tall_vase,vase
bear,stuffed animal

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'the {1} called {0}, on "top"'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
"a {0} {1} in the cook's hat".format(unique_token, class_token),
]
"""


@needs_real
def test_the_published_file() -> None:
    found = dreambench.read(REAL / dreambench.FILE_NAME)
    assert len(found.classes) == 30
    assert len(set(found.classes.values())) == 15
    assert sum(noun in dreambench.LIVE_CLASSES for noun in found.classes.values()) == 9
    assert found.classes["wolf_plushie"] == "stuffed animal"
    assert found.prompts(live=False) == OBJECT_PROMPTS
    assert found.prompts(live=True) == LIVE_PROMPTS


@needs_real
def test_the_published_folders() -> None:
    found = read_subjects(REAL)
    assert len(found.subjects) == 10
    assert {one.name for one in found.subjects if one.live} == {"cat2", "dog6"}
    assert {one.noun for one in found.subjects} >= {"backpack", "toy", "sneaker"}
    assert all(4 <= len(list(one.photos.glob("*.jpg"))) <= 6 for one in found.subjects)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_file_of_the_same_form(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", ending).encode())
    found = dreambench.read(path)
    assert dict(found.classes) == {"rex": "dog", "tall_vase": "vase", "bear": "stuffed animal"}
    assert found.object_prompts == ("a {token} {noun} in the snow", 'the {noun} called {token}, on "top"')
    assert found.live_prompts == ("a {token} {noun} in the cook's hat",)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("rex,dog", "rex;dog", "line 4"),
        ("tall_vase,vase", "rex,vase", "line 5: the subject is in the table twice"),
        ("'a {0} {1} in the snow'.format(unique_token, class_token)", "print('boo')", "line 13"),
        ("a {0} {1} in the snow", "a {0} in the snow", "no {1}"),
        ("a {0} {1} in the snow", 'the {1} called {0}, on "top"', "line 14: the prompt is in the list twice"),
        ("subject_name,class", "name,noun", "line 3"),
        ("Live Subject Prompts", "Others", "line 17"),
        ("rex,dog\ntall_vase,vase\nbear,stuffed animal\n", "", "subject_name,class"),
    ],
)
def test_what_is_no_such_file(old: str, new: str, told: str) -> None:
    assert old in TEXT
    with pytest.raises(DataError, match="told") as caught:
        dreambench.parse(TEXT.replace(old, new), "told.txt")
    assert told in str(caught.value)


def test_nothing_in_the_file_is_run(tmp_path: Path) -> None:
    trap = f"'{{0}} {{1}}'.format(open({str(tmp_path / 'x')!r}, 'w'), class_token),"
    with pytest.raises(DataError):
        dreambench.parse(TEXT.replace("prompt_list = [\n", f"prompt_list = [\n{trap}\n", 1), "it")
    assert not (tmp_path / "x").exists()


def _folders(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        make_photos(root / name, 1)
    return root


def test_what_says_what_a_subject_is(tmp_path: Path) -> None:
    root = _folders(tmp_path, "rex", "mine", "tall_vase", ".hidden")
    (root / dreambench.FILE_NAME).write_text(TEXT)
    (root / "mine" / "class.txt").write_text("rag doll, live\n")
    found = read_subjects(root, told={"tall_vase": "jar"})
    assert [(one.name, one.noun, one.live) for one in found.subjects] == [
        ("mine", "rag doll", True),
        ("rex", "dog", True),
        ("tall_vase", "jar", False),
    ]
    assert found.published is not None
    assert [one.name for one in read_subjects(root, only=["rex"]).subjects] == ["rex"]


def test_subjects_that_nobody_explains_are_all_named(tmp_path: Path) -> None:
    root = _folders(tmp_path, "one", "two", "rex")
    (root / dreambench.FILE_NAME).write_text(TEXT)
    with pytest.raises(DataError, match="one, two") as caught:
        read_subjects(root)
    assert "one/class.txt" in str(caught.value)
    assert "--nouns one=NOUN" in str(caught.value)


def test_names_that_are_not_there(tmp_path: Path) -> None:
    root = _folders(tmp_path, "rex")
    for options in ({"only": ["max"]}, {"told": {"max": "dog"}}):
        with pytest.raises(RecipeError, match="no subject max"):
            read_subjects(root, **options)  # type: ignore[arg-type]


def test_folders_that_hold_no_subjects(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folders in"):
        read_subjects(tmp_path)
    with pytest.raises(DataError, match="cannot be listed"):
        read_subjects(tmp_path / "nowhere")
    (tmp_path / "-rf").mkdir()
    with pytest.raises(DataError, match="names cannot be used: -rf"):
        read_subjects(tmp_path)


@pytest.mark.parametrize(
    ("text", "noun", "live"),
    [("dog", "dog", True), (" rag  doll ", "rag doll", False), ("cat, object", "cat", False)],
)
def test_a_class(text: str, noun: str, live: bool) -> None:
    assert parse_class(text, "it") == (noun, live)


@pytest.mark.parametrize("text", ["", ", live", "dog, dead", "dog\x1b[2J"])
def test_no_class(text: str) -> None:
    with pytest.raises(RecipeError, match="not understood"):
        parse_class(text, "it")


def test_the_digest_is_of_photos_alone(tmp_path: Path) -> None:
    make_photos(tmp_path, 2)
    before = photos_digest(tmp_path)
    (tmp_path / "class.txt").write_text("dog")
    assert photos_digest(tmp_path) == before
    make_photos(tmp_path, 2, seed=1)
    assert photos_digest(tmp_path) != before
