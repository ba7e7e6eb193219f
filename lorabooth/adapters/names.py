"""Names of adapted modules: canonical `<component>.<module path>`, and the world's spellings of them.

Canonical paths are diffusers' for denoisers and transformers' with the `text_model.` prefix for CLIP text
encoders (newer transformers versions drop the prefix from the module tree; files in the world keep it).
Literal tables only; importing this module imports no torch.
"""

from __future__ import annotations

import re
from types import MappingProxyType

from lorabooth.checkpoints import ldm
from lorabooth.errors import AdapterError

COMPONENTS = ("denoiser", "text_encoder", "text_encoder_2", "text_encoder_3")
KINDS = ("lora_A", "lora_B", "alpha")

_PATH = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")

# Parts of module paths, many of which hold underscores themselves. The set is closed and no entry is spelled
# by joining others, which is what makes underscore-joined names readable again.
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
)
_TOKEN = re.compile(r"(" + "|".join(sorted(_ATOMS, key=len, reverse=True)) + r"|\d+)(?:_|$)")

_KOHYA_COMPONENTS = MappingProxyType(
    {
        "lora_unet_": "denoiser",
        "lora_te1_": "text_encoder",
        "lora_te2_": "text_encoder_2",
        "lora_te_": "text_encoder",
    }
)
KOHYA_PREFIXES = MappingProxyType(
    {
        "sd1": MappingProxyType({"denoiser": "lora_unet_", "text_encoder": "lora_te_"}),
        "sd2": MappingProxyType({"denoiser": "lora_unet_", "text_encoder": "lora_te_"}),
        "sdxl": MappingProxyType(
            {"denoiser": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
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


def kohya_name(module: str, family: str) -> str:
    """Kohya's underscore-joined name of a canonical module, as the family's readers spell it.

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
    if module_from_kohya(name) != module:
        raise AdapterError(f"The kohya name of {module!r} would not be readable again, so it is not written.")
    return name


def module_from_kohya(name: str) -> str | None:
    """The canonical module of a kohya name (diffusers' or LDM's spelling), or None when it is not one."""
    for prefix, component in _KOHYA_COMPONENTS.items():
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            path = _from_ldm(rest) if component == "denoiser" else None
            path = path or _unjoin(rest)
            return f"{component}.{canonical_path(component, path)}" if path else None
    return None


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
