"""The typed recipe: what to learn, on which base, how. TOML in and out.

"auto" stands for "what the family does best" and is replaced before a run starts; 0 is "off".
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]


class Section(BaseModel):
    """A recipe's section: frozen, unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)


class ModelSection(Section):
    """The base model."""

    base: str = "pocket"
    """"pocket", a diffusers folder, a .safetensors checkpoint, or a hub id."""
    family: str = "auto"
    revision: str = ""
    """Hub revision; resolved to a commit and recorded. Empty: the default branch."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision that frozen weights are loaded in for caching and images."""


class SubjectSection(Section):
    """One subject to learn."""

    images: str
    """Folder of photos, relative to the recipe file."""
    noun: str
    """The class noun: "dog"."""
    token: str = "auto"
    """The identifier; "auto" looks a rare one up in the base's own tokenizer."""
    template: str = "a photo of a {token} {noun}"
    captions: bool = False
    """Read same-named .txt files; "{token}" and "{noun}" in them are replaced."""


class PriorSection(Section):
    """Prior preservation (DreamBooth eq. 2)."""

    mode: Literal["generated", "images", "distill", "none"] = "generated"
    weight: Annotated[float, Field(ge=0, le=100)] = 1.0
    """lambda."""
    count: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Class images per class noun (mode "generated")."""
    prompt: str = "auto"
    """Class prompt; "auto" is the subject's template without the token."""
    images: str = ""
    """Folder of the user's own class images (mode "images")."""
    sampler_steps: Auto | Annotated[int, Field(ge=1, le=1000)] = "auto"
    guidance: Auto | Annotated[float, Field(ge=0, le=50)] = "auto"


class AdapterSection(Section):
    """The low-rank adapter (LoRA, arXiv 2106.09685)."""

    rank: Auto | Annotated[int, Field(ge=1, le=1024)] = "auto"
    alpha: Auto | Annotated[float, Field(gt=0, le=4096)] = "auto"
    """Scale is alpha / rank; "auto" is alpha = rank."""
    targets: str = "attn"
    """A preset of the family: "attn", "attn+ff", "attn+ff+conv"."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    text_encoder: bool = False
    text_encoder_rank: Auto | Annotated[int, Field(ge=1, le=1024)] = "auto"


class OptimSection(Section):
    """Optimizer and schedule. Steps count optimizer steps."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    lr: Auto | Annotated[float, Field(gt=0, le=1)] = "auto"
    text_encoder_lr: Auto | Annotated[float, Field(gt=0, le=1)] = "auto"
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.01
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    steps: Auto | Annotated[int, Field(ge=1, le=10_000_000)] = "auto"
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 1
    """Subject examples per forward and device; as many class examples come with them."""
    accumulate: Annotated[int, Field(ge=1, le=1024)] = 1
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0


class LossSection(Section):
    """Loss weighting over noise levels."""

    weighting: Literal["none", "min_snr"] = "none"
    snr_gamma: Annotated[float, Field(gt=0)] = 5.0


class ImagesSection(Section):
    """From photos to pixels."""

    resolution: Auto | Annotated[int, Field(ge=8, le=8192)] = "auto"
    buckets: bool = False
    """Keep aspect ratios (areas near resolution squared) instead of square crops."""
    crop: Literal["center", "random"] = "center"
    flip: bool = False


class MemorySection(Section):
    """Precision and memory techniques while training."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute (autocast) precision of the training step; adapter weights are always float32."""
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    checkpointing: bool = False
    base_precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision that the frozen denoiser is held in while training."""


class RunSection(Section):
    """Where the run goes and what it writes on the way. 0 is off."""

    out: str = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    checkpoint_every: Annotated[int, Field(ge=0)] = 100
    keep: Annotated[int, Field(ge=0)] = 2
    """Checkpoints kept; 0 keeps all."""
    sample_every: Annotated[int, Field(ge=0)] = 0
    sample_prompts: tuple[str, ...] = ()
    """May hold "{token}" and "{noun}"; empty: the subject's prompt and its class prompt."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"


class Recipe(Section):
    """Everything a run needs to know."""

    model: ModelSection = ModelSection()
    subjects: tuple[SubjectSection, ...] = ()
    prior: PriorSection = PriorSection()
    adapter: AdapterSection = AdapterSection()
    optim: OptimSection = OptimSection()
    loss: LossSection = LossSection()
    images: ImagesSection = ImagesSection()
    memory: MemorySection = MemorySection()
    run: RunSection = RunSection()
