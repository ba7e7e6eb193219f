"""What a run would do, found without writing anything."""

from __future__ import annotations

from pathlib import Path

from lorabooth.adapters import inject
from lorabooth.progress import Reporter
from lorabooth.recipe import Recipe
from lorabooth.training import folder as folders
from lorabooth.training import going_on, identity
from lorabooth.training.compose import targets_of
from lorabooth.training.plan import Plan, TrainedPart
from lorabooth.training.setting import Clock, Setting, open_setting, part_facts


def plan_run(recipe: Recipe, *, out: Path | None, reporter: Reporter, fresh: bool = False) -> Plan:
    """Everything up to the first write: photos checked, base loaded, adapter attached, folder looked at.

    Args:
        recipe: as for `run`.
        out: as for `run`.
        reporter: hears of everything, also of what is in the run folder.
        fresh: plan for a folder beside one that is taken.

    Raises:
        LoraboothError: what `train` would refuse before training.
    """
    setting = open_setting(recipe, Clock(), reporter)
    place = folders.out_of(out, setting.recipe, fresh=fresh)
    folder = folders.check(place, setting.recipe, identity.of(setting))
    trained = _trained(setting)
    going_on.tell(going_on.find(folder, setting.recipe, reporter), reporter)
    optim = setting.recipe.optim
    n_step = optim.batch_size * optim.accumulate
    return Plan(
        recipe=setting.recipe,
        choices=setting.choices,
        parts=part_facts(setting.parts),
        trained=trained,
        photos=setting.photos.summary(),
        examples=(n_step, 0 if setting.recipe.prior.mode == "none" else n_step),
        device=str(setting.device),
        out=str(place),
    )


def _trained(setting: Setting) -> list[TrainedPart]:
    """What the adapter would sit on."""
    components = setting.parts.components()
    attached = inject.attach(
        components,
        targets_of(setting.family, setting.recipe, components["denoiser"]),
        seed=setting.recipe.run.seed,
    )
    optim, adapter = setting.recipe.optim, setting.recipe.adapter
    trained = []
    for component in attached.components:
        is_text = component != "denoiser"
        modules = [name for name in attached.modules if name.startswith(f"{component}.")]
        rank = int(adapter.text_encoder_rank if is_text else adapter.rank)
        trained.append(
            TrainedPart(
                component=component,
                modules=len(modules),
                rank=rank,
                alpha=float(adapter.alpha) / int(adapter.rank) * rank,
                lr=float(optim.text_encoder_lr if is_text else optim.lr),
                parameters=sum(weight.numel() for weight in attached.parameters(component)),
            )
        )
    inject.detach(components)
    return trained
