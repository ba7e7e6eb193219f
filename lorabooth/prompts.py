"""Prompts from templates, and file names from prompts. Pure strings; imports nothing heavy.

A template holds "{token}" (the rare identifier) and "{noun}" (the class noun). Filled with both it is
the subject's prompt, "a photo of a sks dog"; without the token it is the class prompt of DreamBooth's
prior preservation, "a photo of a dog" (arXiv 2208.12242, section 3.2).
"""

from __future__ import annotations

import re
import unicodedata

_SPACES = re.compile(r"\s+")
_SPACE_BEFORE_MARK = re.compile(r"\s+([,.;:!?])")
_ARTICLE = re.compile(r"\b(an?)(\s+)(?=(?:\{token\}\s+)?\{noun\})", re.IGNORECASE)
_ARTICLE_OF_NOUN = re.compile(r"\b(an?)(\s+)(?=\{noun\})", re.IGNORECASE)
# Words whose first letter is not their first sound.
_SPOKEN_CONSONANT = re.compile(r"(uni(?!n|m)|us[ae]|eu|ew|one\b|once\b|ufo|ute|ukulele)", re.IGNORECASE)
_SPOKEN_VOWEL = re.compile(r"(hour|honest|hono|heir)", re.IGNORECASE)


def instance_prompt(template: str, token: str, noun: str) -> str:
    """The subject's prompt.

    Args:
        template: text with "{token}" and "{noun}"; other braces stay as they are.
        token: the identifier.
        noun: the class noun.

    Returns:
        The filled template, white space collapsed. An article right before "{noun}" is made to agree
        with it; one right before "{token}" stays as written, since nobody knows how a token is spoken.
    """
    text = _agree(template, _ARTICLE_OF_NOUN, noun)
    return _tidy(text.replace("{token}", token).replace("{noun}", noun))


def class_prompt(template: str, noun: str) -> str:
    """The class prompt: the template without the token, its article agreeing with the noun.

    Args:
        template: text with "{token}" and "{noun}".
        noun: the class noun.

    Returns:
        E.g. "a photo of an owl" for "a photo of a {token} {noun}" and "owl".
    """
    text = _agree(template, _ARTICLE, noun)
    return _tidy(text.replace("{token}", "").replace("{noun}", noun))


def slug(text: str, limit: int = 60) -> str:
    """A file name's part made of a text: lower-case letters and digits of any script, joined by "-".

    Args:
        text: anything, e.g. a prompt.
        limit: most bytes in UTF-8, cut at a word where possible.

    Returns:
        Never empty, never with a separator, dot, control character or leading "-"; "untitled" when
        nothing is left.
    """
    normal = unicodedata.normalize("NFC", text).lower()
    words = [word for word in re.split(r"[\W_]+", normal) if word]
    if not words:
        return "untitled"
    kept = words[0].encode()[:limit].decode(errors="ignore")
    for word in words[1:]:
        if len(f"{kept}-{word}".encode()) > limit:
            break
        kept = f"{kept}-{word}"
    return kept


def _agree(template: str, article: re.Pattern[str], noun: str) -> str:
    spoken = "an" if _starts_with_vowel_sound(noun) else "a"
    return article.sub(lambda m: (spoken.capitalize() if m[1][0] == "A" else spoken) + m[2], template)


def _starts_with_vowel_sound(word: str) -> bool:
    bare = unicodedata.normalize("NFD", word.strip())
    if _SPOKEN_VOWEL.match(bare):
        return True
    return bare[:1].lower() in set("aeiou") and not _SPOKEN_CONSONANT.match(bare)


def _tidy(text: str) -> str:
    return _SPACE_BEFORE_MARK.sub(r"\1", _SPACES.sub(" ", text)).strip()
