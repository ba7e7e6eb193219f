"""The tensors of an adapter file by module, of whatever kind it is and whatever is missing. Headers only.

`stored.open_adapter` takes plain and whole LoRA adapters; `inspect` and `check` also look at what it refuses.
Names of LyCORIS' tensors: KohakuBlueleaf/LyCORIS `lycoris/modules/*.py`; of PEFT's: `tuners/lora`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lorabooth.adapters import layouts
from lorabooth.adapters.rank_table import block_of
from lorabooth.adapters.stored import StoredAdapter, StoredFactor
from lorabooth.checkpoints.header import DTYPE_BYTES, Header
from lorabooth.checkpoints.tensors import read_scalar
from lorabooth.errors import AdapterError

# Ends of tensor names -> part of a module, where `layouts` does not know the name.
_PARTS = MappingProxyType(
    {
        "lora_down.weight": "lora_A",
        "lora_up.weight": "lora_B",
        "lora_A.weight": "lora_A",
        "lora_B.weight": "lora_B",
        "lora_A.default.weight": "lora_A",
        "lora_B.default.weight": "lora_B",
        "lora.down.weight": "lora_A",
        "lora.up.weight": "lora_B",
        "lora_mid.weight": "lora_mid",
        "lora_magnitude_vector": "dora_scale",
        "lora_magnitude_vector.weight": "dora_scale",
        "lora_magnitude_vector.default.weight": "dora_scale",
        **{part: part for part in ("alpha", "dora_scale", "scalar", "diff", "diff_b", "set_weight")},
        **{part: part for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
        **{f"lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
        **{f"{part}.weight": f"glora_{part}" for part in ("a1", "a2", "b1", "b2")},
        **{part: part for part in ("oft_blocks", "oft_diag", "rescale", "w_norm", "b_norm", "on_input")},
        **{"oft_R.weight": "oft_R", "oft_R.default.weight": "oft_R", "magnitude": "dora_scale"},
        **{"ia3_l": "ia3_l", "ia3_l.weight": "ia3_l", "ia3_l.default": "ia3_l"},
        "weight": "weight",
    }
)
_NEEDED = MappingProxyType(
    {
        "LoRA": ("lora_A", "lora_B"),
        "DoRA": ("lora_A", "lora_B"),
        "Tucker LoRA": ("lora_A", "lora_B"),
        "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    }
)
# Factors whose inner dimension is the rank: (part, axis of the rank).
_RANKED = (("lora_A", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0), ("glora_a1", 0))


@dataclass(frozen=True)
class FoundModule:
    """What a file holds of one module.

    Attributes:
        name: canonical where it is known, else as the file spells it.
        parts: "lora_A", "lora_B", "hada_w1_a", ... -> where it is.
        alpha: as stored or assumed; None where there is none; NaN where it is no single number.
    """

    name: str
    parts: Mapping[str, StoredFactor]
    alpha: float | None

    @property
    def kind(self) -> str:
        """By its parts: "LoRA", "DoRA", "LoHa", "LoKr" ...; "" for others."""
        kinds = {"hada_": "LoHa", "lokr_": "LoKr", "glora_": "GLoRA", "oft_": "OFT"}
        kinds |= {"dora_scale": "DoRA", "lora_mid": "Tucker LoRA", "lora_": "LoRA", "diff": "full difference"}
        for mark, kind in kinds.items():
            if any(part.startswith(mark) for part in self.parts):
                return kind
        return "(IA)3" if self.parts.keys() & {"on_input", "ia3_l"} else ""

    @property
    def missing(self) -> tuple[str, ...]:
        """Parts that its kind needs and the file lacks."""
        if self.kind == "LoKr":
            return tuple(
                whole
                for whole in ("lokr_w1", "lokr_w2")
                if whole not in self.parts and not {f"{whole}_a", f"{whole}_b"} <= self.parts.keys()
            )
        return tuple(part for part in _NEEDED.get(self.kind, ()) if part not in self.parts)

    @property
    def rank(self) -> int:
        """Inner dimension of its factors; 0 where it has none."""
        for part, axis in _RANKED:
            if part in self.parts and len(self.parts[part].shape) > axis:
                return self.parts[part].shape[axis]
        return 0

    @property
    def scale(self) -> float:
        """What its product is multiplied by: alpha / rank; 1 without an alpha."""
        return 1.0 if self.alpha is None or not self.rank else self.alpha / self.rank

    @property
    def block(self) -> str:
        """The part of the model that it is in, e.g. "down_blocks.0" or "text_encoder"."""
        try:
            return block_of(self.name)
        except AdapterError:
            return _foreign_block(self.name)

    @property
    def dims(self) -> tuple[int, int] | None:
        """(out, in) of the layer, as far as the parts tell; None where they do not."""
        pairs = (("lora_B", "lora_A"), ("hada_w1_a", "hada_w1_b"))
        for up, down in pairs:
            if up in self.parts and down in self.parts:
                shapes = self.parts[up].shape, self.parts[down].shape
                return (shapes[0][0], shapes[1][1]) if all(len(s) > 1 for s in shapes) else None
        if self.kind == "LoKr" and not self.missing:
            outer, inner = self._lokr("lokr_w1"), self._lokr("lokr_w2")
            return (outer[0] * inner[0], outer[1] * inner[1]) if outer and inner else None
        return None

    @property
    def size_bytes(self) -> int:
        """Of its tensors."""
        return sum(
            math.prod(factor.shape) * DTYPE_BYTES[factor.entry.dtype] for factor in self.parts.values()
        )

    def _lokr(self, whole: str) -> tuple[int, int] | None:
        if whole in self.parts:
            shape = self.parts[whole].shape
            return (shape[0], shape[1]) if len(shape) > 1 else None
        shapes = self.parts[f"{whole}_a"].shape, self.parts[f"{whole}_b"].shape
        return (shapes[0][0], shapes[1][1]) if all(len(s) > 1 for s in shapes) else None


@dataclass(frozen=True)
class Gathered:
    """The modules of one or several files.

    Attributes:
        modules: by name, in the files' order.
        unknown: tensors whose names say nothing.
        repeated: tensors that mean what another one means already.
    """

    modules: Mapping[str, FoundModule]
    unknown: tuple[str, ...]
    repeated: tuple[str, ...]


def layout_of(keys: Mapping[str, object]) -> str:
    """The layout of tensor names, without a look at whether it could be read as a LoRA."""
    if any(key.startswith(("lora_", "lycoris_")) for key in keys):
        return "kohya"
    return "peft" if any(key.startswith(layouts.PEFT_PREFIX) for key in keys) else "diffusers"


def gather(path: Path, header: Header, component: str = "denoiser") -> Gathered:
    """Collect a file's tensors by module.

    Args:
        path: the file; alphas are read from it.
        header: its header.
        component: whose adapter it is, if it is in PEFT's layout, which does not say.

    Raises:
        OSError: it cannot be read.
    """
    family = layouts.family_hint(header.entries, header.metadata)
    parts: dict[str, dict[str, StoredFactor]] = {}
    unknown, repeated = [], []
    for key, entry in header.entries.items():
        place = _place(key, component, family)
        if place is None:
            unknown.append(key)
            continue
        own = parts.setdefault(place[0], {})
        if place[1] in own:
            repeated.append(key)
            continue
        own[place[1]] = StoredFactor(path, key, entry, header.data_start, None)
    with path.open("rb", buffering=0) as file:
        modules = {name: FoundModule(name, own, _alpha(file.fileno(), own)) for name, own in parts.items()}
    for name in [name for name, module in modules.items() if not module.kind]:
        unknown += [factor.key for factor in modules.pop(name).parts.values()]
    return Gathered(modules, tuple(unknown), tuple(repeated))


def from_stored(adapter: StoredAdapter) -> dict[str, FoundModule]:
    """The modules of an adapter that is a whole LoRA."""
    return {
        name: FoundModule(name, {"lora_A": module.down, "lora_B": module.up}, module.alpha)
        for name, module in adapter.modules.items()
    }


def joined(parts: list[Gathered]) -> Gathered:
    """Several files' modules as one adapter's."""
    return Gathered(
        {name: module for part in parts for name, module in part.modules.items()},
        tuple(key for part in parts for key in part.unknown),
        tuple(key for part in parts for key in part.repeated),
    )


def _place(key: str, component: str, family: str) -> tuple[str, str] | None:
    """(module, part) of a tensor; a layer that holds several modules (q, k, v) is one, by its own name."""
    parsed = _parse(key, component, family)
    if parsed is not None:
        return parsed
    for count in (3, 2, 1):
        stem, end = _split(key, count)
        if stem and end in _PARTS:
            return _module(stem, component, family), _PARTS[end]
    return None


def _split(key: str, count: int) -> tuple[str, str]:
    pieces = key.rsplit(".", count)
    return (pieces[0], ".".join(pieces[1:])) if len(pieces) == count + 1 else ("", "")


def _module(stem: str, component: str, family: str) -> str:
    """A module's canonical name, asked for as if it had a plain LoRA."""
    parsed = _parse(f"{stem}.lora_down.weight", component, family)
    parsed = parsed or _parse(f"{stem}.lora_A.weight", component, family)
    return parsed[0] if parsed else stem


def _parse(key: str, component: str, family: str) -> tuple[str, str] | None:
    try:
        meaning = layouts.parse(key, component, family)
    except AdapterError:
        return None
    return (meaning.modules[0], meaning.kind) if meaning and len(meaning.modules) == 1 else None


def _foreign_block(name: str) -> str:
    """The block in a name that is not canonical, such as `lora_unet_double_blocks_0_img_attn_qkv`."""
    if match := re.match(r"(?:lora|lycoris)_te(\d?)_|text_encoder(?:_(\d))?\.", name):
        number = match[1] or match[2] or "1"
        return "text_encoder" if number == "1" else f"text_encoder_{number}"
    if match := re.search(r"((?:down|up|input|output)_blocks)[._](\d+)[._]", name):
        return f"{match[1]}.{match[2]}"
    stem = name.removeprefix("lora_unet_")
    match = re.search(r"(mid(?:dle)?_block|(?:[a-z]+_)?blocks|layers)(?=[._])", stem)
    return match[1] if match else "other"


def _alpha(descriptor: int, parts: Mapping[str, StoredFactor]) -> float | None:
    if "alpha" not in parts:
        return None
    value = read_scalar(descriptor, parts["alpha"].data_start, parts["alpha"].entry)
    return math.nan if value is None else value
