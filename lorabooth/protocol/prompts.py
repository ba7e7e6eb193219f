"""The prompts that a subject is measured with: the pocket world's, DreamBench's, or a file's.

Templates hold "{token}" and "{noun}", as a recipe's do. DreamBench's are the lists of its
`prompts_and_classes.txt`, 25 for objects and 25 for what lives (arXiv 2208.12242, section 4.1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lorabooth.errors import RecipeError
from lorabooth.prompts import class_prompt, instance_prompt

CLASS_TEMPLATE = "a photo of a {noun}"
"""What PRES draws: any member of the class."""

POCKET_APPLICATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "recontextualisation": (
            "a photo of a {token} {noun} on the beach",
            "a photo of a {token} {noun} in the snow",
            "a photo of a {token} {noun} in the desert",
            "a photo of a {token} {noun} at night",
            "a photo of a {token} {noun} floating on water",
            "a photo of a {token} {noun} in front of a brick wall",
        ),
        "art renditions": (
            "a painting of a {token} {noun}",
            "a pencil sketch of a {token} {noun}",
        ),
        "novel views": (
            "a photo of a tilted {token} {noun}",
            "a photo of an upside down {token} {noun}",
        ),
        # The identifier stands before the colour, as in the captions that the pocket base was trained on.
        "property modification": (
            "a photo of a {token} red {noun}",
            "a photo of a {token} purple {noun}",
            "a photo of a {token} striped {noun}",
        ),
        "accessorisation": (
            "a photo of a {token} {noun} wearing a red hat",
            "a photo of a {token} {noun} wearing sunglasses",
            "a photo of a {token} {noun} wearing a striped scarf",
        ),
    }
)
"""What the paper shows (its section 4.3) and the pocket world can draw. Its mugs wear hats too."""

_ANYWHERE = (
    "a {token} {noun} in the jungle",
    "a {token} {noun} in the snow",
    "a {token} {noun} on the beach",
    "a {token} {noun} on a cobblestone street",
    "a {token} {noun} on top of pink fabric",
    "a {token} {noun} on top of a wooden floor",
    "a {token} {noun} with a city in the background",
    "a {token} {noun} with a mountain in the background",
    "a {token} {noun} with a blue house in the background",
    "a {token} {noun} on top of a purple rug in a forest",
)
_CHANGED = (
    "a red {token} {noun}",
    "a purple {token} {noun}",
    "a shiny {token} {noun}",
    "a wet {token} {noun}",
    "a cube shaped {token} {noun}",
)
OBJECT_PROMPTS: tuple[str, ...] = (
    *_ANYWHERE,
    "a {token} {noun} with a wheat field in the background",
    "a {token} {noun} with a tree and autumn leaves in the background",
    "a {token} {noun} with the Eiffel Tower in the background",
    "a {token} {noun} floating on top of water",
    "a {token} {noun} floating in an ocean of milk",
    "a {token} {noun} on top of green grass with sunflowers around it",
    "a {token} {noun} on top of a mirror",
    "a {token} {noun} on top of the sidewalk in a crowded street",
    "a {token} {noun} on top of a dirt road",
    "a {token} {noun} on top of a white rug",
    *_CHANGED,
)
"""DreamBench's prompts for objects."""
LIVE_PROMPTS: tuple[str, ...] = (
    *_ANYWHERE,
    "a {token} {noun} wearing a red hat",
    "a {token} {noun} wearing a santa hat",
    "a {token} {noun} wearing a rainbow scarf",
    "a {token} {noun} wearing a black top hat and a monocle",
    "a {token} {noun} in a chef outfit",
    "a {token} {noun} in a firefighter outfit",
    "a {token} {noun} in a police outfit",
    "a {token} {noun} wearing pink glasses",
    "a {token} {noun} wearing a yellow shirt",
    "a {token} {noun} in a purple wizard outfit",
    *_CHANGED,
)
"""DreamBench's prompts for what lives."""

LIVE_NOUNS = frozenset(
    {
        "dog", "cat", "puppy", "kitten", "duck", "fish", "bird", "parrot", "owl", "horse", "pony",
        "cow", "sheep", "goat", "pig", "rabbit", "bunny", "hamster", "mouse", "fox", "wolf", "bear",
        "lion", "tiger", "elephant", "monkey", "turtle", "snake", "lizard", "frog", "hen", "chicken",
        "rooster", "person", "man", "woman", "boy", "girl", "child", "baby", "guy", "lady",
    }
)  # fmt: skip
"""Class nouns that are asked DreamBench's live prompts; only their last word counts ("corgi dog")."""

_OTHERS = ("backpack", "teapot", "dog", "candle", "sneaker", "clock", "cat", "vase", "bowl")
_MOST_UNRELATED = 8
_POCKET_OTHERS = (
    "a photo of a {other} on the grass",
    "a photo of a {other} in the snow",
    "a photo of a {other} on a wooden floor",
    "a painting of a {other}",
)


@dataclass(frozen=True, slots=True)
class EvaluationPrompts:
    """What one subject is asked.

    Attributes:
        subject: templates with "{token}" and "{noun}": DINO, CLIP-I, CLIP-T and DIV.
        classes: templates with "{noun}" alone: PRES.
        unrelated: prompts of other things, nothing to fill in: drift.
    """

    subject: tuple[str, ...]
    classes: tuple[str, ...] = (CLASS_TEMPLATE,)
    unrelated: tuple[str, ...] = ()


def default_prompts(base: str, noun: str) -> EvaluationPrompts:
    """The prompts for a subject of a class, where the user gives none.

    Args:
        base: as in the recipe. "pocket", or a folder with the pocket world's own subject encoder, gets the
            pocket world's words; others get DreamBench's.
        noun: the class noun; its last word decides between live and object prompts.
    """
    if is_pocket(base):
        from lorabooth.pocket.world import CLASSES

        others = [name for name in CLASSES if name != noun][:_MOST_UNRELATED]
        unrelated = tuple(
            class_prompt(_POCKET_OTHERS[index % len(_POCKET_OTHERS)].replace("{other}", "{noun}"), other)
            for index, other in enumerate(others)
        )
        subject = tuple(template for group in POCKET_APPLICATIONS.values() for template in group)
        return EvaluationPrompts(subject, (CLASS_TEMPLATE,), unrelated)
    unrelated = tuple(class_prompt(CLASS_TEMPLATE, other) for other in _OTHERS if other not in noun.split())
    templates = LIVE_PROMPTS if is_live(noun) else OBJECT_PROMPTS
    return EvaluationPrompts(templates, (CLASS_TEMPLATE,), unrelated[:_MOST_UNRELATED])


def is_live(noun: str) -> bool:
    """Whether a class noun is of something that lives."""
    return not LIVE_NOUNS.isdisjoint(noun.lower().split()[-1:])


def is_pocket(base: str) -> bool:
    """Whether a base speaks the pocket world's language."""
    return base == "pocket" or (Path(base) / "subject_encoder").is_dir()


def read_prompts(path: Path, base: str = "", noun: str = "") -> EvaluationPrompts:
    """The subject's templates from a text file; what PRES and drift need is the default of base and noun.

    One template a line, with "{token}" and "{noun}", or DreamBench's "{0}" and "{1}". Empty lines and those
    that begin with "#" are left out.

    Raises:
        RecipeError: the file cannot be read, holds no template, holds one twice, or a line lacks a
            placeholder: all such lines at once.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise RecipeError(
            f"--prompts: {path} cannot be read: {error.strerror or error}.", "Give a text file."
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"--prompts: {path} is not UTF-8: byte {error.start} cannot be read.", "Save it as UTF-8."
        ) from error
    found: dict[str, int] = {}
    wrong: list[str] = []
    for number, line in enumerate(lines, start=1):
        text = re.sub(r"\s+", " ", line).strip()
        if not text or text.startswith("#"):
            continue
        template = text.replace("{0}", "{token}").replace("{1}", "{noun}")
        missing = [part for part in ("{token}", "{noun}") if part not in template]
        if missing:
            wrong.append(f'  line {number}: "{text[:80]}" has no {" and no ".join(missing)}')
        elif template in found:
            wrong.append(f'  line {number}: "{text[:80]}" is line {found[template]} again')
        else:
            found[template] = number
    if wrong:
        raise RecipeError(
            "\n".join([f"--prompts: {path} has lines that cannot be used:", *wrong]),
            'Write one template a line, such as "a photo of a {token} {noun} in the snow".',
        )
    if not found:
        raise RecipeError(
            f"--prompts: {path} holds no prompt.",
            'Write one template a line, such as "a photo of a {token} {noun} in the snow".',
        )
    rest = default_prompts(base, noun)
    return EvaluationPrompts(tuple(found), rest.classes, rest.unrelated)


def filled(template: str, token: str, noun: str) -> tuple[str, str]:
    """What is drawn, and what CLIP-T compares it with: the prompt with and without the rare token.

    The token is noise to a text encoder that has never met it, so the caption goes without it.
    """
    return instance_prompt(template, token, noun), class_prompt(template, noun)
