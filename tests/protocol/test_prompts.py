from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorabooth.errors import RecipeError
from lorabooth.pocket.scenes import ACCESSORIES, CLASSES, COLOURS, PATTERNS, PLACES, POSES, STYLES
from lorabooth.protocol.prompts import (
    LIVE_PROMPTS,
    OBJECT_PROMPTS,
    POCKET_APPLICATIONS,
    default_prompts,
    filled,
    is_live,
    is_pocket,
    read_prompts,
)


def test_dreambench_s_lists_are_25_each_and_share_the_places_and_the_properties() -> None:
    assert len(set(OBJECT_PROMPTS)) == len(set(LIVE_PROMPTS)) == 25
    assert len(set(OBJECT_PROMPTS) & set(LIVE_PROMPTS)) == 15
    assert not any("wearing" in template for template in OBJECT_PROMPTS)


@pytest.mark.parametrize(
    ("noun", "live"), [("dog", True), ("corgi dog", True), ("dog toy", False), ("", False)]
)
def test_the_noun_decides_between_live_and_object_prompts(noun: str, live: bool) -> None:
    assert is_live(noun) is live
    assert default_prompts("runwayml/some-base", noun).subject == (LIVE_PROMPTS if live else OBJECT_PROMPTS)


@pytest.mark.parametrize("templates", [OBJECT_PROMPTS, LIVE_PROMPTS, *POCKET_APPLICATIONS.values()])
def test_every_template_has_both_placeholders_once(templates: tuple[str, ...]) -> None:
    assert all(template.count("{token}") == template.count("{noun}") == 1 for template in templates)


def test_the_pocket_prompts_say_nothing_that_the_pocket_world_cannot_show() -> None:
    known = " ".join((*PLACES.values(), *ACCESSORIES, *STYLES, *POSES, *COLOURS, *PATTERNS, *CLASSES)).split()
    glue = {"a", "an", "of", "on", "in", "the", "at", "wearing"}
    prompts = default_prompts("pocket", "mug")
    assert len(prompts.subject) == sum(map(len, POCKET_APPLICATIONS.values())) >= 15
    for template in prompts.subject:
        assert set(filled(template, "qzx", "mug")[1].split()) <= {*known, *glue}, template
    for prompt in prompts.unrelated:
        assert set(prompt.split()) <= {*known, *glue}
        assert "mug" not in prompt.split()


def test_each_application_asks_for_its_own_kind_of_thing() -> None:
    shows = {
        "recontextualisation": [*PLACES.values()],
        "art renditions": [style for style in STYLES if style != "photo"],
        "novel views": [pose for pose in POSES if pose != "upright"],
        "property modification": [*COLOURS, *PATTERNS],
        "accessorisation": [thing for thing in ACCESSORIES if thing != "none"],
    }
    assert set(shows) == set(POCKET_APPLICATIONS)
    for name, templates in POCKET_APPLICATIONS.items():
        for template in templates:
            assert any(re.search(rf"\b{thing}\b", template) for thing in shows[name]), template


def test_unrelated_prompts_are_not_of_the_class() -> None:
    for noun in ("dog", "cat", "vase"):
        unrelated = default_prompts("some/base", noun).unrelated
        assert len(unrelated) == 8
        assert not any(prompt.endswith(f" {noun}") for prompt in unrelated)


def test_a_folder_with_its_own_encoder_speaks_the_pocket_s_language(tmp_path: Path) -> None:
    assert is_pocket("pocket")
    assert not is_pocket(str(tmp_path))
    (tmp_path / "subject_encoder").mkdir()
    assert is_pocket(str(tmp_path))


def test_the_caption_is_the_prompt_without_the_token_and_its_article_agrees() -> None:
    assert filled("a {token} {noun} in the snow", "sks", "owl") == (
        "a sks owl in the snow",
        "an owl in the snow",
    )
    assert filled("a photo of a {token} red {noun}", "sks", "mug")[1] == "a photo of a red mug"


def test_a_file_of_templates_in_either_notation(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff# mine\n\n a {token}  {noun} here\na red {0} {1}\n", encoding="utf-8")
    found = read_prompts(file, "pocket", "mug")
    assert found.subject == ("a {token} {noun} here", "a red {token} {noun}")
    assert found.classes == default_prompts("pocket", "mug").classes
    assert found.unrelated == default_prompts("pocket", "mug").unrelated


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a {token} {noun}\na {noun}\na dog", ["line 2", "no {token}", "line 3", "no {token} and no {noun}"]),
        ("a {token} {noun}\n\na {0} {1}", ["line 3", "line 1 again"]),
        ("# nothing\n", ["holds no prompt"]),
    ],
)
def test_every_bad_line_is_named_at_once(tmp_path: Path, text: str, told: list[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        read_prompts(file)
    assert all(part in str(error.value) for part in [*told, str(file)]), str(error.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"a {token} {noun} caf\xe9")
    with pytest.raises(RecipeError, match="byte 20"):
        read_prompts(tmp_path / "latin.txt")
