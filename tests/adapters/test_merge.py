"""A merged base is the base with the adapter live on it, in every layout, and nothing else of it changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabooth.adapters import file, inject, merge
from lorabooth.adapters.merge_match import Merging
from lorabooth.adapters.metadata import Metadata
from lorabooth.adapters.stored import open_adapter
from lorabooth.checkpoints.header import read_header
from lorabooth.checkpoints.inventory import open_base
from lorabooth.errors import AdapterError, BaseModelError
from tests.adapters.conftest import Base, difference, outputs
from tests.families.ldm import make_single_file

UNET = "unet/diffusion_pytorch_model.safetensors"


def load(folder: Path) -> dict[str, torch.nn.Module]:
    """What diffusers itself reads from a folder."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    return {"denoiser": pipe.unet, "text_encoder": pipe.text_encoder}


def load_single(path: Path, configs: Path) -> dict[str, torch.nn.Module]:
    """What diffusers itself reads from a single file with local configs."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_single_file(str(path), config=str(configs), local_files_only=True)
    return {"denoiser": pipe.unet, "text_encoder": pipe.text_encoder}


@pytest.fixture
def adapter(base: Base, trained, tmp_path: Path) -> Path:
    """Every kind of layer: attention, feed-forward, 1x1 and 3x3 convolutions, embeddings, text encoder."""
    return save(trained(base.load()), tmp_path / "adapter.safetensors")


def save(tensors, path: Path, family: str = "sd1") -> Path:
    file.write(path, tensors, Metadata(family=family))
    return path


def live(base: Base, *adapters: tuple[Path, float]):
    components = base.load()
    for index, (path, strength) in enumerate(adapters):
        inject.attach_tensors(components, file.read(path).tensors, strength=strength, name=f"a{index}")
    return outputs(components)


def single(base: Base, path: Path) -> Path:
    openclip = "sd2" in base.folder.name
    return make_single_file(base.folder, path, openclip=openclip)


def in_dtype(source: Path, target: Path, dtype: torch.dtype) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.to(dtype) for k, v in load_file(source).items()}, target, metadata={"format": "pt"})
    return target


def test_a_merged_folder_is_the_base_with_the_adapter_live(base, adapter, tmp_path):
    report = merge.merge(base.folder, [Merging(adapter, 0.7)], tmp_path / "merged")
    for got, wanted in zip(outputs(load(tmp_path / "merged")), live(base, (adapter, 0.7)), strict=True):
        assert difference(got, wanted) < 1e-5
    assert report.n_modules == len(file.read(adapter).tensors) // 3
    assert 0 <= report.waited_s <= report.seconds
    assert report.leftovers == ()
    assert 0 < report.mean_change < report.largest_change.relative_change
    assert report.worst_rounding.rounding == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_may_begin_at_any_byte(base, adapter, tmp_path, dtype):
    """The format's header may have any length, though safetensors itself makes it a multiple of eight."""
    even = in_dtype(
        single(base, tmp_path / "m" / "checkpoint.safetensors"), tmp_path / "even.safetensors", dtype
    )
    content = even.read_bytes()
    n_header = int.from_bytes(content[:8], "little")
    odd = tmp_path / "odd.safetensors"
    header = content[8 : 8 + n_header] + b" "
    odd.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + n_header :])
    for path in (even, odd):
        merge.merge(path, [Merging(adapter)], tmp_path / f"merged-{path.name}")
    from_even = (tmp_path / "merged-even.safetensors").read_bytes()
    from_odd = (tmp_path / "merged-odd.safetensors").read_bytes()
    assert from_odd[8 + len(header) :] == from_even[8 + n_header :]


def test_a_merged_single_file_is_the_base_with_the_adapter_live(base, adapter, tmp_path):
    checkpoint = single(base, tmp_path / "m" / "checkpoint.safetensors")
    merge.merge(checkpoint, [Merging(adapter)], tmp_path / "merged.safetensors")
    got = outputs(load_single(tmp_path / "merged.safetensors", tmp_path / "m" / "checkpoint"))
    for ours, wanted in zip(got, live(base, (adapter, 1.0)), strict=True):
        assert difference(ours, wanted) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_one_rounding_to_the_dtype_of_the_base(base, adapter, tmp_path, dtype):
    exact = single(base, tmp_path / "exact.safetensors")
    held = in_dtype(exact, tmp_path / "held.safetensors", dtype)
    merge.merge(held, [Merging(adapter, 0.5)], tmp_path / "merged.safetensors")
    # The reference: the held weights, widened, merged in float64 by a folder-independent rule, rounded once.
    wide = in_dtype(held, tmp_path / "wide.safetensors", torch.float64)
    merge.merge(wide, [Merging(adapter, 0.5)], tmp_path / "reference.safetensors")
    reference = load_file(tmp_path / "reference.safetensors")
    got = load_file(tmp_path / "merged.safetensors")
    for key, value in got.items():
        assert value.dtype == dtype
        near = reference[key].to(dtype)
        # One unit in the last place, and float32's own where numbers cancel.
        step = torch.finfo(dtype).eps * near.double().abs() + 1e-6 * near.double().abs().max()
        assert ((value.double() - near.double()).abs() <= step).all(), key
    report = merge.merge(held, [Merging(adapter, 0.5)], tmp_path / "merged.safetensors", overwrite=True)
    assert (report.worst_rounding.rounding > 0) == (dtype != torch.float64)


def test_nothing_but_the_touched_tensors_changes_and_the_base_is_only_read(base, trained, tmp_path):
    tensors = trained(base.load(), patterns=(r".*attn2\.to_k",), text=False)
    path = save(tensors, tmp_path / "adapter.safetensors")
    checkpoint = single(base, tmp_path / "checkpoint.safetensors")
    before = checkpoint.read_bytes()
    merge.merge(checkpoint, [Merging(path)], tmp_path / "merged.safetensors")
    assert checkpoint.read_bytes() == before
    after = (tmp_path / "merged.safetensors").read_bytes()
    assert len(after) == len(before)
    header = read_header(checkpoint)
    changed = set()
    for key, entry in header.entries.items():
        span = slice(header.data_start + entry.begin, header.data_start + entry.end)
        if before[span] != after[span]:
            changed.add(key)
    assert before[: header.data_start] == after[: header.data_start]
    assert changed == {k for k in header.entries if k.endswith("attn2.to_k.weight")}
    assert len(changed) == len(tensors) // 3


def test_only_the_adapted_third_of_a_fused_matrix_changes(tiny_sd2, trained, tmp_path):
    base = Base(tiny_sd2)
    components = base.load()
    tensors = trained(components, text=True)
    keep = {k: v for k, v in tensors.items() if ".layers.0.self_attn.k_proj." in k}
    path = save(keep, tmp_path / "k.safetensors", "sd2")
    checkpoint = single(base, tmp_path / "checkpoint.safetensors")
    merge.merge(checkpoint, [Merging(path)], tmp_path / "merged.safetensors")
    key = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    before, after = load_file(checkpoint)[key], load_file(tmp_path / "merged.safetensors")[key]
    third = before.shape[0] // 3
    assert torch.equal(before[:third], after[:third])
    assert torch.equal(before[2 * third :], after[2 * third :])
    assert not torch.equal(before[third : 2 * third], after[third : 2 * third])


def test_several_adapters_add_up_and_reverse_takes_them_out(base, trained, tmp_path):
    first = save(trained(base.load(), seed=1), tmp_path / "1.safetensors")
    second = save(trained(base.load(), seed=2, rank=2), tmp_path / "2.safetensors")
    both = [Merging(first, 0.5), Merging(second, -0.3)]
    merge.merge(base.folder, both, tmp_path / "merged")
    wanted = live(base, (first, 0.5), (second, -0.3))
    for got, expected in zip(outputs(load(tmp_path / "merged")), wanted, strict=True):
        assert difference(got, expected) < 1e-5
    merge.merge(tmp_path / "merged", both, tmp_path / "back", reverse=True)
    before, after = load_file(base.folder / UNET), load_file(tmp_path / "back" / UNET)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_block_strengths_scale_the_parts_they_name(base, adapter, tmp_path):
    blocks = {
        "down_blocks": 0.0,
        "denoiser.down_blocks.1": 2.0,
        "mid_block.attentions.0.proj_in": 0.5,
        "text_encoder": 0,
    }
    merge.merge(base.folder, [Merging(adapter, 1.0, blocks)], tmp_path / "merged")
    merge.merge(base.folder, [Merging(adapter, 1.0)], tmp_path / "whole")
    before = load_file(base.folder / UNET)
    whole, some = load_file(tmp_path / "whole" / UNET), load_file(tmp_path / "merged" / UNET)

    def ratio(key: str) -> float:
        return float((some[key] - before[key]).norm() / (whole[key] - before[key]).norm())

    assert ratio("down_blocks.0.resnets.0.conv1.weight") == 0
    assert ratio("down_blocks.1.resnets.0.conv1.weight") == pytest.approx(2, rel=1e-3)
    assert ratio("mid_block.attentions.0.proj_in.weight") == pytest.approx(0.5, rel=1e-3)
    assert ratio("mid_block.attentions.0.proj_out.weight") == pytest.approx(1, rel=1e-3)
    text = "text_encoder/model.safetensors"
    assert (tmp_path / "merged" / text).read_bytes() == (base.folder / text).read_bytes()


def shard(folder: Path, target: Path) -> Path:
    """The same base with its UNet in two shards and an index."""
    shutil.copytree(folder, target)
    tensors = load_file(target / UNET)
    (target / UNET).unlink()
    keys = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((keys[: len(keys) // 2], keys[len(keys) // 2 :]), 1):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({k: tensors[k] for k in part}, target / "unet" / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (target / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return target


def test_sharded_bases_stay_sharded(base, adapter, tmp_path):
    sharded = shard(base.folder, tmp_path / "sharded")
    merge.merge(sharded, [Merging(adapter)], tmp_path / "merged")
    assert len(list((tmp_path / "merged/unet").glob("*.safetensors"))) == 2
    for got, wanted in zip(outputs(load(tmp_path / "merged")), live(base, (adapter, 1.0)), strict=True):
        assert difference(got, wanted) < 1e-5
    next((sharded / "unet").glob("*-00002-of*.safetensors")).unlink()
    with pytest.raises(BaseModelError, match="not there"):
        merge.merge(sharded, [Merging(adapter)], tmp_path / "other")


def test_every_variant_is_merged_and_unmerged_copies_are_left_out(base, adapter, tmp_path):
    source = shutil.copytree(base.folder, tmp_path / "source")
    in_dtype(source / UNET, source / "unet/diffusion_pytorch_model.fp16.safetensors", torch.float16)
    for name in ("unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin", "v1-5-pruned.ckpt"):
        (source / name).write_bytes(b"unmerged")
    (source / "README.md").write_text("card")
    report = merge.merge(source, [Merging(adapter)], tmp_path / "merged")
    full = load_file(tmp_path / "merged" / UNET)
    half = load_file(tmp_path / "merged/unet/diffusion_pytorch_model.fp16.safetensors")
    torch.testing.assert_close({k: v.float() for k, v in half.items()}, full, rtol=2e-3, atol=1e-3)
    assert set(report.left_out) == {"unet/diffusion_pytorch_model.bin", "v1-5-pruned.ckpt"}
    assert (tmp_path / "merged/vae/diffusion_pytorch_model.bin").read_bytes() == b"unmerged"
    assert (tmp_path / "merged/README.md").read_text() == "card"


def test_a_1x1_convolution_fits_a_linear_layer_and_back(tiny_sd, tiny_sd2, trained, tmp_path):
    """Kohya's SD2 files may hold proj_in as a convolution."""
    for folder, to in ((tiny_sd2, 4), (tiny_sd, 2)):
        base = Base(folder)
        tensors = trained(base.load(), patterns=(r".*\.proj_(in|out)",), text=False)
        other = {
            k: v if k.endswith("alpha") else (v[:, :, None, None] if to == 4 else v[:, :, 0, 0]).contiguous()
            for k, v in tensors.items()
        }
        first = save(tensors, tmp_path / f"a{to}.safetensors")
        second = save(other, tmp_path / f"b{to}.safetensors")
        for path in (first, second):
            merge.merge(folder, [Merging(path)], tmp_path / f"{path.stem}-merged")
        a, b = (tmp_path / f"{path.stem}-merged" / UNET for path in (first, second))
        assert a.read_bytes() == b.read_bytes() != (folder / UNET).read_bytes()


# ---- what is refused ----


def refused(
    error: type[Exception], match: str, base: Path, adapters: list[Path], out: Path, **options
) -> None:
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(error, match=match):
        merge.merge(base, [Merging(path) for path in adapters], out, **options)
    assert sorted(out.parent.rglob("*")) == before


def test_what_does_not_fit_is_refused_whole_or_listed(base, trained, tmp_path):
    tensors = trained(base.load(), text=False)
    strange = {
        key.replace("down_blocks.0", "down_blocks.7"): value
        for key, value in tensors.items()
        if "down_blocks.0.attentions.0.proj_in" in key
    }
    family = open_base(base.folder).family
    path = save(tensors | strange, tmp_path / "a.safetensors", family)
    refused(AdapterError, r"1 of .*down_blocks\.7", base.folder, [path], tmp_path / "out")
    report = merge.merge(base.folder, [Merging(path)], tmp_path / "partial", allow_partial=True)
    assert report.leftovers == ("denoiser.down_blocks.7.attentions.0.proj_in",)
    only = save(strange, tmp_path / "none.safetensors", family)
    refused(AdapterError, "Nothing of the adapter", base.folder, [only], tmp_path / "out", allow_partial=True)


def test_an_adapter_of_another_family_is_one_line(tiny_sd, tmp_path):
    name = "denoiser.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
    tensors = {
        f"{name}.lora_A": torch.ones(2, 2048),
        f"{name}.lora_B": torch.ones(640, 2),
        f"{name}.alpha": torch.tensor(2.0),
    }
    path = save(tensors, tmp_path / "xl.safetensors", "sdxl")
    refused(AdapterError, "for sdxl, but .* is sd1", tiny_sd, [path], tmp_path / "out")


def test_outputs_that_would_destroy_something(base, adapter, tmp_path):
    checkpoint = single(base, tmp_path / "checkpoint.safetensors")
    refused(AdapterError, "one of the inputs", checkpoint, [adapter], checkpoint, overwrite=True)
    refused(AdapterError, "one of the inputs", checkpoint, [adapter], adapter, overwrite=True)
    refused(AdapterError, "must be a .safetensors", checkpoint, [adapter], tmp_path / "folder")
    refused(AdapterError, "must be a folder", base.folder, [adapter], tmp_path / "x.safetensors")
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    refused(AdapterError, "--overwrite", checkpoint, [adapter], tmp_path / "there.safetensors")
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.jpg").write_bytes(b"mine")
    refused(
        AdapterError, "not a base model folder", base.folder, [adapter], tmp_path / "photos", overwrite=True
    )
    source = shutil.copytree(base.folder, tmp_path / "source")
    refused(AdapterError, "inside the other", source, [adapter], source / "merged")
    link = tmp_path / "link.safetensors"
    link.symlink_to(checkpoint)
    refused(AdapterError, "one of the inputs", checkpoint, [adapter], link, overwrite=True)


def test_overwrite_replaces_an_earlier_result_whole(base, adapter, tmp_path):
    merge.merge(base.folder, [Merging(adapter)], tmp_path / "merged")
    (tmp_path / "merged/unet/old.txt").write_text("of the earlier result")
    merge.merge(base.folder, [Merging(adapter, 0.5)], tmp_path / "merged", overwrite=True)
    assert not (tmp_path / "merged/unet/old.txt").exists()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    for got, wanted in zip(outputs(load(tmp_path / "merged")), live(base, (adapter, 0.5)), strict=True):
        assert difference(got, wanted) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none(base, trained, tmp_path, bad):
    tensors = trained(base.load())
    good = save(tensors, tmp_path / "good.safetensors")
    held = load_file(good)
    key = next(key for key in held if key.endswith("lora_up.weight"))
    held[key].view(-1)[3] = bad
    save_file(held, tmp_path / "bad.safetensors")
    told = f"bad.safetensors: {key} holds NaN or infinity"
    refused(AdapterError, told, base.folder, [tmp_path / "bad.safetensors"], tmp_path / "out")
    checkpoint = single(base, tmp_path / "checkpoint.safetensors")
    weights = load_file(checkpoint)
    weights["model.diffusion_model.middle_block.1.proj_in.weight"].view(-1)[0] = bad
    save_file(weights, checkpoint)
    refused(BaseModelError, "NaN or infinity", checkpoint, [good], tmp_path / "out.safetensors")


def test_a_strength_that_overflows_half_precision(base, adapter, tmp_path):
    half = in_dtype(single(base, tmp_path / "m.safetensors"), tmp_path / "half.safetensors", torch.float16)
    with pytest.raises(AdapterError, match="overflows"):
        merge.merge(half, [Merging(adapter, 1e6)], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_quantized_and_pickled_bases(base, adapter, tmp_path):
    checkpoint = single(base, tmp_path / "checkpoint.safetensors")
    weights = load_file(checkpoint)
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    for name, value in (("i8", weights[key].to(torch.int8)), ("f8", weights[key].to(torch.float8_e4m3fn))):
        save_file(weights | {key: value}, tmp_path / f"{name}.safetensors")
        refused(
            BaseModelError,
            "quantized",
            tmp_path / f"{name}.safetensors",
            [adapter],
            tmp_path / "o.safetensors",
        )
    for name in ("model.ckpt", "renamed.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04" + b"\xff" * 100)
        refused(BaseModelError, "pickled", tmp_path / name, [adapter], tmp_path / "o.safetensors")
    refused(BaseModelError, "no such", tmp_path / "absent", [adapter], tmp_path / "o")
    refused(BaseModelError, "is an adapter", adapter, [adapter], tmp_path / "o.safetensors")
    refused(BaseModelError, "model_index", base.folder / "unet", [adapter], tmp_path / "o")


def test_a_full_disk_is_seen_before(base, adapter, tmp_path, monkeypatch):
    from lorabooth.errors import TrainingError

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    refused(TrainingError, "are free", base.folder, [adapter], tmp_path / "out")


def test_inventories_of_a_folder_and_of_its_single_file_agree(base, tmp_path):
    folder, checkpoint = open_base(base.folder), open_base(single(base, tmp_path / "c.safetensors"))
    assert folder.family == checkpoint.family
    assert {k: v[0].shape for k, v in folder.slots.items()} == {
        k: v[0].shape for k, v in checkpoint.slots.items()
    }


def test_a_transformer_in_a_diffusers_folder(tmp_path, trained):
    """FLUX: of the same file its kohya form has q, k and v in one matrix, and merges to the same weights."""
    from diffusers import FluxTransformer2DModel

    from lorabooth.adapters.convert import convert_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4),
        )
    folder = tmp_path / "flux"
    transformer.save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    patterns = (r".*\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)", r".*\.(proj_mlp|proj_out)")
    tensors = trained({"denoiser": transformer}, patterns=patterns, text=False)
    plain = FluxTransformer2DModel.from_pretrained(folder / "transformer").state_dict()
    path = tmp_path / "a.safetensors"
    file.write(path, tensors, Metadata(family="flux"), layout="diffusers")
    convert_file(path, tmp_path / "kohya.safetensors", to="kohya")
    for adapter in (path, tmp_path / "kohya.safetensors"):
        report = merge.merge(folder, [Merging(adapter, 0.5)], tmp_path / adapter.stem)
        assert report.family == "flux"
        merged = FluxTransformer2DModel.from_pretrained(tmp_path / adapter.stem / "transformer").state_dict()
        changed = {key for key in plain if not torch.equal(plain[key], merged[key])}
        assert changed == {f"{m.removeprefix('denoiser.')}.weight" for m in open_adapter(path).modules}
        for module in open_adapter(path).modules:
            key = f"{module.removeprefix('denoiser.')}.weight"
            delta = tensors[f"{module}.lora_B"] @ tensors[f"{module}.lora_A"] * (0.5 * 6.0 / 4)
            torch.testing.assert_close(merged[key], plain[key] + delta, rtol=1e-5, atol=1e-6)


def test_dropout_is_of_training_alone(base, tmp_path):
    """An adapter trained with dropout merges to what it computes when it is not in training."""
    components = base.load()
    target = inject.Target("denoiser", (r".*attn[12]\.to_(q|k|v|out\.0)",), 4, 6.0, dropout=0.5)
    attached = inject.attach(components, [target], seed=0)
    with torch.no_grad():
        for weight in attached.up_weights():
            weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    for module in components.values():
        module.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        training = outputs(components)[0]
    for module in components.values():
        module.eval()
    evaluated = outputs(components)[0]
    assert difference(training, evaluated) > 1e-2
    path = save(inject.tensors(components), tmp_path / "a.safetensors")
    merge.merge(base.folder, [Merging(path)], tmp_path / "merged")
    assert difference(outputs(load(tmp_path / "merged"))[0], evaluated) < 1e-5
