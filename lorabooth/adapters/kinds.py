"""What kind of file tensor names are of: LoRA, its relatives, an embedding, a checkpoint. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection

# Parts of tensor names; the first kind that any name holds a mark of decides (LyCORIS `lycoris/modules/*.py`,
# ComfyUI `comfy/weight_adapter/*.py`, PEFT `tuners/*/layer.py`). A DoRA also holds LoRA's own factors.
_MARKS = (
    ("LoHa", (".hada_w1_a", ".hada_w1_b", ".hada_w2_a")),
    ("LoKr", (".lokr_w1", ".lokr_w2")),
    ("OFT", (".oft_blocks", ".oft_diag", ".oft_R.")),
    ("GLoRA", (".a1.weight", ".b1.weight")),
    ("(IA)3", (".ia3_l", ".on_input")),
    ("Tucker LoRA", (".lora_mid.",)),
    ("LoRA", (".lora_down.", ".lora_up.", ".lora_A", ".lora_B", "_lora.down.", "_lora.up.")),
    ("LoRA", (".lora.down.", ".lora.up.", ".lora_linear_layer.", "_lora1.down.", "_lora2.down.")),
)
_DORA_ENDS = (".dora_scale", ".lora_magnitude_vector", ".magnitude")
_FULL_ENDS = (".diff", ".diff_b", ".set_weight", ".w_norm", ".b_norm")
_EMBEDDINGS = frozenset({"emb_params", "clip_l", "clip_g", "clip_h", "t5", "t5xxl"})
# How diffusers' script names a learned word: "<cat-toy>".
_LEARNED_WORD = re.compile(r"<[^<>]+>")


def kind_of(keys: Collection[str]) -> str:
    """What a file of these tensor names is.

    Returns:
        "LoRA", "LoHa", "LoKr", "DoRA", "GLoRA", "OFT", "(IA)3", "Tucker LoRA" (LyCORIS' LoCon with a middle
        factor), "full difference", "textual inversion", "checkpoint", or "" for none of these.
    """
    found = next((kind for kind, marks in _MARKS if any(m in key for key in keys for m in marks)), "")
    dora = any(key.endswith(_DORA_ENDS) or ".lora_magnitude_vector." in key for key in keys)
    if found:
        return "DoRA" if dora and found == "LoRA" else found
    if dora:
        return "DoRA"
    if any(key.endswith(_FULL_ENDS) for key in keys):
        return "full difference"
    if any(_is_embedding(key) for key in keys):
        return "textual inversion"
    return "checkpoint" if any(key.endswith((".weight", ".bias")) for key in keys) else ""


def _is_embedding(key: str) -> bool:
    return key in _EMBEDDINGS or key.startswith("string_to_param") or bool(_LEARNED_WORD.fullmatch(key))
