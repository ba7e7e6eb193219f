"""SDXL and FLUX beside diffusers: it reads our kohya file, we read its own, its converter agrees."""

from __future__ import annotations

import copy
import logging
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorabooth.adapters import file, formats, inject
from lorabooth.adapters.inject import Target
from lorabooth.adapters.metadata import Metadata
from lorabooth.adapters.stored import open_adapter
from tests.adapters.conftest import CONVOLUTIONS, EMBEDDING, TEXT, difference
from tests.tiny_sdxl import TIME_DIM, WIDTHS, make_sdxl_folder

META = Metadata(family="sdxl", base_id="tiny")
CLOSE = 1e-5
UNET = (
    r".*\.attn[12]\.to_(q|k|v|out\.0)|.*\.ff\.net\.(0\.proj|2)",
    CONVOLUTIONS,
    EMBEDDING,
    r"add_embedding\.linear_[12]",
)
NAMES = {"denoiser": "unet", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sdxl_folder(tmp_path_factory.mktemp("sdxl") / "tiny-sdxl")


@cache
def _loaded(folder: Path):
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    return pipe


def pipeline(folder: Path):
    shared = _loaded(folder)
    fresh = {name: copy.deepcopy(getattr(shared, name)) for name in NAMES.values()}
    return type(shared)(**shared.components | fresh, add_watermarker=False)


def parts(pipe) -> dict[str, nn.Module]:
    return {component: getattr(pipe, name) for component, name in NAMES.items()}


def outputs(components: dict[str, nn.Module]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    cond = torch.randn(2, 7, sum(WIDTHS), generator=generator)
    added = {
        "text_embeds": torch.randn(2, WIDTHS[1], generator=generator),
        "time_ids": torch.full((2, 6), float(TIME_DIM)),
    }
    ids = torch.randint(0, 400, (2, 77), generator=generator)
    with torch.no_grad():
        noise = components["denoiser"](x, torch.tensor([10, 700]), cond, added_cond_kwargs=added).sample
        states = [
            components[name](ids, output_hidden_states=True).hidden_states[-2]
            for name in ("text_encoder", "text_encoder_2")
        ]
    return [noise, *states]


def trained(components: dict[str, nn.Module]) -> dict[str, Tensor]:
    targets = [Target("denoiser", UNET, 3, 5.0)]
    targets += [Target(name, (TEXT,), 2, 3.0) for name in ("text_encoder", "text_encoder_2")]
    attached = inject.attach(components, targets, seed=0)
    fill_up(attached.up_weights())
    return inject.tensors(components)


def fill_up(weights) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in weights:
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))


def assert_close(got: list[Tensor], expected: list[Tensor]) -> None:
    assert [difference(a, b) < CLOSE for a, b in zip(got, expected, strict=True)] == [True] * 3


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_our_file_in_diffusers(folder, tmp_path, layout, caplog):
    pipe = pipeline(folder)
    plain = outputs(parts(pipe))
    tensors = trained(parts(pipe))
    expected = outputs(parts(pipe))
    assert all(difference(a, b) > 1e-3 for a, b in zip(expected, plain, strict=True))
    file.write(tmp_path / "a.safetensors", tensors, META, layout)
    reader = pipeline(folder)
    logging.getLogger("diffusers").propagate = True
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        reader.load_lora_weights(str(tmp_path / "a.safetensors"))
    told = [str(w.message) for w in caught] + caplog.messages
    assert not [t for t in told if "key" in t.lower() or "target" in t.lower()], told
    assert_close(outputs(parts(reader)), expected)


@pytest.mark.parametrize("prefixed", [False, True])
def test_file_that_diffusers_saves(folder, tmp_path, prefixed):
    """As train_dreambooth_lora_sdxl.py does."""
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = pipeline(folder)
    unet = LoraConfig(r=4, lora_alpha=10, target_modules=["to_k", "to_q", "to_v", "to_out.0", "proj_in"])
    text = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
    states, metadata = {}, {}
    for name, config in (("unet", unet), ("text_encoder", text), ("text_encoder_2", text)):
        model = getattr(pipe, name)
        model.add_adapter(config)
        fill_up(weight for key, weight in model.named_parameters() if "lora_B" in key)
        state = get_peft_model_state_dict(model)
        states[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(state) if prefixed else state
        metadata[f"{name}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    expected = outputs(parts(pipe))
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, **states, **metadata)
    got = open_adapter(tmp_path)
    assert got.notes == ()
    assert set(got.components) == {"denoiser", "text_encoder", "text_encoder_2"}
    assert {(m.rank, m.alpha) for m in got.modules.values()} == {(4, 10.0), (2, 3.0)}
    fresh = pipeline(folder)
    inject.attach_tensors(parts(fresh), got.tensors())
    assert_close(outputs(parts(fresh)), expected)


@pytest.mark.parametrize("dense", [True, False])
def test_diffusers_converter_of_kohya_flux_gives_the_same_changes(dense):
    """diffusers' own tables for kohya's FLUX, in real widths (it knows no others)."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    generator = torch.Generator().manual_seed(0)
    layers = {
        "double_blocks_3_img_attn_qkv": (3072, (3072,) * 3),
        "double_blocks_3_txt_attn_qkv": (3072, (3072,) * 3),
        "double_blocks_3_img_attn_proj": (3072, (3072,)),
        "double_blocks_3_txt_mod_lin": (3072, (18432,)),
        "double_blocks_3_img_mlp_2": (12288, (3072,)),
        "single_blocks_9_linear1": (3072, (3072, 3072, 3072, 12288)),
        "single_blocks_9_linear2": (15360, (3072,)),
        "single_blocks_9_modulation_lin": (3072, (9216,)),
        "final_layer_linear": (3072, (64,)),
        "final_layer_adaLN_modulation_1": (3072, (6144,)),
    }
    foreign: dict[str, Tensor] = {}
    for name, (width, rows) in layers.items():
        rank = 12 if len(rows) > 1 else 2
        up = torch.randn(sum(rows), rank, generator=generator)
        if not dense and len(rows) > 1:
            up *= torch.block_diag(*[torch.ones(n, rank // len(rows)) for n in rows])
            up += 0.0
        foreign[f"lora_unet_{name}.lora_down.weight"] = torch.randn(rank, width, generator=generator)
        foreign[f"lora_unet_{name}.lora_up.weight"] = up
        # diffusers leaves the alphas of these aside ("TODO: alphas").
        foreign[f"lora_unet_{name}.alpha"] = torch.tensor(float(rank) / (1 if "final" in name else 2))
    ours = formats.import_(foreign, "kohya").tensors
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(foreign))
    theirs = {key.removeprefix("transformer."): value for key, value in theirs.items()}
    modules = sorted(key.removesuffix(".lora_A").removeprefix("denoiser.") for key in ours if "lora_A" in key)
    assert sorted(key.removesuffix(".lora_A.weight") for key in theirs if "lora_A" in key) == modules
    rows_of_a_few = slice(None, None, 97)
    for module in modules:
        down, up, alpha = (ours[f"denoiser.{module}.{kind}"] for kind in ("lora_A", "lora_B", "alpha"))
        mine = (up[rows_of_a_few] @ down) * (float(alpha) / down.shape[0])
        theirs_up = theirs[f"{module}.lora_B.weight"][rows_of_a_few]
        assert theirs_up.shape == up[rows_of_a_few].shape
        assert difference(mine, theirs_up @ theirs[f"{module}.lora_A.weight"]) < CLOSE
        if not dense and "to_q" in module:
            assert down.shape[0] == (3 if "single" in module else 4)
