"""Which kind of layer an adapted module is, from its name: canonical, or as a foreign file spells it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

# The first that a name (dots written as underscores) ends in.
_KINDS = (
    ("attention q", r"(?:to_q|add_q_proj|q_proj)"),
    ("attention k", r"(?:to_k|add_k_proj|k_proj)"),
    ("attention v", r"(?:to_v|add_v_proj|v_proj)"),
    ("attention out", r"(?:to_out(?:_0)?|to_add_out|out_proj|attn_proj)"),
    ("attention qkv", r"(?:qkv|in_proj)"),
    ("feed-forward", r"_ff(?:_context)?_(?:net_)?\w+|mlp_(?:fc)?\w+|fc[12]|proj_mlp|feed_forward_\w+"),
    ("attention with feed-forward", r"single_blocks_\d+_linear[12]"),
    ("modulation", r"norm\w*_linear|mod(?:ulation)?_lin|adaLN_modulation_1|modulation_1"),
    ("time embedding", r"time_emb_proj|(?:time|add)_embedding_linear_\d|time_embed_\d|emb_layers_1"),
    ("time embedding", r"label_emb_\w+"),
    ("projections", r"proj_in|proj_out"),
    ("convolutions", r"conv\d?|conv_in|conv_out|conv_shortcut|_op|in_layers_2|out_layers_3"),
    ("convolutions", r"skip_connection"),
    ("convolutions", r"input_blocks_0_0|out_2"),
    ("embeddings", r"embedd(?:er|ings?)\w*|_in(?:_layer)?|text_projection"),
)
_PATTERNS = tuple((kind, re.compile(rf"(?:{pattern})$")) for kind, pattern in _KINDS)
_TEXT = re.compile(r"text_encoder|(?:lora|lycoris)_te\d?_")


def target_of(module: str) -> str:
    """The kind of layer: "attention q", "feed-forward", ...; in a text encoder "text encoder ..."."""
    name = module.replace(".", "_")
    kind = next((kind for kind, pattern in _PATTERNS if pattern.search(name)), "other layers")
    return f"text encoder {kind}" if _TEXT.match(module) else kind


def count(modules: Iterable[str]) -> dict[str, int]:
    """Kind of layer -> how many modules, in the order of the table; text encoders last."""
    counts = Counter(map(target_of, modules))
    order = [kind for kind, _ in _KINDS] + ["other layers"]
    ranked = [*order, *(f"text encoder {kind}" for kind in order)]
    return {kind: counts[kind] for kind in dict.fromkeys(ranked) if counts[kind]}
