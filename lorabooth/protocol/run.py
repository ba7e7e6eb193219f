"""Evaluate one run: draw with the adapter on and off, measure, and write what was found beside the run."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from lorabooth.errors import BaseModelError
from lorabooth.evaluation.backbones import Backbones, open_backbones
from lorabooth.evaluation.sample import device_and_dtype
from lorabooth.memory.facts import versions
from lorabooth.progress import Reporter, Silent
from lorabooth.protocol.measuring import CLASS_IMAGES, UNRELATED_IMAGES, Album, Counts, measure
from lorabooth.protocol.opened import OpenRun, open_run
from lorabooth.protocol.page import write_page
from lorabooth.protocol.prompts import EvaluationPrompts, default_prompts, read_prompts
from lorabooth.protocol.results import Evaluation
from lorabooth.protocol.studio import Studio
from lorabooth.run_report import write_run_report
from lorabooth.training.folder import read_json


def evaluate(
    run: Path | str,
    *,
    prompts: Path | EvaluationPrompts | None = None,
    images_per_prompt: int = 4,
    class_images: int = CLASS_IMAGES,
    unrelated_images: int = UNRELATED_IMAGES,
    dino: str | None = None,
    clip: str | None = None,
    lpips: str | None = None,
    backbones: Backbones | None = None,
    strength: float = 1.0,
    steps: int | None = None,
    base: str | None = None,
    images: Path | None = None,
    device: str = "auto",
    out: Path | None = None,
    base_images: Path | None = None,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Measure what a finished run learned, and what it forgot.

    The same prompts and seeds are drawn with the adapter on and off. Images are kept under OUT/evaluation/
    and drawn at most once: an evaluation that was interrupted goes on.

    Args:
        run: the run folder.
        prompts: a file of templates, or the templates; None: the pocket world's or DreamBench's.
        images_per_prompt: of the subject's prompts; seeds 0, 1, ...
        class_images: of the class, for PRES.
        unrelated_images: per unrelated prompt, for drift.
        dino: what measures DINO and PRES: a hub id, a folder, "auto"; None is what the run's recipe says.
        clip: likewise, CLIP-I and CLIP-T.
        lpips: likewise, DIV and drift.
        backbones: opened ones, instead of those three.
        strength: factor on the adapter.
        steps: sampler steps; None is the run's.
        base: where the base is now, if not where the run's recipe says.
        images: where the photos are now, likewise.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        out: folder for evaluation.json, evaluation.html and the images; None is the run folder, whose report
            then shows the table too.
        base_images: folder of the images with the adapter off, so that several runs of one base can share
            them; None: beside the others.
        reporter: hears of cost and progress.

    Returns:
        The numbers, and where they were written.

    Raises:
        RecipeError: no run folder, an unfinished run, prompts without placeholders, a given backbone that
            cannot be had, or an output that cannot be written.
        AdapterError, DataError: the adapter or photos are gone or broken.
        BaseModelError: the base cannot be used, or nothing can be measured at all.
        InterruptedRunError: Ctrl-C; what was drawn is kept.
    """
    began_s = time.perf_counter()
    reporter = reporter or Silent()
    opened = open_run(Path(run), base=base, images=images)
    counts = Counts(images_per_prompt, class_images, unrelated_images)
    albums = _albums(opened, prompts, counts)
    photos = [opened.pixels(index) for index in range(len(albums))]
    home = out or opened.folder.root
    where, dtype = device_and_dtype(device, opened.recipe.model.dtype)
    studio = Studio.of(opened, where, dtype, strength=strength, steps=steps, reporter=reporter)
    if backbones is None:
        backbones = _backbones(opened, (dino, clip, lpips), where, reporter)
    albums = tuple(album.measured_by(backbones) for album in albums)
    images_of = home / "evaluation"
    off = studio.side(base_images or images_of / "base", on=False)
    on = studio.side(images_of / "adapter", on=True)
    studio.draw([shot for album in albums for shot in album.shots], on, off, again=Path(run))
    reporter.say("measuring")
    evaluation = Evaluation(
        run=opened.folder.root.absolute().name,
        base=studio.source.base_id,
        subjects=tuple(
            measure(album, on, off, photos[index], backbones, home=home, photos_digest=digest)
            for index, (album, digest) in enumerate(zip(albums, opened.photo_digests, strict=True))
        ),
        backbones=backbones.names(),
        notes=(*opened.notes, *studio.notes(), *backbones.notes),
        images_per_prompt=images_per_prompt,
        class_images=class_images,
        unrelated_images=unrelated_images,
        sampler=studio.sampler.facts(),
        facts=studio.facts(),
        versions=versions(),
        seconds=time.perf_counter() - began_s,
        path=home / "evaluation.json",
        page=home / "evaluation.html",
    )
    evaluation.write()
    write_page(evaluation, [[record.path for record in one] for one in opened.photos])
    if out is None:
        # The adapter may be an earlier checkpoint's (run.select); the report is of the whole run.
        done = read_json(opened.folder.facts).get("steps_done", opened.metadata.steps)
        write_run_report(opened.folder, opened.recipe, int(done))
    return evaluation


def _albums(opened: OpenRun, prompts: Path | EvaluationPrompts | None, counts: Counts) -> tuple[Album, ...]:
    base = opened.recipe.model.base
    found = []
    for subject in opened.subjects:
        token, noun = subject.placeholders["token"], subject.placeholders["noun"]
        if prompts is None:
            asked = default_prompts(base, noun)
        else:
            asked = read_prompts(prompts, base, noun) if isinstance(prompts, Path) else prompts
        found.append(Album.of(token, noun, asked, counts))
    return tuple(found)


def _backbones(
    opened: OpenRun,
    given: tuple[str | None, str | None, str | None],
    device: torch.device,
    reporter: Reporter,
) -> Backbones:
    """Open them, before anything is drawn.

    Raises:
        RecipeError: one that was asked for cannot be had.
        BaseModelError: there is none at all.
    """
    own = opened.recipe.evaluation
    dino, clip, lpips = (
        one or auto for one, auto in zip(given, (own.dino, own.clip, own.lpips), strict=True)
    )
    found = open_backbones(
        dino, clip, lpips, base=opened.recipe.model.base, device=device, reporter=reporter, strict=True
    )
    if not found.metrics():
        raise BaseModelError(
            "\n".join(
                ["nothing can be measured: no backbone is there.", *(f"  {note}" for note in found.notes)]
            ),
            "Give --dino FOLDER or --clip FOLDER, or download them where the hub can be reached.",
        )
    for note in found.notes:
        reporter.warn(note)
    return found
