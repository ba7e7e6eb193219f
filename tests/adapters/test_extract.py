"""What is extracted, merged again, is the tuned model within the error that was reported."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabooth.adapters import extract, file, merge
from lorabooth.adapters.merge_match import Merging
from lorabooth.adapters.metadata import Metadata
from lorabooth.errors import AdapterError, BaseModelError
from tests.adapters.test_merge import UNET, in_dtype, single

TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def tuned(base, trained, tmp_path: Path) -> Path:
    """The base with an adapter of rank 4 (text encoder: 2) merged into it."""
    file.write(tmp_path / "adapter.safetensors", trained(base.load()), Metadata(family="sd1"))
    merge.merge(base.folder, [Merging(tmp_path / "adapter.safetensors")], tmp_path / "tuned")
    return tmp_path / "tuned"


def noisy(folder: Path, target: Path, *, everything: bool = True, seed: int = 0) -> Path:
    """A full fine-tune: every weight of the UNet moved by noise that falls off along its singular values."""
    shutil.copytree(folder, target)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(target / UNET)
    for key, value in tensors.items():
        noise = 0.01 * torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            left, values, right = torch.linalg.svd(noise.flatten(1), full_matrices=False)
            noise = (left * (values * 0.7 ** torch.arange(len(values))) @ right).view(value.shape)
        elif not everything:
            continue
        tensors[key] = value + noise
    save_file(tensors, target / UNET, metadata={"format": "pt"})
    return target


def missed(tuned: Path, back: Path, base: Path) -> float:
    """Norm of what the merged extract misses, over the norm of the whole change."""
    wrong = whole = 0.0
    for name in (UNET, TEXT):
        there, here, origin = (load_file(folder / name) for folder in (tuned, back, base))
        wrong += sum(float((there[key].double() - here[key].double()).square().sum()) for key in there)
        whole += sum(float((there[key].double() - origin[key].double()).square().sum()) for key in there)
    return math.sqrt(wrong / whole)


def test_a_merged_adapter_comes_out_again(base, tuned, tmp_path):
    report = extract.extract(base.folder, tuned, tmp_path / "out.safetensors", rank=4)
    assert report.relative_error < 1e-5
    assert report.rest.tensors == 0
    assert report.notes == ()
    merge.merge(base.folder, [Merging(tmp_path / "out.safetensors")], tmp_path / "back")
    assert missed(tuned, tmp_path / "back", base.folder) < 1e-5
    names = {key.rpartition(".")[0] for key in file.read(tmp_path / "adapter.safetensors").tensors}
    assert {key.rpartition(".")[0] for key in file.read(tmp_path / "out.safetensors").tensors} == names


@pytest.mark.parametrize("rank", [1, 6])
def test_the_reported_error_is_the_true_one(base, tmp_path, rank):
    tuned = noisy(base.folder, tmp_path / "tuned")
    report = extract.extract(base.folder, tuned, tmp_path / "out.safetensors", rank=rank)
    merge.merge(base.folder, [Merging(tmp_path / "out.safetensors")], tmp_path / "back")
    assert report.rest.tensors > 50
    assert 0 < report.rest.relative_norm < report.relative_error < 1
    assert report.relative_error == pytest.approx(missed(tuned, tmp_path / "back", base.folder), rel=1e-3)
    half = extract.extract(base.folder, tuned, tmp_path / "half.safetensors", rank=rank, dtype=torch.float16)
    assert half.relative_error == pytest.approx(report.relative_error, rel=1e-2)
    assert half.n_bytes < 0.7 * report.n_bytes


def test_randomised_decomposition_is_as_good_as_the_exact_one(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 400, generator=generator)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    falling = (left * (values * 0.9 ** torch.arange(300))) @ right
    best = torch.linalg.svdvals(falling)[16:].square().sum().sqrt()
    made = extract._randomised(falling, 16, "denoiser.x").truncated(16)
    assert (falling - made.up @ made.down).norm() < 1.01 * best
    again = extract._randomised(falling, 16, "denoiser.x").truncated(16)
    assert torch.equal(made.up, again.up)


def test_layouts_and_dtypes_may_differ(base, tuned, tmp_path):
    from lorabooth.adapters.stored import open_adapter

    checkpoint = single(base, tmp_path / "checkpoint.safetensors")
    report = extract.extract(checkpoint, tuned, tmp_path / "a.safetensors", rank=4)
    assert report.relative_error < 1e-5
    assert len(report.notes) == 1
    assert "VAE" in report.notes[0]
    half = in_dtype(checkpoint, tmp_path / "half.safetensors", torch.bfloat16)
    report = extract.extract(half, tuned, tmp_path / "b.safetensors", rank=4)
    assert 1e-4 < report.relative_error < 0.5  # the rounding of the base is part of the difference
    assert set(open_adapter(tmp_path / "b.safetensors").components) == {"denoiser", "text_encoder"}


def test_energy_lowers_ranks(base, tmp_path):
    tuned = noisy(base.folder, tmp_path / "tuned", everything=False)
    report = extract.extract(base.folder, tuned, tmp_path / "a.safetensors", rank=16, energy=0.9)
    assert 1 <= report.table.total.new_ranks[0] < report.table.total.new_ranks[1] < 16
    assert max(row.relative_error for row in report.table.rows) ** 2 <= 0.1001


def test_a_vae_that_differs_is_said(base, tuned, tmp_path):
    path = tuned / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["quant_conv.bias"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    report = extract.extract(base.folder, tuned, tmp_path / "a.safetensors", rank=4)
    assert report.notes == ("The VAEs differ, and an adapter does not hold that.",)


def test_what_cannot_be_extracted(base, tuned, tiny_sd, tiny_sd2, tmp_path):
    out = tmp_path / "out.safetensors"

    def refused(error: type[Exception], match: str, first: Path, second: Path, target: Path = out) -> None:
        with pytest.raises(error, match=match):
            extract.extract(first, second, target, rank=4)
        assert not out.exists()

    refused(AdapterError, "nothing to extract", base.folder, base.folder)
    refused(BaseModelError, "is sd1, .* is sd2", tiny_sd, tiny_sd2)
    refused(BaseModelError, "no such", base.folder, tmp_path / "absent")
    refused(AdapterError, "ends in .safetensors", base.folder, tuned, tmp_path / "folder")
    refused(AdapterError, "one of the inputs", base.folder, tuned, tuned / UNET)
    smaller = shutil.copytree(tuned, tmp_path / "smaller")
    tensors = load_file(smaller / UNET)
    del tensors["mid_block.attentions.0.proj_in.weight"]
    save_file(tensors, smaller / UNET)
    refused(BaseModelError, "not built alike", base.folder, smaller)
    broken = shutil.copytree(tuned, tmp_path / "broken")
    tensors = load_file(broken / UNET)
    tensors["mid_block.attentions.0.proj_in.weight"].view(-1)[0] = math.nan
    save_file(tensors, broken / UNET)
    refused(BaseModelError, "NaN", base.folder, broken)
