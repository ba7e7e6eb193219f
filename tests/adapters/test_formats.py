"""Formats are bijections; nothing is dropped silently."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorabooth.adapters import formats, layouts, lora_config
from lorabooth.errors import AdapterError

number = st.integers(0, 12).map(str)
attention = st.tuples(
    st.sampled_from(["attn1", "attn2"]), st.sampled_from(["to_q", "to_k", "to_v", "to_out.0"])
).map(".".join)
transformer = st.tuples(
    st.just("transformer_blocks"),
    number,
    st.one_of(attention, st.sampled_from(["ff.net.0.proj", "ff.net.2"])),
).map(".".join)
in_attention = st.one_of(transformer, st.sampled_from(["proj_in", "proj_out"]))
resnet_leaf = st.sampled_from(["conv1", "conv2", "conv_shortcut", "time_emb_proj"])


def block(index: st.SearchStrategy[str], layer: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(index, st.just("attentions"), layer, in_attention),
        st.tuples(index, st.just("resnets"), layer, resnet_leaf),
    ).map(".".join)


TOPS = ["conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"]
sd_unet = st.one_of(
    st.sampled_from(TOPS),
    block(st.one_of(number.map("down_blocks.{}".format), number.map("up_blocks.{}".format)), number),
    block(st.just("mid_block"), number),
    number.map("down_blocks.{}.downsamplers.0.conv".format),
    number.map("up_blocks.{}.upsamplers.0.conv".format),
)
two, three = st.sampled_from("01"), st.sampled_from("012")
sdxl_unet = st.one_of(
    st.sampled_from(
        [*TOPS, "add_embedding.linear_1", "add_embedding.linear_2", "mid_block.attentions.0.proj_in"]
    ),
    block(three.map("down_blocks.{}".format), two),
    block(three.map("up_blocks.{}".format), three),
    st.tuples(st.just("mid_block.resnets"), two, resnet_leaf).map(".".join),
    two.map("down_blocks.{}.downsamplers.0.conv".format),
    two.map("up_blocks.{}.upsamplers.0.conv".format),
)
clip = st.tuples(
    st.just("text_model.encoder.layers"),
    number,
    st.sampled_from(
        [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.out_proj",
            "mlp.fc1",
            "mlp.fc2",
        ]
    ),
).map(".".join)


@st.composite
def adapters(draw: st.DrawFn, family: str, components: tuple[str, ...]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    modules: list[str] = []
    for component in components:
        paths = clip if component != "denoiser" else (sdxl_unet if family == "sdxl" else sd_unet)
        modules += [f"{component}.{p}" for p in draw(st.lists(paths, max_size=8, unique=True))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    for module in modules or [
        f"{components[0]}.{draw(clip if components[0] != 'denoiser' else st.just('conv_in'))}"
    ]:
        rank = draw(st.integers(1, 4))
        kernel = draw(st.sampled_from([(), (1, 1), (3, 3)]))
        ones = (1, 1) if kernel else ()
        dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
        out[f"{module}.lora_A"] = torch.randn(rank, 3, *kernel, generator=generator).to(dtype)
        out[f"{module}.lora_B"] = torch.randn(5, rank, *ones, generator=generator).to(dtype)
        alpha = draw(st.one_of(st.integers(1, 64).map(float), st.floats(0.0078125, 100, width=32)))
        out[f"{module}.alpha"] = torch.tensor(alpha)
    return out


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


FAMILIES = {
    "sd1": ("denoiser", "text_encoder"),
    "sd2": ("denoiser", "text_encoder"),
    "sdxl": ("denoiser", "text_encoder", "text_encoder_2"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_export_import_is_the_identity(layout, family, data):
    tensors = data.draw(adapters(family, FAMILIES[family]))
    foreign = formats.export(tensors, layout, family)
    assert layouts.detect(foreign) == layout
    header = json.loads(json.dumps(formats.export_header(tensors, layout)))
    back = formats.import_(foreign, layout, header)
    assert same(back.tensors, tensors)
    assert back.notes == ()


@pytest.mark.parametrize("component", ["denoiser", "text_encoder"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_peft_is_the_identity(component, data):
    tensors = data.draw(adapters("sd1", (component,)))
    foreign = formats.export(tensors, "peft", "sd1", component)
    assert layouts.detect(foreign) == "peft"
    config = json.dumps(lora_config.build(formats.ranks_and_alphas(tensors), component))
    assert same(formats.import_(foreign, "peft", {"adapter_config": config}, component).tensors, tensors)


def factors(rank: int = 2) -> tuple[Tensor, Tensor]:
    return torch.ones(rank, 3), torch.ones(5, rank)


@pytest.mark.parametrize(
    ("spelling", "module"),
    [
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.{}.weight", "attn1.to_q"),
        (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.{}.weight",
            "attn1.to_q",
        ),
        (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.{}.weight",
            "attn1.to_out.0",
        ),
        (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.lora.{}.weight",
            "attn1.to_out.0",
        ),
    ],
)
def test_older_diffusers_spellings(spelling, module):
    down, up = factors()
    foreign = {spelling.format("down"): down, spelling.format("up"): up}
    assert layouts.detect(foreign) == "diffusers"
    got = formats.import_(foreign, "diffusers")
    stem = f"denoiser.down_blocks.0.attentions.0.transformer_blocks.0.{module}"
    assert list(got.tensors) == [f"{stem}.lora_A", f"{stem}.lora_B", f"{stem}.alpha"]
    assert float(got.tensors[f"{stem}.alpha"]) == 2
    assert "alpha" in got.notes[0]


@pytest.mark.parametrize(
    "spelling",
    [
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj.lora_linear_layer.{}.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.{}.weight",
        "text_encoder.encoder.layers.0.self_attn.out_proj.lora.{}.weight",
    ],
)
def test_older_text_encoder_spellings(spelling):
    down, up = factors()
    got = formats.import_({spelling.format("down"): down, spelling.format("up"): up}, "diffusers").tensors
    assert "text_encoder.text_model.encoder.layers.0.self_attn.out_proj.lora_A" in got


def test_alpha_patterns_of_a_configuration():
    config = {
        "r": 4,
        "lora_alpha": 8,
        "alpha_pattern": {"attn1.to_q": 3, "^conv_in": 5, "layers.0.mlp.fc1": 1.5},
    }
    find = lora_config.alpha_of
    assert find(config, "denoiser", "down_blocks.0.attn1.to_q", 4) == 3
    assert find(config, "denoiser", "down_blocks.0.xattn1.to_q", 4) == 8
    assert find(config, "denoiser", "conv_in", 4) == 5
    assert find(config, "denoiser", "mid.conv_in", 4) == 8
    assert find(config, "text_encoder", "text_model.encoder.layers.0.mlp.fc1", 4) == 1.5
    assert find({**config, "use_rslora": True}, "denoiser", "x", 4) == 16
    assert find({}, "denoiser", "x", 4) is None
    for bad in (
        {"lora_alpha": "8"},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 10**400},
        {"lora_alpha": True},
        {"alpha_pattern": {".*to_q": 1}},
        {"alpha_pattern": [1]},
        {"use_dora": True},
    ):
        with pytest.raises(AdapterError):
            find({"lora_alpha": 1, **bad}, "denoiser", "x", 4)


def test_nothing_is_dropped_silently():
    down, up = factors()
    name = "lora_unet_mid_block_attentions_0_proj_in"
    good = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    got = formats.import_(good, "kohya")
    assert float(got.tensors["denoiser.mid_block.attentions.0.proj_in.alpha"]) == 2
    assert got.notes
    assert not formats.import_({**good, f"{name}.alpha": torch.tensor([1.0])}, "kohya").notes
    unknown = "lora_unet_mid_block_weird_part.lora_down.weight"
    with pytest.raises(AdapterError, match="weird_part"):
        formats.import_({**good, unknown: down}, "kohya")
    with pytest.raises(AdapterError, match="one of its two factors"):
        formats.import_({f"{name}.lora_down.weight": down}, "kohya")
    with pytest.raises(AdapterError, match="do not fit together"):
        formats.import_({**good, f"{name}.lora_up.weight": torch.ones(5, 3)}, "kohya")
    with pytest.raises(AdapterError, match="do not fit together"):
        formats.import_(
            {f"{name}.lora_down.weight": torch.ones(0, 3), f"{name}.lora_up.weight": torch.ones(5, 0)},
            "kohya",
        )
    with pytest.raises(AdapterError, match="one finite number"):
        formats.import_({**good, f"{name}.alpha": torch.tensor(float("nan"))}, "kohya")
    with pytest.raises(AdapterError, match="one finite number"):
        formats.import_({**good, f"{name}.alpha": torch.ones(2)}, "kohya")
    twice = {
        f"lora_unet_middle_block_1_proj_in.{s}.weight": t for s, t in (("lora_down", down), ("lora_up", up))
    }
    with pytest.raises(AdapterError, match="Two tensors"):
        formats.import_({**good, **twice}, "kohya")
    with pytest.raises(AdapterError, match="not JSON"):
        formats.import_({"unet.conv_in.lora_A.weight": down}, "diffusers", {lora_config.HEADER_KEY: "{"})
    whole = {"denoiser.conv_in.lora_A": down, "denoiser.conv_in.lora_B": up}
    with pytest.raises(AdapterError, match="no alpha"):
        formats.export(whole, "kohya", "sd1")
    with pytest.raises(AdapterError, match="known layout"):
        formats.export({**whole, "denoiser.conv_in.alpha": torch.tensor(1.0)}, "zip", "sd1")


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "LoHa"),
        ("lora_unet_mid_block_attentions_0_proj_in.lokr_w1", "LoKr"),
        ("unet.conv_in.lora_magnitude_vector", "DoRA"),
        ("model.diffusion_model.input_blocks.0.0.weight", "checkpoint"),
        ("emb_params", "inversion"),
        ("conv_in.weight", "No LoRA"),
    ],
)
def test_detect_says_what_it_is_instead(key, word):
    with pytest.raises(AdapterError, match=word):
        layouts.detect([key])
