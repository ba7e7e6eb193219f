"""Names of adapted modules: canonical `<component>.<module path>`, and the world's spellings of them.

Canonical paths are diffusers' for denoisers and transformers' with the `text_model.` prefix for CLIP text
encoders (newer transformers versions drop the prefix from the module tree; files in the world keep it).
Literal tables only; importing this module imports no torch.
"""

from __future__ import annotations

import re
from types import MappingProxyType

from lorabooth.adapters import transformer_names
from lorabooth.checkpoints import ldm
from lorabooth.errors import AdapterError

COMPONENTS = ("denoiser", "text_encoder", "text_encoder_2", "text_encoder_3")
KINDS = ("lora_A", "lora_B", "alpha")

_PATH = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")

# Parts of module paths, many of which hold underscores themselves. The set is closed and the longest entry
# wins ("proj_mlp" is one part, never "proj" in which there is an "mlp"), which is what makes names joined by
# underscores readable again.
_ATOMS = (
    # UNet2DConditionModel
    *("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "conv_in", "conv_out", "conv_shortcut"),
    *("time_embedding", "add_embedding", "time_emb_proj", "linear_1", "linear_2", "proj_in", "proj_out"),
    *("to_q", "to_k", "to_v", "to_out", "add_k_proj", "add_q_proj", "add_v_proj", "encoder_hid_proj"),
    *("attentions", "resnets", "downsamplers", "upsamplers", "attn1", "attn2", "ff", "net", "proj"),
    *("conv", "conv1", "conv2"),
    # CLIPTextModel, CLIPTextModelWithProjection
    *("text_model", "text_projection", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    *("encoder", "layers", "mlp", "fc1", "fc2"),
    # FluxTransformer2DModel, SD3Transformer2DModel
    *("single_transformer_blocks", "attn", "ff_context", "to_add_out", "proj_mlp", "norm", "norm1"),
    *("norm_out", "norm1_context", "linear", "x_embedder", "context_embedder", "pos_embed"),
    *("time_text_embed", "timestep_embedder", "text_embedder", "guidance_embedder"),
)
_TOKEN = re.compile(r"(" + "|".join(sorted(_ATOMS, key=len, reverse=True)) + r"|\d+)(?:_|$)")

# T5EncoderModel
_T5 = re.compile(r"encoder_block_(\d+)_layer_(\d)_(SelfAttention_[qkvo]|DenseReluDense_(?:wi_[01]|wi|wo))")
T5_TOP = "encoder.block."
"""How the names of T5's modules begin."""

# The T5 encoder is FLUX's second text encoder and SD3's third; kohya numbers it 3 in both, as ComfyUI does.
T5 = "t5"
FLAT_PREFIXES = MappingProxyType(
    {
        "lora_unet_": "denoiser",
        "lora_transformer_": "denoiser",  # OneTrainer before 2026, ai-toolkit
        "lora_prior_unet_": "denoiser",  # OneTrainer, ComfyUI
        "lycoris_": "denoiser",  # LyCORIS as SimpleTuner calls it
        "lora_te1_": "text_encoder",
        "lora_te2_": "text_encoder_2",
        "lora_te3_": T5,
        "lora_te_": "text_encoder",
        "lora_prior_te_": "text_encoder",
    }
)
"""How underscore-joined names begin -> component, or T5 where that depends on the family."""

_SD = MappingProxyType({"denoiser": "lora_unet_", "text_encoder": "lora_te_"})
_SDXL = MappingProxyType(
    {"denoiser": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
)
KOHYA_PREFIXES = MappingProxyType(
    {
        "sd1": _SD,
        "sd2": _SD,
        "sdxl": _SDXL,
        "sd3": MappingProxyType({**_SDXL, "text_encoder_3": "lora_te3_"}),
        "flux": MappingProxyType(
            {"denoiser": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te3_"}
        ),
    }
)
"""Family -> component -> prefix of kohya's names; readers such as A1111 want exactly these."""

_LDM_TO_RESNET = MappingProxyType({joined.replace(".", "_"): joined for joined in ldm.RESNET_FROM_LDM})
_LDM_TO_TOP = MappingProxyType({joined.replace(".", "_"): joined for joined in ldm.TOP_FROM_LDM})


def split_key(key: str) -> tuple[str, str]:
    """Split a canonical tensor name into (`<component>.<module path>`, kind).

    Raises:
        AdapterError: not a canonical name.
    """
    module, _, kind = key.rpartition(".")
    if kind not in KINDS:
        raise AdapterError(f"{key!r} is not an adapter tensor's name: it must end in {', '.join(KINDS)}.")
    split_module(module)
    return module, kind


def split_module(module: str) -> tuple[str, str]:
    """Split `<component>.<module path>` into its two parts.

    Raises:
        AdapterError: unknown component or malformed path.
    """
    component, _, path = module.partition(".")
    if component not in COMPONENTS or not _PATH.fullmatch(path):
        raise AdapterError(
            f"{module!r} is not an adapted module's name: it begins with one of {', '.join(COMPONENTS)}."
        )
    return component, path


def canonical_path(component: str, path: str) -> str:
    """The canonical path of a module found at `path` in a loaded component or a file.

    A CLIP text encoder's layers get the `text_model.` prefix where it is absent; all else is unchanged.
    """
    if component.startswith("text_encoder") and path.startswith("encoder.layers."):
        return f"text_model.{path}"
    return path


def flat_path(component: str, path: str) -> str:
    """The path without `text_model.`, as in the module tree of newer transformers versions."""
    return path.removeprefix("text_model.") if component.startswith("text_encoder") else path


def t5_component(family: str) -> str:
    """Which component the T5 encoder is."""
    return "text_encoder_2" if family == "flux" else "text_encoder_3"


def kohya_name(module: str, family: str) -> str:
    """Kohya's underscore-joined name of a canonical module, as the family's readers spell it.

    For FLUX's and SD3's denoiser the module must be a layer of the original code (`fused.to_original`), since
    that is what kohya's names follow.

    Raises:
        AdapterError: the family or the module has no such name, or the name could not be read back.
    """
    component, path = split_module(module)
    if family not in KOHYA_PREFIXES:
        raise AdapterError(
            f"No kohya names are known for family {family!r} (known: {', '.join(KOHYA_PREFIXES)})."
        )
    prefix = KOHYA_PREFIXES[family].get(component)
    if prefix is None:
        raise AdapterError(f"Family {family!r} has no {component!r}, so {module!r} has no kohya name.")
    name = prefix + _spelled(path, component, family).replace(".", "_")
    if component == "denoiser" and family in transformer_names.FAMILIES:
        original = transformer_names.from_flat(name.removeprefix(prefix))
        readable = original is not None and original.path == path
    else:
        readable = module_from_kohya(name, family) == module
    if not readable:
        raise AdapterError(f"The kohya name of {module!r} would not be readable again, so it is not written.")
    return name


def module_from_kohya(name: str, family: str = "") -> str | None:
    """The canonical module of a kohya name (diffusers' or LDM's spelling), or None when it is not one.

    Names of FLUX's and SD3's original layers are not read here, as several modules can be in one.

    Args:
        name: without the tensor's suffix.
        family: decides which text encoder T5 is.
    """
    for prefix, found in FLAT_PREFIXES.items():
        if name.startswith(prefix):
            component = t5_component(family) if found == T5 else found
            rest = name.removeprefix(prefix)
            path = _from_ldm(rest) if component == "denoiser" else _t5(rest)
            path = path or _unjoin(rest)
            return f"{component}.{canonical_path(component, path)}" if path else None
    return None


def _t5(name: str) -> str | None:
    """`encoder_block_0_layer_0_SelfAttention_q` -> dotted; None when it is not one."""
    match = _T5.fullmatch(name)
    if match is None:
        return None
    layer, _, leaf = match[3].partition("_")
    return f"encoder.block.{match[1]}.layer.{match[2]}.{layer}.{leaf}"


def _unjoin(name: str) -> str | None:
    """Undo `".".join(parts)` -> `"_".join(parts)` with the closed vocabulary; None when a part is unknown."""
    parts: list[str] = []
    at = 0
    while at < len(name):
        match = _TOKEN.match(name, at)
        if match is None:
            return None
        parts.append(match.group(1))
        at = match.end()
    # A trailing underscore is swallowed by the last token; such a name was not made by joining.
    return ".".join(parts) if parts and not name.endswith("_") else None


def _spelled(path: str, component: str, family: str) -> str:
    """The path that kohya's names follow: SDXL's UNet has its original (LDM) one, all else diffusers'."""
    if family != "sdxl" or component != "denoiser":
        return path
    original = ldm.sdxl_unet_to_ldm(path)
    if original is None:
        raise AdapterError(
            f"{path!r} is not a module of SDXL's UNet, so it has no name in its original layout."
        )
    return original


def _from_ldm(name: str) -> str | None:
    """Underscore-joined LDM name -> diffusers' UNet path; None when it is not one."""
    if name in _LDM_TO_TOP:
        return ldm.unet_from_ldm(_LDM_TO_TOP[name])
    match = re.fullmatch(r"((?:input|output)_blocks_\d+|middle_block)_(\d+)_(.+)", name)
    if match is None:
        return None
    leaf = match[3] if match[3] == "op" else _LDM_TO_RESNET.get(match[3]) or _unjoin(match[3])
    stem = match[1].replace("blocks_", "blocks.")
    return ldm.unet_from_ldm(f"{stem}.{match[2]}.{leaf}") if leaf else None
