"""Converting is a bijection, of tensors and of metadata; nothing is destroyed or left half written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorabooth.adapters import file, stash
from lorabooth.adapters.convert import ConvertReport, convert_file
from lorabooth.adapters.metadata import Metadata
from lorabooth.adapters.stored import open_adapter
from lorabooth.errors import AdapterError

BLOCK = "down_blocks_1_attentions_0_transformer_blocks_0"
KOHYA_ENTRIES = {
    "ss_base_model_version": "sd_v1",
    "ss_v2": "False",
    "ss_network_module": "networks.lora",
    "ss_network_dim": "4",
    "ss_network_alpha": "2.0",
    "ss_tag_frequency": '{"10_dög": {"a dög": 3}}',
    "sshs_model_hash": "abc",
    "modelspec.title": "dog",
}


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as opened:
        return dict(opened.metadata() or {})


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


def kohya_tensors(
    names: dict[str, tuple[int, int]],
    *,
    rank: int = 4,
    alpha: float | None = 2.0,
    dtype: torch.dtype = torch.float16,
    alpha_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    out: dict[str, Tensor] = {}
    for name, (rows, columns) in names.items():
        out[f"{name}.lora_down.weight"] = torch.randn(rank, columns, generator=generator).to(dtype)
        out[f"{name}.lora_up.weight"] = torch.randn(rows, rank, generator=generator).to(dtype)
        if alpha is not None:
            out[f"{name}.alpha"] = torch.tensor(alpha, dtype=alpha_dtype or dtype)
    return out


SD1 = {
    f"lora_unet_{BLOCK}_attn2_to_k": (320, 768),
    f"lora_unet_{BLOCK}_attn1_to_out_0": (320, 320),
    "lora_te_text_model_encoder_layers_0_self_attn_out_proj": (768, 768),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (64, 768),
}
SDXL = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (64, 2048),
    "lora_unet_input_blocks_4_1_proj_in": (64, 64),
    "lora_te1_text_model_encoder_layers_0_self_attn_out_proj": (64, 64),
    "lora_te2_text_model_encoder_layers_0_self_attn_out_proj": (80, 80),
}
FLUX = {
    "lora_unet_double_blocks_0_img_attn_qkv": (24, 8),
    "lora_unet_single_blocks_0_linear1": (56, 8),
    "lora_unet_final_layer_adaLN_modulation_1": (16, 8),
    "lora_te1_text_model_encoder_layers_0_self_attn_out_proj": (8, 8),
}
SD3 = {
    "lora_unet_joint_blocks_0_x_block_attn_qkv": (3 * 1536, 1536),
    "lora_te2_text_model_encoder_layers_0_self_attn_out_proj": (8, 8),
}


@pytest.fixture
def kohya(tmp_path: Path) -> Path:
    path = tmp_path / "dog.safetensors"
    save_file(kohya_tensors(SD1), path, KOHYA_ENTRIES)
    return path


@pytest.mark.parametrize("to", ["diffusers", "peft"])
@pytest.mark.parametrize(
    ("names", "options", "entries"),
    [
        (SD1, {}, KOHYA_ENTRIES),
        (SD1, {"dtype": torch.bfloat16}, {}),
        (SD1, {"dtype": torch.float32}, {"format": "pt", "ss_network_dim": "4"}),
        (SD1, {"alpha_dtype": torch.float32}, KOHYA_ENTRIES),
        (SD1, {"alpha": 4, "alpha_dtype": torch.int64}, {}),
        (SD1, {"alpha": None}, {}),
        (SD1, {"alpha": 0.1, "alpha_dtype": torch.float32}, {}),
        (SDXL, {}, {"ss_base_model_version": "sdxl_base_v1-0"}),
        (FLUX, {"alpha": 3.0}, {"ss_base_model_version": "flux1"}),
        (SD3, {"rank": 6, "alpha": 1.0}, {"modelspec.architecture": "stable-diffusion-3-m/lora"}),
    ],
)
def test_from_kohya_and_back(tmp_path, to, names, options, entries):
    source = tmp_path / "dog.safetensors"
    tensors = kohya_tensors(names, **options)
    save_file(tensors, source, entries)
    there, back = tmp_path / "there", tmp_path / "back"
    convert_file(source, there, to=to)
    assert open_adapter(there).layout == to
    assert {k: v for k, v in open_adapter(there).entries.items() if k in entries} == entries
    report = convert_file(there, back, to="kohya")
    assert report.files == (back / "there.safetensors",)
    assert same(load_file(report.files[0]), tensors)
    assert header(report.files[0]) == entries
    # by way of the third layout, too
    other = "peft" if to == "diffusers" else "diffusers"
    convert_file(there, tmp_path / "other", to=other)
    convert_file(tmp_path / "other", tmp_path / "again.safetensors", to="kohya")
    assert (tmp_path / "again.safetensors").read_bytes() == report.files[0].read_bytes()
    convert_file(tmp_path / "other", tmp_path / "there2", to=to)
    assert same(open_adapter(tmp_path / "there2").tensors(), open_adapter(there).tensors())
    assert open_adapter(tmp_path / "there2").entries == open_adapter(there).entries


def test_a_lone_attention_layer_returns_to_the_names_that_it_had(tmp_path):
    """Nothing in it tells SD1 from SDXL but its names."""
    for name in (
        f"lora_unet_{BLOCK}_attn1_to_q",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    ):
        tensors = kohya_tensors({name: (8, 8)})
        save_file(tensors, tmp_path / "a.safetensors")
        convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers", overwrite=True)
        convert_file(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya", overwrite=True)
        assert same(load_file(tmp_path / "c.safetensors"), tensors)


DEEP = "down_blocks.1.attentions.0.transformer_blocks.0"


def diffusers_file(path: Path, **config) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, columns in (
        (f"unet.{DEEP}.attn2.to_k", 768),
        ("unet.conv_in", 4),
        ("text_encoder.text_model.encoder.layers.0.self_attn.out_proj", 768),
    ):
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(8, 4, generator=generator)
    entries = {"format": "pt"}
    if config:
        packed = {
            f"{prefix}.{key}": value for prefix in ("unet", "text_encoder") for key, value in config.items()
        }
        entries["lora_adapter_metadata"] = json.dumps(packed, indent=2, sort_keys=True)
    save_file(tensors, path, entries)
    return tensors


@pytest.mark.parametrize("to", ["kohya", "peft"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"r": 4, "lora_alpha": 4, "target_modules": ["to_k"]},
        {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "init_lora_weights": "gaussian", "peft_type": "LORA"},
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
        {"r": 8, "lora_alpha": 8, "alpha_pattern": {"conv_in": 3}, "rank_pattern": {"to_k": 4, "conv_in": 4}},
    ],
)
def test_from_diffusers_and_back(tmp_path, to, config):
    config = (
        config
        if "rank_pattern" not in config
        else config | {"rank_pattern": {"to_k": 4, "conv_in": 4, "out_proj": 4}}
    )
    source = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = diffusers_file(source, **config)
    convert_file(source, tmp_path / "there", to=to)
    convert_file(tmp_path / "there", tmp_path / "back", to="diffusers")
    back = tmp_path / "back" / "pytorch_lora_weights.safetensors"
    assert same(load_file(back), tensors)
    assert header(back) == header(source)
    expected = {name: module.alpha for name, module in open_adapter(source).modules.items()}
    there = open_adapter(tmp_path / "there")
    assert {n: torch.tensor(m.alpha) for n, m in there.modules.items()} == {
        n: torch.tensor(a) for n, a in expected.items()
    }
    if config.get("use_rslora"):
        assert expected["denoiser.conv_in"] == 16.0  # 8 * sqrt(4)


def peft_folder(folder: Path, config: dict, names: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    folder.mkdir(parents=True)
    tensors = {}
    for name, (rows, columns) in names.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, columns)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 4)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    return tensors


PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "lora_dropout": 0.2, "target_modules": ["to_k", "fc1"]}


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
@pytest.mark.parametrize("components", [("unet",), ("text_encoder_2",), ("unet", "text_encoder")])
def test_from_peft_and_back(tmp_path, to, components):
    names = {
        "unet": {f"{DEEP}.attn2.to_k": (8, 2048)},
        "text_encoder": {"encoder.layers.0.mlp.fc1": (8, 8)},
        "text_encoder_2": {"text_model.encoder.layers.0.mlp.fc1": (8, 8)},
    }
    given = {
        name: peft_folder(
            tmp_path / "in" / name, PEFT | {"base_model_name_or_path": "/home/me/sdxl"}, names[name]
        )
        for name in components
    }
    there = tmp_path / "there.safetensors"
    report = convert_file(tmp_path / "in", there, to=to)
    assert report.family == "sdxl"
    assert "/home" not in there.read_bytes()[:100_000].decode("latin-1")
    convert_file(there, tmp_path / "back", to="peft")
    for name in components:
        found = tmp_path / "back" / name if len(components) > 1 else tmp_path / "back"
        assert same(load_file(found / "adapter_model.safetensors"), given[name])
        config = json.loads((found / "adapter_config.json").read_text())
        assert config == PEFT | {"base_model_name_or_path": None}
        told = {"lorabooth.component": "text_encoder_2"} if name == "text_encoder_2" else {}
        assert header(found / "adapter_model.safetensors") == {"format": "pt"} | told
    assert set(open_adapter(tmp_path / "back").components) == set(open_adapter(there).components)


def test_peft_in_one_file(tmp_path, kohya):
    single = tmp_path / "unet.safetensors"
    only_unet = {k: v for k, v in load_file(kohya).items() if "lora_te" not in k}
    save_file(only_unet, tmp_path / "u.safetensors", KOHYA_ENTRIES)
    convert_file(tmp_path / "u.safetensors", single, to="peft")
    assert json.loads(header(single)["adapter_config"])["lora_alpha"] == 2
    opened = open_adapter(single)
    assert opened.notes == ()
    assert {module.alpha for module in opened.modules.values()} == {2.0}
    convert_file(single, tmp_path / "back.safetensors", to="kohya")
    assert same(load_file(tmp_path / "back.safetensors"), only_unet)
    assert header(tmp_path / "back.safetensors") == KOHYA_ENTRIES
    refused("Give a folder", kohya, tmp_path / "both.safetensors", to="peft")


def test_a_peft_folders_weights_are_read_with_the_configuration_beside_them(tmp_path):
    peft_folder(tmp_path / "in", PEFT, {f"{DEEP}.attn2.to_k": (8, 768)})
    adapter = open_adapter(tmp_path / "in" / "adapter_model.safetensors")
    assert [module.alpha for module in adapter.modules.values()] == [6.0]


def test_lorabooths_own_file_and_back(tmp_path):
    module = f"denoiser.{DEEP}.attn2.to_k"
    tensors = {
        f"{module}.lora_A": torch.randn(4, 768),
        f"{module}.lora_B": torch.randn(8, 4),
        f"{module}.alpha": torch.tensor(4.0),
    }
    metadata = Metadata(
        family="sd1", base_id="pocket", rank=4, alpha=4.0, trigger_words=("qzx dog",), steps=7
    )
    source = tmp_path / "adapter.safetensors"
    file.write(source, tensors, metadata, dtype=torch.float16)  # alphas stay float32
    convert_file(source, tmp_path / "d", to="diffusers")
    assert open_adapter(tmp_path / "d").metadata == metadata
    convert_file(tmp_path / "d", tmp_path / "k.safetensors", to="kohya")
    assert (tmp_path / "k.safetensors").read_bytes() == source.read_bytes()


def test_nothing_is_invented_for_a_foreign_file(tmp_path):
    diffusers_file(tmp_path / "a.safetensors")
    convert_file(tmp_path / "a.safetensors", tmp_path / "k.safetensors", to="kohya")
    assert set(header(tmp_path / "k.safetensors")) == {"format", stash.KEY}


def test_dtype_and_level_alphas(tmp_path, kohya):
    tensors = load_file(kohya)
    tensors[f"lora_unet_{BLOCK}_attn2_to_k.alpha"] = torch.tensor(8.0, dtype=torch.float16)
    save_file(tensors, kohya, KOHYA_ENTRIES)
    report = convert_file(kohya, tmp_path / "same.safetensors", to="kohya")
    assert same(load_file(tmp_path / "same.safetensors"), tensors)  # literal
    assert len(report.warnings) == 1
    assert "--level-alphas" in report.warnings[0]
    assert "1 modules of denoiser" in report.warnings[0]
    report = convert_file(
        kohya, tmp_path / "level.safetensors", to="kohya", level_alphas=True, dtype=torch.float32
    )
    assert report.warnings == ()
    level = load_file(tmp_path / "level.safetensors")
    assert {value.dtype for value in level.values()} == {torch.float32}
    for name in SD1:
        old, new = (
            t[f"{name}.lora_up.weight"].float()
            @ t[f"{name}.lora_down.weight"].float()
            * float(t[f"{name}.alpha"])
            for t in (tensors, level)
        )
        torch.testing.assert_close(new, old)
    assert len({float(v) for k, v in level.items() if k.endswith("alpha") and "unet" in k}) == 1
    # the hash of other tensors
    assert "sshs_model_hash" not in header(tmp_path / "level.safetensors")


def test_text_attention_that_diffusers_does_not_read_in_kohyas_layout(tmp_path):
    """diffusers 0.42 tells its old names by "to_out_lora" alone, which `out_proj` becomes."""
    names = {f"lora_te_text_model_encoder_layers_0_self_attn_{x}_proj": (8, 8) for x in "qkv"}
    save_file(kohya_tensors(names), tmp_path / "a.safetensors", {"ss_base_model_version": "sd_v1"})
    report = convert_file(tmp_path / "a.safetensors", tmp_path / "k.safetensors", to="kohya")
    assert "out_proj" in report.warnings[0]
    assert convert_file(tmp_path / "a.safetensors", tmp_path / "d", to="diffusers").warnings == ()


def test_too_large_for_fp16(tmp_path, kohya):
    tensors = kohya_tensors(SD1, dtype=torch.float32)
    tensors[f"lora_unet_{BLOCK}_attn2_to_k.lora_up.weight"][0, 0] = 1e6
    save_file(tensors, kohya)
    refused("too large for", kohya, tmp_path / "b.safetensors", to="kohya", dtype=torch.float16)


def refused(match: str, source: Path, out: Path, error: type[Exception] = AdapterError, **options) -> None:
    """The error, and not a byte on the disk is another one."""
    root = source.parent
    before = {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}
    with pytest.raises(error, match=match):
        convert_file(source, out, **options)
    assert {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")} == before


def test_what_is_refused(tmp_path, kohya):
    out = tmp_path / "out.safetensors"
    refused("is the input", kohya, kohya, to="diffusers", overwrite=True)
    refused("is the input", kohya, tmp_path, to="diffusers", overwrite=True)
    link = tmp_path / "link.safetensors"
    link.symlink_to(kohya)
    refused("is the input", kohya, link, to="diffusers", overwrite=True)
    os.link(kohya, tmp_path / "hard.safetensors")
    refused("is the input", kohya, tmp_path / "hard.safetensors", to="diffusers", overwrite=True)
    refused("known layout", kohya, out, to="comfyui")
    out.write_text("precious")
    refused("exists already; --overwrite", kohya, out, to="diffusers")
    (tmp_path / "folder.safetensors").mkdir()
    refused("is a folder", kohya, tmp_path / "folder.safetensors", to="diffusers", overwrite=True)
    (tmp_path / "file").write_text("precious")
    refused("is a file", kohya, tmp_path / "file", to="diffusers", overwrite=True)
    out.unlink()
    good = load_file(kohya)
    name = f"lora_unet_{BLOCK}_attn2_to_k"
    for match, change in (
        ("NaN", {f"{name}.lora_up.weight": torch.full((320, 4), torch.nan)}),
        ("one of its two factors", {f"{name}.lora_up.weight": None}),
        ("weird", {"lora_unet_weird.lora_up.weight": torch.ones(2, 2)}),
        ("DoRA", {f"{name}.dora_scale": torch.ones(320, 1)}),
    ):
        broken = tmp_path / "broken.safetensors"
        save_file({k: v for k, v in (good | change).items() if v is not None}, broken)
        refused(match, broken, out, to="diffusers")
    lonely = {k: v for k, v in good.items() if "attn1" in k}
    save_file({k.replace("lora_unet_", "lycoris_"): v for k, v in lonely.items()}, tmp_path / "l.safetensors")
    report = convert_file(tmp_path / "l.safetensors", out, to="kohya")
    assert isinstance(report, ConvertReport)  # attention alone: SD1's and SD2's names, which are the same
    assert same(load_file(out), lonely)
    out.unlink()
    strange = {"transformer.blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 8)}
    strange["transformer.blocks.0.attn.to_q.lora_B.weight"] = torch.ones(8, 2)
    save_file(strange, tmp_path / "strange.safetensors")
    refused("--family", tmp_path / "strange.safetensors", out, to="kohya")


def test_a_folder_is_replaced_only_if_it_holds_nothing_but_an_adapter(tmp_path, kohya):
    out = tmp_path / "out"
    convert_file(kohya, out, to="peft")
    assert {p.relative_to(out).as_posix() for p in out.rglob("*.*")} == {
        f"{c}/{f}"
        for c in ("unet", "text_encoder")
        for f in ("adapter_config.json", "adapter_model.safetensors")
    }
    refused("exists already; --overwrite", kohya, out, to="kohya")
    convert_file(kohya, out, to="diffusers", overwrite=True)
    assert [p.name for p in out.iterdir()] == ["pytorch_lora_weights.safetensors"]
    convert_file(kohya, out, to="kohya", overwrite=True)
    assert [p.name for p in out.iterdir()] == ["dog.safetensors"]
    for precious in ("notes.txt", "unet/notes.txt", "other.safetensors", "photos/1.jpg"):
        (out / precious).parent.mkdir(exist_ok=True)
        (out / precious).write_text("precious")
        refused("more than an adapter", kohya, out, to="kohya", overwrite=True)
        (out / precious).unlink()
        if "/" in precious:
            (out / precious).parent.rmdir()
    (tmp_path / "empty").mkdir()
    convert_file(kohya, tmp_path / "empty", to="kohya")


def test_a_full_disk_leaves_what_was_there(tmp_path, kohya, monkeypatch):
    from lorabooth import durable
    from lorabooth.errors import TrainingError

    out = tmp_path / "out"
    convert_file(kohya, out, to="peft")
    real = durable.write

    def fails(path: Path, *chunks: bytes) -> None:
        if path.name == "adapter_config.json":
            raise OSError(28, "No space left on device")
        real(path, *chunks)

    monkeypatch.setattr(durable, "write", fails)
    refused("No space", kohya, out, TrainingError, to="peft", overwrite=True)
    monkeypatch.setattr(durable, "write", real)
    monkeypatch.setattr(durable.shutil, "disk_usage", lambda _: type("U", (), {"free": 1000})())
    refused("free", kohya, out, TrainingError, to="peft", overwrite=True)


def test_a_malformed_record_is_ignored(tmp_path, kohya):
    for text in ("{", "[1]", '[{"layout": 3}]', '[{"layout": "kohya", "strange": 1}]', '"x"', "null", "5"):
        assert stash.records_in({stash.KEY: text}) == ()
    convert_file(kohya, tmp_path / "d.safetensors", to="diffusers")
    tensors, entries = load_file(tmp_path / "d.safetensors"), header(tmp_path / "d.safetensors")
    save_file(tensors, tmp_path / "e.safetensors", entries | {stash.KEY: "{"})
    convert_file(tmp_path / "e.safetensors", tmp_path / "k.safetensors", to="kohya")
    assert same(load_file(tmp_path / "k.safetensors"), load_file(kohya))


def test_a_record_that_is_no_longer_true_is_not_restored(tmp_path):
    """Another tool changed alphas in between."""
    source = tmp_path / "a.safetensors"
    diffusers_file(source, r=4, lora_alpha=8, lora_dropout=0.1)
    convert_file(source, tmp_path / "k.safetensors", to="kohya")
    tensors = load_file(tmp_path / "k.safetensors")
    tensors["lora_unet_conv_in.alpha"] = torch.tensor(5.0)
    save_file(tensors, tmp_path / "k.safetensors", header(tmp_path / "k.safetensors"))
    convert_file(tmp_path / "k.safetensors", tmp_path / "b.safetensors", to="diffusers")
    opened = open_adapter(tmp_path / "b.safetensors")
    assert opened.modules["denoiser.conv_in"].alpha == 5.0
    assert opened.modules[f"denoiser.{DEEP}.attn2.to_k"].alpha == 8.0
    assert json.loads(header(tmp_path / "b.safetensors")["lora_adapter_metadata"])["unet.lora_dropout"] == 0.1
