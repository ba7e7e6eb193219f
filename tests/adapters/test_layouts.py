"""Names that other tools write, by hand from their code, and what they mean here.

Sources: kohya-ss/sd-scripts 48d368f, Nerogar/OneTrainer 23df383 and (OMI, legacy) a44be32, ostris/ai-toolkit
27a03a9, comfyanonymous/ComfyUI `comfy/lora.py`, `comfy/weight_adapter/lora.py`, diffusers 0.42 `loaders`.
"""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorabooth.adapters import formats, layouts
from lorabooth.adapters.stored import open_file
from lorabooth.errors import AdapterError

DOWN_UP = (".lora_down.weight", ".lora_up.weight", ".alpha")
A_B = (".lora_A.weight", ".lora_B.weight")
A_B_ALPHA = (*A_B, ".alpha")
DEFAULT = (".lora_A.default.weight", ".lora_B.default.weight")
LORA = (".lora.down.weight", ".lora.up.weight")
LINEAR = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
OLD = ("_lora.down.weight", "_lora.up.weight")

DEEP = "down_blocks.1.attentions.0.transformer_blocks.0"

# Who writes it, layout, family, suffixes, and each name with the modules that it means below it.
WORLD = [
    (
        "kohya SD1, networks.lora with conv_dim",
        "kohya",
        "sd1",
        DOWN_UP,
        """
        lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k
            denoiser.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k
        lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj
            denoiser.down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj
        lora_unet_down_blocks_1_resnets_1_conv1
            denoiser.down_blocks.1.resnets.1.conv1
        lora_unet_up_blocks_2_resnets_0_conv_shortcut
            denoiser.up_blocks.2.resnets.0.conv_shortcut
        lora_unet_down_blocks_0_downsamplers_0_conv
            denoiser.down_blocks.0.downsamplers.0.conv
        lora_unet_up_blocks_1_upsamplers_0_conv
            denoiser.up_blocks.1.upsamplers.0.conv
        lora_unet_mid_block_resnets_1_time_emb_proj
            denoiser.mid_block.resnets.1.time_emb_proj
        lora_te_text_model_encoder_layers_11_self_attn_out_proj
            text_encoder.text_model.encoder.layers.11.self_attn.out_proj
        lora_te_text_model_encoder_layers_11_mlp_fc1
            text_encoder.text_model.encoder.layers.11.mlp.fc1
        """,
    ),
    (
        "kohya SDXL",
        "kohya",
        "sdxl",
        DOWN_UP,
        """
        lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k
            denoiser.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k
        lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_out_0
            denoiser.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_out.0
        lora_unet_input_blocks_8_0_in_layers_2
            denoiser.down_blocks.2.resnets.1.conv1
        lora_unet_input_blocks_7_0_skip_connection
            denoiser.down_blocks.2.resnets.0.conv_shortcut
        lora_unet_input_blocks_3_0_op
            denoiser.down_blocks.0.downsamplers.0.conv
        lora_unet_input_blocks_0_0
            denoiser.conv_in
        lora_unet_middle_block_1_proj_in
            denoiser.mid_block.attentions.0.proj_in
        lora_unet_middle_block_2_emb_layers_1
            denoiser.mid_block.resnets.1.time_emb_proj
        lora_unet_output_blocks_5_2_conv
            denoiser.up_blocks.1.upsamplers.0.conv
        lora_unet_output_blocks_0_1_transformer_blocks_9_ff_net_2
            denoiser.up_blocks.0.attentions.0.transformer_blocks.9.ff.net.2
        lora_unet_label_emb_0_0
            denoiser.add_embedding.linear_1
        lora_unet_time_embed_2
            denoiser.time_embedding.linear_2
        lora_unet_out_2
            denoiser.conv_out
        lora_te1_text_model_encoder_layers_11_mlp_fc2
            text_encoder.text_model.encoder.layers.11.mlp.fc2
        lora_te2_text_model_encoder_layers_31_self_attn_q_proj
            text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj
        """,
    ),
    (
        "OneTrainer SDXL, legacy: diffusers' names, numbered text encoders; ai-toolkit's SDXL is the same",
        "kohya",
        "sdxl",
        DOWN_UP,
        """
        lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k
            denoiser.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k
        lora_unet_add_embedding_linear_2
            denoiser.add_embedding.linear_2
        lora_te1_text_model_encoder_layers_11_mlp_fc1
            text_encoder.text_model.encoder.layers.11.mlp.fc1
        lora_te2_text_model_encoder_layers_11_mlp_fc1
            text_encoder_2.text_model.encoder.layers.11.mlp.fc1
        lora_te2_text_projection
            text_encoder_2.text_projection
        """,
    ),
    (
        "OneTrainer SD1, OMI",
        "diffusers",
        "sd1",
        DOWN_UP,
        """
        unet.input_blocks.4.1.transformer_blocks.0.attn2.to_k
            denoiser.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k
        unet.input_blocks.10.0.in_layers.2
            denoiser.down_blocks.3.resnets.0.conv1
        unet.input_blocks.9.0.op
            denoiser.down_blocks.2.downsamplers.0.conv
        unet.middle_block.1.proj_out
            denoiser.mid_block.attentions.0.proj_out
        unet.output_blocks.8.2.conv
            denoiser.up_blocks.2.upsamplers.0.conv
        unet.time_embed.0
            denoiser.time_embedding.linear_1
        unet.out.2
            denoiser.conv_out
        clip_l.text_model.encoder.layers.11.self_attn.k_proj
            text_encoder.text_model.encoder.layers.11.self_attn.k_proj
        """,
    ),
    (
        "OneTrainer SDXL, OMI",
        "diffusers",
        "sdxl",
        DOWN_UP,
        """
        unet.input_blocks.4.1.transformer_blocks.0.attn2.to_k
            denoiser.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k
        unet.label_emb.0.2
            denoiser.add_embedding.linear_2
        clip_l.text_model.encoder.layers.11.mlp.fc1
            text_encoder.text_model.encoder.layers.11.mlp.fc1
        clip_g.text_model.encoder.layers.11.mlp.fc1
            text_encoder_2.text_model.encoder.layers.11.mlp.fc1
        """,
    ),
    (
        "OneTrainer for ComfyUI, SDXL",
        "diffusers",
        "sdxl",
        A_B_ALPHA,
        """
        diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k
            denoiser.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k
        diffusion_model.middle_block.0.out_layers.3
            denoiser.mid_block.resnets.0.conv2
        text_encoders.clip_l.transformer.text_model.encoder.layers.11.mlp.fc1
            text_encoder.text_model.encoder.layers.11.mlp.fc1
        text_encoders.clip_g.transformer.text_model.encoder.layers.11.mlp.fc1
            text_encoder_2.text_model.encoder.layers.11.mlp.fc1
        """,
    ),
    (
        "OneTrainer, original names without a prefix; model. as in a checkpoint (ComfyUI)",
        "diffusers",
        "sd2",
        A_B_ALPHA,
        """
        input_blocks.4.1.transformer_blocks.0.attn2.to_k
            denoiser.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k
        output_blocks.3.1.proj_in
            denoiser.up_blocks.1.attentions.0.proj_in
        model.diffusion_model.output_blocks.3.1.proj_out
            denoiser.up_blocks.1.attentions.0.proj_out
        text_encoders.clip_h.transformer.text_model.encoder.layers.11.mlp.fc2
            text_encoder.text_model.encoder.layers.11.mlp.fc2
        """,
    ),
    (
        "LyCORIS as SimpleTuner writes it",
        "kohya",
        "sd1",
        DOWN_UP,
        """
        lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k
            denoiser.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k
        """,
    ),
    (
        "diffusers' scripts of today, and PEFT's state_dict with the adapter's name",
        "diffusers",
        "sdxl",
        A_B,
        """
        unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k
            denoiser.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k
        text_encoder.text_model.encoder.layers.11.self_attn.q_proj
            text_encoder.text_model.encoder.layers.11.self_attn.q_proj
        text_encoder_2.encoder.layers.11.self_attn.q_proj
            text_encoder_2.text_model.encoder.layers.11.self_attn.q_proj
        mid_block.resnets.0.conv1
            denoiser.mid_block.resnets.0.conv1
        """,
    ),
    (
        "with .default.",
        "diffusers",
        "sd1",
        DEFAULT,
        """
        unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k
            denoiser.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k
        """,
    ),
    (
        "with an adapter's own name",
        "diffusers",
        "sd1",
        (".lora_A.my-dog.weight", ".lora_B.my-dog.weight"),
        """
        unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k
            denoiser.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k
        """,
    ),
    (
        "diffusers' scripts since 0.26",
        "diffusers",
        "sd1",
        LORA,
        """
        unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k
            denoiser.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k
        unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0
            denoiser.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0
        """,
    ),
    (
        "diffusers' scripts, text encoder",
        "diffusers",
        "",
        LINEAR,
        """
        text_encoder.text_model.encoder.layers.11.self_attn.out_proj
            text_encoder.text_model.encoder.layers.11.self_attn.out_proj
        text_encoder_2.text_model.encoder.layers.11.mlp.fc1
            text_encoder_2.text_model.encoder.layers.11.mlp.fc1
        """,
    ),
    (
        "diffusers before 0.22: attention processors",
        "diffusers",
        "sd1",
        OLD,
        """
        unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k
            denoiser.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k
        unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_out
            denoiser.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0
        down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q
            denoiser.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q
        text_encoder.text_model.encoder.layers.11.self_attn.to_out
            text_encoder.text_model.encoder.layers.11.self_attn.out_proj
        """,
    ),
    (
        "PEFT folder of a UNet",
        "peft",
        "sd1",
        A_B,
        """
        base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k
            denoiser.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k
        """,
    ),
    (
        "PEFT of a text encoder, whose names tell",
        "peft",
        "",
        A_B,
        """
        base_model.model.encoder.layers.11.mlp.fc1
            text_encoder.text_model.encoder.layers.11.mlp.fc1
        base_model.model.text_model.encoder.layers.11.mlp.fc2
            text_encoder.text_model.encoder.layers.11.mlp.fc2
        """,
    ),
    (
        "diffusers' and ai-toolkit's FLUX",
        "diffusers",
        "flux",
        A_B,
        """
        transformer.transformer_blocks.0.attn.to_q
            denoiser.transformer_blocks.0.attn.to_q
        transformer.transformer_blocks.0.ff_context.net.0.proj
            denoiser.transformer_blocks.0.ff_context.net.0.proj
        transformer.single_transformer_blocks.37.proj_mlp
            denoiser.single_transformer_blocks.37.proj_mlp
        transformer.single_transformer_blocks.37.norm.linear
            denoiser.single_transformer_blocks.37.norm.linear
        lora_te1.text_model.encoder.layers.11.mlp.fc1
            text_encoder.text_model.encoder.layers.11.mlp.fc1
        lora_te2.encoder.block.23.layer.0.SelfAttention.q
            text_encoder_2.encoder.block.23.layer.0.SelfAttention.q
        """,
    ),
    (
        "ai-toolkit's and SimpleTuner's bare FLUX, FLUX's PEFT",
        "peft",
        "flux",
        A_B,
        """
        base_model.model.transformer_blocks.0.attn.add_k_proj
            denoiser.transformer_blocks.0.attn.add_k_proj
        base_model.model.single_transformer_blocks.0.proj_out
            denoiser.single_transformer_blocks.0.proj_out
        base_model.model.x_embedder
            denoiser.x_embedder
        """,
    ),
    (
        "kohya FLUX",
        "kohya",
        "flux",
        DOWN_UP,
        """
        lora_unet_double_blocks_0_img_attn_qkv
            denoiser.transformer_blocks.0.attn.to_q
            denoiser.transformer_blocks.0.attn.to_k
            denoiser.transformer_blocks.0.attn.to_v
        lora_unet_double_blocks_18_txt_attn_qkv
            denoiser.transformer_blocks.18.attn.add_q_proj
            denoiser.transformer_blocks.18.attn.add_k_proj
            denoiser.transformer_blocks.18.attn.add_v_proj
        lora_unet_double_blocks_0_img_attn_proj
            denoiser.transformer_blocks.0.attn.to_out.0
        lora_unet_double_blocks_0_txt_attn_proj
            denoiser.transformer_blocks.0.attn.to_add_out
        lora_unet_double_blocks_0_img_mlp_0
            denoiser.transformer_blocks.0.ff.net.0.proj
        lora_unet_double_blocks_0_txt_mlp_2
            denoiser.transformer_blocks.0.ff_context.net.2
        lora_unet_double_blocks_0_img_mod_lin
            denoiser.transformer_blocks.0.norm1.linear
        lora_unet_double_blocks_0_txt_mod_lin
            denoiser.transformer_blocks.0.norm1_context.linear
        lora_unet_single_blocks_37_linear1
            denoiser.single_transformer_blocks.37.attn.to_q
            denoiser.single_transformer_blocks.37.attn.to_k
            denoiser.single_transformer_blocks.37.attn.to_v
            denoiser.single_transformer_blocks.37.proj_mlp
        lora_unet_single_blocks_37_linear2
            denoiser.single_transformer_blocks.37.proj_out
        lora_unet_single_blocks_37_modulation_lin
            denoiser.single_transformer_blocks.37.norm.linear
        lora_unet_img_in
            denoiser.x_embedder
        lora_unet_txt_in
            denoiser.context_embedder
        lora_unet_time_in_in_layer
            denoiser.time_text_embed.timestep_embedder.linear_1
        lora_unet_vector_in_out_layer
            denoiser.time_text_embed.text_embedder.linear_2
        lora_unet_guidance_in_in_layer
            denoiser.time_text_embed.guidance_embedder.linear_1
        lora_te1_text_model_encoder_layers_11_self_attn_v_proj
            text_encoder.text_model.encoder.layers.11.self_attn.v_proj
        lora_te3_encoder_block_23_layer_0_SelfAttention_q
            text_encoder_2.encoder.block.23.layer.0.SelfAttention.q
        lora_te3_encoder_block_23_layer_1_DenseReluDense_wi_0
            text_encoder_2.encoder.block.23.layer.1.DenseReluDense.wi_0
        """,
    ),
    (
        "OneTrainer FLUX, legacy",
        "kohya",
        "flux",
        DOWN_UP,
        """
        lora_transformer_transformer_blocks_0_attn_to_q
            denoiser.transformer_blocks.0.attn.to_q
        lora_transformer_transformer_blocks_0_attn_to_out_0
            denoiser.transformer_blocks.0.attn.to_out.0
        lora_transformer_transformer_blocks_0_attn_to_add_out
            denoiser.transformer_blocks.0.attn.to_add_out
        lora_transformer_transformer_blocks_0_norm1_context_linear
            denoiser.transformer_blocks.0.norm1_context.linear
        lora_transformer_single_transformer_blocks_0_proj_mlp
            denoiser.single_transformer_blocks.0.proj_mlp
        lora_transformer_norm_out_linear
            denoiser.norm_out.linear
        lora_transformer_proj_out
            denoiser.proj_out
        lora_transformer_time_text_embed_guidance_embedder_linear_1
            denoiser.time_text_embed.guidance_embedder.linear_1
        lora_te1_text_model_encoder_layers_11_mlp_fc1
            text_encoder.text_model.encoder.layers.11.mlp.fc1
        lora_te2_encoder_block_23_layer_1_DenseReluDense_wo
            text_encoder_2.encoder.block.23.layer.1.DenseReluDense.wo
        """,
    ),
    (
        "SimpleTuner's LyCORIS FLUX",
        "kohya",
        "flux",
        DOWN_UP,
        """
        lycoris_single_transformer_blocks_0_attn_to_k
            denoiser.single_transformer_blocks.0.attn.to_k
        lycoris_transformer_blocks_0_ff_net_0_proj
            denoiser.transformer_blocks.0.ff.net.0.proj
        """,
    ),
    (
        "OneTrainer FLUX, OMI: parts of fused layers apart",
        "diffusers",
        "flux",
        DOWN_UP,
        """
        transformer.double_blocks.0.img_attn.qkv.0
            denoiser.transformer_blocks.0.attn.to_q
        transformer.double_blocks.0.img_attn.qkv.2
            denoiser.transformer_blocks.0.attn.to_v
        transformer.double_blocks.0.txt_attn.qkv.1
            denoiser.transformer_blocks.0.attn.add_k_proj
        transformer.double_blocks.0.img_attn.proj
            denoiser.transformer_blocks.0.attn.to_out.0
        transformer.single_blocks.5.linear1.3
            denoiser.single_transformer_blocks.5.proj_mlp
        transformer.single_blocks.5.linear2
            denoiser.single_transformer_blocks.5.proj_out
        transformer.img_in.proj
            denoiser.x_embedder
        transformer.final_layer.linear
            denoiser.proj_out
        clip_l.text_model.encoder.layers.11.mlp.fc1
            text_encoder.text_model.encoder.layers.11.mlp.fc1
        t5.encoder.block.23.layer.0.SelfAttention.o
            text_encoder_2.encoder.block.23.layer.0.SelfAttention.o
        """,
    ),
    (
        "BFL's names under ComfyUI's prefix",
        "diffusers",
        "flux",
        A_B_ALPHA,
        """
        diffusion_model.double_blocks.0.img_attn.qkv
            denoiser.transformer_blocks.0.attn.to_q
            denoiser.transformer_blocks.0.attn.to_k
            denoiser.transformer_blocks.0.attn.to_v
        diffusion_model.single_blocks.0.linear1
            denoiser.single_transformer_blocks.0.attn.to_q
            denoiser.single_transformer_blocks.0.attn.to_k
            denoiser.single_transformer_blocks.0.attn.to_v
            denoiser.single_transformer_blocks.0.proj_mlp
        diffusion_model.img_in
            denoiser.x_embedder
        text_encoders.clip_l.transformer.text_model.encoder.layers.11.mlp.fc1
            text_encoder.text_model.encoder.layers.11.mlp.fc1
        text_encoders.t5xxl.transformer.encoder.block.23.layer.0.SelfAttention.k
            text_encoder_2.encoder.block.23.layer.0.SelfAttention.k
        """,
    ),
    (
        "BFL's names bare, and ai-toolkit's under diffusion_model.",
        "diffusers",
        "flux",
        A_B,
        """
        double_blocks.0.img_mlp.0
            denoiser.transformer_blocks.0.ff.net.0.proj
        single_blocks.0.modulation.lin
            denoiser.single_transformer_blocks.0.norm.linear
        diffusion_model.transformer_blocks.0.attn.to_q
            denoiser.transformer_blocks.0.attn.to_q
        """,
    ),
    (
        "XLabs FLUX",
        "diffusers",
        "flux",
        (".down.weight", ".up.weight"),
        """
        double_blocks.0.processor.qkv_lora1
            denoiser.transformer_blocks.0.attn.to_q
            denoiser.transformer_blocks.0.attn.to_k
            denoiser.transformer_blocks.0.attn.to_v
        double_blocks.0.processor.qkv_lora2
            denoiser.transformer_blocks.0.attn.add_q_proj
            denoiser.transformer_blocks.0.attn.add_k_proj
            denoiser.transformer_blocks.0.attn.add_v_proj
        double_blocks.0.processor.proj_lora1
            denoiser.transformer_blocks.0.attn.to_out.0
        double_blocks.0.processor.proj_lora2
            denoiser.transformer_blocks.0.attn.to_add_out
        single_blocks.0.processor.qkv_lora
            denoiser.single_transformer_blocks.0.attn.to_q
            denoiser.single_transformer_blocks.0.attn.to_k
            denoiser.single_transformer_blocks.0.attn.to_v
        single_blocks.0.processor.proj_lora
            denoiser.single_transformer_blocks.0.proj_out
        """,
    ),
    (
        "kohya SD3",
        "kohya",
        "sd3",
        DOWN_UP,
        """
        lora_unet_joint_blocks_0_x_block_attn_qkv
            denoiser.transformer_blocks.0.attn.to_q
            denoiser.transformer_blocks.0.attn.to_k
            denoiser.transformer_blocks.0.attn.to_v
        lora_unet_joint_blocks_0_context_block_attn_qkv
            denoiser.transformer_blocks.0.attn.add_q_proj
            denoiser.transformer_blocks.0.attn.add_k_proj
            denoiser.transformer_blocks.0.attn.add_v_proj
        lora_unet_joint_blocks_0_x_block_attn2_qkv
            denoiser.transformer_blocks.0.attn2.to_q
            denoiser.transformer_blocks.0.attn2.to_k
            denoiser.transformer_blocks.0.attn2.to_v
        lora_unet_joint_blocks_0_x_block_attn_proj
            denoiser.transformer_blocks.0.attn.to_out.0
        lora_unet_joint_blocks_0_context_block_mlp_fc1
            denoiser.transformer_blocks.0.ff_context.net.0.proj
        lora_unet_joint_blocks_0_x_block_adaLN_modulation_1
            denoiser.transformer_blocks.0.norm1.linear
        lora_unet_context_embedder
            denoiser.context_embedder
        lora_unet_x_embedder_proj
            denoiser.pos_embed.proj
        lora_unet_t_embedder_mlp_0
            denoiser.time_text_embed.timestep_embedder.linear_1
        lora_unet_y_embedder_mlp_2
            denoiser.time_text_embed.text_embedder.linear_2
        lora_te1_text_model_encoder_layers_11_mlp_fc1
            text_encoder.text_model.encoder.layers.11.mlp.fc1
        lora_te2_text_model_encoder_layers_11_mlp_fc1
            text_encoder_2.text_model.encoder.layers.11.mlp.fc1
        lora_te3_encoder_block_23_layer_0_SelfAttention_q
            text_encoder_3.encoder.block.23.layer.0.SelfAttention.q
        """,
    ),
    (
        "diffusers' SD3, OneTrainer's legacy beside it",
        "kohya",
        "sd3",
        DOWN_UP,
        """
        lora_transformer_transformer_blocks_0_attn2_to_q
            denoiser.transformer_blocks.0.attn2.to_q
        lora_transformer_pos_embed_proj
            denoiser.pos_embed.proj
        lora_te3_encoder_block_23_layer_0_SelfAttention_q
            text_encoder_3.encoder.block.23.layer.0.SelfAttention.q
        """,
    ),
    (
        "diffusers' SD3",
        "diffusers",
        "sd3",
        A_B,
        """
        transformer.transformer_blocks.0.attn2.to_q
            denoiser.transformer_blocks.0.attn2.to_q
        text_encoder.text_model.encoder.layers.11.mlp.fc1
            text_encoder.text_model.encoder.layers.11.mlp.fc1
        text_encoder_2.text_model.encoder.layers.11.mlp.fc1
            text_encoder_2.text_model.encoder.layers.11.mlp.fc1
        """,
    ),
]

WIDTHS = {"sd1": 768, "sd2": 1024, "sdxl": 2048, "": 8, "flux": 4, "sd3": 4}


def parsed(table: str) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    name = ""
    for line in filter(str.strip, table.splitlines()):
        if line.startswith(" " * 12):
            out[name].append(line.strip())
        else:
            name = line.strip()
            out[name] = []
    return out


def written(family: str, suffixes: tuple[str, ...], names: dict[str, list[str]]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for i, (name, modules) in enumerate(names.items()):
        rows = {3: 12, 4: 28}.get(len(modules), 8)
        out[name + suffixes[0]] = torch.full((2, WIDTHS[family]), float(i))
        out[name + suffixes[1]] = torch.arange(rows * 2.0).reshape(rows, 2)
        if len(suffixes) == 3:
            out[name + suffixes[2]] = torch.tensor(1.0)
    return out


@pytest.mark.parametrize(("who", "layout", "family", "suffixes", "table"), WORLD, ids=[w[0] for w in WORLD])
def test_names_of_the_world(who, layout, family, suffixes, table, tmp_path):
    names = parsed(table)
    tensors = written(family, suffixes, names)
    assert layouts.kind_of(tensors) == "LoRA"
    assert layouts.detect(tensors) == layout
    expected: dict[str, tuple[float, int]] = {}
    for i, modules in enumerate(names.values()):
        starts = [0, 4, 8, 12]  # rows of lora_B count on by 2
        expected |= {module: (float(i), 2 * start) for module, start in zip(modules, starts, strict=False)}
    got = formats.import_(tensors, layout)
    assert {key.rpartition(".")[0] for key in got.tensors} == set(expected)
    for module, (number, first) in expected.items():
        assert float(got.tensors[f"{module}.lora_A"][0, 0]) == number
        assert float(got.tensors[f"{module}.lora_B"][0, 0]) == first
        assert float(got.tensors[f"{module}.alpha"]) == (1.0 if len(suffixes) == 3 else 2.0)
    save_file(tensors, tmp_path / "a.safetensors")
    stored = open_file(tmp_path / "a.safetensors")
    assert stored.layout == layout
    assert set(stored.modules) == set(expected)
    assert stored.family == family or (family == "" and stored.family in ("", "sdxl"))
    read = stored.tensors()
    assert all(torch.equal(read[key], value) for key, value in got.tensors.items())


def test_halves_that_diffusers_keeps_in_the_other_order():
    """shift, scale in the original final layer and in SD3's last context block; scale, shift in diffusers."""
    up = torch.arange(16.0).reshape(8, 2)
    down = torch.ones(2, 4)
    for name, module in (
        ("lora_unet_final_layer_adaLN_modulation_1", "norm_out.linear"),
        (
            "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1",
            "transformer_blocks.23.norm1_context.linear",
        ),
    ):
        foreign = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        got = formats.import_(foreign, "kohya").tensors
        assert torch.equal(got[f"denoiser.{module}.lora_B"], torch.cat([up[4:], up[:4]]))
    six = torch.arange(48.0).reshape(24, 2)
    foreign = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": six}
    got = formats.import_(foreign, "kohya").tensors
    assert torch.equal(got["denoiser.transformer_blocks.23.norm1_context.linear.lora_B"], six)


def test_shapes_of_sd2_as_kohya_writes_them_are_kept():
    """kohya's SD2 UNet has 1x1 convolutions where diffusers' has linear layers."""
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    foreign = {
        f"{name}.lora_down.weight": torch.ones(2, 320, 1, 1),
        f"{name}.lora_up.weight": torch.ones(320, 2, 1, 1),
    }
    got = formats.import_(foreign, "kohya").tensors
    assert got["denoiser.down_blocks.0.attentions.0.proj_in.lora_A"].shape == (2, 320, 1, 1)
    assert got["denoiser.down_blocks.0.attentions.0.proj_in.lora_B"].shape == (320, 2, 1, 1)


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (["lora_unet_mid_block_attentions_0_proj_in.hada_w1_a"], "LoHa"),
        (["lora_unet_x.lokr_w1", "lora_unet_x.alpha"], "LoKr"),
        (["lycoris_x.lokr_w2_a"], "LoKr"),
        (["lora_unet_x.lora_down.weight", "lora_unet_x.dora_scale"], "DoRA"),
        (["unet.x.lora_A.weight", "unet.x.lora_magnitude_vector"], "DoRA"),
        (["unet.x.lora_A.weight", "unet.x.lora_magnitude_vector.default.weight"], "DoRA"),
        (["transformer.x.lora_A.weight", "transformer.x.magnitude"], "DoRA"),
        (["lora_unet_x.lora_mid.weight", "lora_unet_x.lora_up.weight"], "Tucker LoRA"),
        (["lora_unet_x.oft_blocks"], "OFT"),
        (["unet.x.oft_R.weight"], "OFT"),
        (["lora_unet_x.a1.weight", "lora_unet_x.b2.weight"], "GLoRA"),
        (["lora_unet_x.on_input", "lora_unet_x.weight"], "(IA)3"),
        (["base_model.model.x.ia3_l"], "(IA)3"),
        (["lora_unet_x.diff", "lora_unet_x.diff_b"], "full difference"),
        (["emb_params"], "textual inversion"),
        (["clip_g", "clip_l"], "textual inversion"),
        (["<my-cat>"], "textual inversion"),
        (["string_to_param.*"], "textual inversion"),
        (["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x.bias"], "checkpoint"),
        (["transformer_blocks.0.attn.to_q.weight"], "checkpoint"),
        (["clip_l.text_model.encoder.layers.0.mlp.fc1.lora_down.weight"], "LoRA"),
        (["double_blocks.0.processor.proj_lora1.down.weight"], "LoRA"),
        (["x.attn1.processor.to_q_lora.down.weight"], "LoRA"),
        (["step", "epoch"], ""),
        ([], ""),
    ],
)
def test_kinds(keys, kind):
    assert layouts.kind_of(keys) == kind
    if kind != "LoRA":
        with pytest.raises(AdapterError, match=re.escape(kind.split()[-1]) if kind else "No LoRA"):
            layouts.detect(keys)


@pytest.mark.parametrize(
    "key",
    [
        "diffusion_model.blocks.0.cross_attn.k.lora_A.weight",  # Wan
        "lora_unet_blocks_0_cross_attn_k.lora_down.weight",
        "vae.decoder.conv_in.lora_A.weight",
        "bundle_emb.dog.clip_l",
        "unet.input_blocks.0.1.proj_in.lora_down.weight",
        "lora_te2_transformer_resblocks_0_mlp_c_fc.lora_down.weight",
        "text_encoder.lora_A.weight",
        "unet..lora_A.weight",
    ],
)
def test_names_that_mean_nothing_are_told(key):
    with contextlib.suppress(AdapterError):
        assert layouts.parse(key) is None
    good = {
        f"unet.{DEEP}.attn2.to_k.lora_A.weight": torch.ones(1, 2),
        f"unet.{DEEP}.attn2.to_k.lora_B.weight": torch.ones(2, 1),
    }
    with pytest.raises(AdapterError, match=key.split(".")[0].replace(".", r"\.")):
        formats.import_({**good, key: torch.ones(1, 2)}, "diffusers")


def test_fused_layer_of_a_wrong_size():
    name = "lora_unet_single_blocks_0_linear1"
    with pytest.raises(AdapterError, match="1:1:1:4"):
        formats.import_(
            {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(27, 2)},
            "kohya",
        )
