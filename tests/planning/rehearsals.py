"""Real runs on this CPU under the counter, phase by phase, and the forecast of the same recipe."""

from __future__ import annotations

import gc
from collections import deque
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from lorabooth.data.cache import Store
from lorabooth.evaluation.generate import generate
from lorabooth.evaluation.grids import draw_grid
from lorabooth.evaluation.sample import file_name
from lorabooth.families import registry
from lorabooth.families.reload import with_vae
from lorabooth.families.source import resolve
from lorabooth.memory import in_turn, meter_cuda, stream
from lorabooth.memory.facts import Device, describe_device
from lorabooth.memory.meter import Meter, Usage
from lorabooth.planning import components as things
from lorabooth.planning.forecast import Forecast, Forecaster
from lorabooth.progress import Silent
from lorabooth.recipe import Recipe
from lorabooth.training import pool as pools
from lorabooth.training.caching import cache_and_release
from lorabooth.training.class_images import class_examples
from lorabooth.training.compose import attach, compose
from lorabooth.training.prefetch import DEPTH, make
from lorabooth.training.setting import Clock, LoadedBase, Setting, open_setting
from lorabooth.training.studio import Studio
from lorabooth.training.update import launch

CPU = Device("cpu", "a CPU", 8 << 30, 8 << 30, "", describe_device("cpu").bf16)
CARD = Device("cuda", "a card of 8 GiB", 8 << 30, 8 << 30, "8.6", True)
STUDIO = Studio(generate=generate, draw_grid=draw_grid, file_name=file_name)
STEPS = 2


def predicted(recipe: Recipe, device: Device = CPU, **options: Any) -> Forecast:
    base = resolve(recipe.model.base, configs_only=True)
    return Forecaster()(recipe, base, registry.family(base.family), device, **options)


def measured(recipe: Recipe, work: Path) -> dict[str, Usage]:
    """Phase -> the highest moment of a real run of two steps on this CPU."""
    store, found = Store(work / "cache"), {}
    setting = open_setting(recipe, Clock(), Silent())
    accelerator = Accelerator()
    with Meter() as meter:
        things.hold(meter, setting.parts)
        classes = class_examples(setting, STUDIO, store, Silent())
        found["class images"] = meter.usage()
        gc.collect()
        meter.reset_peak()
        examples, encoded = cache_and_release(setting, classes.records, store, Silent())
        found["caching"] = meter.usage()
    # Examples in memory are the same in all phases that follow, and left out.
    with Meter() as meter:
        things.hold(meter, setting.parts)
        with meter.during(things.DENOISER):
            attached = attach(setting, accelerator.device, Silent())
        things.hold(meter, setting.parts)
        meter.watch(things.ADAPTER, *attached.parameters())
        pool = pools.prepare(
            setting, examples, device=accelerator.device, world=1, store=store, reporter=Silent()
        )
        pools.hollow_out(setting, attached, Silent())
        session = compose(setting, examples, attached, accelerator=accelerator, reporter=Silent(), pool=pool)
        made = (session.batches, session.step_parts.path, session.seed)
        # In the loop another thread makes these, which a counter does not see.
        with meter.during(things.INPUTS):
            coming = deque(make(*made, step, pin=False) for step in range(DEPTH))
        with meter.gradients(session.parameters):
            for step in range(STEPS):
                with meter.during(things.INPUTS):
                    coming.append(make(*made, step + DEPTH, pin=False))
                launch(session, step, coming.popleft(), asked=(), want_up_norms=False)()
        found["training"] = meter.usage()
        coming.clear()
        if recipe.run.sample_count:
            meter.reset_peak()
            _draw(setting, encoded, meter)
            found["previews"] = meter.usage()
    return found


def measured_before(recipe: Recipe, work: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Usage]:
    """Class images and caching, really run, counted as a card's memory would be.

    This CPU's memory is the card's, but for what waits in host memory; a streamed base's units are copied
    ahead, as on CUDA. What the run moves to its device is counted from then on, and not when it moves back.
    """
    _copy_ahead(monkeypatch)
    monkeypatch.setattr(in_turn, "has_own_memory", lambda device: True)
    store, found = Store(work / "cache"), {}
    setting = replace(open_setting(recipe, Clock(), Silent()), device=torch.device("cpu", 0))
    with Meter(granule_bytes=meter_cuda.GRANULE_BYTES, host_counts=False) as meter:
        _follow(setting, meter, monkeypatch)
        classes = class_examples(setting, STUDIO, store, Silent())
        found["class images"] = meter.usage()
        gc.collect()
        meter.reset_peak()
        cache_and_release(setting, classes.records, store, Silent())
        found["caching"] = meter.usage()
    return found


def _follow(setting: Setting, meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the parts that are on the run's device."""
    names = {"vae": things.VAE, "text_encoder": things.TEXT_ENCODER, "denoiser": things.DENOISER}
    waiting = {id(tensor) for tensor in stream.streamed_tensors(setting.parts.denoiser)}

    def to(base: LoadedBase, device: torch.device, *moved: str) -> None:
        modules = {"vae": base.parts.vae, **base.parts.components()}
        for name in moved:
            tensors = [*modules[name].parameters(), *modules[name].buffers()]
            staying = [tensor for tensor in tensors if id(tensor) not in waiting]
            meter.watch(names[name], *staying) if device == setting.device else meter.drop(*staying)

    monkeypatch.setattr(LoadedBase, "to", to)


class _Stream:
    """A CUDA stream's part in copying, where there is none."""

    def record_event(self) -> None:
        """Copies are done when they are made."""

    def wait_event(self, event: None) -> None:
        """Nothing to wait for."""


def _copy_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    make = stream._Line.__init__

    def made(line: stream._Line, device: torch.device) -> None:
        make(line, device)
        line.stream = _Stream()

    monkeypatch.setattr(stream._Line, "__init__", made)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)


def _draw(setting: Any, encoded: dict[str, torch.Tensor] | None, meter: Meter) -> None:
    """As `previews.Previews` draws one prompt."""
    recipe, family = setting.recipe, setting.family
    with nullcontext(with_vae(family, setting.parts, setting.device)) as parts:
        meter.watch(things.VAE, parts.vae)
        side_px = int(recipe.images.resolution)
        prompt = setting.subjects[0].prompt
        generate(
            family.pipeline(replace(parts)),
            [prompt] * recipe.run.sample_count,
            list(range(recipe.run.sample_count)),
            steps=3,
            guidance=float(recipe.prior.guidance),
            height_px=side_px,
            width_px=side_px,
            batch_size=recipe.run.sample_count,
            encoded=encoded,
        )
