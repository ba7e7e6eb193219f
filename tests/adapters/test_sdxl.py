"""SDXL: two text encoders, one of them OpenCLIP's with fused q, k, v: folder, single file, live, all one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lorabooth.adapters import extract, file, inject, merge
from lorabooth.adapters.inject import Target
from lorabooth.adapters.merge_match import Merging
from lorabooth.adapters.metadata import Metadata
from lorabooth.checkpoints.inventory import open_base
from lorabooth.evaluation.apply import load_adapter
from tests.adapters.conftest import EVERYTHING, TEXT, difference
from tests.families.ldm import make_single_file

TARGETS = (
    Target("denoiser", (*EVERYTHING, r"add_embedding\.linear_[12]"), 4, 6.0),
    Target("text_encoder", (TEXT,), 2, 5.0),
    Target("text_encoder_2", (TEXT, "text_projection"), 2, 5.0),
)


def pipeline(source: Path, configs: Path | None = None):
    from diffusers import StableDiffusionXLPipeline

    if configs is None:
        return StableDiffusionXLPipeline.from_pretrained(source, local_files_only=True)
    return StableDiffusionXLPipeline.from_single_file(str(source), config=str(configs), local_files_only=True)


def parts(pipe) -> dict[str, nn.Module]:
    return {"denoiser": pipe.unet, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}


@torch.no_grad()
def images_of(pipe) -> tuple[Tensor, Tensor, Tensor]:
    """(prompt embeddings, pooled embedding, the denoiser's prediction)."""
    cond, _, pooled, _ = pipe.encode_prompt(
        "a photo of a sks dog", device="cpu", do_classifier_free_guidance=False
    )
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    more = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    return cond, pooled, pipe.unet(x, torch.tensor([400]), cond, added_cond_kwargs=more).sample


@pytest.fixture(scope="module")
def adapter(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    components = parts(pipeline(tiny_sdxl))
    attached = inject.attach(components, TARGETS, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in attached.up_weights():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    path = tmp_path_factory.mktemp("adapter") / "dog.safetensors"
    file.write(path, inject.tensors(components), Metadata(family="sdxl", trigger_words=("sks dog",)))
    return path


@pytest.fixture(scope="module")
def live(tiny_sdxl: Path, adapter: Path) -> tuple[Tensor, Tensor, Tensor]:
    pipe = pipeline(tiny_sdxl)
    before = images_of(pipe)
    weights = {
        name: {k: v.clone() for k, v in part.state_dict().items()} for name, part in parts(pipe).items()
    }
    handle = load_adapter(pipe, adapter)
    found = images_of(pipe)
    assert all(difference(ours, plain) > 1e-2 for ours, plain in zip(found, before, strict=True))
    handle.set_strength(0.0)
    assert all(difference(a, b) < 1e-6 for a, b in zip(images_of(pipe), before, strict=True))
    handle.remove()
    for name, part in parts(pipe).items():
        now = part.state_dict()
        assert now.keys() == weights[name].keys()
        assert all(torch.equal(now[key], weights[name][key]) for key in now)
    return found


def near(got, wanted) -> bool:
    return all(difference(ours, theirs) < 1e-5 for ours, theirs in zip(got, wanted, strict=True))


def test_merged_folder_and_single_file_are_the_live_adapter(tiny_sdxl, adapter, live, tmp_path):
    merge.merge(tiny_sdxl, [Merging(adapter)], tmp_path / "merged")
    assert near(images_of(pipeline(tmp_path / "merged")), live)
    checkpoint = make_single_file(tiny_sdxl, tmp_path / "m" / "xl.safetensors")
    assert open_base(checkpoint).family == open_base(tiny_sdxl).family == "sdxl"
    report = merge.merge(checkpoint, [Merging(adapter)], tmp_path / "merged.safetensors")
    assert report.n_modules == len(file.read(adapter).tensors) // 3
    assert near(images_of(pipeline(tmp_path / "merged.safetensors", tmp_path / "m" / "xl")), live)
    before, after = load_file(checkpoint), load_file(tmp_path / "merged.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert "conditioner.embedders.1.model.text_projection" in changed
    assert not [
        key for key in changed if key.startswith("first_stage_model.") or "norm" in key or "ln_" in key
    ]


def test_diffusers_reads_our_file_as_we_do(tiny_sdxl, adapter, live):
    pipe = pipeline(tiny_sdxl)
    pipe.load_lora_weights(adapter.parent, weight_name=adapter.name)
    assert near(images_of(pipe), live)


def test_the_adapter_comes_out_of_the_merged_single_file(tiny_sdxl, adapter, live, tmp_path):
    checkpoint = make_single_file(tiny_sdxl, tmp_path / "xl.safetensors")
    merge.merge(checkpoint, [Merging(adapter)], tmp_path / "merged.safetensors")
    report = extract.extract(
        checkpoint, tmp_path / "merged.safetensors", tmp_path / "out.safetensors", rank=4
    )
    assert report.family == "sdxl"
    # What ComfyUI does not read from an adapter is not put into one, and is counted as missing.
    assert report.rest.examples == ("text_encoder_2.text_projection.weight",)
    assert report.table.total.relative_error < 1e-5 < report.relative_error
    pipe = pipeline(tiny_sdxl)
    load_adapter(pipe, tmp_path / "out.safetensors")
    assert difference(images_of(pipe)[0], live[0]) < 1e-5
