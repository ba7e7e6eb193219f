"""The typed recipe: what to learn, on which base, how.

"auto" stands for "what the family does best" and is replaced before a run starts; 0 is "off".
This file is the schema; `io` reads, writes and compares recipes, `check` explains what is wrong with one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

if TYPE_CHECKING:
    from pathlib import Path

Auto = Literal["auto"]


class Section(BaseModel):
    """A recipe's section: frozen, unknown keys forbidden, no silent conversion of types.

    A field's docstring becomes its description, and the comment above its key in a written recipe.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        str_strip_whitespace=True,
        use_attribute_docstrings=True,
    )


class ModelSection(Section):
    """The base model."""

    base: str = "pocket"
    """"pocket", a diffusers folder, a .safetensors checkpoint, or a hub id. Paths: relative to this file."""
    family: str = "auto"
    """Kind of base model ("sd1", "sd2", ...); "auto" reads it from the files."""
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
    """The prompt of the photos; "{token}" and "{noun}" are replaced."""
    captions: bool = False
    """Read same-named .txt files; "{token}" and "{noun}" in them are replaced."""


class PriorSection(Section):
    """Prior preservation: the class is kept while the subject is learned (DreamBooth eq. 2)."""

    mode: Literal["generated", "images", "distill", "none"] = "generated"
    """Class images "generated" by the base, your own "images", "distill" (needs no images), or "none"."""
    weight: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Weight of the class examples in the loss (the paper's lambda)."""
    count: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Class images per class noun (mode "generated")."""
    prompt: str = "auto"
    """Class prompt, may hold "{noun}"; "auto" is the subject's template without the token."""
    images: str = ""
    """Folder of your own class images (mode "images"), relative to the recipe file."""
    sampler_steps: Auto | Annotated[int, Field(ge=1, le=1000)] = "auto"
    """Sampler steps per class image."""
    guidance: Auto | Annotated[float, Field(ge=0, le=50)] = "auto"
    """Guidance of class images."""
    guidance_interval: (
        Auto | Annotated[tuple[Annotated[float, Field(ge=0, le=1000)], ...], Field(strict=False)]
    ) = "auto"
    """Noise levels [low, high] at which it acts: cheaper, more variety (arXiv 2404.07724); []: all."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of drawing class images; "auto" is model.dtype, but bf16 on CPUs that have it natively."""
    every: Annotated[int, Field(ge=1, le=20)] = 1
    """Class examples are in every so many steps only, at so many times their weight: less time, same sum."""
    pool: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Mode "distill": targets stored per class example before training, so that a step has one forward."""


class AdapterSection(Section):
    """The low-rank adapter (LoRA, arXiv 2106.09685)."""

    rank: Auto | Annotated[int, Field(ge=1, le=1024)] = "auto"
    """Rank of the adapter's matrices: more can learn more detail, and makes a larger file."""
    alpha: Auto | Annotated[float, Field(gt=0, le=4096)] = "auto"
    """Scale is alpha / rank; "auto" is alpha = rank."""
    targets: str = "attn"
    """A preset of the family: "attn", "attn+ff", "attn+ff+conv"."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of adapter inputs dropped while training."""
    text_encoder: bool = False
    """Train the text encoder too; helps faces, needs more memory."""
    text_encoder_rank: Auto | Annotated[int, Field(ge=1, le=1024)] = "auto"
    """Rank in the text encoder; "auto" is the same rank."""


class OptimSection(Section):
    """Optimizer and schedule. Steps count optimizer steps."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """8-bit ones need bitsandbytes, and are proven by one step before they are used."""
    strict: bool = False
    """Stop, instead of going on with AdamW, where an 8-bit optimizer does not work."""
    lr: Auto | Annotated[float, Field(gt=0, le=1)] = "auto"
    """Peak learning rate."""
    text_encoder_lr: Auto | Annotated[float, Field(gt=0, le=1)] = "auto"
    """Peak learning rate of the text encoder's adapter."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.01
    """AdamW's decoupled weight decay."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate goes on after the warmup; cosine and linear fall to 0 at the last step."""
    warmup_steps: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    """Steps over which the learning rate rises from 0."""
    steps: Auto | Annotated[int, Field(ge=1, le=10_000_000)] = "auto"
    """Optimizer steps of the whole run."""
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 1
    """Subject examples per forward and device; as many class examples come with them."""
    accumulate: Annotated[int, Field(ge=1, le=1024)] = 1
    """Forwards per optimizer step."""
    max_grad_norm: Annotated[float, Field(ge=0, le=1e9)] = 1.0
    """Gradients are scaled down to this norm; 0 is off."""


class LossSection(Section):
    """Loss weighting over noise levels."""

    weighting: Literal["none", "min_snr"] = "none"
    """"min_snr" weighs noise levels as in arXiv 2303.09556."""
    snr_gamma: Annotated[float, Field(gt=0, le=1e6)] = 5.0
    """gamma of min_snr."""


class ImagesSection(Section):
    """From photos to pixels."""

    resolution: Auto | Annotated[int, Field(ge=8, le=8192)] = "auto"
    """Side of a square crop in pixels; "auto" is what the base was trained on."""
    buckets: bool = False
    """Keep aspect ratios (areas near resolution squared) instead of square crops."""
    crop: Literal["center", "random"] = "center"
    """Where photos are cropped."""
    flip: bool = False
    """Mirror photos at random; not for subjects with writing or a left and a right."""


class MemorySection(Section):
    """Precision and memory techniques while training. `memory = "auto"` is short for `fit = true`."""

    fit: bool = False
    """Choose the keys that are not written here so that the run fits the budget; see `lorabooth plan`."""
    budget: str = "auto"
    """Memory that `fit` may use: "8GiB", "8GB", "8192MiB"; "auto" is what the device has free."""
    on_oom: Literal["stop", "step_down"] = "stop"
    """When memory runs out: stop and name what to try, or "step_down": go on with the next technique."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute (autocast) precision of the training step; adapter weights are always float32."""
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    """Attention kernel; proven forward and backward before it is used."""
    checkpointing: bool = False
    """Gradient checkpointing: less memory, slower steps."""
    checkpoint_blocks: Auto | Annotated[int, Field(ge=1, le=10_000)] = "auto"
    """Blocks of the denoiser that are computed again in the backward pass, outermost first; "auto" is all."""
    checkpoint_offload: bool = False
    """What checkpoints keep waits in host memory."""
    base_precision: Literal["auto", "fp32", "bf16", "fp16", "int8", "nf4", "fp8"] = "auto"
    """Precision that the frozen denoiser is held in while training; "nf4" needs bitsandbytes."""
    stream: bool = False
    """The denoiser's frozen weights wait in host memory and visit the device block by block."""
    vae_slicing: bool = False
    """The VAE takes images one at a time."""
    vae_tiling: bool = False
    """The VAE takes images in overlapping tiles: less memory, slightly other latents and pixels."""
    in_turn: bool = False
    """Images are drawn with denoiser and VAE on the device one at a time; the other waits in host memory."""
    images_at_once: Auto | Annotated[int, Field(ge=1, le=64)] = "auto"
    """Images drawn together; "auto": class images 8 on a GPU and 4 on a CPU, samples all of a prompt."""
    hollow: bool = False
    """Train a U-Net's outer levels, its deep middle not in memory (Hollowed Net, arXiv 2411.01179)."""
    hollow_keep: Auto | Annotated[int, Field(ge=1, le=64)] = "auto"
    """Outer levels that stay; "auto": as many as leave at least half of the denoiser's weights out."""
    hollow_pool: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Noises and timesteps per photo and class image for which the middle's output is stored on disk."""


def expanded_memory(value: object) -> object:
    """What `memory = "auto"` is short for; other values as they are."""
    return {"fit": True} if value == "auto" else value


class SpeedSection(Section):
    """What makes steps faster; results differ in the last bits at most."""

    compile: Literal["off", "on", "auto"] = "off"
    """Compile the denoiser's repeated blocks; "auto" measures, and keeps it where it pays within the run."""
    cuda_graph: bool = False
    """Record the whole training step as a CUDA graph, launched at once; for small batches on fast GPUs."""


class EvaluationSection(Section):
    """What results are measured with: "auto", "pocket", a hub id, or a folder (relative to this file)."""

    dino: str = "auto"
    """Subject encoder (DINO, PRES); "auto": the base's own if it has one, else facebook/dino-vits16."""
    clip: str = "auto"
    """CLIP (CLIP-I, CLIP-T); "auto": the base's own if it has one, else openai/clip-vit-base-patch32."""
    lpips: str = "auto"
    """LPIPS (DIV, drift), may be a .safetensors file; "auto": a stand-in by the subject encoder, named so."""


class RunSection(Section):
    """Where the run goes and what it writes on the way. 0 is off."""

    out: str = "auto"
    """Run folder, relative to the recipe file; "auto" is runs/NAME where lorabooth is started."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Every random draw of the run follows from it."""
    checkpoint_every: Annotated[int, Field(ge=0, le=10_000_000)] = 100
    """Steps between checkpoints."""
    keep: Annotated[int, Field(ge=0, le=1_000_000)] = 2
    """Checkpoints kept; 0 keeps all."""
    sample_every: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    """Steps between previews."""
    sample_prompts: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """May hold "{token}" and "{noun}"; empty: the subject's prompt and its class prompt."""
    sample_count: Annotated[int, Field(ge=0, le=64)] = 4
    """Images per sample prompt, each with its own seed; 0: no samples at all, not even at the end."""
    sample_steps: Auto | Annotated[int, Field(ge=1, le=1000)] = "auto"
    """Sampler steps of samples, and of the images that a checkpoint is chosen by."""
    sample_guidance: Auto | Annotated[float, Field(ge=0, le=50)] = "auto"
    """Guidance of samples, and of the images that a checkpoint is chosen by."""
    select: Literal["last", "balanced", "subject", "prompt"] = "last"
    """Checkpoint that becomes the result: the "last", or the best by DINO x CLIP-T, DINO or CLIP-T."""
    select_prompts: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Drawn and measured at each checkpoint, with "{token}" and "{noun}"; empty: four plain scenes."""
    select_images: Annotated[int, Field(ge=1, le=64)] = 2
    """Images per selection prompt."""
    stop_early: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """End the run after so many checkpoints in a row below the best one before them; 0 is never."""
    validation_every: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    """Steps between validation losses: fixed noise and timesteps, the subject's and the class's apart."""
    validation_photos: Annotated[int, Field(ge=0, le=1000)] = 0
    """Last photos of each subject that validation keeps from training; 0: the training photos serve."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics go besides metrics.jsonl."""


class Recipe(Section):
    """Everything a run needs to know.

    A recipe built in Python is checked field by field; the rules that join several keys are
    `check`, which every way of loading a recipe applies.
    """

    model: ModelSection = ModelSection()
    subjects: Annotated[tuple[SubjectSection, ...], Field(strict=False)] = ()
    prior: PriorSection = PriorSection()
    adapter: AdapterSection = AdapterSection()
    optim: OptimSection = OptimSection()
    loss: LossSection = LossSection()
    images: ImagesSection = ImagesSection()
    memory: MemorySection = MemorySection()
    speed: SpeedSection = SpeedSection()
    evaluation: EvaluationSection = EvaluationSection()
    run: RunSection = RunSection()

    @field_validator("memory", mode="before")
    @classmethod
    def _memory_in_short(cls, value: object) -> object:
        """`memory = "auto"` instead of a section."""
        return expanded_memory(value)

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
        """Read and check a recipe file; paths in it are relative to it.

        Raises:
            RecipeError: the file cannot be read, or the recipe is wrong: all errors at once.
        """
        from lorabooth.recipe.io import load

        return load(path)
