"""Loading Stable Diffusion 1.x and 2.x from a folder or a single file: frozen, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorabooth.errors import BaseModelError
from lorabooth.families import single_file
from lorabooth.families.base import Parts, Source
from lorabooth.families.folder import component_config, component_weights
from lorabooth.families.quiet import quiet_libraries

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_TOKENS_LIMIT = 77
# Half-way between a network that predicts the noise (1) and one that predicts v (0); see probe_prediction.
_EPSILON_SLOPE = 0.5


def load_parts(source: Source, family: str, dtype: torch.dtype) -> Parts:
    """All components; the VAE in float32 whatever `dtype` is.

    Args:
        source: a diffusers folder or an LDM single file.
        family: "sd1" or "sd2".
        dtype: of the UNet's and the text encoder's weights.

    Raises:
        BaseModelError: a component is missing, broken or of another kind.
    """
    scheduler = config_of(source, family, "scheduler")
    notes: tuple[str, ...] = ()
    vae: Any = load_vae(source, family)
    tokenizer: Any
    text_encoder: Any
    unet: Any
    if source.path.is_file():
        tokenizer, text_encoder, unet = single_file.load_components(source.path, family, dtype, vae)
    else:
        tokenizer, text_encoder, unet = _load_folder(source, dtype)
    _check_fit(source, tokenizer, text_encoder, unet)
    _freeze(text_encoder, unet)
    if source.path.is_file() and family == "sd2" and single_file.beside_folder(source.path) is None:
        scheduler, notes = _told_by_probe(scheduler, unet, text_encoder, tokenizer)
    limit = min(int(tokenizer.model_max_length), int(text_encoder.config.max_position_embeddings))
    return _parts(source, dtype, tokenizer, text_encoder, vae, unet, scheduler, limit, notes)


def skeleton_parts(source: Source, family: str, dtype: torch.dtype) -> Parts:
    """All components from their configs alone, with weights that mean nothing; no weight file is looked at.

    Made among fake tensors it costs no memory. As `load_parts` gives them: frozen, VAE in float32. Without
    a vocabulary on this machine there is no tokenizer in it.

    Args:
        source: a diffusers folder (configs are enough) or an LDM single file.
        family: "sd1" or "sd2".
        dtype: of the UNet's and the text encoder's weights.

    Raises:
        BaseModelError: a config is missing or broken.
    """
    scheduler = config_of(source, family, "scheduler")
    with quiet_libraries(), _broken_parts(source):
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        from lorabooth.memory.apply import cast_base  # with torch, which commands on files do not wait for

        unet: Any = UNet2DConditionModel.from_config(config_of(source, family, "unet"))
        vae: Any = AutoencoderKL.from_config(config_of(source, family, "vae"))
        text_encoder: Any = CLIPTextModel(CLIPTextConfig.from_dict(config_of(source, family, "text_encoder")))
        tokenizer = _vocabulary(source)
    _freeze(text_encoder, unet, vae)
    for module in (unet, text_encoder):
        cast_base(module, dtype)
    _open_door(vae)
    limit = int(text_encoder.config.max_position_embeddings)
    limit = limit if tokenizer is None else min(int(tokenizer.model_max_length), limit)
    notes = ("built from configs alone: its weights mean nothing",)
    return _parts(source, dtype, tokenizer, text_encoder, vae, unet, scheduler, limit, notes)


def _parts(
    source: Source,
    dtype: torch.dtype,
    tokenizer: Any,
    text_encoder: Any,
    vae: Any,
    unet: Any,
    scheduler: dict[str, Any],
    max_tokens: int,
    notes: tuple[str, ...],
) -> Parts:
    extras = {
        "vae_factor": 2 ** (len(vae.config.block_out_channels) - 1),
        "max_tokens": max_tokens,
        "use_attention_mask": bool(getattr(text_encoder.config, "use_attention_mask", False)),
        "notes": notes,
    }
    return Parts(
        source=source,
        tokenizers=MappingProxyType({} if tokenizer is None else {"tokenizer": tokenizer}),
        text_encoders=MappingProxyType({"text_encoder": text_encoder}),
        vae=vae,
        denoiser=unet,
        scheduler_config=MappingProxyType(scheduler),
        dtype=dtype,
        extras=MappingProxyType(extras),
    )


def _vocabulary(source: Source) -> Any:
    """The tokenizer if its vocabulary is on this machine, or None."""
    from transformers import CLIPTokenizer

    if source.path.is_file():
        folder = single_file.find_vocabulary(source.path)
    else:
        folder = source.path / "tokenizer"
        folder = (
            folder if any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")) else None
        )
    return None if folder is None else CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def load_vae(source: Source, family: str) -> nn.Module:
    """The VAE alone: float32, frozen, on the CPU; it takes latents of any precision.

    Raises:
        BaseModelError: it is missing or broken.
    """
    import torch

    vae: Any
    if source.path.is_file():
        vae = single_file.load_vae(source.path, family)
    else:
        with quiet_libraries(), _broken_parts(source):
            from diffusers import AutoencoderKL

            vae = AutoencoderKL.from_pretrained(
                source.path / "vae", torch_dtype=torch.float32, **_how(source, "vae")
            )
    _freeze(vae)
    _open_door(vae)
    module: nn.Module = vae
    return module


def config_of(source: Source, family: str, component: str) -> dict[str, Any]:
    """The config file of a component ("unet", "vae", "scheduler" ...) of a base."""
    if source.path.is_file():
        return single_file.config_of(source.path, family, component)
    return component_config(source.path, component)


def probe_prediction(unet: Any, empty_prompt_1LD: Tensor) -> str:
    """Tell what a Stable Diffusion UNet predicts when no config says so: "epsilon" or "v_prediction".

    At the last timestep the input x is almost pure noise. A network that predicts the noise returns it, so
    that its output follows x with slope 1; v = a eps - s x0, with a = 0.07 and x0 not to be seen in x, has a
    slope of about 0. One forward pass at 16x16 latents decides.

    Args:
        unet: the denoiser, on the CPU.
        empty_prompt_1LD: [1,L,D] text embedding of the empty prompt.
    """
    import torch

    held_in = next(unet.parameters()).dtype
    # Half precision is slow on a CPU, and SD2's attention overflows float16; widening and back is lossless.
    with quiet_libraries():
        unet.to(torch.float32)
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = unet(noise, torch.tensor([999]), empty_prompt_1LD.float(), return_dict=False)[0]
    with quiet_libraries():
        unet.to(held_in)
    slope = float((output * noise).sum() / noise.square().sum())
    return "epsilon" if slope > _EPSILON_SLOPE else "v_prediction"


def _told_by_probe(
    scheduler: dict[str, Any], unet: Any, text_encoder: Any, tokenizer: Any
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """SD2 came in both kinds, and a single file holds no scheduler config: 768 px v and 512 px epsilon."""
    import torch

    ids = tokenizer(
        [""], padding="max_length", max_length=_TOKENS_LIMIT, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        kind = probe_prediction(unet, text_encoder(ids["input_ids"]).last_hidden_state)
    if kind == "epsilon":
        unet.register_to_config(sample_size=64)
    return {**scheduler, "prediction_type": kind}, (f"prediction type {kind}: found by a probe of the UNet",)


def _load_folder(source: Source, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Tokenizer, text encoder and UNet of a diffusers folder."""
    with quiet_libraries(), _broken_parts(source):
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(source.path / "tokenizer", local_files_only=True)
        text_encoder = CLIPTextModel.from_pretrained(
            source.path / "text_encoder", dtype=dtype, **_how(source, "text_encoder")
        )
        unet = UNet2DConditionModel.from_pretrained(
            source.path / "unet", torch_dtype=dtype, **_how(source, "unet")
        )
    return tokenizer, text_encoder, unet


def _how(source: Source, component: str) -> dict[str, Any]:
    """How every component is loaded: safetensors, from this machine, in the variant that is there."""
    variant = component_weights(source.path, component).variant or None
    return {"use_safetensors": True, "local_files_only": True, "variant": variant}


@contextmanager
def _broken_parts(source: Source) -> Iterator[None]:
    """What the libraries raise for truncated or foreign files, as one message."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise BaseModelError(
            f"{source.path}: a part of the base cannot be loaded: {lines[0][:300]}",
            "The files may be truncated or of another model; download the base again.",
        ) from error


def _check_fit(source: Source, tokenizer: Any, text_encoder: Any, unet: Any) -> None:
    """Components of one model fit each other; say so before the first step does."""
    width, hidden = unet.config.cross_attention_dim, text_encoder.config.hidden_size
    if width != hidden:
        raise BaseModelError(
            f"{source.path}: the UNet takes embeddings of width {width}, the text encoder makes {hidden}.",
            "The parts come from different models; download the base again.",
        )
    rows = text_encoder.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise BaseModelError(
            f"{source.path}: the tokenizer has {len(tokenizer)} tokens, the text encoder only {rows}.",
            "The tokenizer belongs to another model.",
        )


def _open_door(vae: Any) -> None:
    """Half-precision latents of a sampling pipeline enter a float32 VAE: cast at its door, once, here."""
    door = getattr(vae, "post_quant_conv", None) or vae.decoder.conv_in
    door.register_forward_pre_hook(_to_weight_dtype)


def _freeze(*modules: Any) -> None:
    for module in modules:
        module.requires_grad_(False)
        module.eval()


def _to_weight_dtype(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook: the input in the dtype of the module's weight."""
    return (args[0].to(module.weight.dtype), *args[1:])
