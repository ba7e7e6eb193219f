"""What `lorabooth inspect` tells of a file or folder: plain values, ready for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class BlockFacts:
    """One part of a model that an adapter changes.

    Attributes:
        name: e.g. "down_blocks.0", "mid_block", "text_encoder".
        modules: adapted modules in it.
        rank_min: smallest rank of them; 0 where they have none.
        rank_max: largest.
        alpha_min: smallest alpha; None where none is stored or assumed.
        alpha_max: largest.
        sampled: modules whose norm was computed.
        norm: root mean square, over those, of the Frobenius norm of a module's effect at strength 1; None
            where none was computed.
    """

    name: str
    modules: int
    rank_min: int
    rank_max: int
    alpha_min: float | None
    alpha_max: float | None
    sampled: int
    norm: float | None


@dataclass(frozen=True)
class ComponentFacts:
    """One component of a base model, or of a file that is one.

    Attributes:
        name: "denoiser", "vae", "text_encoder", ..., or a diffusers folder's own name of it.
        class_name: as its config says, "" where there is none.
        tensors: how many.
        parameters: numbers in them.
        size_bytes: of them.
        dtypes: safetensors' name of a type -> parameters.
        quantization: how it was quantized, "" if it was not.
        variants: other sets of the same weights beside it, e.g. ("fp16",).
        files: number of weight files (shards).
    """

    name: str
    class_name: str
    tensors: int
    parameters: int
    size_bytes: int
    dtypes: Mapping[str, int]
    quantization: str
    variants: tuple[str, ...]
    files: int


@dataclass(frozen=True)
class Inspection:
    """A weight file or folder, looked at from outside. The attributes are the keys of `inspect --json`.

    Attributes:
        name: of the file or folder, without where it is.
        kind: "LoRA", "LoHa", "LoKr", "DoRA", ... for adapters; "checkpoint", "UNet", "transformer", "VAE",
            "text encoder", "ControlNet", "textual inversion", ... for others; "" where it cannot be told.
        is_adapter: whether `kind` is one of the adapters'.
        family: of base models, e.g. "sd1"; "" where it cannot be told.
        family_name: what people call it.
        layout: "kohya", "diffusers", "peft"; of base models "original", "diffusers", "transformers".
        variant: what sets it apart in its family or kind: "inpainting", "refiner", "CLIP ViT-L", ...
        prediction: "epsilon", "v_prediction", "flow"; "" where nothing says it.
        base: name or hub id of the base that an adapter was trained on.
        trigger_words: phrases that call the subject.
        tags: the most frequent tags of the training captions, each with its count.
        steps: optimizer steps; 0 where it is not known.
        facts: other things that the metadata says, label -> text.
        tensors: how many.
        parameters: numbers in them.
        size_bytes: of the file, or of a folder's weight files.
        dtypes: safetensors' name of a type -> parameters.
        quantization: "" where weights are not quantized.
        ema: whether a second, averaged copy of the denoiser is there.
        modules: adapted modules.
        ranks: smallest and largest rank; (0, 0) for what is no adapter.
        targets: kind of layer -> adapted modules.
        blocks: of an adapter.
        sampled: adapted modules whose norm was computed.
        components: of a base model.
        notes: what was assumed or left out.
        problems: what is wrong with it.
    """

    name: str
    kind: str = ""
    is_adapter: bool = False
    family: str = ""
    family_name: str = ""
    layout: str = ""
    variant: str = ""
    prediction: str = ""
    base: str = ""
    trigger_words: tuple[str, ...] = ()
    tags: tuple[tuple[str, int], ...] = ()
    steps: int = 0
    facts: Mapping[str, str] = field(default_factory=dict)
    tensors: int = 0
    parameters: int = 0
    size_bytes: int = 0
    dtypes: Mapping[str, int] = field(default_factory=dict)
    quantization: str = ""
    ema: bool = False
    modules: int = 0
    ranks: tuple[int, int] = (0, 0)
    targets: Mapping[str, int] = field(default_factory=dict)
    blocks: tuple[BlockFacts, ...] = ()
    sampled: int = 0
    components: tuple[ComponentFacts, ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the attributes' names."""
        return asdict(self)
