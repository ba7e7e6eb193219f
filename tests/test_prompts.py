import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabooth.prompts import class_prompt, instance_prompt, slug


@pytest.mark.parametrize(
    ("template", "noun", "expected"),
    [
        ("a photo of a {token} {noun}", "dog", "a photo of a dog"),
        ("a photo of a {token} {noun}", "owl", "a photo of an owl"),
        ("a photo of an {token} {noun}", "dog", "a photo of a dog"),
        ("A {token} {noun} at home", "owl", "An owl at home"),
        ("a photo of a {token} {noun}", "unicorn toy", "a photo of a unicorn toy"),
        ("a photo of a {token} {noun}", "umbrella", "a photo of an umbrella"),
        ("a photo of a {token} {noun}", "hourglass", "a photo of an hourglass"),
        ("a photo of a {token} {noun}", "écharpe", "a photo of an écharpe"),
        ("{token} {noun}", "dog", "dog"),
        ("photo of {token}  {noun} , close up", "dog", "photo of dog, close up"),
        ("the {noun} named {token}, on a beach", "dog", "the dog named, on a beach"),
        ("a banana {noun} of {token} type", "cap", "a banana cap of type"),
    ],
)
def test_class_prompt(template: str, noun: str, expected: str) -> None:
    assert class_prompt(template, noun) == expected


@pytest.mark.parametrize(
    ("template", "token", "noun", "expected"),
    [
        ("a photo of a {token} {noun}", "sks", "dog", "a photo of a sks dog"),
        ("a photo of a {token} {noun}", "ohw", "owl", "a photo of a ohw owl"),
        ("a {noun} in {token} style", "sks", "icon", "an icon in sks style"),
        ("{noun.__class__} {0} {token}", "sks", "dog", "{noun.__class__} {0} sks"),
    ],
)
def test_instance_prompt(template: str, token: str, noun: str, expected: str) -> None:
    assert instance_prompt(template, token, noun) == expected


def test_slug_of_a_prompt() -> None:
    assert slug("A photo of a dog, on the Moon!") == "a-photo-of-a-dog-on-the-moon"
    assert slug("Ein Foto von Übergröße") == "ein-foto-von-übergröße"
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("...") == "untitled"


@given(st.text(), st.integers(8, 80))
def test_slug_is_a_safe_short_name(text: str, limit: int) -> None:
    name = slug(text, limit)
    assert name
    assert len(name.encode()) <= max(limit, len("untitled"))
    assert not set(name) & set('/\\.:*?"<>|\x00\n ')
    assert name == "untitled" or not name.startswith("-")
    assert slug(text, limit) == name
