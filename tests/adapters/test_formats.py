"""Formats are bijections; nothing is dropped silently."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorabooth.adapters import formats, layouts, lora_config
from lorabooth.adapters.transformer_names import to_original
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
@pytest.mark.parametrize("family", ["sd1", "flux"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_peft_is_the_identity(component, family, data):
    transformer = family == "flux" and component == "denoiser"
    tensors = data.draw(transformers(family) if transformer else adapters("sd1", (component,)))
    foreign = formats.export(tensors, "peft", family, component)
    assert layouts.detect(foreign) == "peft"
    config = json.dumps(lora_config.build(formats.ranks_and_alphas(tensors), component))
    assert same(formats.import_(foreign, "peft", {"adapter_config": config}, component).tensors, tensors)


# ---- FLUX and SD3: hidden width 4, MLP 16 ----

WIDE = {"proj_mlp": 16, "norm_out.linear": 8}
T5 = [f"encoder.block.0.layer.0.SelfAttention.{x}" for x in "qkvo"] + [
    "encoder.block.11.layer.1.DenseReluDense.wi_0",
    "encoder.block.11.layer.1.DenseReluDense.wo",
]
STREAMS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]
BLOCK = [*STREAMS, "attn.to_out.0", "attn.to_add_out", "ff.net.0.proj", "ff_context.net.2", "norm1.linear"]
EMBEDDERS = ["time_text_embed.timestep_embedder.linear_1", "time_text_embed.text_embedder.linear_2"]
PATHS = {
    "flux": [
        *(f"transformer_blocks.{i}.{leaf}" for i in (0, 18) for leaf in [*BLOCK, "norm1_context.linear"]),
        *(
            f"single_transformer_blocks.{i}.{leaf}"
            for i in (0, 37)
            for leaf in [*STREAMS[:3], "proj_mlp", "proj_out", "norm.linear"]
        ),
        *EMBEDDERS,
        *("time_text_embed.guidance_embedder.linear_1", "x_embedder", "context_embedder"),
        *("norm_out.linear", "proj_out"),
    ],
    "sd3": [
        *(
            f"transformer_blocks.{i}.{leaf}"
            for i in (0, 23)
            for leaf in [*BLOCK, "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
        ),
        *("transformer_blocks.0.norm1_context.linear", "transformer_blocks.23.norm1_context.linear"),
        *EMBEDDERS,
        *("context_embedder", "norm_out.linear", "proj_out"),
    ],
}


@st.composite
def transformers(draw: st.DrawFn, family: str) -> dict[str, Tensor]:
    """Modules of a tiny transformer; those of one layer shared, stacked, of several ranks, or in part."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    out: dict[str, Tensor] = {}
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    chosen = draw(st.lists(st.sampled_from(PATHS[family]), min_size=1, max_size=12, unique=True))
    how = draw(st.sampled_from(["shared", "stacked", "several ranks"]))
    if how == "shared":  # whole layers
        wanted = {original.path for path in chosen if (original := to_original(path, family))}
        chosen = [p for p in PATHS[family] if (o := to_original(p, family)) and o.path in wanted]
    rank = draw(st.integers(1, 6))
    alpha = draw(st.one_of(st.integers(1, 64).map(float), st.floats(0.0078125, 100, width=32)))
    zero = draw(st.booleans())
    down = torch.randn(rank, 4, generator=generator).to(dtype)
    for path in chosen:
        own = draw(st.integers(1, 4)) if how == "several ranks" else rank
        last_context = family == "sd3" and path == "transformer_blocks.23.norm1_context.linear"
        leaf = path.split(".", 2)[-1] if "_blocks" in path else path
        wide = 8 if last_context else WIDE.get(leaf, 24 if "norm1" in leaf else 4)
        module = f"denoiser.{path}"
        out[f"{module}.lora_A"] = (
            down if how == "shared" else torch.randn(own, 4, generator=generator).to(dtype)
        )
        up = torch.randn(wide, own, generator=generator).to(dtype)
        out[f"{module}.lora_B"] = up * 0 + 0 if zero else up
        out[f"{module}.alpha"] = torch.tensor(float(own) / 2 if how == "several ranks" else alpha)
    return out


@pytest.mark.parametrize("family", ["flux", "sd3"])
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_transformers_export_import_is_the_identity(layout, family, data):
    tensors = data.draw(transformers(family))
    texts = ("text_encoder", "text_encoder_2", "text_encoder_3")[: 2 if family == "flux" else 3]
    for component in data.draw(st.lists(st.sampled_from(texts), unique=True)):
        t5 = component == texts[-1]
        path = data.draw(st.sampled_from(T5) if t5 else clip)
        tensors |= {
            f"{component}.{path}.lora_A": torch.randn(2, 3),
            f"{component}.{path}.lora_B": torch.randn(5, 2),
            f"{component}.{path}.alpha": torch.tensor(1.5),
        }
    foreign = formats.export(tensors, layout, family)
    assert layouts.detect(foreign) == layout
    header = {"lorabooth.family": family, **formats.export_header(tensors, layout, family)}
    back = formats.import_(foreign, layout, json.loads(json.dumps(header)))
    assert same(back.tensors, tensors)
    assert back.notes == ()


@pytest.mark.parametrize("family", ["flux", "sd3"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_original_layers_import_export_is_the_identity(family, data):
    """A file as kohya's trainer writes it: whole layers, dense or block-diagonal."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    layers = {
        "flux": [("double_blocks_3_img_attn_qkv", 3), ("single_blocks_7_linear1", 7)],
        "sd3": [("joint_blocks_3_context_block_attn_qkv", 3), ("joint_blocks_4_x_block_attn2_qkv", 3)],
    }[family]
    layers += [("final_layer_adaLN_modulation_1", 2), ("joint_blocks_1_x_block_mlp_fc1", 4)][
        : 1 if family == "flux" else 2
    ]
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    foreign: dict[str, Tensor] = {}
    for name, times in layers:
        rank = data.draw(st.integers(1, 8))
        up = torch.randn(4 * times, rank, generator=generator)
        parts = {3: (4, 4, 4), 7: (4, 4, 4, 16)}.get(times, (4 * times,))
        if data.draw(st.booleans()) and rank % len(parts) == 0:
            up *= torch.block_diag(*[torch.ones(rows, rank // len(parts)) for rows in parts])
            up += 0.0  # no negative zeros: they would be something
        foreign[f"lora_unet_{name}.lora_down.weight"] = torch.randn(rank, 4, generator=generator).to(dtype)
        foreign[f"lora_unet_{name}.lora_up.weight"] = up.to(dtype)
        # A third of it must be told apart from the next number's: alphas of up to 22 significant bits.
        foreign[f"lora_unet_{name}.alpha"] = torch.tensor(data.draw(st.integers(1, 2**20)) / 1024)
    read = formats.import_(foreign, "kohya").tensors
    assert same(formats.export(read, "kohya", family), foreign)


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
        ("conv_in.weight", "checkpoint"),
        ("step", "No LoRA"),
    ],
)
def test_detect_says_what_it_is_instead(key, word):
    with pytest.raises(AdapterError, match=word):
        layouts.detect([key])


# ---- layers that hold several modules ----

QKV = [f"denoiser.transformer_blocks.0.attn.to_{x}" for x in "qkv"]


def apart(ranks: tuple[int, ...], alphas: tuple[float, ...], dtype=torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    out: dict[str, Tensor] = {}
    for module, rank, alpha in zip(QKV, ranks, alphas, strict=True):
        out[f"{module}.lora_A"] = torch.randn(rank, 4, generator=generator).to(dtype)
        out[f"{module}.lora_B"] = torch.randn(4, rank, generator=generator).to(dtype)
        out[f"{module}.alpha"] = torch.tensor(alpha)
    return out


def changes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        module: tensors[f"{module}.lora_B"].double()
        @ tensors[f"{module}.lora_A"].double()
        * (float(tensors[f"{module}.alpha"]) / tensors[f"{module}.lora_A"].shape[0])
        for module in QKV
    }


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 2, 4)])
def test_kohyas_rule_on_a_stacked_layer_gives_each_modules_change(ranks):
    """`alpha / dim * up @ down` of the whole layer is, row by row, what its modules' adapters were."""
    tensors = apart(ranks, tuple(rank / 2 for rank in ranks))
    foreign = formats.export(tensors, "kohya", "flux")
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    down, up, alpha = (foreign[f"{name}.{x}"] for x in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert down.shape == (sum(ranks), 4)
    assert float(alpha) == sum(ranks) / 2
    whole = up.double() @ down.double() * (float(alpha) / down.shape[0])
    for i, change in enumerate(changes(tensors).values()):
        torch.testing.assert_close(whole[4 * i : 4 * i + 4], change)
    # read without the header's word on ranks, the change is still exact
    read = formats.import_(foreign, "kohya").tensors
    for module, change in changes(tensors).items():
        torch.testing.assert_close(changes(read)[module], change)


def test_layers_that_cannot_be_one_and_what_levelling_makes_of_them():
    uneven = apart((2, 4, 3), (2.0, 2.0, 5.0))
    with pytest.raises(AdapterError, match="different scales"):
        formats.export(uneven, "kohya", "flux")
    level = formats.level_alphas(uneven)
    for module, change in changes(uneven).items():
        torch.testing.assert_close(changes(level)[module], change)
        assert level[f"{module}.lora_A"].shape[0] == 4
    foreign = formats.export(level, "kohya", "flux")
    assert same(formats.import_(foreign, "kohya").tensors, level)
    mixed = apart((2, 2, 2), (1.0, 1.0, 1.0))
    mixed[f"{QKV[1]}.lora_A"] = mixed[f"{QKV[1]}.lora_A"].half()
    with pytest.raises(AdapterError, match="different dtypes"):
        formats.export(mixed, "kohya", "flux")
    narrow = apart((2, 2, 2), (1.0, 1.0, 1.0))
    narrow[f"{QKV[1]}.lora_B"] = narrow[f"{QKV[1]}.lora_B"][:3]
    with pytest.raises(AdapterError, match="must have 4, 4, 4 rows"):
        formats.export(narrow, "kohya", "flux")
    with pytest.raises(AdapterError, match="not a module of flux"):
        formats.export(apart((1, 1, 1), (1.0, 1.0, 1.0)) | whole_module("denoiser.conv_in"), "kohya", "flux")


def whole_module(module: str) -> dict[str, Tensor]:
    down, up = factors()
    return {f"{module}.lora_A": down, f"{module}.lora_B": up, f"{module}.alpha": torch.tensor(1.0)}


def test_a_record_of_ranks_that_is_wrong_is_not_believed():
    tensors = apart((1, 2, 3), (1.0, 2.0, 3.0))
    foreign = formats.export(tensors, "kohya", "flux")
    assert same(
        formats.import_(foreign, "kohya", formats.export_header(tensors, "kohya", "flux")).tensors, tensors
    )
    for text in (
        "{",
        "[]",
        '{"transformer_blocks.0.attn.to_q": [2, 2, 2]}',
        '{"transformer_blocks.0.attn.to_q": 3}',
    ):
        read = formats.import_(foreign, "kohya", {"lorabooth.fused": text}).tensors
        for module, change in changes(tensors).items():
            torch.testing.assert_close(changes(read)[module], change)


@pytest.mark.parametrize("start", ["pissa", "PiSSA_niter_16", "olora", "corda"])
def test_initialisations_that_change_the_base_are_refused(start):
    with pytest.raises(AdapterError, match="also changes the base"):
        lora_config.alpha_of({"lora_alpha": 4, "init_lora_weights": start}, "denoiser", "x", 4)
    assert lora_config.alpha_of({"lora_alpha": 4, "init_lora_weights": "gaussian"}, "denoiser", "x", 4) == 4
