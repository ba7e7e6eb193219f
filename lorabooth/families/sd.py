"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a KL autoencoder, a UNet with cross-attention.

The two differ only in defaults: what a checkpoint predicts (epsilon or v), its sizes and its tokenizer's
padding are read from its own files. Defaults: learning rate, rank, steps and guidance are what LoRA on 3-6
photos is commonly trained with on these bases (rate 1e-4 on the UNet, ranks 4-16, 500-1000 steps); 5e-5 for
the text encoder follows cloneofsimo/lora; resolutions are those the published checkpoints were trained at.

Legend of shape suffixes: B batch, C latent channels, h w latent size, H W pixels, L tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorabooth.errors import BaseModelError
from lorabooth.families.base import Defaults, Parts, Source
from lorabooth.families.quiet import quiet_libraries
from lorabooth.families.sd_load import config_of, load_parts, load_vae, skeleton_parts
from lorabooth.types import Cond, Geometry, Moments

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from lorabooth.objective.paths import NoisePath

_ATTENTION = (r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",)
_FEED_FORWARD = (r".*\.ff\.net\.(0\.proj|2)", r".*\.attentions\.\d+\.(proj_in|proj_out)")
_CONVOLUTIONS = (
    r".*\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)",
    r".*\.(downsamplers|upsamplers)\.\d+\.conv",
)
_PROMPTS_AT_ONCE = 16


@dataclass(frozen=True)
class StableDiffusion:
    """The family protocol for Stable Diffusion 1.x and 2.x.

    Attributes:
        name: "sd1" or "sd2".
        defaults: for the published checkpoints; `defaults_for` fits them to a base of another size.
    """

    name: str
    defaults: Defaults

    @property
    def targets(self) -> Mapping[str, Sequence[str]]:
        """Presets: attention only, with feed-forward and projections, and with residual blocks too."""
        return MappingProxyType(
            {
                "attn": _ATTENTION,
                "attn+ff": (*_ATTENTION, *_FEED_FORWARD),
                "attn+ff+conv": (*_ATTENTION, *_FEED_FORWARD, *_CONVOLUTIONS),
            }
        )

    @property
    def text_targets(self) -> Sequence[str]:
        """The text encoder's self-attention, canonical names."""
        return (r"text_model\.encoder\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",)

    def defaults_for(self, base: Source | Parts) -> Defaults:
        """The family's defaults with the base's own resolution: UNet sample size times the VAE's factor."""
        if isinstance(base, Parts):
            denoiser: Any = base.denoiser
            unet, factor = dict(denoiser.config), int(base.extras["vae_factor"])
        else:
            unet, vae = (config_of(base, self.name, part) for part in ("unet", "vae"))
            factor = 2 ** (len(vae.get("block_out_channels", (0,) * 4)) - 1)
        source = base.source if isinstance(base, Parts) else base
        defaults = POCKET_DEFAULTS if source.base_id == POCKET_ID else self.defaults
        size = unet.get("sample_size")
        if not isinstance(size, int) or size < 1:
            return defaults
        return replace(defaults, resolution_px=size * factor)

    def load(self, source: Source, dtype: torch.dtype) -> Parts:
        """All components on the CPU, frozen, in eval mode; the VAE in float32 whatever `dtype` is.

        Raises:
            BaseModelError: a component is missing, broken or of another kind.
        """
        return load_parts(source, self.name, dtype)

    def skeleton(self, source: Source, dtype: torch.dtype) -> Parts:
        """All components from their configs alone; as `load` gives them, but their weights mean nothing.

        Raises:
            BaseModelError: a config is missing or broken.
        """
        return skeleton_parts(source, self.name, dtype)

    def load_vae(self, source: Source) -> nn.Module:
        """The VAE alone, frozen, float32, on the CPU: to look at images after it was released."""
        return load_vae(source, self.name)

    def noise_path(self, parts: Parts) -> NoisePath:
        """The checkpoint's discrete path, epsilon or v, by its scheduler config."""
        from lorabooth.objective.paths import discrete_path

        return discrete_path(parts.scheduler_config)

    def tokenize(self, parts: Parts, prompts: Sequence[str]) -> list[Cond]:
        """Prompts -> {"input_ids": [L] int64} each, padded and cut to L = 77; with a mask if it is used."""
        with quiet_libraries():
            tokens = parts.tokenizers["tokenizer"](
                list(prompts),
                padding="max_length",
                max_length=parts.extras["max_tokens"],
                truncation=True,
                return_tensors="pt",
            )
        names = ("input_ids", "attention_mask") if parts.extras["use_attention_mask"] else ("input_ids",)
        return [{name: tokens[name][row] for name in names} for row in range(len(prompts))]

    def count_tokens(self, parts: Parts, prompts: Sequence[str]) -> list[tuple[int, int]]:
        """(tokens of the prompt, tokens that the encoder takes), start and end tokens included in both."""
        with quiet_libraries():
            ids = parts.tokenizers["tokenizer"](list(prompts), truncation=False, padding=False)["input_ids"]
        return [(len(row), int(parts.extras["max_tokens"])) for row in ids]

    def encode_tokens(self, parts: Parts, tokens: Cond) -> Cond:
        """{"input_ids": [B,L]} -> {"encoder_hidden_states": [B,L,D]}, the last layer, normalised."""
        encoder = parts.text_encoders["text_encoder"]
        device = next(encoder.parameters()).device
        mask = tokens.get("attention_mask")
        hidden = encoder(
            tokens["input_ids"].to(device), attention_mask=None if mask is None else mask.to(device)
        ).last_hidden_state
        return {"encoder_hidden_states": hidden}

    def encode_prompts(self, parts: Parts, prompts: Sequence[str]) -> list[Cond]:
        """Prompts -> {"encoder_hidden_states": [L,D]} each, on the CPU, without gradient."""
        import torch

        conds: list[Cond] = []
        with torch.no_grad():
            for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
                tokens = self.collate(self.tokenize(parts, prompts[start : start + _PROMPTS_AT_ONCE]))
                hidden = self.encode_tokens(parts, tokens)["encoder_hidden_states"].cpu()
                # Cloned, so that keeping one prompt does not keep the batch it came in.
                conds += [{"encoder_hidden_states": row.clone()} for row in hidden]
        return conds

    def encode_images(self, parts: Parts, pixels: Tensor) -> list[Moments]:
        """Pixels [B,3,H,W] float32 in [-1,1] -> moments [C,h,w] each, float32, CPU, shifted and scaled."""
        import torch

        vae = _vae(parts)
        device = next(vae.parameters()).device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            posterior = vae.encode(pixels.to(device, torch.float32)).latent_dist
        scale = float(vae.config.scaling_factor)
        shift = float(getattr(vae.config, "shift_factor", None) or 0.0)
        mean, std = ((posterior.mean - shift) * scale).cpu(), (posterior.std * scale).cpu()
        return [Moments(m.clone(), s.clone()) for m, s in zip(mean, std, strict=True)]

    def decode_latents(self, parts: Parts, latents_BChw: Tensor) -> Tensor:
        """Latents as the denoiser sees them -> pixels [B,3,H,W] float32 in [-1,1], CPU. VAE in float32."""
        import torch

        vae = _vae(parts)
        device = next(vae.parameters()).device
        shift = float(getattr(vae.config, "shift_factor", None) or 0.0)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            latents = latents_BChw.to(device, torch.float32) / float(vae.config.scaling_factor) + shift
            pixels: Tensor = vae.decode(latents).sample
        return pixels.clamp(-1, 1).cpu()

    def image_cond(self, parts: Parts, pixels: Tensor) -> list[Cond]:  # noqa: ARG002
        """Nothing: these bases are conditioned on text alone."""
        return [{} for _ in range(pixels.shape[0])]

    def collate(self, conds: Sequence[Cond]) -> Cond:
        """Stack: all prompts are padded to one length already."""
        import torch

        return {name: torch.stack([cond[name] for cond in conds]) for name in conds[0]}

    def predict(
        self,
        parts: Parts,
        x_BChw: Tensor,
        level_B: Tensor,
        cond: Cond,
        geometry: Sequence[Geometry],  # noqa: ARG002
    ) -> Tensor:
        """The UNet's output [B,C,h,w]: epsilon or v, which is already the path's target."""
        unet: Any = parts.denoiser
        dtype = unet.conv_in.weight.dtype
        output: Tensor = unet(
            x_BChw.to(dtype), level_B, cond["encoder_hidden_states"].to(dtype), return_dict=False
        )[0]
        return output

    def pipeline(self, parts: Parts) -> DiffusionPipeline:
        """A StableDiffusionPipeline over the same modules, with the checkpoint's scheduler; silent.

        Released components are None in it: then pass `prompt_embeds`, or `output_type="latent"`.
        """
        name = str(parts.scheduler_config.get("_class_name", "PNDMScheduler"))
        with quiet_libraries():
            import diffusers

            scheduler_class = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
            if scheduler_class is None:
                raise BaseModelError(
                    f"{parts.source.base_id}: its scheduler {name!r} is not known to diffusers."
                )
            pipeline = diffusers.StableDiffusionPipeline(
                vae=parts.vae,
                text_encoder=parts.text_encoders.get("text_encoder"),
                tokenizer=parts.tokenizers["tokenizer"],
                unet=parts.denoiser,
                scheduler=scheduler_class.from_config(dict(parts.scheduler_config)),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def resolution_multiple_px(self, parts: Parts) -> int:
        """The VAE's factor times the UNet's: 64 for the published bases, so that no level has an odd side."""
        unet: Any = parts.denoiser
        halvings = len(unet.config.block_out_channels) - 1
        return int(parts.extras["vae_factor"]) << halvings


POCKET_ID = "pocket"
# The embedded base is a thousandth of SD's size: it wants a higher rate and less guidance, and learns sooner.
# Rate and steps are those that learned the demo's mug on attention alone; guidance: see the base's card.
POCKET_DEFAULTS = Defaults(
    resolution_px=64,
    learning_rate=1e-3,
    text_encoder_learning_rate=2e-4,
    rank=16,
    steps=300,
    guidance=4.0,
    class_guidance=1.5,
    class_guidance_interval=(),
    sampler_steps=20,
    class_sampler_steps=20,
    class_bf16=False,
)
SD1 = StableDiffusion(
    "sd1",
    Defaults(
        resolution_px=512,
        learning_rate=1e-4,
        text_encoder_learning_rate=5e-5,
        rank=16,
        steps=800,
        guidance=7.5,
        class_guidance=7.5,
        class_guidance_interval=(0.28, 5.42),  # SD-XL's in arXiv 2404.07724, section 3.1
        sampler_steps=20,  # "15 to 20 steps for guided sampling": arXiv 2211.01095, abstract
        class_sampler_steps=15,
        class_bf16=True,
    ),
)
SD2 = StableDiffusion("sd2", replace(SD1.defaults, resolution_px=768))


def _vae(parts: Parts) -> Any:
    if parts.vae is None:
        raise RuntimeError("the VAE was released already")
    return parts.vae
