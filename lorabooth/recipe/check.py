"""What is wrong with a recipe, all of it at once, in the user's words: key, value, what is allowed.

`build` turns a plain mapping (from TOML, overrides or command line options) into a checked `Recipe`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

import annotated_types as at
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lorabooth.errors import RecipeError
from lorabooth.recipe.rules import Key, Problem, broken_rules, key_text, value_text
from lorabooth.recipe.schema import Recipe, SubjectSection

# What other trainers call the same things, so that a user who comes from them is sent to the right key.
FOREIGN_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "pretrained_model_name_or_path": "model.base",
        "pretrained_model": "model.base",
        "checkpoint": "model.base",
        "instance_data_dir": "subjects.images",
        "train_data_dir": "subjects.images",
        "class_data_dir": "prior.images",
        "instance_prompt": "subjects.template",
        "class_prompt": "prior.prompt",
        "prior_loss_weight": "prior.weight",
        "with_prior_preservation": "prior.mode",
        "num_class_images": "prior.count",
        "learning_rate": "optim.lr",
        "unet_lr": "optim.lr",
        "optimizer": "optim.name",
        "optimizer_type": "optim.name",
        "lr_scheduler": "optim.schedule",
        "lr_warmup_steps": "optim.warmup_steps",
        "max_train_steps": "optim.steps",
        "train_batch_size": "optim.batch_size",
        "gradient_accumulation_steps": "optim.accumulate",
        "network_dim": "adapter.rank",
        "lora_rank": "adapter.rank",
        "network_alpha": "adapter.alpha",
        "lora_alpha": "adapter.alpha",
        "train_text_encoder": "adapter.text_encoder",
        "min_snr_gamma": "loss.snr_gamma",
        "mixed_precision": "memory.precision",
        "gradient_checkpointing": "memory.checkpointing",
        "enable_xformers_memory_efficient_attention": "memory.attention",
        "random_flip": "images.flip",
        "enable_bucket": "images.buckets",
        "output_dir": "run.out",
        "checkpointing_steps": "run.checkpoint_every",
        "checkpoints_total_limit": "run.keep",
        "validation_prompt": "run.sample_prompts",
        "report_to": "run.tracker",
    }
)


def build(raw: Mapping[str, Any], where: str) -> Recipe:
    """A checked recipe from plain values.

    Args:
        raw: sections as in the TOML file; paths already resolved.
        where: what the errors' first line names: a file, or "the command line".

    Raises:
        RecipeError: with one line per problem.
    """
    problems: list[Problem] = []
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(dict(raw))
    except ValidationError as error:
        problems = list(_explain(error, raw))
    bad = [problem.key for problem in problems]
    if recipe is None:
        recipe = _salvage(raw, bad)
    if recipe is not None:
        broken = list(broken_rules(recipe))
        problems += [p for p in broken if not any(_touches(k, b) for k in (p.key, *p.also) for b in bad)]
    if problems or recipe is None:
        raise _error(problems, where)
    return recipe


def check(recipe: Recipe, where: str = "the recipe") -> None:
    """Apply the rules that join several keys.

    Raises:
        RecipeError: with one line per broken rule.
    """
    problems = list(broken_rules(recipe))
    if problems:
        raise _error(problems, where)


def _error(problems: Sequence[Problem], where: str) -> RecipeError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"  {key_text(p.key)}: {p.text}" for p in problems]
    return RecipeError("\n".join([f"{where}: {count}", *lines]))


def _touches(key: Key, bad: Key) -> bool:
    """Whether one key is the other or lies within it."""
    short = min(len(key), len(bad))
    return key[:short] == bad[:short]


def sections() -> dict[str, type[BaseModel]]:
    """The recipe's sections by name; "subjects" is the one that repeats."""
    found: dict[str, type[BaseModel]] = {}
    for name, field in Recipe.model_fields.items():
        kind = field.annotation
        found[name] = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else SubjectSection
    return found


def allowed(field: FieldInfo) -> str:
    """What a field takes, in words: '"auto" or a whole number from 1 to 1024'."""
    return _allowed(field.annotation, field.metadata)


def _allowed(annotation: Any, metadata: Sequence[Any]) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(value_text(choice) for choice in get_args(annotation))
    if hasattr(annotation, "__metadata__"):
        extras = annotation.__metadata__
        bounds = [b for extra in extras for b in getattr(extra, "metadata", [extra])]
        return _allowed(get_args(annotation)[0], bounds)
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        return ("a whole number" if annotation is int else "a number") + _bounds(metadata)
    if annotation is str:
        return "a text in quotes"
    if get_origin(annotation) is tuple:
        item = get_args(annotation)[0]
        return 'a list of texts: ["...", "..."]' if item is str else f"a list, each {_allowed(item, ())}"
    return " or ".join(_allowed(option, ()) for option in get_args(annotation))


def _bounds(metadata: Sequence[Any]) -> str:
    low = high = ""
    for bound in metadata:
        if isinstance(bound, at.Ge):
            low = f"at least {bound.ge}"
        elif isinstance(bound, at.Gt):
            low = f"above {bound.gt}"
        elif isinstance(bound, at.Le):
            high = f"at most {bound.le}"
        elif isinstance(bound, at.Lt):
            high = f"below {bound.lt}"
    joined = " and ".join(filter(None, (low, high)))
    return f" {joined}" if joined else ""


def _explain(error: ValidationError, raw: Mapping[str, Any]) -> Iterator[Problem]:
    """What pydantic found, as problems: one per key, in the order of the recipe."""
    seen: set[Key] = set()
    for detail in error.errors(include_url=False, include_context=False):
        key = _known_part(detail["loc"])
        if key in seen:
            continue
        seen.add(key)
        if detail["type"] == "extra_forbidden":
            yield Problem(key, _unknown(key, detail["input"]))
        elif detail["type"] == "missing":
            yield Problem(key, f"is missing; {_field_help(key)}")
        else:
            yield Problem(key, _wrong_value(key, detail["input"], raw))


def _known_part(location: tuple[int | str, ...]) -> Key:
    """A location in pydantic's sense without the union branch it adds at the end."""
    length = 1
    if location[0] == "subjects":
        length = 3
    elif location[0] in sections():
        length = 2
    return location[:length]


def _field(key: Key) -> FieldInfo | None:
    section = sections().get(str(key[0]))
    return section.model_fields.get(str(key[-1])) if section and len(key) > 1 else None


def _field_help(key: Key) -> str:
    field = _field(key)
    return (field.description or "").rstrip(".") if field else ""


def _wrong_value(key: Key, value: object, raw: Mapping[str, Any]) -> str:
    field = _field(key)
    name = str(key[0])
    if field is None:
        if name == "subjects":
            return "must be a list of tables: write [[subjects]], with double brackets"
        return f"must be a section, not {value_text(value)}: write [{name}] and its keys below it"
    whole = _lookup(raw, key, value)
    text = f"{value_text(whole)} is not allowed; must be {allowed(field)}"
    if isinstance(whole, str) and _number_like(whole):
        text += " (numbers are written without quotes)"
    return text


def _lookup(raw: Mapping[str, Any], key: Key, default: object) -> object:
    node: Any = raw
    for part in key:
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            return default
    return node


def _number_like(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _unknown(key: Key, value: object) -> str:
    """An unknown key's message, with the key that was probably meant."""
    name = str(key[-1])
    every = sections()
    if len(key) == 1 and isinstance(value, Mapping | list):
        close = difflib.get_close_matches(name, every, n=1, cutoff=0.5)
        return f"unknown section{_meant(close)}; there are {', '.join(every)}"
    here = str(key[0]) if len(key) > 1 else ""
    if owners := [section for section, kind in every.items() if name in kind.model_fields]:
        return f"unknown key; `{name}` belongs to {' or '.join(map(_header, owners))}"
    if name in every and here:
        return f"unknown key; [{name}] is a section of its own"
    if name.lower() in FOREIGN_NAMES:
        return f"unknown key{_meant([FOREIGN_NAMES[name.lower()]])}"
    siblings = {field: key_text((*key[:-1], field)) for field in every[here].model_fields} if here else {}
    if close := difflib.get_close_matches(name, siblings, n=1, cutoff=0.6):
        return f"unknown key{_meant([siblings[close[0]]])}"
    fields = {field: f"{section}.{field}" for section, kind in every.items() for field in kind.model_fields}
    dotted = {**FOREIGN_NAMES, **fields}
    close = [dotted[match] for match in difflib.get_close_matches(name, dotted, n=1, cutoff=0.7)]
    if close or not here:
        return f"unknown key{_meant(close)}"
    return f"unknown key; {_header(here)} takes {', '.join(siblings)}"


def _meant(close: Sequence[str]) -> str:
    return f"; did you mean `{close[0]}`?" if close else ""


def _header(section: str) -> str:
    return "[[subjects]]" if section == "subjects" else f"[{section}]"


def _salvage(raw: Mapping[str, Any], bad: Sequence[Key]) -> Recipe | None:
    """The recipe with its wrong keys left at their defaults, so that the rules can be tried on the rest."""
    kept: dict[str, Any] = {}
    for name, kind in sections().items():
        given = raw.get(name)
        if kind is SubjectSection:
            entries = given if isinstance(given, list | tuple) and ("subjects",) not in bad else []
            filler = {"images": "?", "noun": "?"}
            kept[name] = [filler | _without(item, (name, i), bad) for i, item in enumerate(entries)]
        elif isinstance(given, Mapping):
            kept[name] = _without(given, (name,), bad)
    try:
        return Recipe.model_validate(kept)
    except ValidationError:
        return None


def _without(table: object, prefix: Key, bad: Sequence[Key]) -> dict[str, Any]:
    return {k: v for k, v in table.items() if (*prefix, k) not in bad} if isinstance(table, Mapping) else {}
