"""What a weight file is, told from the names and shapes in its header alone: literal tables, no torch.

Sources of the tell-tale names: CompVis/stable-diffusion, Stability-AI/generative-models (original layouts),
huggingface/diffusers model classes, black-forest-labs/flux `model.py`, ComfyUI `comfy/model_detection.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lorabooth.checkpoints.header import Entry

Shapes = Mapping[str, tuple[int, ...]]

FAMILY_NAMES = MappingProxyType(
    {
        "sd1": "Stable Diffusion 1",
        "sd2": "Stable Diffusion 2",
        "sdxl": "Stable Diffusion XL",
        "sdxl-refiner": "Stable Diffusion XL refiner",
        "sd3": "Stable Diffusion 3",
        "flux": "FLUX.1",
        "flux2": "FLUX.2",
        "chroma": "Chroma",
        "svd": "Stable Video Diffusion",
        "cascade": "Stable Cascade",
        "auraflow": "AuraFlow",
        "hunyuan-dit": "Hunyuan-DiT",
        "hunyuan-video": "HunyuanVideo",
        "lumina2": "Lumina 2",
        "pixart": "PixArt",
        "qwen-image": "Qwen-Image",
        "sana": "Sana",
        "wan": "Wan",
        "ltx": "LTX-Video",
        "mochi": "Mochi",
        "hidream": "HiDream",
    }
)
"""Family -> what people call it."""

FLOW_FAMILIES = frozenset(
    {"sd3", "flux", "flux2", "chroma", "auraflow", "hunyuan-video", "lumina2", "qwen-image", "sana"}
    | {"wan", "ltx", "mochi", "hidream"}
)
"""Families that predict a flow's velocity, all of them."""

COMPONENT_PREFIXES = MappingProxyType(
    {
        "model.diffusion_model.": "denoiser",
        "model_ema.": "denoiser EMA",
        "first_stage_model.": "vae",
        "vae.": "vae",
        "cond_stage_model.": "text_encoder",
        "conditioner.embedders.0.transformer.": "text_encoder",
        "conditioner.embedders.0.model.": "text_encoder_2",  # the refiner's only one
        "conditioner.embedders.1.": "text_encoder_2",
        "text_encoders.clip_l.": "text_encoder",
        "text_encoders.clip_g.": "text_encoder_2",
        "text_encoders.t5xxl.": "text_encoder_3",
        "control_model.": "controlnet",
    }
)
"""Where a single-file checkpoint keeps its components."""

_DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_OTHER_PARTS = frozenset({"vae", "text_encoder", "text_encoder_2", "text_encoder_3"})
_BY_CONTEXT_WIDTH = MappingProxyType({768: "sd1", 1024: "sd2", 1280: "sdxl-refiner", 2048: "sdxl"})
# Only this family's transformer has a tensor of this name; names as in the original layouts.
_TRANSFORMERS = MappingProxyType(
    {
        "joint_blocks.0.context_block.attn.qkv.weight": "sd3",
        "txt_in.individual_token_refiner.blocks.0.norm1.weight": "hunyuan-video",  # has FLUX's blocks, too
        "double_blocks.0.img_attn.qkv.weight": "flux",
        "double_layers.0.attn.w1q.weight": "auraflow",
        "mlp_t5.0.weight": "hunyuan-dit",
        "t_block.1.weight": "pixart",
        "clf.1.weight": "cascade",
        "cap_embedder.1.weight": "lumina2",
        "head.modulation": "wan",
        "t5_yproj.weight": "mochi",
        "caption_projection.0.linear.weight": "hidream",
    }
)
# As in diffusers' folders.
_DIFFUSERS_TRANSFORMERS = MappingProxyType(
    {
        "single_transformer_blocks.0.attn.to_q.weight": "flux",
        "single_transformer_blocks.0.norm.linear.weight": "flux",
        "transformer_blocks.0.attn.add_k_proj.weight": "sd3",
        "transformer_blocks.0.ff.conv_inverted.weight": "sana",
        "adaln_single.emb.timestep_embedder.linear_1.weight": "pixart",
        "condition_embedder.time_embedder.linear_1.weight": "wan",
    }
)
_EMBEDDING_KEYS = frozenset({"emb_params", "clip_l", "clip_g", "t5xxl"})
_CHANNELS = MappingProxyType(
    {(9, 4): "inpainting", (8, 4): "image editing", (5, 4): "depth", (7, 4): "x4 upscaler"}
)
_FLUX_CHANNELS = MappingProxyType({384: "fill", 128: "control", 96: "control"})
_TEXT_WIDTHS = MappingProxyType({768: "CLIP ViT-L", 1024: "OpenCLIP ViT-H", 1280: "OpenCLIP ViT-bigG"})


@dataclass(frozen=True, slots=True)
class Identity:
    """What a weight file is; empty strings where it cannot be told.

    Attributes:
        kind: "checkpoint" (a denoiser with other parts), "UNet", "transformer", "VAE", "text encoder",
            "image encoder", "ControlNet", "IP-Adapter", "motion module", "textual inversion".
        family: a key of FAMILY_NAMES.
        layout: of its names: "original", "diffusers" or "transformers".
        variant: what sets it apart in its family, e.g. "inpainting", "dev", "CLIP ViT-L".
        prediction: "epsilon", "v_prediction" or "flow", where names or family tell.
        certain: whether the family is told by a width or a name that only it has.
    """

    kind: str = ""
    family: str = ""
    layout: str = ""
    variant: str = ""
    prediction: str = ""
    certain: bool = True


def identify(shapes: Shapes) -> Identity:
    """What a file of these tensors is. Adapters (LoRA, LoHa ...) are not looked for here.

    Args:
        shapes: the file's tensor names -> shapes.
    """
    return _addition(shapes) or _whole(shapes) or _alone(shapes) or _embedding(shapes) or Identity()


def component_of(key: str) -> str:
    """The component of a single-file checkpoint that a tensor belongs to; "other" where it is none."""
    for prefix, component in COMPONENT_PREFIXES.items():
        if key.startswith(prefix):
            return component
    return "other"


def quantization(entries: Mapping[str, Entry]) -> str:
    """How weights were quantized: "bitsandbytes nf4", "fp8", ...; "" if they were not."""
    for key in entries:
        if match := re.search(r"\.quant_state\.bitsandbytes__(\w+)$", key):
            return f"bitsandbytes {match[1]}"
    if any(key.endswith(".SCB") for key in entries):
        return "bitsandbytes int8"
    if any(key.endswith(".qweight") for key in entries):
        return "packed integers (qweight)"
    matrices = {entry.dtype for entry in entries.values() if len(entry.shape) > 1}
    scaled = any(key.endswith((".weight_scale", ".scale_weight", "scaled_fp8")) for key in entries)
    if any(dtype.startswith("F8_") for dtype in matrices):
        return "fp8 with scales" if scaled else "fp8"
    if matrices & {"I8", "U8"}:
        return "8-bit integers"
    return "with scales" if scaled else ""


def _whole(shapes: Shapes) -> Identity | None:
    """A denoiser, with or without the other parts of a pipeline."""
    prefix = next((p for p in _DENOISER_PREFIXES if any(key.startswith(p) for key in shapes)), "")
    names = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    found = _denoiser(names)
    if found is None:
        return None
    kind, family, layout, variant = found
    if prefix and {component_of(key) for key in shapes} & _OTHER_PARTS:
        kind = "checkpoint"
    certain = kind == "transformer" or family in ("svd", "") or bool(_by_width(names))
    return Identity(kind, family, layout, variant, _prediction(shapes, family), certain)


def _prediction(shapes: Shapes, family: str) -> str:
    # Empty marker tensors, as NoobAI's and other SDXL checkpoints carry them for ComfyUI.
    if "v_pred" in shapes or "edm_vpred.sigma_max" in shapes:
        return "v_prediction"
    return "flow" if family in FLOW_FAMILIES else ""


def _denoiser(names: Shapes) -> tuple[str, str, str, str] | None:
    """(kind, family, layout, variant) of a denoiser, its names without a prefix."""
    if "input_blocks.0.0.weight" in names:
        ends = (names["input_blocks.0.0.weight"], names.get("out.2.weight", ()))
        return ("UNet", _unet_family(names), "original", _unet_variant(*ends))
    if "conv_in.weight" in names and any(key.startswith("down_blocks.") for key in names):
        if any(key.startswith("mid_block.resnets.") for key in names) and _is_unet(names):
            ends = (names["conv_in.weight"], names.get("conv_out.weight", ()))
            return ("UNet", _unet_family(names), "diffusers", _unet_variant(*ends))
        return None
    for mark, family in _TRANSFORMERS.items():
        if mark in names:
            return _transformer(names, family, "original")
    for mark, family in _DIFFUSERS_TRANSFORMERS.items():
        if mark in names:
            return _transformer(names, family, "diffusers")
    if "txt_norm.weight" in names and any(key.startswith("transformer_blocks.") for key in names):
        return ("transformer", "qwen-image", "diffusers", "")
    return None


def _is_unet(names: Shapes) -> bool:
    return "time_embedding.linear_1.weight" in names


def _unet_family(names: Shapes) -> str:
    if any(".time_stack." in key or ".temporal_transformer_blocks." in key for key in names):
        return "svd"
    if known := _by_width(names):
        return known
    if not any(key.endswith(".attn2.to_k.weight") for key in names):
        return ""
    # A width of nobody's: the projections and the extra embedding still tell whose shape it follows.
    if "add_embedding.linear_1.weight" in names or "label_emb.0.0.weight" in names:
        return "sdxl"
    projections = {len(shape) for key, shape in names.items() if key.endswith(".proj_in.weight")}
    return "sd2" if projections == {2} else "sd1"


def _by_width(names: Shapes) -> str:
    """By what cross-attention's keys are made from."""
    widths = {shape[-1] for key, shape in names.items() if key.endswith(".attn2.to_k.weight") and shape}
    return _BY_CONTEXT_WIDTH.get(next(iter(widths)), "") if len(widths) == 1 else ""


def _unet_variant(first: tuple[int, ...], last: tuple[int, ...]) -> str:
    channels = (first[1] if len(first) > 1 else 0, last[0] if last else 4)
    if channels[0] == channels[1] or 0 in channels:
        return ""
    return _CHANNELS.get(channels, f"{channels[0]} input channels")


def _transformer(names: Shapes, family: str, layout: str) -> tuple[str, str, str, str]:
    variant = ""
    if family == "flux":
        if any(key.startswith("distilled_guidance_layer.") for key in names):
            return ("transformer", "chroma", layout, "")
        if any(key.startswith("double_stream_modulation_img.") for key in names):
            return ("transformer", "flux2", layout, "")
        guided = any(key.startswith(("guidance_in.", "time_text_embed.guidance_embedder.")) for key in names)
        first = names.get("img_in.weight", names.get("x_embedder.weight", ()))
        variant = _FLUX_CHANNELS.get(first[1] if len(first) > 1 else 0, "")
        variant = variant or ("dev" if guided else "schnell")
    elif family == "sd3":
        stem = "joint_blocks." if layout == "original" else "transformer_blocks."
        blocks = {key.split(".")[1] for key in names if key.startswith(stem)}
        dual = any(".x_block.attn2." in key or ".attn2." in key for key in names)
        variant = {24: "3.5 medium" if dual else "3 medium", 38: "3.5 large"}.get(len(blocks), "")
    elif family == "pixart" and "pos_embed.proj.weight" not in names and layout == "diffusers":
        family = "ltx"  # shares PixArt's modulation, has no patch embedding
    return ("transformer", family, layout, variant)


def _addition(shapes: Shapes) -> Identity | None:
    """What is put beside a denoiser: it holds parts of one, so it is looked for first."""
    if any(key.startswith(("controlnet_cond_embedding.", "controlnet_down_blocks.")) for key in shapes):
        family = _unet_family(shapes) if _is_unet(shapes) else ""
        return Identity("ControlNet", family, "diffusers")
    hint = "input_hint_block.0.weight"
    if any(key.removeprefix("control_model.") == hint for key in shapes):
        names = {key.removeprefix("control_model."): shape for key, shape in shapes.items()}
        return Identity("ControlNet", _unet_family(names), "original")
    if any(key.startswith("ip_adapter.") or ".to_k_ip." in key for key in shapes):
        return Identity("IP-Adapter")
    if any("motion_modules." in key for key in shapes) and not any("resnets" in key for key in shapes):
        return Identity("motion module")
    return None


def _alone(shapes: Shapes) -> Identity | None:
    """A VAE or an encoder alone."""
    for prefix in ("", "first_stage_model.", "vae."):
        last = shapes.get(f"{prefix}decoder.conv_in.weight")
        if last is not None:
            original = any(key.startswith(f"{prefix}decoder.mid.") for key in shapes)
            channels = f"{last[1]} latent channels" if len(last) > 1 else ""
            return Identity("VAE", "", "original" if original else "diffusers", channels)
    if any("vision_model." in key for key in shapes):
        return Identity("image encoder", "", "transformers")
    if any(
        re.search(r"(?:^|\.)encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight$", key) for key in shapes
    ):
        return Identity("text encoder", "", "transformers", "T5")
    if any(key.endswith("transformer.resblocks.0.ln_1.weight") for key in shapes):
        return Identity("text encoder", "", "original", _text_variant(shapes, "ln_final.weight"))
    if any(key.endswith("encoder.layers.0.self_attn.q_proj.weight") for key in shapes):
        variant = _text_variant(shapes, "final_layer_norm.weight")
        return Identity("text encoder", "", "transformers", variant)
    return None


def _text_variant(shapes: Shapes, norm: str) -> str:
    width = next((shape[0] for key, shape in shapes.items() if key.endswith(norm) and shape), 0)
    return _TEXT_WIDTHS.get(width, f"width {width}" if width else "")


def _embedding(shapes: Shapes) -> Identity | None:
    keys: Collection[str] = shapes.keys()
    tops = {key.split(".")[0] for key in keys}
    token = len(shapes) == 1 and all(re.fullmatch(r"<[^<>]+>", key) for key in keys)
    if not (tops & (_EMBEDDING_KEYS | {"string_to_param"}) or token) or len(shapes) > 8:
        return None
    widths = {shape[-1] for shape in shapes.values() if len(shape) in (1, 2)}
    if {"clip_g", "clip_l"} <= tops or 1280 in widths:
        return Identity("textual inversion", "sdxl")
    family = _BY_CONTEXT_WIDTH.get(next(iter(widths)), "") if len(widths) == 1 else ""
    return Identity("textual inversion", family)
