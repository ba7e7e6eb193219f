from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from lorabooth.pocket import scenes
from lorabooth.pocket.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from lorabooth.pocket.vocabulary import CONTEXT_TOKENS, corpus, identifiers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(*corpus(0, 500)), folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> CLIPTokenizer:
    return load_tokenizer(folder)


def test_every_word_of_the_grammar_is_one_token(tokenizer: CLIPTokenizer) -> None:
    names = {w for group in (scenes.CLASSES, scenes.COLOURS, scenes.PATTERNS, scenes.PLACES) for w in group}
    for word in {part for name in names for part in name.split()}:
        assert len(tokenizer(word).input_ids) == 3, word


def test_identifiers_are_single_rare_tokens(tokenizer: CLIPTokenizer) -> None:
    rare = [tokenizer(name).input_ids for name in identifiers()]
    assert all(len(ids) == 3 for ids in rare)
    assert len({ids[1] for ids in rare}) == len(rare) == 300
    assert min(ids[1] for ids in rare) > tokenizer("mug").input_ids[1]


def test_any_text_is_encodable_and_case_does_not_matter(tokenizer: CLIPTokenizer) -> None:
    text = "Ein zzyzx-Wagen, 日本 123!"
    assert tokenizer.unk_token_id not in tokenizer(text).input_ids[1:-1]
    assert tokenizer("A MUG").input_ids == tokenizer("a mug").input_ids
    assert (
        tokenizer.decode(tokenizer("a dotted mug").input_ids, skip_special_tokens=True).strip()
        == "a dotted mug"
    )


def test_prompts_are_padded_with_the_end_token(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("a mug", padding="max_length", max_length=tokenizer.model_max_length).input_ids
    assert len(ids) == CONTEXT_TOKENS
    assert ids[0] == tokenizer.bos_token_id
    assert set(ids[3:]) == {tokenizer.eos_token_id}


def test_older_layout_is_written_too(folder: Path, tokenizer: CLIPTokenizer) -> None:
    old = CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    text = "a photo of a qzx striped robot at night"
    assert old(text).input_ids == tokenizer(text).input_ids
