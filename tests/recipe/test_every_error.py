"""Whatever is wrong with a recipe, in its text or in `--set`: one message, and it names each wrong key."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabooth.errors import RecipeError
from lorabooth.recipe import dump, from_mapping, load, loads
from lorabooth.recipe.check import sections
from lorabooth.recipe.rules import Key, key_text, printable, value_text

SUBJECT = '[[subjects]]\nimages = "photos"\nnoun = "dog"\n'
FIELDS: list[Key] = [
    (*((name, 0) if name == "subjects" else (name,)), field)
    for name, kind in sections().items()
    for field in kind.model_fields
]

# TOML literals by kind; what a field accepts is worked out below from its Python type alone.
LITERALS: dict[str, st.SearchStrategy[str]] = {
    "bool": st.sampled_from(["true", "false"]),
    "int": st.one_of(st.integers().map(str), st.just("0x" + "f" * 5000), st.just("9" * 4000)),
    "float": st.sampled_from(["2.5", "-1e3", "nan", "inf", "-inf", "1e400", "0.0"]),
    "str": st.text(st.characters(codec="utf-8"), max_size=12).map(lambda text: toml_text(f"~{text}")),
    "date": st.sampled_from(["2024-02-29", "12:30:00", "2024-02-29T12:30:00Z"]),
    "list": st.sampled_from(["[]", "[1]", "['a', 2]", "[" * 90 + "]" * 90, "[{" + "b." * 2000 + "c = 1}]"]),
    "table": st.sampled_from(["{}", "{a = 1}", "{" + "b." * 2000 + "c = 1}"]),
}


def toml_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def accepted_kinds(annotation: Any) -> set[str]:
    """Kinds of literals that may be right for a field of this type."""
    if get_origin(annotation) is Literal:
        return set()  # the texts drawn here are never one of the choices
    if annotation in (bool, int, str):
        return {annotation.__name__}
    if annotation is float:
        return {"float", "int"}
    if get_origin(annotation) is tuple:
        return set()  # nor is any list drawn here one of texts, but the empty one; see `wrong_literals`
    parts = get_args(annotation)
    return set().union(*(accepted_kinds(part) for part in parts if not hasattr(part, "ge") or part is float))


def wrong_literals(key: Key) -> st.SearchStrategy[str]:
    annotation = sections()[str(key[0])].model_fields[str(key[-1])].annotation
    kinds = [kind for kind in LITERALS if kind not in accepted_kinds(annotation)]
    drawn = st.sampled_from(kinds).flatmap(LITERALS.__getitem__)
    return drawn.filter(lambda literal: literal != "[]") if get_origin(annotation) is tuple else drawn


WRONG_FIELDS = st.sampled_from(FIELDS).flatmap(lambda key: st.tuples(st.just(key), wrong_literals(key)))
ANY_LITERAL = st.one_of(*LITERALS.values())


def is_unknown(key: Key) -> bool:
    return key[0] not in sections() if len(key) == 1 else key not in FIELDS


def unknown_fields(names: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[Key, str]]:
    places = st.sampled_from([("subjects", 0) if name == "subjects" else (name,) for name in sections()])
    keys = st.tuples(places, names).map(lambda pair: (*pair[0], pair[1])).filter(is_unknown)
    return st.tuples(keys, ANY_LITERAL)


def written(values: dict[Key, str]) -> str:
    """A recipe's text with these values, and nothing else that is wrong."""
    values = {("subjects", 0, "images"): '"photos"', ("subjects", 0, "noun"): '"dog"'} | values
    lines = [f"{toml_text(str(key[0]))} = {value}" for key, value in values.items() if len(key) == 1]
    for name in sections():
        lines.append("[[subjects]]" if name == "subjects" else f"[{name}]")
        lines += [f"{toml_text(str(k[-1]))} = {v}" for k, v in values.items() if k[0] == name and len(k) > 1]
    return "\n".join(lines)


def told_by(error: RecipeError, where: str) -> list[str]:
    """The lines of an error after the first; none of them can steer a terminal."""
    assert error.exit_code == 2
    first, *lines = str(error).split("\n")
    assert first == f"{where}: {len(lines)} problem{'s' * (len(lines) != 1)}"
    for line in lines:
        assert printable(line) == line
        assert len(line) < 700
    return lines


def assert_names_exactly(lines: list[str], keys: set[Key]) -> None:
    assert len(lines) == len(keys), lines
    for key in keys:
        assert any(line.startswith(f"  {key_text(key)}: ") for line in lines), (key_text(key), lines)


@settings(max_examples=300)
@given(
    st.lists(WRONG_FIELDS, max_size=4),
    st.lists(unknown_fields(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)), max_size=3),
    st.dictionaries(st.from_regex(r"[a-z_]{1,9}", fullmatch=True), ANY_LITERAL, max_size=2),
)
def test_every_wrong_key_of_a_text_is_named_and_no_other(
    wrong: list[tuple[Key, str]], unknown: list[tuple[Key, str]], outside: dict[str, str]
) -> None:
    values = dict(wrong) | dict(unknown)
    values |= {(name,): literal for name, literal in outside.items() if name not in sections()}
    text = written(values)
    if not values:
        assert loads(text, "r.toml").subjects[0].noun == "dog"
        return
    with pytest.raises(RecipeError) as caught:
        loads(text, "r.toml")
    assert_names_exactly(told_by(caught.value, "r.toml"), set(values))


@settings(max_examples=300)
@given(
    st.lists(WRONG_FIELDS, max_size=4),
    st.lists(unknown_fields(st.from_regex(r"[a-z_]{1,9}", fullmatch=True)), max_size=3),
)
def test_every_wrong_key_of_set_is_named_and_no_other(
    wrong: list[tuple[Key, str]], unknown: list[tuple[Key, str]]
) -> None:
    values = dict(wrong) | dict(unknown)
    overrides = [f"{'.'.join(map(str, key))}={literal}" for key, literal in values.items()]
    if not values:
        return
    with pytest.raises(RecipeError) as caught:
        loads(SUBJECT, "r.toml", overrides)
    assert_names_exactly(told_by(caught.value, "r.toml"), set(values))


@pytest.mark.parametrize("key", FIELDS, ids=key_text)
@pytest.mark.parametrize("kind", LITERALS)
def test_a_wrong_type_of_each_field_alone(key: Key, kind: str) -> None:
    literals = {"bool": "true", "int": "3", "float": "2.5", "str": "'~ no choice'", "date": "2024-02-29"}
    literal = (literals | {"list": "[1]", "table": "{a = 1}"})[kind]
    field = sections()[str(key[0])].model_fields[str(key[-1])]
    if kind in accepted_kinds(field.annotation):
        return
    for text, overrides in (
        (written({key: literal}), []),
        (SUBJECT, [f"{'.'.join(map(str, key))}={literal}"]),
    ):
        with pytest.raises(RecipeError) as caught:
            loads(text, "r.toml", overrides)
        assert_names_exactly(told_by(caught.value, "r.toml"), {key})


def test_the_kinds_that_fields_accept() -> None:
    """Guards the tests above: no field may count as accepting everything."""
    by_key = {
        key: accepted_kinds(sections()[str(key[0])].model_fields[str(key[-1])].annotation) for key in FIELDS
    }
    assert by_key[("optim", "lr")] == {"float", "int"}
    assert by_key[("optim", "steps")] == {"int"}
    assert by_key[("prior", "weight")] == {"float", "int"}
    assert by_key[("model", "base")] == {"str"}
    assert by_key[("model", "dtype")] == set()
    assert by_key[("images", "flip")] == {"bool"}
    assert by_key[("run", "sample_prompts")] == set()
    assert max(map(len, by_key.values())) == 2


WHOLE = dump(from_mapping({"subjects": [{"images": "/a", "noun": "dog"}]}, (), "test"))


@settings(max_examples=300)
@given(st.data())
def test_any_damage_to_a_text_gives_a_recipe_or_one_message(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(WHOLE)))
    length = data.draw(st.integers(0, 40))
    junk = data.draw(
        st.one_of(st.text(max_size=8), st.sampled_from(["[[", "{", '"', "'''", "= =", "\x1b", "\r"]))
    )
    try:
        loads(WHOLE[:start] + junk + WHOLE[start + length :], "r.toml")
    except RecipeError as error:
        message = str(error)
    else:
        return  # a comment, or a value that another one may take the place of
    assert message.startswith("r.toml: ")
    assert all(printable(line) == line for line in message.split("\n"))


# ---- texts that used to crash, each in one message ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\na = " + "[" * 5000, "r.toml: lists or tables are nested too deeply, probably at line 2"),
        ("a = " + "{b = " * 5000, "r.toml: lists or tables are nested too deeply, probably at line 1"),
        (
            "[optim]\nlr = " + "9" * 5000,
            "r.toml: not valid TOML at line 2: a number of 5,000 digits\n  lr = 999",
        ),
        ("[optim]\nlr = " + "9_" * 5000 + "9", "at line 2: a number of 10,001 digits"),
        ("[run]\nseed = 0x" + "f" * 5000 + f"\n{SUBJECT}", "run.seed: a whole number of 20,000 bits is not"),
        ("[optim]\nlr = [{" + "b." * 5000 + f"c = 1}}]\n{SUBJECT}", "optim.lr: [a table] is not allowed"),
        (
            f"[model]\nbase = '~nouser/x'\n{SUBJECT}",
            'model.base: "~nouser/x" begins with a user who does not',
        ),
        (SUBJECT.replace("photos", "~nouser/x"), 'subjects[0].images: "~nouser/x" begins with a user'),
        (f"[model]\nbase = '{'a' * 300}'\n{SUBJECT}", "too long for a file's name: 300 bytes, at most 255"),
        (f"[model]\nbase = './{'ab/' * 3000}'\n{SUBJECT}", "model.base: "),
        (f"[run]\nout = '{'é' * 200}'\n{SUBJECT}", "run.out: "),
        (f"[prior]\nmode = 'images'\nimages = '{'a' * 300}'\n{SUBJECT}", "prior.images: "),
        (f'[prior]\nmode = "images"\nimages = "a\\u001b"\n{SUBJECT}', "prior.images: "),
        (f"[evaluation]\ndino = '~nouser/x'\n{SUBJECT}", 'evaluation.dino: "~nouser/x" begins with a user'),
        (f"[evaluation]\nclip = ''\n{SUBJECT}", "evaluation.clip: is empty"),
        (f"[evaluation]\nlpips = '{'a' * 300}'\n{SUBJECT}", "evaluation.lpips: "),
        (f'[model]\nrevision = "a\\nb"\n{SUBJECT}', 'model.revision: "a\\nb" has a line break'),
        (f'[optim]\n"a\\u001b[31m\\nb" = 1\n{SUBJECT}', r"optim.a\x1b[31m\nb: unknown key"),
        (f'[optim]\n"{"a" * 9000}" = 1\n{SUBJECT}', f"optim.{'a' * 77}...: unknown key"),
    ],
)
def test_texts_that_python_itself_stumbles_over(text: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        loads(text, "r.toml")
    message = str(caught.value)
    assert expected in message
    assert caught.value.exit_code == 2
    assert len(message) < 800


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["subjects=[3]", "subjects.0.noun=x"], "subjects[0].noun: subjects[0] is 3, not a table"),
        (["subjects=3", "subjects.0.noun=x"], "subjects[0].noun: subjects is 3 in the recipe, not a list"),
        (["optim.lr=" + "[" * 5000], "optim.lr: [[[["),
        (["optim.lr=" + "9" * 5000], "optim.lr: 9999"),
        ([f"subjects.{'9' * 5000}.noun=x"], ".noun: name one subject by its number"),
        ([f"subjects[{'9' * 5000}].noun=x"], ".noun: name one subject by its number"),
        (["subjects.9999999.noun=x"], "subjects.9999999.noun: name one subject by its number"),
        (["model.base=~nouser/x"], 'model.base: "~nouser/x" begins with a user who does not exist'),
        ([f"model.base={'a' * 300}"], "model.base: "),
        (["optim\x1b.lr=1"], r"optim\x1b.lr=1: is not KEY=VALUE"),
        (["x" * 5000], "...: is not KEY=VALUE"),
    ],
)
def test_overrides_that_used_to_crash(overrides: list[str], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        loads(SUBJECT, "r.toml", overrides)
    _, *lines = str(caught.value).split("\n")
    assert len(lines) == 1
    assert expected in lines[0]
    assert len(lines[0]) < 300
    assert caught.value.exit_code == 2


def test_a_syntax_error_shows_its_place_in_a_long_line_with_control_characters() -> None:
    with pytest.raises(RecipeError) as caught:
        loads("a = 1\nb = '" + "x" * 5000 + "\x1b[2J'\n", "r\x1b.toml")
    first, shown, mark = str(caught.value).split("\n")
    assert first.startswith(r"r\x1b.toml: not valid TOML at line 2, column 5006: ")
    assert shown[mark.index("^") :].startswith(r"\x1b[2J'")
    assert len(shown) < 120
    with pytest.raises(RecipeError) as caught:
        loads("a = '\u2028'\nb = = 3\n", "r.toml")  # not a line break in TOML
    assert str(caught.value).split("\n")[1:] == ["  b = = 3", "      ^"]


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    huge = tmp_path / "model.safetensors"
    with huge.open("wb") as file:
        file.truncate(1 << 40)  # a hole: reading it all would take a TiB of memory
    with pytest.raises(RecipeError, match="larger than 1024 KiB, so no recipe"):
        load(huge)
    with pytest.raises(RecipeError, match=r"cannot be read \(File name too long"):
        load(tmp_path / ("a" * 300))
    with pytest.raises(RecipeError, match=r"a\\x1b: there is no such recipe file"):
        load(tmp_path / "a\x1b")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ([1, "a", True], '[1, "a", true]'),
        ([[[[1]]]], "[[[[...]]]]"),
        (list(range(20)), "[0, 1, 2, 3, 4, 5, 6, 7, ...]"),
        (10**30, "1" + "0" * 30),
        (10**400, "a whole number of 1,329 bits"),
        ("x" * 10**6, '"' + "x" * 56 + "..."),
    ],
)
def test_values_are_shown_short(value: object, shown: str) -> None:
    assert value_text(value) == shown


@given(st.text())
def test_printable_text_is_one_line_that_steers_nothing(text: str) -> None:
    shown = printable(text)
    assert not {unicodedata.category(char) for char in shown} & {"Cc", "Zl", "Zp", "Cs"}
    assert printable(shown) == shown
    if not any(unicodedata.category(char)[0] == "C" or char in "\u2028\u2029" for char in text):
        assert shown == text
    assert len(printable(text, 10)) <= 10
