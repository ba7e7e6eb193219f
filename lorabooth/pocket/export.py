"""Trained parts -> a StableDiffusionPipeline, in memory or as a folder in half precision."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPImageProcessor, CLIPModel

from lorabooth.pocket.clip import save_clip_rest, text_half
from lorabooth.pocket.dataset import SIZE_PX
from lorabooth.pocket.subject import INPUT_PX, SubjectEncoder, save_subject_encoder
from lorabooth.pocket.tokenizer import save_tokenizer
from lorabooth.pocket.unet import make_scheduler

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def assemble(
    tokenizer: CLIPTokenizer, clip: CLIPModel, vae: AutoencoderKL, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """A pipeline of the given parts, without a safety checker; the text encoder is copied out of `clip`."""
    scheduler: SchedulerMixin = make_scheduler()
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_half(clip),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_folder(
    pipeline: StableDiffusionPipeline, clip: CLIPModel, subject: SubjectEncoder, folder: Path
) -> None:
    """Write a pocket base in half precision; every file is replaced whole.

    The parts in memory keep their precision. Files in the folder that are not part of it stay.

    Args:
        pipeline: what draws.
        clip: what the text encoder lacks of it goes under clip/.
        subject: the subject encoder, under subject_encoder/.
        folder: made if need be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as name:
        staging = Path(name)
        _half_copy(pipeline).save_pretrained(staging, safe_serialization=True)
        save_tokenizer(pipeline.tokenizer, staging / "tokenizer")
        _load_as_float32(staging / "text_encoder" / "config.json")
        save_clip_rest(clip, staging / "clip")
        save_subject_encoder(subject, staging / "subject_encoder")
        for part, side in (("clip", SIZE_PX), ("subject_encoder", INPUT_PX)):
            _image_processor(side).save_pretrained(staging / part)
        for file in sorted(staging.rglob("*")):
            if file.is_file():
                target = folder / file.relative_to(staging)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.chmod(0o644)  # safetensors writes files that only their owner can read
                file.replace(target)


def _image_processor(side: int) -> CLIPImageProcessor:
    size = {"height": side, "width": side}
    return CLIPImageProcessor(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def _load_as_float32(config_file: Path) -> None:
    """Name float32 in a config: transformers loads what is named there, diffusers float32 by default."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _half_copy(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    vae = AutoencoderKL.from_config(pipeline.vae.config)
    unet = UNet2DConditionModel.from_config(pipeline.unet.config)
    text_encoder = type(pipeline.text_encoder)(pipeline.text_encoder.config)
    for copy, part in ((vae, pipeline.vae), (unet, pipeline.unet), (text_encoder, pipeline.text_encoder)):
        copy.load_state_dict(part.state_dict())
        copy.half()
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=pipeline.tokenizer,
        unet=unet,
        scheduler=pipeline.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
