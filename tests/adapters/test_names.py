"""Names of the world, against literal examples and the real SD1/SD2/SDXL module trees."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorabooth.adapters import names, transformer_names
from lorabooth.errors import AdapterError


@pytest.mark.parametrize(
    ("module", "family", "kohya"),
    [
        # as found in files written by kohya's sd-scripts
        (
            "denoiser.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
            "sd1",
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
        ),
        (
            "denoiser.up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj",
            "sd2",
            "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj",
        ),
        ("denoiser.mid_block.attentions.0.proj_in", "sd1", "lora_unet_mid_block_attentions_0_proj_in"),
        (
            "denoiser.down_blocks.1.resnets.0.time_emb_proj",
            "sd1",
            "lora_unet_down_blocks_1_resnets_0_time_emb_proj",
        ),
        ("denoiser.down_blocks.1.downsamplers.0.conv", "sd1", "lora_unet_down_blocks_1_downsamplers_0_conv"),
        (
            "text_encoder.text_model.encoder.layers.11.self_attn.out_proj",
            "sd1",
            "lora_te_text_model_encoder_layers_11_self_attn_out_proj",
        ),
        (
            "text_encoder_2.text_model.encoder.layers.31.mlp.fc2",
            "sdxl",
            "lora_te2_text_model_encoder_layers_31_mlp_fc2",
        ),
        (
            "denoiser.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
            "sdxl",
            "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k",
        ),
        ("denoiser.mid_block.attentions.0.proj_out", "sdxl", "lora_unet_middle_block_1_proj_out"),
        ("denoiser.up_blocks.0.attentions.2.proj_in", "sdxl", "lora_unet_output_blocks_2_1_proj_in"),
        ("denoiser.down_blocks.0.downsamplers.0.conv", "sdxl", "lora_unet_input_blocks_3_0_op"),
        ("denoiser.up_blocks.1.upsamplers.0.conv", "sdxl", "lora_unet_output_blocks_5_2_conv"),
        ("denoiser.mid_block.resnets.1.conv2", "sdxl", "lora_unet_middle_block_2_out_layers_3"),
        ("denoiser.time_embedding.linear_2", "sdxl", "lora_unet_time_embed_2"),
    ],
)
def test_literal_names(module, family, kohya):
    assert names.kohya_name(module, family) == kohya
    assert names.module_from_kohya(kohya) == module


def unet(family: str) -> nn.Module:
    """The real block structure with thin layers, without storage."""
    from diffusers import UNet2DConditionModel

    common = {"norm_num_groups": 8, "cross_attention_dim": 32, "attention_head_dim": 8}
    with torch.device("meta"):
        if family == "sdxl":
            return UNet2DConditionModel(
                block_out_channels=(16, 32, 64),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 10),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=64,
                **common,
            )
        return UNet2DConditionModel(
            block_out_channels=(16, 32, 64, 64), use_linear_projection=family == "sd2", **common
        )


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_layer_of_the_real_trees_has_its_own_name_and_reads_back(family):
    layers = [n for n, m in unet(family).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(layers) > 200
    written = {path: names.kohya_name(f"denoiser.{path}", family) for path in layers}
    assert len(set(written.values())) == len(layers)
    assert all(names.module_from_kohya(name) == f"denoiser.{path}" for path, name in written.items())


def transformer(family: str) -> nn.Module:
    """Two blocks of each kind of the real network, with thin layers, without storage."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    thin = {"attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 4, "pooled_projection_dim": 8}
    with torch.device("meta"):
        if family == "flux":
            return FluxTransformer2DModel(
                num_layers=2,
                num_single_layers=2,
                joint_attention_dim=8,
                guidance_embeds=True,
                axes_dims_rope=(2, 2, 4),
                **thin,
            )
        return SD3Transformer2DModel(
            num_layers=2,
            joint_attention_dim=8,
            caption_projection_dim=16,
            sample_size=8,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            **thin,
        )


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_every_layer_of_the_real_transformers_has_an_original_layer(family):
    layers = [n for n, m in transformer(family).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(layers) > 30
    originals = {path: transformer_names.to_original(path, family) for path in layers}
    assert [path for path, original in originals.items() if original is None] == []
    for path, original in originals.items():
        assert path in original.modules
        assert set(original.modules) <= set(layers) or ".attn2." in path
        assert transformer_names.from_original(original.path).modules == original.modules
        assert transformer_names.from_flat(original.path.replace(".", "_")).modules == original.modules
        flat = path.replace(".", "_")
        assert names.module_from_kohya(f"lora_transformer_{flat}") == f"denoiser.{path}"
        assert names.kohya_name(f"denoiser.{original.path}", family) == (
            "lora_unet_" + original.path.replace(".", "_")
        )


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_every_layer_of_t5_has_its_own_name(family):
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        t5 = T5EncoderModel(
            T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
        )
    component = names.t5_component(family)
    layers = [n for n, m in t5.named_modules() if isinstance(m, nn.Linear)]
    assert len(layers) == 14
    for path in layers:
        name = names.kohya_name(f"{component}.{path}", family)
        assert name == f"lora_te3_{path.replace('.', '_')}"
        assert names.module_from_kohya(name, family) == f"{component}.{path}"


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_",
        "lora_unet_down_blocks_",
        "lora_unet_down_blocks_0_",
        "lora_unet_double_blocks_0_img_attn_proj_x",
        "lora_unet_down__blocks_0",
        "lora_unet_input_blocks_0_1_proj_in",
        "lora_unet_middle_block_3_in_layers_2",
        "lora_unet_input_blocks_3_0_in_layers_2",
        "lora_te_text_model_encoder_layers_0_self_attn_q",
        "unet_down_blocks_0",
        "",
    ],
)
def test_unknown_names_are_none(name):
    assert names.module_from_kohya(name) is None


def test_what_has_no_name_is_refused():
    for module, family in [
        ("denoiser.down_blocks.0.resnets.5.conv1", "sdxl"),
        ("denoiser.some_new_part.0", "sd1"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "sd1"),
        ("denoiser.conv_in", "flux"),
        ("unet.conv_in", "sd1"),
        ("denoiser.", "sd1"),
        ("denoiser.a/../b", "sd1"),
    ]:
        with pytest.raises(AdapterError):
            names.kohya_name(module, family)
    for key in ["denoiser.conv_in.weight", "lora_A", "vae.conv_in.lora_A", "denoiser..lora_A"]:
        with pytest.raises(AdapterError):
            names.split_key(key)
