"""Hub ids: the local cache is used, only what is needed is fetched, and every refusal is one message.

The hub itself is the one thing replaced here; the cache on disk is real.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from lorabooth.errors import BaseModelError
from lorabooth.families import hub, source
from lorabooth.progress import Silent

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def put(cache: Path, repo: str, content: Path) -> Path:
    """A model in the cache as the hub client lays it out."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    return shutil.copytree(content, root / "snapshots" / COMMIT)


def test_a_cached_model_is_used_offline_with_its_commit(cache: Path, tiny_sd: Path) -> None:
    folder = put(cache, "someone/base", tiny_sd)
    found = source.resolve("someone/base", allow_download=False)
    assert (found.path, found.base_id, found.revision) == (folder, "someone/base", COMMIT)


def test_a_cached_commit_needs_no_network(
    cache: Path, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache, "someone/base", tiny_sd)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", _unreachable)
    assert source.resolve("someone/base", revision=COMMIT).revision == COMMIT


def test_not_cached_and_offline_says_what_to_do(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "sd15").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseModelError, match="not in the local hub cache") as caught:
        source.resolve("models/sd-15", allow_download=False)
    assert "pocket" in caught.value.fix
    assert str(Path("models/sd15")) in caught.value.fix


def test_a_tokenizer_alone_in_the_cache_is_no_base(cache: Path, tiny_sd: Path) -> None:
    shutil.rmtree(put(cache, "someone/base", tiny_sd) / "unet")
    (cache / "models--someone--base" / "snapshots" / COMMIT / "model_index.json").unlink()
    with pytest.raises(BaseModelError, match="not in the local hub cache"):
        source.resolve("someone/base", allow_download=False)


def test_an_unreachable_hub_falls_back_to_the_cache_and_says_so(
    cache: Path, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache, "someone/base", tiny_sd)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", _unreachable)
    warnings: list[str] = []

    class Listener(Silent):
        def warn(self, message: str) -> None:
            warnings.append(message)

    assert source.resolve("someone/base", reporter=Listener()).revision == COMMIT
    assert "cannot be reached" in warnings[0]
    assert COMMIT[:10] in warnings[0]


def test_a_download_fetches_only_what_is_needed_at_one_commit(
    cache: Path, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The revision is resolved to a commit first, and every file is asked for at that commit."""
    asked: list[tuple[str, str]] = []
    names = [str(p.relative_to(tiny_sd)) for p in tiny_sd.rglob("*") if p.is_file()]
    extra = [
        "unet/diffusion_pytorch_model.bin",
        "v1-5-pruned.ckpt",
        "README.md",
        "safety_checker/model.safetensors",
    ]
    siblings = [SimpleNamespace(rfilename=name, size=10) for name in (*names, *extra)]

    def info(self: Any, repo: str, *, revision: str | None, files_metadata: bool) -> Any:
        assert revision == "fp32"
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    def fetch(repo: str, name: str, *, revision: str, library_name: str) -> str:
        asked.append((name, revision))
        root = cache / "models--someone--base" / "snapshots" / COMMIT
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        return shutil.copyfile(tiny_sd / name, root / name)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    found = source.resolve("someone/base", revision="fp32")
    assert found.revision == COMMIT
    assert {revision for _, revision in asked} == {COMMIT}
    assert sorted(name for name, _ in asked) == sorted(names)


def test_needed_files_prefers_full_precision_and_never_takes_pickles() -> None:
    base = ["model_index.json", "unet/config.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"]
    both = [f"unet/diffusion_pytorch_model{v}.safetensors" for v in ("", ".fp16", ".non_ema")]
    both += ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.fp16.safetensors"]
    pickles = [
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.bin",
        "x.ckpt",
        "text_encoder/pytorch_model.bin",
    ]
    assert hub.needed_files(base + both + pickles) == sorted(
        [
            *base,
            "unet/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model.fp16.safetensors",
        ]
    )
    assert hub.needed_files(base + pickles) == []
    assert hub.needed_files([n for n in base + both if n != "model_index.json"]) == []


def test_needed_files_takes_all_shards() -> None:
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = ["model_index.json", "unet/diffusion_pytorch_model.safetensors.index.json", *shards]
    names += ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
    half = "unet/diffusion_pytorch_model.safetensors.index.fp16.json"
    assert hub.needed_files([*names, half]) == sorted(names)


def test_a_repository_of_pickles_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = [
        SimpleNamespace(rfilename="model_index.json", size=1),
        SimpleNamespace(rfilename="a.ckpt", size=1),
    ]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda *a, **k: SimpleNamespace(sha=COMMIT, siblings=siblings)
    )
    with pytest.raises(BaseModelError, match="pickle"):
        source.resolve("someone/base")


def _unreachable(*args: Any, **kwargs: Any) -> Any:
    raise ConnectionError("no route to host")
