"""The options of `lorabooth sample` mean what they look like."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabooth.cli.sample import parse_adapter, parse_numbers, parse_seeds
from lorabooth.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("a.safetensors:-1e-1", ("a.safetensors", -0.1)),
        (r"C:\files\a.safetensors", (r"C:\files\a.safetensors", 1.0)),
        (r"C:\files\a.safetensors:2", (r"C:\files\a.safetensors", 2.0)),
        ("dir:x/a.safetensors", ("dir:x/a.safetensors", 1.0)),
        (":0.5", (":0.5", 1.0)),
    ],
)
def test_adapter(text: str, expected: tuple[str, float]) -> None:
    assert parse_adapter(text) == (Path(expected[0]), expected[1])


def test_a_file_whose_own_name_ends_like_a_strength(tmp_path: Path) -> None:
    file = tmp_path / "take:2"
    file.touch()
    assert parse_adapter(str(file)) == (file, 1.0)
    assert parse_adapter(f"{file}:0.5") == (file, 0.5)


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf"])
def test_adapter_strength_is_finite(strength: str) -> None:
    with pytest.raises(RecipeError, match="finite"):
        parse_adapter(f"a.safetensors:{strength}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", [0]), ("0,1,2", [0, 1, 2]), ("0-3", [0, 1, 2, 3]), (" 0 - 1 , 7", [0, 1, 7]), ("5-5", [5])],
)
def test_seeds(text: str, expected: list[int]) -> None:
    assert parse_seeds(text) == expected


@pytest.mark.parametrize("text", ["", "a", "1,", "-1", "3-1", "1,1", "0-2,2", "0-1000000000", "1.5"])
def test_wrong_seeds(text: str) -> None:
    with pytest.raises(RecipeError, match="--seeds"):
        parse_seeds(text)


def test_strengths() -> None:
    assert parse_numbers("0,0.5,1", "--strengths") == [0, 0.5, 1]
    for wrong in ("", "a", "0;1", "nan", "1,inf"):
        with pytest.raises(RecipeError, match="--strengths"):
            parse_numbers(wrong, "--strengths")
