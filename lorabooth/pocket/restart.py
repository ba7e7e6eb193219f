"""Begin a build where a finished pocket base ended.

Its tokenizer, autoencoder, CLIP and subject encoder are kept, its denoiser trains on. What is lost is the
state of the optimizers, which is not shipped.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from lorabooth.errors import RecipeError
from lorabooth.pocket.build import BuildPlan
from lorabooth.pocket.clip import load_clip
from lorabooth.pocket.subject import load_subject_encoder
from lorabooth.pocket.trainer import write_state

_DONE_S = 1e9
"""More training time than any build is given: the phase counts as finished."""


def start_from(plan: BuildPlan, folder: Path) -> None:
    """Fill a build's work folder from a finished base, unless the build has begun already.

    Args:
        plan: of the build; its work folder is filled.
        folder: a pocket base: a StableDiffusionPipeline folder with clip/ beside its parts.

    Raises:
        RecipeError: the folder is no pocket base.
    """
    if plan.state_file("unet").exists():
        return
    if not all((folder / part).is_dir() for part in ("tokenizer", "clip", "subject_encoder", "vae", "unet")):
        raise RecipeError(
            f"--start-from: {folder} is not a pocket base.", "Give a folder that a build has made."
        )
    plan.work.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder / "tokenizer", plan.work / "tokenizer", dirs_exist_ok=True)
    modules = {
        "vae": (AutoencoderKL.from_pretrained(folder / "vae").float(), _DONE_S),
        "clip": (load_clip(folder), _DONE_S),
        "subject": (load_subject_encoder(folder), _DONE_S),
        "unet": (UNet2DConditionModel.from_pretrained(folder / "unet").float(), 0.0),
    }
    for phase, (module, elapsed_s) in modules.items():
        step = plan.min_steps if elapsed_s else 0
        write_state(
            plan.state_file(phase), _weights(module.state_dict()), {"step": step, "elapsed_s": elapsed_s}
        )


def _weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A training state without an optimizer: the weights, which are their own average."""
    return {f"{kind}/{name}": tensor for kind in ("model", "ema") for name, tensor in weights.items()}
