"""The rules of a recipe that join several keys, or look into a text: what no single field's type can say."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorabooth.recipe.schema import Recipe
from lorabooth.recipe.sizes import parse_size

_VALUE_CHARS = 60
_KEY_CHARS = 80
_NAME_BYTES = 255
"""A part of a path that no usual file system takes is longer than this."""
_PATH_BYTES = 4095
_LIST_ITEMS = 8
_LIST_LEVELS = 3
"""A list may hold anything, a thousand levels down: more is not shown."""

Key = tuple[str | int, ...]
"""A place in a recipe: ("optim", "lr"), ("subjects", 0, "noun")."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        key: the place it is reported under.
        text: what is wrong and what is allowed.
        also: other keys it depends on; when one of those is wrong itself, this problem is not reported.
    """

    key: Key
    text: str
    also: tuple[Key, ...] = ()


def printable(text: str, limit: int = 0) -> str:
    """A text on one line that cannot steer a terminal: control characters as they are written in Python.

    Args:
        text: anything a user gave, such as a file's name.
        limit: most characters shown; 0 is all.
    """
    shown = "".join(char.encode("unicode_escape").decode() if _steers(char) else char for char in text)
    return shown if not limit or len(shown) <= limit else shown[: limit - 3] + "..."


def _steers(char: str) -> bool:
    """Whether a character moves the cursor, breaks a line or turns the direction of writing."""
    is_direction = "\u202a" <= char <= "\u202e" or "\u2066" <= char <= "\u2069"
    return is_direction or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")


def key_text(key: Key) -> str:
    """A key as users write it: "optim.lr", "subjects[0].noun"."""
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + printable(part, _KEY_CHARS)
    return text


def value_text(value: object, levels: int = _LIST_LEVELS) -> str:
    """A value as TOML would show it, shortened; of lists within lists only the first `levels`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value[:_VALUE_CHARS].replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        text = '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'
    elif isinstance(value, Mapping):
        text = "a table"
    elif isinstance(value, int) and value.bit_length() > 8 * _VALUE_CHARS:
        text = f"a whole number of {value.bit_length():,} bits"  # Python refuses to write out long ones
    elif isinstance(value, list | tuple):
        shown = [value_text(item, levels - 1) if levels else "..." for item in value[:_LIST_ITEMS]]
        text = f"[{', '.join([*shown, *(['...'] * (len(value) > _LIST_ITEMS))])}]"
    else:
        text = str(value)
    return text if len(text) <= _VALUE_CHARS else text[: _VALUE_CHARS - 3] + "..."


def broken_rules(recipe: Recipe) -> Iterator[Problem]:
    """Every rule over several keys, or over a text's content, that a recipe breaks."""
    rules = (
        _subject_rules,
        _prior_rules,
        _optim_rules,
        _memory_rules,
        _fit_rules,
        _hollow_rules,
        _speed_rules,
        _run_rules,
        _text_rules,
    )
    for rule in rules:
        yield from rule(recipe)


def _subject_rules(recipe: Recipe) -> Iterator[Problem]:
    if not recipe.subjects:
        yield Problem(("subjects",), "there is no subject; add [[subjects]] with images and noun")
    first: dict[tuple[str, str], int] = {}
    for i, subject in enumerate(recipe.subjects):
        for name in ("images", "noun", "token"):
            if text := _plain_text(getattr(subject, name), braces=name != "images"):
                yield Problem(("subjects", i, name), text)
        if text := _no_such_user(subject.images):
            yield Problem(("subjects", i, "images"), text)
        if any(char.isspace() for char in subject.token):
            yield Problem(("subjects", i, "token"), f"{value_text(subject.token)} has a space; use one word")
        both = ("token", "noun")
        yield from _placeholders(("subjects", i, "template"), subject.template, both, both)
        name_pair = (subject.token.lower(), subject.noun.lower())
        if subject.token != "auto" and name_pair in first:
            other = first[name_pair]
            text = f"same token and noun as subjects[{other}]; give each subject its own token"
            also: list[Key] = [("subjects", j, name) for j in (i, other) for name in ("token", "noun")]
            yield Problem(("subjects", i, "token"), text, tuple(also))
        first.setdefault(name_pair, i)


def _prior_rules(recipe: Recipe) -> Iterator[Problem]:
    prior = recipe.prior
    mode_key: Key = ("prior", "mode")
    if prior.mode == "images" and not prior.images:
        text = 'is missing; prior.mode = "images" needs a folder of class images'
        yield Problem(("prior", "images"), text, (mode_key,))
    if prior.images and prior.mode != "images":
        text = f'is only used with prior.mode = "images", but that is "{prior.mode}"; change one of the two'
        yield Problem(("prior", "images"), text, (mode_key,))
    if prior.every > 1 and prior.mode == "none":
        text = f'{prior.every}, but prior.mode = "none" has no class examples; change one of the two'
        yield Problem(("prior", "every"), text, (mode_key,))
    if prior.pool and prior.mode != "distill":
        text = f'is only used with prior.mode = "distill", but that is "{prior.mode}"; change one of the two'
        yield Problem(("prior", "pool"), text, (mode_key,))
    if prior.guidance_interval != "auto":
        ends = list(prior.guidance_interval)
        if ends and (len(ends) != 2 or ends[0] >= ends[1]):
            text = f"{value_text(ends)} is no interval; write [low, high] with low below high, or [] for all"
            yield Problem(("prior", "guidance_interval"), text)
    if recipe.memory.stream and prior.dtype not in ("auto", recipe.model.dtype):
        text = f'"{prior.dtype}", but a streamed base draws class images in model.dtype; give both the same'
        yield Problem(("prior", "dtype"), text, (("memory", "stream"), ("model", "dtype")))
    if prior.prompt != "auto":
        if "{token}" in prior.prompt:
            text = "the class prompt is without {token}: it stands for the class, not for the subject"
            yield Problem(("prior", "prompt"), text)
        else:
            yield from _placeholders(("prior", "prompt"), prior.prompt, ("noun",))


def _optim_rules(recipe: Recipe) -> Iterator[Problem]:
    off: Key = ("adapter", "text_encoder")
    if not recipe.adapter.text_encoder:
        hint = "is set, but adapter.text_encoder is false; set it to true or remove this key"
        if recipe.optim.text_encoder_lr != "auto":
            yield Problem(("optim", "text_encoder_lr"), hint, (off,))
        if recipe.adapter.text_encoder_rank != "auto":
            yield Problem(("adapter", "text_encoder_rank"), hint, (off,))
    steps, warmup = recipe.optim.steps, recipe.optim.warmup_steps
    if steps != "auto" and warmup > steps:
        text = f"{warmup} is more than optim.steps = {steps}; the learning rate would never reach its peak"
        yield Problem(("optim", "warmup_steps"), text, (("optim", "steps"),))


def _memory_rules(recipe: Recipe) -> Iterator[Problem]:
    compute, base = recipe.memory.precision, recipe.memory.base_precision
    if compute == "fp32" and base not in ("auto", "fp32"):
        text = f'"{base}" rounds the base and makes nothing faster with memory.precision = "fp32"'
        fix = "give both the same" if base in ("bf16", "fp16") else 'write memory.precision = "bf16"'
        yield Problem(("memory", "base_precision"), f"{text}; {fix}", (("memory", "precision"),))
    yield from _checkpoint_rules(recipe)


def _checkpoint_rules(recipe: Recipe) -> Iterator[Problem]:
    memory, on = recipe.memory, ("memory", "checkpointing")
    if not memory.checkpointing:
        given = {
            "checkpoint_blocks": memory.checkpoint_blocks != "auto",
            "checkpoint_offload": memory.checkpoint_offload,
            "stream": memory.stream,
        }
        text = "is set, but memory.checkpointing is false; set it to true or remove this key"
        yield from (Problem(("memory", key), text, (on,)) for key, is_set in given.items() if is_set)
    elif memory.stream and memory.checkpoint_blocks != "auto":
        # What is not recomputed keeps its weights on the device from the forward to the backward pass.
        text = f'memory.stream needs all blocks, not {memory.checkpoint_blocks}; write "auto"'
        yield Problem(("memory", "checkpoint_blocks"), text, (("memory", "stream"),))


def _fit_rules(recipe: Recipe) -> Iterator[Problem]:
    memory, key = recipe.memory, ("memory", "budget")
    if memory.budget == "auto":
        return
    try:
        parse_size(memory.budget)
    except ValueError as error:
        yield Problem(key, f"{value_text(memory.budget)} {error}")
        return
    if not memory.fit:
        text = "is only used with memory.fit = true; set that too, or remove this key"
        yield Problem(key, text, (("memory", "fit"),))


def _hollow_rules(recipe: Recipe) -> Iterator[Problem]:
    memory, on = recipe.memory, ("memory", "hollow")
    if not memory.hollow:
        if memory.hollow_keep != "auto":
            text = "is set, but memory.hollow is false; set it to true or remove this key"
            yield Problem(("memory", "hollow_keep"), text, (on,))
        return
    if recipe.adapter.text_encoder:
        text = "needs a frozen text encoder, but adapter.text_encoder is true; set one of them to false"
        yield Problem(on, text, (("adapter", "text_encoder"),))
    if recipe.prior.pool:
        text = "memory.hollow stores these targets in its own pool, of memory.hollow_pool; remove this key"
        yield Problem(("prior", "pool"), text, (on,))


def _speed_rules(recipe: Recipe) -> Iterator[Problem]:
    """What a recording of the step cannot hold, and what a compiler cannot see."""
    speed, memory, optim = recipe.speed, recipe.memory, recipe.optim
    if speed.compile != "off" and memory.stream:
        text = f"{value_text(speed.compile)} does not go with memory.stream = true; change one of the two"
        yield Problem(("speed", "compile"), text, (("memory", "stream"),))
    if not speed.cuda_graph:
        return
    clashes: list[tuple[bool, Key, str]] = [
        (optim.name != "adamw", ("optim", "name"), f'optim.name = "{optim.name}" counts on the host'),
        (memory.precision == "fp16", ("memory", "precision"), 'memory.precision = "fp16" has a loss scale'),
        (recipe.adapter.dropout > 0, ("adapter", "dropout"), "adapter.dropout draws anew in every step"),
        (memory.stream, ("memory", "stream"), "memory.stream moves weights between the kernels"),
        (memory.in_turn, ("memory", "in_turn"), "memory.in_turn moves weights when samples are drawn"),
        (
            memory.checkpoint_offload,
            ("memory", "checkpoint_offload"),
            "memory.checkpoint_offload moves tensors",
        ),
        (speed.compile == "auto", ("speed", "compile"), 'speed.compile = "auto" changes the step'),
    ]
    for clash, key, why in clashes:
        if clash:
            text = f"true, but {why}, which a recorded step cannot; change one of the two"
            yield Problem(("speed", "cuda_graph"), text, (key,))


def _run_rules(recipe: Recipe) -> Iterator[Problem]:
    run = recipe.run
    if run.sample_every and not run.sample_count:
        text = f"{run.sample_every}, but run.sample_count = 0 draws no samples; change one of the two"
        yield Problem(("run", "sample_every"), text, (("run", "sample_count"),))
    yield from _selection_rules(recipe)
    yield from _validation_rules(recipe)


def _selection_rules(recipe: Recipe) -> Iterator[Problem]:
    run, select = recipe.run, ("run", "select")
    if run.stop_early and run.select == "last":
        text = f'{run.stop_early}, but run.select = "last" measures no checkpoint; write "balanced" there'
        yield Problem(("run", "stop_early"), text, (select,))
    if run.select != "last" and not run.checkpoint_every:
        text = (
            f'"{run.select}", but run.checkpoint_every = 0 leaves one checkpoint only; change one of the two'
        )
        yield Problem(select, text, (("run", "checkpoint_every"),))
    for i, prompt in enumerate(run.select_prompts):
        both = ("token", "noun")
        for problem in _placeholders(("run", "select_prompts"), prompt, both, both):
            yield Problem(problem.key, f"entry {i + 1}: {problem.text}")


def _validation_rules(recipe: Recipe) -> Iterator[Problem]:
    run, key = recipe.run, ("run", "validation_every")
    if run.validation_photos and not run.validation_every:
        text = f"{run.validation_photos}, but run.validation_every is 0; give both, or remove this key"
        yield Problem(("run", "validation_photos"), text, (key,))
    if run.validation_every and recipe.memory.hollow:
        text = "needs the whole denoiser, but memory.hollow is true; change one of the two"
        yield Problem(key, text, (("memory", "hollow"),))


def _text_rules(recipe: Recipe) -> Iterator[Problem]:
    named: dict[Key, str] = {
        ("model", "base"): recipe.model.base,
        ("model", "family"): recipe.model.family,
        ("adapter", "targets"): recipe.adapter.targets,
        ("run", "out"): recipe.run.out,
        **{("evaluation", key): value for key, value in recipe.evaluation.model_dump().items()},
    }
    optional: dict[Key, str] = {
        ("model", "revision"): recipe.model.revision,
        ("prior", "images"): recipe.prior.images,
    }
    named |= {key: value for key, value in optional.items() if value}
    for key, value in named.items():
        is_path = key in (("model", "base"), ("prior", "images"), ("run", "out")) or key[0] == "evaluation"
        text = _plain_text(value, braces=False)
        if is_path:
            text = text or _no_such_user(value) or _too_long(value)
        if text:
            yield Problem(key, text)
    for i, prompt in enumerate(recipe.run.sample_prompts):
        for problem in _placeholders(("run", "sample_prompts"), prompt, ("token", "noun")):
            yield Problem(problem.key, f"entry {i + 1}: {problem.text}")


def _plain_text(value: str, *, braces: bool) -> str:
    """What is wrong with a one-line text, or ""."""
    if not value:
        return "is empty"
    if any(unicodedata.category(char) in ("Cc", "Zl", "Zp") for char in value):
        return f"{value_text(value)} has a line break or control character"
    if braces and ("{" in value or "}" in value):
        return f"{value_text(value)} has braces; those are for templates"
    return ""


def _no_such_user(path: str) -> str:
    """What is wrong with a path that begins with "~", or ""."""
    if path.startswith("~"):
        try:
            Path(path).expanduser()
        except RuntimeError:
            return f"{value_text(path)} begins with a user who does not exist here; write the whole path"
    return ""


def _too_long(path: str) -> str:
    longest = max((len(part.encode(errors="replace")) for part in Path(path).parts), default=0)
    whole = len(path.encode(errors="replace"))
    if longest > _NAME_BYTES:
        return f"{value_text(path)} is too long for a file's name: {longest} bytes, at most {_NAME_BYTES}"
    if whole > _PATH_BYTES:
        return f"{value_text(path)} is too long for a path: {whole} bytes, at most {_PATH_BYTES}"
    return ""


def _placeholders(key: Key, text: str, known: Sequence[str], needed: Sequence[str] = ()) -> Iterator[Problem]:
    """Check the braces of a prompt template: only known names, and all that are needed."""
    if wrong := _plain_text(text, braces=False):
        yield Problem(key, wrong)
        return
    names = " and ".join(f"{{{name}}}" for name in known)
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError:
        yield Problem(key, f"{value_text(text)} has a single brace; braces are only for {names}")
        return
    found = {field for _, field, _, _ in parts if field is not None}
    plain = all(not spec and not conversion for _, field, spec, conversion in parts if field is not None)
    if unknown := sorted(found - set(known)):
        listed = ", ".join(f"{{{name}}}" for name in unknown)
        yield Problem(key, f"{value_text(text)} has unknown {listed}; only {names} can be used")
    elif not plain or "{{" in text or "}}" in text:
        yield Problem(key, f"{value_text(text)}: braces are only for {names}, written exactly so")
    if missing := [f"{{{name}}}" for name in needed if name not in found]:
        yield Problem(key, f"{value_text(text)} lacks {' and '.join(missing)}")
