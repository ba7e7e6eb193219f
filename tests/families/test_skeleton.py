"""Parts from configs alone: as the loaded ones, but for their numbers; bases found without their weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from torch import nn

from lorabooth.errors import BaseModelError
from lorabooth.families import registry, source
from lorabooth.memory.meter_shapes import ShapesOnly
from tests.families.ldm import make_single_file
from tests.families.test_hub import COMMIT, put

WEIGHTS = "*.safetensors"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def configs_of(folder: Path, into: Path) -> Path:
    return shutil.copytree(folder, into, ignore=shutil.ignore_patterns(WEIGHTS))


def facts_of(module: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype, bool]]:
    held = (*module.named_parameters(), *module.named_buffers())
    return {name: (tuple(one.shape), one.dtype, one.requires_grad) for name, one in held}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "single file", "pocket"])
def test_a_skeleton_is_the_base_without_its_numbers(
    kind: str, dtype: torch.dtype, tiny_sd: Path, tiny_sd2: Path, tmp_path: Path
) -> None:
    path = {"sd1": str(tiny_sd), "sd2": str(tiny_sd2)}.get(kind, "pocket")
    if kind == "single file":
        path = str(make_single_file(tiny_sd, tmp_path / "base.safetensors"))
    family = registry.family(source.resolve(path).family)
    loaded = family.load(source.resolve(path), dtype)
    bare = str(configs_of(Path(path), tmp_path / "bare")) if kind in ("sd1", "sd2") else path
    with ShapesOnly():
        made = family.skeleton(source.resolve(bare, configs_only=True), dtype)
        assert loaded.vae is not None
        assert made.vae is not None
        pairs = [(loaded.vae, made.vae), (loaded.denoiser, made.denoiser)]
        pairs += [(loaded.text_encoders[name], made.text_encoders[name]) for name in loaded.text_encoders]
        assert set(loaded.text_encoders) == set(made.text_encoders)
        for real, shapes in pairs:
            assert facts_of(real) == facts_of(shapes)
            assert not shapes.training
    assert {k: v for k, v in made.extras.items() if k != "notes"} == {
        k: v for k, v in loaded.extras.items() if k != "notes"
    }
    assert dict(made.scheduler_config) == dict(loaded.scheduler_config)
    assert made.dtype == dtype


def test_without_a_vocabulary_there_is_no_tokenizer(tiny_sd: Path, tmp_path: Path) -> None:
    bare = configs_of(tiny_sd, tmp_path / "bare")
    for name in ("vocab.json", "merges.txt"):
        (bare / "tokenizer" / name).unlink()
    found = source.resolve(str(bare), configs_only=True)
    with ShapesOnly():
        parts = registry.family(found.family).skeleton(found, torch.float32)
    assert not parts.tokenizers
    assert parts.extras["max_tokens"] == 77


def test_a_broken_config_is_one_message(tiny_sd: Path, tmp_path: Path) -> None:
    bare = configs_of(tiny_sd, tmp_path / "bare")
    (bare / "vae" / "config.json").write_text('{"block_out_channels": "many", "latent_channels": 4}')
    found = source.resolve(str(bare), configs_only=True)
    with ShapesOnly(), pytest.raises(BaseModelError):
        registry.family(found.family).skeleton(found, torch.float32)


def test_a_family_that_the_base_is_not_is_refused(tmp_path: Path) -> None:
    from benchmarks.published import write_config_folder

    folder = write_config_folder(tmp_path / "sd15", "sd15")
    with pytest.raises(BaseModelError, match="this base is sd1"):
        source.resolve(str(folder), family="sd2", configs_only=True)


def test_of_a_hub_model_only_configs_are_downloaded_and_training_asks_for_the_rest(
    cache: Path, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    names = [str(p.relative_to(tiny_sd)) for p in tiny_sd.rglob("*") if p.is_file()]

    def info(self: Any, repo: str, *, revision: str | None, files_metadata: bool) -> Any:
        return SimpleNamespace(
            sha=COMMIT, siblings=[SimpleNamespace(rfilename=name, size=10) for name in names]
        )

    def fetch(repo: str, name: str, *, revision: str, library_name: str) -> str:
        fetched.append(name)
        root = cache / "models--someone--base" / "snapshots" / COMMIT
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copyfile(tiny_sd / name, root / name))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    found = source.resolve("someone/base", revision=COMMIT, configs_only=True)
    assert (found.base_id, found.revision, found.family) == ("someone/base", COMMIT, "sd1")
    assert fetched
    assert not [name for name in fetched if name.endswith(".safetensors")]
    # The configs in the cache are no base yet, though the commit is there.
    assert source.resolve("someone/base", revision=COMMIT).path == found.path
    assert [name for name in fetched if name.endswith(".safetensors")]


def test_a_cached_model_is_found_offline(cache: Path, tiny_sd: Path) -> None:
    put(cache, "someone/base", tiny_sd)
    assert source.resolve("someone/base", allow_download=False, configs_only=True).revision == COMMIT
