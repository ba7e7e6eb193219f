"""Of a hub repository only what a metric model needs; pickles never, and the hub's own conversion of them.

The hub itself is the one thing replaced here; the cache on disk is real.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from lorabooth.errors import BaseModelError
from lorabooth.evaluation.downloads import model_folder, needed_files
from lorabooth.progress import Silent

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD = ["README.md", "config.json", "preprocessor_config.json", "pytorch_model.bin", "tf_model.h5"]


def test_only_what_is_needed() -> None:
    new = [*OLD, "model.safetensors"]
    words = ["tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json"]
    image = ["config.json", "preprocessor_config.json", "model.safetensors"]
    assert needed_files(new, "image") == image
    assert needed_files(new, "clip") == []
    assert sorted(needed_files([*new, *words], "clip")) == sorted([*image, *words])
    assert needed_files(OLD, "image") == []
    assert needed_files(["model.safetensors", "config.json"], "image") == []
    assert needed_files(["model.safetensors", "config.json"], "lpips") == ["model.safetensors"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub with one repository of 2021: pickles, and the bot's offer of safetensors."""
    state: dict[str, Any] = {"fetched": [], "offers": ["refs/pr/7"]}
    folder = tmp_path / "hub"
    snapshot = folder / "models--some--model" / "snapshots" / COMMIT
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def info(self: Any, repo: str, *, revision: str | None = None, files_metadata: bool) -> Any:
        names = OLD if revision is None else [*OLD, "model.safetensors"]
        return SimpleNamespace(
            sha=COMMIT if revision else "f" * 40,
            siblings=[SimpleNamespace(rfilename=n, size=9) for n in names],
        )

    def offers(self: Any, repo: str, *, author: str, **kwargs: str) -> Any:
        state["author"] = author
        return [SimpleNamespace(git_reference=ref) for ref in state["offers"]]

    def fetch(repo: str, name: str, *, revision: str, library_name: str) -> str:
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(b"x")
        state["fetched"].append((name, revision))
        return str(snapshot / name)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_repo_discussions", offers)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    return state


def test_the_hubs_conversion_of_pickles_is_found(hub: dict[str, Any]) -> None:
    folder, commit = model_folder("some/model", "image", Silent())
    assert commit == folder.name == COMMIT
    assert hub["author"] == "SFconvertbot"
    names = ["config.json", "preprocessor_config.json", "model.safetensors"]
    assert hub["fetched"] == [(name, COMMIT) for name in names]


def test_pickles_alone_are_refused(hub: dict[str, Any]) -> None:
    hub["offers"] = []
    with pytest.raises(BaseModelError, match=r"no model\.safetensors with its config; pickles are not read"):
        model_folder("some/model", "image", Silent())
    assert hub["fetched"] == []


def test_a_hub_that_does_not_answer_leaves_the_cache(
    hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = model_folder("some/model", "image", Silent())

    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    assert model_folder("some/model", "image", Silent()) == first
    with pytest.raises(BaseModelError, match="getting it failed: OSError: no route"):
        model_folder("some/other", "image", Silent())
