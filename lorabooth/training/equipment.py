"""What a run works with: accelerator, previews, the adapter's metadata, the room it needs on the disk."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator

from lorabooth.adapters import inject
from lorabooth.adapters.metadata import Metadata
from lorabooth.data import images as data_images
from lorabooth.families.reload import load_denoiser
from lorabooth.memory import hollow
from lorabooth.progress import Reporter
from lorabooth.recipe import Recipe
from lorabooth.training import space, state
from lorabooth.training.easel import Easel
from lorabooth.training.folder import RunFolder
from lorabooth.training.loop import Session
from lorabooth.training.previews import Previews
from lorabooth.training.selection import Selection
from lorabooth.training.setting import Setting
from lorabooth.training.studio import Referee, Studio
from lorabooth.training.subjects import preview_prompts
from lorabooth.version import __version__


def amounts_of(recipe: Recipe, session: Session, parameters: int, previews: Previews | None) -> space.Amounts:
    """What the run will write; `parameters` are the adapter's numbers."""
    return space.Amounts(
        checkpoint_bytes=state.checkpoint_bytes(session.optimizer),
        adapter_bytes=int(parameters * 4 * 1.05),
        steps=int(recipe.optim.steps),
        checkpoint_every=recipe.run.checkpoint_every,
        keep=recipe.run.keep,
        sample_every=recipe.run.sample_every,
        images=0 if previews is None else len(previews.prompts) * len(previews.seeds),
        side_px=0 if previews is None else previews.side_px,
        chosen=recipe.run.select != "last",
    )


def easel_of(
    setting: Setting, studio: Studio, encoded: dict[str, torch.Tensor] | None, reporter: Reporter
) -> Easel:
    """What draws between the steps.

    Args:
        setting: the run's.
        studio: draws images.
        encoded: prompt -> text embedding [tokens, width]; None while the text encoder is there.
        reporter: hears of progress.
    """
    recipe = setting.recipe
    multiple_px = setting.family.resolution_multiple_px(setting.parts)

    def whole() -> AbstractContextManager[None]:
        return hollow.whole(setting.parts.denoiser, load_denoiser(setting.family, setting.parts))

    return Easel(
        family=setting.family,
        complete=setting.with_vae,
        studio=studio,
        steps=int(recipe.run.sample_steps),
        guidance=float(recipe.run.sample_guidance),
        side_px=data_images.square_for(int(recipe.images.resolution), multiple_px)[0],
        encoded=encoded,
        reporter=reporter,
        at_once=None if recipe.memory.images_at_once == "auto" else recipe.memory.images_at_once,
        in_turn=recipe.memory.in_turn,
        whole=whole if recipe.memory.hollow else nullcontext,
    )


def previews_of(setting: Setting, easel: Easel, folder: RunFolder) -> Previews | None:
    """What draws the samples into the run's folder; None where the recipe wants none."""
    recipe = setting.recipe
    if recipe.run.sample_count == 0:
        return None
    components = setting.parts.components()
    return Previews(
        easel=easel,
        prompts=preview_prompts(recipe, setting.subjects),
        seeds=range(recipe.run.sample_count),
        folder=folder,
        adapter_off=lambda: inject.disabled(components),
    )


def selection_of(
    setting: Setting, easel: Easel, folder: RunFolder, referee: Referee | None, *, start: int
) -> Selection | None:
    """What measures the checkpoints, in the process that does; None where the recipe takes the last one.

    Args:
        setting: the run's.
        easel: what draws.
        folder: of the run; what it holds of checkpoints after `start` is dropped.
        referee: what measures; None in the processes that only hear of it.
        start: finished steps that the run goes on from.
    """
    if referee is None:
        return None
    selection = Selection.of(setting, easel, folder, referee)
    selection.begin(start)
    return selection


def metadata_of(setting: Setting) -> Metadata:
    """What the adapter file says of itself; without the steps."""
    recipe, source = setting.recipe, setting.parts.source
    return Metadata(
        family=source.family,
        base_id=source.base_id,
        base_sha256=source.sha256,
        rank=int(recipe.adapter.rank),
        alpha=float(recipe.adapter.alpha),
        targets=recipe.adapter.targets,
        trigger_words=tuple(subject.name for subject in setting.subjects),
        steps=0,
        lorabooth_version=__version__,
    )


def accelerator_of(setting: Setting, folder: RunFolder) -> Accelerator:
    """Devices, processes and the tracker that the recipe names."""
    tracker = setting.recipe.run.tracker
    if tracker == "none":
        return Accelerator()
    accelerator = Accelerator(log_with=tracker, project_dir=str(folder.root))
    accelerator.init_trackers("lorabooth", init_kwargs={"wandb": {"name": folder.root.name}})
    return accelerator
