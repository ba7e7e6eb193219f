"""Everything wrong with a recipe is told at once, each under its key, with what is allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabooth.errors import RecipeError
from lorabooth.recipe import Recipe, SubjectSection, check, loads
from lorabooth.recipe.check import allowed, build, sections
from lorabooth.recipe.rules import key_text

SUBJECT = '[[subjects]]\nimages = "photos"\nnoun = "dog"\n'


def problems(text: str) -> list[str]:
    """The lines of the error that a recipe gets, without the first."""
    with pytest.raises(RecipeError) as error:
        loads(text, "r.toml")
    assert error.value.exit_code == 2
    first, *rest = str(error.value).splitlines()
    assert first == f"r.toml: {len(rest)} problem{'s' * (len(rest) != 1)}"
    return [line.strip() for line in rest]


def test_all_errors_come_at_once_each_with_its_key() -> None:
    found = problems(
        """
        [optim]
        lr = "1e-4"
        warmup_steps = -1
        [adapter]
        rank = 0
        [prior]
        mode = "imagess"
        [[subjects]]
        images = "a"
        noun = "{dog}"
        """
    )
    keys = [line.split(":")[0] for line in found]
    assert sorted(keys) == [
        "adapter.rank",
        "optim.lr",
        "optim.warmup_steps",
        "prior.mode",
        "subjects[0].noun",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[optim]\nlr = 0", 'optim.lr: 0 is not allowed; must be "auto" or a number above 0 and at most 1'),
        ("[optim]\nlr = '1e-4'", "numbers are written without quotes"),
        ("[optim]\nlr = nan", "optim.lr: nan is not allowed"),
        ("[prior]\nweight = inf", "prior.weight: inf is not allowed"),
        ("[prior]\nweight = true", "prior.weight: true is not allowed; must be a number"),
        (
            "[prior]\nguidance_interval = ['a', 'b']",
            'prior.guidance_interval: ["a", "b"] is not allowed; must be "auto" or a list, each a number',
        ),
        ("[optim]\nbatch_size = true", "optim.batch_size: true is not allowed; must be a whole number"),
        ("[optim]\nbatch_size = 2.0", "optim.batch_size: 2.0 is not allowed; must be a whole number"),
        ("[adapter]\nrank = 0", 'must be "auto" or a whole number at least 1 and at most 1024'),
        ("[adapter]\ntext_encoder = 1", "adapter.text_encoder: 1 is not allowed; must be true or false"),
        ("[optim]\nschedule = 'cosin'", 'must be "constant" or "cosine" or "linear"'),
        ("[run]\nsample_prompts = 'a'", "must be a list of texts"),
        ("[run]\nsample_prompts = ['a', 3]", 'run.sample_prompts: ["a", 3] is not allowed'),
        ("[run]\nsample_prompts = ['a', '{x}']", 'run.sample_prompts: entry 2: "{x}" has unknown {x}'),
        ("[run]\nseed = -1", "run.seed: -1 is not allowed"),
        ("[model]\nbase = ''", "model.base: is empty"),
    ],
)
def test_wrong_values(text: str, expected: str) -> None:
    (line,) = problems(f"{text}\n{SUBJECT}")
    assert expected in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[optim]\nlrr = 1", "optim.lrr: unknown key; did you mean `optim.lr`?"),
        ("[optim]\nstepz = 1", "optim.stepz: unknown key; did you mean `optim.steps`?"),
        ("[optim]\nlearning_rate = 1", "did you mean `optim.lr`?"),
        ("[optim]\nleraning_rate = 1", "did you mean `optim.lr`?"),
        ("[adapter]\nmax_train_steps = 1", "did you mean `optim.steps`?"),
        ("[adapter]\nlr = 1", "adapter.lr: unknown key; `lr` belongs to [optim]"),
        ("[model]\nimages = 'x'", "model.images: unknown key; `images` belongs to [[subjects]] or [prior]"),
        ("[model]\nresolutoin = 512", "did you mean `images.resolution`?"),
        ("[optmi]\nlr = 1", "optmi: unknown section; did you mean `optim`?"),
        ("[subjects]\nnoun = 'dog'", "subjects: must be a list of tables: write [[subjects]]"),
    ],
)
def test_unknown_keys_are_sent_to_the_right_place(text: str, expected: str) -> None:
    found = problems(text if "[subjects]" in text else f"{text}\n{SUBJECT}")
    assert len(found) == 1
    assert expected in found[0]


def test_a_key_without_a_section_and_a_section_without_a_table() -> None:
    found = problems(f"lr = 1e-4\nmodel = 'pocket'\n{SUBJECT}")
    assert "lr: unknown key; `lr` belongs to [optim]" in found
    assert any(line.startswith("model: must be a section") for line in found)


def test_misspelt_subject_key_names_the_subject() -> None:
    found = problems(f'{SUBJECT}[[subjects]]\nimages = "b"\nnown = "cat"\n')
    assert "subjects[1].nown: unknown key; did you mean `subjects[1].noun`?" in found
    assert any(line.startswith("subjects[1].noun: is missing") for line in found)


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("[prior]\nmode = 'images'", "prior.images", "needs a folder of class images"),
        ("[prior]\nimages = 'x'", "prior.images", 'is only used with prior.mode = "images"'),
        ("[prior]\nprompt = 'a {token} {noun}'", "prior.prompt", "without {token}"),
        ("[prior]\nprompt = 'a {dog}'", "prior.prompt", "unknown {dog}"),
        ("[prior]\nguidance_interval = [5, 2]", "prior.guidance_interval", "[5.0, 2.0] is no interval"),
        ("[prior]\nguidance_interval = [5]", "prior.guidance_interval", "write [low, high]"),
        (
            "[prior]\ndtype = 'bf16'\n[memory]\nstream = true\ncheckpointing = true",
            "prior.dtype",
            "a streamed base draws class images in model.dtype",
        ),
        ("[optim]\ntext_encoder_lr = 1e-5", "optim.text_encoder_lr", "adapter.text_encoder is false"),
        ("[adapter]\ntext_encoder_rank = 4", "adapter.text_encoder_rank", "adapter.text_encoder is false"),
        ("[optim]\nsteps = 10\nwarmup_steps = 11", "optim.warmup_steps", "more than optim.steps = 10"),
        ('[model]\nfamily = "a\\nb"', "model.family", "line break"),
        ("[run]\nsample_every = 5\nsample_count = 0", "run.sample_every", "run.sample_count = 0 draws no"),
        ("[run]\nstop_early = 3", "run.stop_early", 'run.select = "last" measures no checkpoint'),
        ("[run]\nselect = 'subject'\ncheckpoint_every = 0", "run.select", "leaves one checkpoint only"),
        ("[run]\nselect_prompts = ['a {token} {noun}', 'a {noun}']", "run.select_prompts", "entry 2: "),
        ("[run]\nselect_prompts = ['a {noun}']", "run.select_prompts", "lacks {token}"),
        ("[run]\nvalidation_photos = 1", "run.validation_photos", "run.validation_every is 0"),
        ("[run]\nvalidation_every = 1\n[memory]\nhollow = true", "run.validation_every", "memory.hollow"),
        ("[memory]\nprecision = 'fp32'\nbase_precision = 'bf16'", "memory.base_precision", '"bf16" rounds'),
        ("[memory]\nprecision = 'fp32'\nbase_precision = 'fp16'", "memory.base_precision", '"fp16" rounds'),
    ],
)
def test_rules_that_join_keys(text: str, key: str, expected: str) -> None:
    (line,) = problems(f"{text}\n{SUBJECT}")
    assert line.startswith(f"{key}: ")
    assert expected in line


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("template = 'a photo of a {noun}'", "lacks {token}"),
        ("template = 'a photo'", "lacks {token} and {noun}"),
        ("template = 'a {token} {noun} {place}'", "unknown {place}"),
        ("template = 'a {token} {noun} {'", "single brace"),
        ("template = 'a {token} {noun!r}'", "braces are only for {token} and {noun}"),
        ("template = 'a {{token}} {token} {noun}'", "braces are only for {token} and {noun}"),
        ("template = 'a {0} {token} {noun}'", "unknown {0}"),
        ("token = 'a b'", "has a space"),
        ("token = '{x}'", "has braces"),
        ('token = "a\\nb"', "line break"),
        ("token = ''", "is empty"),
    ],
)
def test_subject_texts(line: str, expected: str) -> None:
    found = problems(f"{SUBJECT}{line}\n")
    assert all(each.startswith(f"subjects[0].{line.split()[0]}: ") for each in found)
    assert any(expected in each for each in found)


def test_no_subject_and_twice_the_same() -> None:
    assert problems("") == ["subjects: there is no subject; add [[subjects]] with images and noun"]
    same = f"{SUBJECT}token = 'qzx'\n{SUBJECT}token = 'QZX'\n"
    assert problems(same) == [
        "subjects[1].token: same token and noun as subjects[0]; give each subject its own token"
    ]
    loads(f"{SUBJECT}{SUBJECT}", "r.toml")  # two automatic tokens differ by themselves


def test_a_rule_is_silent_about_keys_that_are_wrong_themselves() -> None:
    found = problems(
        f"[prior]\nmode = 'imags'\nimages = 'x'\n[optim]\nsteps = 0\nwarmup_steps = 5\n{SUBJECT}"
    )
    assert sorted(line.split(":")[0] for line in found) == ["optim.steps", "prior.mode"]


def test_what_is_unusual_but_fine() -> None:
    recipe = loads(f"[loss]\nsnr_gamma = 3\n[optim]\nlr = 1\n{SUBJECT}", "r.toml")
    assert recipe.loss.snr_gamma == 3.0
    assert isinstance(recipe.optim.lr, float)
    for text in (
        "[prior]\nweight = 0",  # the other end of a sweep over the weight
        "[prior]\nweight = 0\nmode = 'none'",
        "[prior]\nweight = 0\nmode = 'distill'",
        "[run]\nsample_every = 0\nsample_count = 0",
        "[run]\nselect = 'balanced'\nstop_early = 2\nselect_prompts = ['a {token} {noun} at sea']",
        "[run]\nvalidation_every = 5\nvalidation_photos = 1",
        "[memory]\nprecision = 'bf16'\nbase_precision = 'fp16'",
        "[memory]\nprecision = 'fp32'\nbase_precision = 'fp32'",
        "[memory]\nbase_precision = 'bf16'",  # whether it fits is known where the device is
    ):
        loads(f"{text}\n{SUBJECT}", "r.toml")


def test_check_of_a_recipe_made_in_python() -> None:
    check(Recipe(subjects=[SubjectSection(images="a", noun="dog")]))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="there is no subject"):
        check(Recipe())


# ---- properties: whatever is wrong, its key is named ----

KEYS = [
    (name, field) for name, kind in sections().items() if name != "subjects" for field in kind.model_fields
]
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JUNK, min_size=1, max_size=5))
def test_every_error_names_its_key_and_no_other(values: dict[tuple[str, str], Any]) -> None:
    raw: dict[str, Any] = {"subjects": [{"images": "a", "noun": "dog"}]}
    for (section, field), value in values.items():
        raw.setdefault(section, {})[field] = value
    wrong = set()
    for (section, field), value in values.items():
        alone = {"subjects": raw["subjects"], section: {field: value}}
        try:
            build(alone, "r")
        except RecipeError:
            wrong.add(key_text((section, field)))
    try:
        recipe = build(raw, "r")
    except RecipeError as error:
        named = {line.strip().split(":")[0] for line in str(error).splitlines()[1:]}
        joined = {"prior.images", "optim.warmup_steps", "optim.text_encoder_lr", "adapter.text_encoder_rank"}
        joined |= {"prior.weight", "run.sample_every", "memory.base_precision"}
        joined |= {"run.stop_early", "run.validation_every", "run.validation_photos"}
        assert wrong - joined <= named <= wrong | joined
    else:
        assert wrong <= {
            "prior.images",
            "optim.text_encoder_lr",
            "adapter.text_encoder_rank",
            "prior.mode",
            "prior.weight",
        }
        for (section, field), value in values.items():
            kept = getattr(getattr(recipe, section), field)
            assert type(kept) in (type(value), float, tuple)
            assert not isinstance(kept, float) or math.isfinite(kept)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(sections())), st.from_regex(r"[a-z_]{1,12}", fullmatch=True))
def test_every_unknown_key_is_named(section: str, name: str) -> None:
    if name in sections()[section].model_fields:
        return
    subject: dict[str, Any] = {"images": "a", "noun": "dog"}
    raw = {"subjects": [subject]} | ({} if section == "subjects" else {section: {name: 1}})
    if section == "subjects":
        subject[name] = 1
    with pytest.raises(RecipeError) as error:
        build(raw, "r")
    (line,) = str(error.value).splitlines()[1:]
    path = f"subjects[0].{name}" if section == "subjects" else f"{section}.{name}"
    assert line.startswith(f"  {path}: unknown key")


def test_every_field_is_documented_and_says_what_it_takes() -> None:
    for name, kind in sections().items():
        for field_name, field in kind.model_fields.items():
            assert field.description, f"{name}.{field_name}"
            assert allowed(field)
