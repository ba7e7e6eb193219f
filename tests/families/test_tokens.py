"""The identifier is rare, is no word, and is really one token (or few) in the base's own vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorabooth.errors import BaseModelError
from lorabooth.families.tokens import CONSONANTS, KNOWN_MEANINGS, POOL, find_identifier
from tests.tiny import RARE_TOKENS, byte_alphabet, write_tokenizer

POCKET = Path(__file__).parents[2] / "lorabooth" / "pocket" / "weights" / "tokenizer"


def _clip_tokenizer(folder: Path, words: list[str]) -> Any:
    """A CLIP tokenizer whose merges make these words, the rarest last."""
    from transformers import CLIPTokenizer

    alphabet = byte_alphabet()
    pieces = alphabet + [c + "</w>" for c in alphabet]
    merges: list[str] = []
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            merge, joined = f"{symbols[0]} {symbols[1]}", symbols[0] + symbols[1]
            if merge not in merges:
                merges.append(merge)
                pieces.append(joined)
            symbols = [joined, *symbols[2:]]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


def test_takes_the_rarest_single_token_that_means_nothing(tmp_path: Path) -> None:
    common = ["dog", "photo", "cat", "snow", "grass", "house", "beach"]
    tokenizer = _clip_tokenizer(tmp_path, [*common, "zfj", "gxq", "red", "nyc", "mlb", "sks"])
    found = find_identifier(tokenizer)
    assert found.text == "gxq"
    assert found.token_ids == (tokenizer.get_vocab()["gxq</w>"],)
    assert str(found.token_ids[0]) in found.reason


def test_is_exactly_those_tokens_within_a_prompt(tokenizer: Any) -> None:
    found = find_identifier(tokenizer)
    prompt = tokenizer(f"a photo of a {found.text} dog", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a photo of a dog", add_special_tokens=False)["input_ids"]
    assert prompt == [*whole[:4], *found.token_ids, *whole[4:]]


def test_subjects_of_one_run_get_different_ones_until_letters_must_be_combined(tokenizer: Any) -> None:
    taken: list[str] = []
    kinds = set()
    for _ in range(12):
        found = find_identifier(tokenizer, avoid=taken)
        assert found.text not in taken
        assert found.text not in KNOWN_MEANINGS
        assert 1 <= len(found.token_ids) <= 3
        assert 2 <= len(found.text) <= 3
        taken.append(found.text)
        kinds.add(len(found.token_ids))
    assert "sks" not in taken
    assert taken[0] in RARE_TOKENS
    assert kinds >= {1, 2}


def test_same_arguments_same_identifier_and_a_seed_picks_within_the_pool(tokenizer: Any) -> None:
    picks = [find_identifier(tokenizer, seed=seed).text for seed in range(POOL)]
    assert picks == [find_identifier(tokenizer, seed=seed).text for seed in range(POOL)]
    assert len(set(picks)) > 1
    assert picks[0] == find_identifier(tokenizer).text


def test_avoids_in_any_case(tokenizer: Any) -> None:
    first = find_identifier(tokenizer).text
    assert find_identifier(tokenizer, avoid=[first.upper()]).text != first


def test_a_vocabulary_without_consonant_tokens_combines_letters(tmp_path: Path) -> None:
    found = find_identifier(_clip_tokenizer(tmp_path, ["dog", "photo", "a", "of"]))
    assert len(found.token_ids) == 3
    assert found.text == "qxz"


def test_a_vocabulary_that_offers_nothing_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    tokenizer = _clip_tokenizer(tmp_path, ["dog"])
    every = {a + b + c for a in CONSONANTS for b in CONSONANTS for c in CONSONANTS}
    every |= {a + b for a in CONSONANTS for b in CONSONANTS}
    with pytest.raises(BaseModelError, match="no rare token") as error:
        find_identifier(tokenizer, avoid=every)
    assert 'token = "' in error.value.fix


def test_the_refused_list_only_holds_what_could_be_found() -> None:
    assert all(2 <= len(word) <= 3 and set(word) <= set(CONSONANTS) for word in KNOWN_MEANINGS)
    assert {"mlb", "nyc", "sks", "kkk", "fck", "kgs", "jpg"} - KNOWN_MEANINGS == {"nyc"}


@pytest.mark.skipif(not POCKET.is_dir(), reason="the pocket base is not built yet")
def test_the_pocket_base_has_single_token_identifiers() -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(POCKET)
    taken: list[str] = []
    for _ in range(5):
        found = find_identifier(tokenizer, avoid=taken)
        assert len(found.token_ids) == 1
        taken.append(found.text)
