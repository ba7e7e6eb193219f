"""Files told apart by names and shapes; the shapes are those of the published models' first layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabooth.checkpoints.header import Entry, read_header
from lorabooth.checkpoints.identify import FAMILY_NAMES, component_of, identify, quantization
from tests.families.ldm import make_single_file

UNET = "model.diffusion_model."
Shapes = dict[str, tuple[int, ...]]


def ldm_unet(width: int, channels: int = 4, *, prefix: str = UNET, linear: bool = False) -> Shapes:
    kernel = () if linear else (1, 1)
    return {
        f"{prefix}input_blocks.0.0.weight": (320, channels, 3, 3),
        f"{prefix}input_blocks.4.1.proj_in.weight": (640, 640, *kernel),
        f"{prefix}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, width),
        f"{prefix}out.2.weight": (4, 320, 3, 3),
    }


def diffusers_unet(width: int, channels: int = 4) -> Shapes:
    return {
        "conv_in.weight": (320, channels, 3, 3),
        "conv_out.weight": (4, 320, 3, 3),
        "time_embedding.linear_1.weight": (1280, 320),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, width),
        "mid_block.resnets.0.conv1.weight": (1280, 1280, 3, 3),
    }


CLIP = {"cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": (768, 768)}
VAE = {"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3), "first_stage_model.decoder.mid.x": (1,)}
XL = {
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
    "conditioner.embedders.1.model.ln_final.weight": (1280,),
}


@pytest.mark.parametrize(
    ("shapes", "kind", "family", "variant"),
    [
        (ldm_unet(768) | CLIP | VAE, "checkpoint", "sd1", ""),
        (ldm_unet(768, 9) | CLIP | VAE, "checkpoint", "sd1", "inpainting"),
        (ldm_unet(768, 8) | CLIP | VAE, "checkpoint", "sd1", "image editing"),
        (ldm_unet(1024, linear=True) | VAE, "checkpoint", "sd2", ""),
        (ldm_unet(1024, 5, linear=True) | VAE, "checkpoint", "sd2", "depth"),
        (ldm_unet(1024, 7, linear=True) | VAE, "checkpoint", "sd2", "x4 upscaler"),
        (ldm_unet(2048, linear=True) | XL | VAE, "checkpoint", "sdxl", ""),
        (ldm_unet(1280, linear=True) | VAE, "checkpoint", "sdxl-refiner", ""),
        (ldm_unet(2048), "UNet", "sdxl", ""),
        (ldm_unet(768, prefix=""), "UNet", "sd1", ""),
        (diffusers_unet(768), "UNet", "sd1", ""),
        (diffusers_unet(2048, 9), "UNet", "sdxl", "inpainting"),
        (ldm_unet(768, 32), "UNet", "sd1", "32 input channels"),
    ],
)
def test_unets(shapes: Shapes, kind: str, family: str, variant: str) -> None:
    found = identify(shapes)
    assert (found.kind, found.family, found.variant, found.certain) == (kind, family, variant, True)


def flux(first: int = 64, *, guided: bool = True, prefix: str = "") -> Shapes:
    guide = {f"{prefix}guidance_in.in_layer.weight": (3072, 256)} if guided else {}
    return {
        f"{prefix}img_in.weight": (3072, first),
        f"{prefix}double_blocks.0.img_attn.qkv.weight": (9216, 3072),
        **guide,
    }


def sd3(blocks: int, *, dual: bool = False) -> Shapes:
    stem = f"{UNET}joint_blocks"
    extra = {f"{stem}.0.x_block.attn2.qkv.weight": (4608, 1536)} if dual else {}
    return {f"{stem}.{i}.context_block.attn.qkv.weight": (4608, 1536) for i in range(blocks)} | extra


@pytest.mark.parametrize(
    ("shapes", "kind", "family", "variant"),
    [
        (flux(), "transformer", "flux", "dev"),
        (flux(guided=False), "transformer", "flux", "schnell"),
        (flux(384), "transformer", "flux", "fill"),
        (flux(prefix=UNET) | {"vae.decoder.conv_in.weight": (512, 16, 3, 3)}, "checkpoint", "flux", "dev"),
        (flux() | {"distilled_guidance_layer.layers.0.in_layer.weight": (1, 1)}, "transformer", "chroma", ""),
        (sd3(24), "transformer", "sd3", "3 medium"),
        (sd3(24, dual=True), "transformer", "sd3", "3.5 medium"),
        (sd3(38), "transformer", "sd3", "3.5 large"),
        (sd3(24) | {"text_encoders.clip_l.x": (1,)}, "checkpoint", "sd3", "3 medium"),
        ({"single_transformer_blocks.0.attn.to_q.weight": (3072, 3072)}, "transformer", "flux", "schnell"),
        ({"transformer_blocks.0.attn.add_k_proj.weight": (1536, 1536)}, "transformer", "sd3", ""),
    ],
)
def test_transformers(shapes: Shapes, kind: str, family: str, variant: str) -> None:
    found = identify(shapes)
    assert (found.kind, found.family, found.variant) == (kind, family, variant)
    assert found.prediction == "flow"
    assert found.family in FAMILY_NAMES


@pytest.mark.parametrize(
    ("shapes", "kind", "detail"),
    [
        ({"decoder.conv_in.weight": (512, 4, 3, 3), "decoder.mid_block.x": (1,)}, "VAE", "4 latent channels"),
        ({"first_stage_model.decoder.conv_in.weight": (512, 16, 3, 3)}, "VAE", "16 latent channels"),
        (
            {
                "text_model.encoder.layers.0.self_attn.q_proj.weight": (768, 768),
                "text_model.final_layer_norm.weight": (768,),
            },
            "text encoder",
            "CLIP ViT-L",
        ),
        (
            {"transformer.resblocks.0.ln_1.weight": (1280,), "ln_final.weight": (1280,)},
            "text encoder",
            "OpenCLIP ViT-bigG",
        ),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096)}, "text encoder", "T5"),
        ({"vision_model.post_layernorm.weight": (1280,)}, "image encoder", ""),
        ({"ip_adapter.1.to_k_ip.weight": (320, 768)}, "IP-Adapter", ""),
        ({"something.weight": (3, 3)}, "", ""),
        ({}, "", ""),
    ],
)
def test_parts_alone(shapes: Shapes, kind: str, detail: str) -> None:
    found = identify(shapes)
    assert (found.kind, found.variant) == (kind, detail)


def test_a_controlnet_is_none_of_its_unet() -> None:
    ours = diffusers_unet(768) | {"controlnet_down_blocks.0.weight": (320, 320, 1, 1)}
    assert (identify(ours).kind, identify(ours).family) == ("ControlNet", "sd1")
    theirs = ldm_unet(2048, prefix="control_model.") | {
        "control_model.input_hint_block.0.weight": (16, 3, 3, 3)
    }
    assert (identify(theirs).kind, identify(theirs).family) == ("ControlNet", "sdxl")


@pytest.mark.parametrize(
    ("shapes", "family"),
    [
        ({"emb_params": (4, 768)}, "sd1"),
        ({"<cat-toy>": (1, 1024)}, "sd2"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "sdxl"),
    ],
)
def test_embeddings(shapes: Shapes, family: str) -> None:
    assert (identify(shapes).kind, identify(shapes).family) == ("textual inversion", family)


def test_markers_of_v_prediction() -> None:
    base = ldm_unet(2048) | XL | VAE
    assert identify(base).prediction == ""
    assert identify(base | {"v_pred": ()}).prediction == "v_prediction"


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_base_of_nobody_s_widths_is_told_by_its_layers(
    family: str, tiny_sd: Path, tiny_sd2: Path, tmp_path: Path
) -> None:
    folder = tiny_sd if family == "sd1" else tiny_sd2
    file = make_single_file(folder, tmp_path / "x.safetensors", openclip=family == "sd2")
    found = identify({key: entry.shape for key, entry in read_header(file).entries.items()})
    assert (found.kind, found.family, found.layout, found.certain) == (
        "checkpoint",
        family,
        "original",
        False,
    )


def test_components_of_a_single_file() -> None:
    keys = {
        "model.diffusion_model.out.2.bias": "denoiser",
        "model_ema.diffusion_modelout2bias": "denoiser EMA",
        "first_stage_model.quant_conv.bias": "vae",
        "cond_stage_model.model.ln_final.bias": "text_encoder",
        "conditioner.embedders.1.model.ln_final.bias": "text_encoder_2",
        "text_encoders.t5xxl.transformer.shared.weight": "text_encoder_3",
        "betas": "other",
    }
    assert {key: component_of(key) for key in keys} == keys


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"a.weight": ("F16", (4, 4))}, ""),
        ({"a.weight": ("F8_E4M3", (4, 4))}, "fp8"),
        ({"a.weight": ("F8_E4M3", (4, 4)), "a.scale_weight": ("F32", ())}, "fp8 with scales"),
        (
            {"a.weight": ("U8", (8, 1)), "a.weight.quant_state.bitsandbytes__nf4": ("U8", (90,))},
            "bitsandbytes nf4",
        ),
        ({"a.weight": ("I8", (4, 4)), "a.SCB": ("F32", (4,))}, "bitsandbytes int8"),
        ({"a.weight": ("I8", (4, 4))}, "8-bit integers"),
        ({"a.qweight": ("I32", (4, 4))}, "packed integers (qweight)"),
        ({"a.weight": ("F16", (4, 4)), "position_ids": ("I64", (1, 77))}, ""),
    ],
)
def test_quantization(entries: dict[str, tuple[str, tuple[int, ...]]], expected: str) -> None:
    assert (
        quantization({key: Entry(dtype, shape, 0, 1) for key, (dtype, shape) in entries.items()}) == expected
    )
