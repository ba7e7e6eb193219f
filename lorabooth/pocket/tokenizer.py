"""A tokenizer in CLIP's own format: byte-level BPE, lower-cased, every text encodable, rare words last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from lorabooth.pocket.vocabulary import CONTEXT_TOKENS

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _merges_of(sentences: Sequence[str], rare_words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges by frequency until every word is whole; a rare word counts once, so its merges come last."""
    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=20_000,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    model.train_from_iterator([*sentences, *rare_words], trainer)
    import json

    merges: list[Any] = json.loads(model.to_str())["model"]["merges"]
    return [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in merges]


def train_tokenizer(sentences: Sequence[str], rare_words: Sequence[str]) -> CLIPTokenizer:
    """Train a tokenizer whose highest ids are the rare words, each one token.

    Args:
        sentences: ordinary text; every word in it becomes one token.
        rare_words: identifiers; each becomes one token, with a higher id than any word.

    Returns:
        A `CLIPTokenizer` of at most `CONTEXT_TOKENS` tokens a prompt: 256 bytes, 256 bytes that end a word,
        the merges, start and end (which also pads), in this order, as in CLIP.
    """
    from transformers import CLIPTokenizer

    merges = _merges_of(sentences, rare_words)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [
        *alphabet,
        *(f"{letter}</w>" for letter in alphabet),
        *("".join(pair) for pair in merges),
        START,
        END,
    ]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_TOKENS)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write `tokenizer` in the current layout and CLIP's older one (vocab.json, merges.txt)."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Read what `save_tokenizer` wrote."""
    from transformers import CLIPTokenizer

    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer
