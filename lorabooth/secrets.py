"""Secrets that this process can know of, taken out of whatever it shows.

Tokens only ever come from the environment or the hub's login. They end up in messages by ways that nobody
plans: a URL with a token in it, a header that a library quotes in its exception.
"""

from __future__ import annotations

import os
import re
from urllib.parse import quote

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY")
"""Environment variables whose values are secret."""

HIDDEN = "***"
"""What stands in a secret's place."""

_MIN_CHARS = 6  # a shorter value is no token, and would take ordinary words apart

_SHAPES = (
    # Hugging Face's tokens, and its organisations' older ones; wandb's newer keys.
    (re.compile(r"(?<![A-Za-z0-9])(?:hf_|api_org_)[A-Za-z0-9]{16,}|\bwandb_v\d+_\w{16,}"), HIDDEN),
    (re.compile(r"(://[^\s/:@]*:)[^\s/@]+(?=@)"), rf"\1{HIDDEN}"),  # https://user:password@host
    (re.compile(r"([?&](?:access_token|api_key|token)=)[^\s&\"'#]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(\bBearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1{HIDDEN}"),
)


def redact(text: str) -> str:
    """The text with `***` in place of known secrets and of what looks like one.

    Known are the values of VARIABLES, as they are and as they stand in a URL. The shapes: Hugging Face tokens
    (`hf_...`), a password or a `token=` in a URL, a bearer header.
    """
    for value in _known():
        text = text.replace(value, HIDDEN)
    for shape, replacement in _SHAPES:
        text = shape.sub(replacement, text)
    return text


def _known() -> list[str]:
    # Asked anew each time: a command may run long after this was imported, with another environment.
    values = {os.environ.get(name, "").strip() for name in VARIABLES}
    values |= {quote(value, safe="") for value in values}
    return sorted((value for value in values if len(value) >= _MIN_CHARS), key=len, reverse=True)
