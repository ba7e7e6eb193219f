"""Names of adapted modules: canonical `<component>.<module path>`, and the world's spellings of them.

Canonical paths are diffusers' for denoisers and transformers' with the `text_model.` prefix for CLIP text
encoders (newer transformers versions drop the prefix from the module tree; files in the world keep it).
Literal tables only; importing this module imports no torch.
"""

from __future__ import annotations

import re
from types import MappingProxyType

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

# SDXL's UNet in the original (LDM) naming, which kohya trains on: two layers a block and a sampler between.
_RESNET_TO_LDM = MappingProxyType(
    {
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
)
_TOP_TO_LDM = MappingProxyType(
    {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
)
_LDM_TO_RESNET = MappingProxyType({v.replace(".", "_"): k for k, v in _RESNET_TO_LDM.items()})
_LDM_TO_TOP = MappingProxyType({v.replace(".", "_"): k for k, v in _TOP_TO_LDM.items()})


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
    spelled = _to_ldm(path) if family == "sdxl" and component == "denoiser" else path
    name = prefix + spelled.replace(".", "_")
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


def _to_ldm(path: str) -> str:
    """Diffusers' SDXL UNet path -> LDM path."""
    if path in _TOP_TO_LDM:
        return _TOP_TO_LDM[path]
    if match := re.fullmatch(r"mid_block\.resnets\.([01])\.(\w+)", path):
        return f"middle_block.{2 * int(match[1])}.{_resnet_to_ldm(path, match[2])}"
    if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", path):
        return f"middle_block.1.{match[1]}"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", path):
        down, block, layer = match[1] == "down", int(match[2]), int(match[4])
        if layer < (2 if down else 3):
            stem = f"input_blocks.{3 * block + layer + 1}" if down else f"output_blocks.{3 * block + layer}"
            return (
                f"{stem}.0.{_resnet_to_ldm(path, match[5])}"
                if match[3] == "resnets"
                else f"{stem}.1.{match[5]}"
            )
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", path):
        return f"input_blocks.{3 * int(match[1]) + 3}.0.op"
    if match := re.fullmatch(r"up_blocks\.([01])\.upsamplers\.0\.conv", path):
        return f"output_blocks.{3 * int(match[1]) + 2}.2.conv"
    raise AdapterError(f"{path!r} is not a module of SDXL's UNet, so it has no name in its original layout.")


def _resnet_to_ldm(path: str, leaf: str) -> str:
    if leaf not in _RESNET_TO_LDM:
        raise AdapterError(
            f"{path!r} is not a module of SDXL's UNet, so it has no name in its original layout."
        )
    return _RESNET_TO_LDM[leaf]


def _from_ldm(name: str) -> str | None:
    """Underscore-joined LDM name -> diffusers' SDXL UNet path; None when it is not one."""
    if name in _LDM_TO_TOP:
        return _LDM_TO_TOP[name]
    match = re.fullmatch(r"(?:(input|output)_blocks_(\d+)|(middle)_block)_(\d+)_(.+)", name)
    if match is None:
        return None
    side, part, leaf = match[1] or match[3], int(match[4]), match[5]
    tail = _unjoin(leaf)
    if side == "middle":
        if part == 1:
            return f"mid_block.attentions.0.{tail}" if tail else None
        resnet = _LDM_TO_RESNET.get(leaf)
        return f"mid_block.resnets.{part // 2}.{resnet}" if part in (0, 2) and resnet else None
    index = int(match[2]) - (1 if side == "input" else 0)
    if index < 0:
        return None
    block, layer = divmod(index, 3)
    stem = f"{'down' if side == 'input' else 'up'}_blocks.{block}"
    if side == "input" and layer == 2:
        return f"{stem}.downsamplers.0.conv" if part == 0 and leaf == "op" else None
    if side == "output" and leaf == "conv":
        return f"{stem}.upsamplers.0.conv" if layer == 2 and part in (1, 2) else None
    if part == 0:
        resnet = _LDM_TO_RESNET.get(leaf)
        return f"{stem}.resnets.{layer}.{resnet}" if resnet else None
    return f"{stem}.attentions.{layer}.{tail}" if part == 1 and tail else None
