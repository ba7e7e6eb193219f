"""The model card of the pocket base, made from measured figures and the build's own record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorabooth.pocket import clip, scenes, unet, vae, vocabulary

_HEADER = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# The pocket base

A complete `StableDiffusionPipeline` for 64 x 64 pictures in {size_mb:.1f} MB of half precision, trained by
`lorabooth pocket build` on scenes that the project renders itself. It exists so that the demo, the tests and
the evaluation are real without a download. It knows {class_count} classes, {colour_count} colours,
{pattern_count} patterns, {place_count} places, {style_count} styles, {accessory_count} accessories and
{pose_count} poses, and nothing else.

Classes: {classes}. Places: {places}.
"""

_USE = """
## Use

```python
from diffusers import StableDiffusionPipeline
from lorabooth.pocket.base import pocket_dir

pipeline = StableDiffusionPipeline.from_pretrained(pocket_dir())
prompt = "a photo of a red striped mug on the beach"
image = pipeline(prompt, num_inference_steps={steps}, guidance_scale={guidance}).images[0]
```

v-prediction on Stable Diffusion's schedule. `clip/` holds the image half of the text encoder's CLIP
(`lorabooth.pocket.clip.load_clip`).
"""


def _share(entry: Mapping[str, Any]) -> str:
    return f"{entry['value']:.1%} ({entry['low']:.1%} to {entry['high']:.1%})"


def _quality(figures: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f"| {name} | {_share(figures['samples'][name])} | {figures['targets'][name]:.0%} "
        f"| {_share(figures['judge']['through_vae'][name])} |"
        for name in ("class", "place", "colour")
    )
    return f"""
## Quality

{figures["sample_count"]} samples of prompts whose combination of class, place, colour and pattern is not in
the training data, read by classifiers trained on renderings; DPM-Solver++, {figures["steps"]} steps, guidance
{figures["guidance"]}. In brackets the 95 % Wilson interval.

| attribute | samples | aimed at | classifier on renderings of those scenes, through the VAE |
|---|---|---|---|
{rows}

Autoencoder on held-out renderings: {figures["judge"]["vae_psnr_db"]:.2f} dB PSNR.

Not measured: patterns, poses, styles and accessories. Small marks and patterns come out roughly; class, place
and main colour are what the model is sure of.
"""


def _recipe(build: Mapping[str, Any], parameters: Mapping[str, int]) -> str:
    sizes = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parameters.items())
    phases = "\n".join(
        f"| {p['phase']} | {p['steps']} | {p['minutes']:.1f} | {p['hyper']['lr']} | {p['batch']} |"
        for p in build["phases"]
    )
    return f"""
## Recipe of the build

Parameters: {sizes}. Seed {build["seed"]}, {build["scenes"]} renderings, device {build["device"]}.

| phase | steps | minutes | peak learning rate | batch |
|---|---|---|---|---|
{phases}

AdamW in bfloat16 autocast, cosine schedule over the time, moving average of the weights in every phase.
Autoencoder: {vae.LATENT_CHANNELS} x 16 x 16 latents, absolute and squared error, edges, random features.
CLIP: contrast, and a reading of every token from its own output. Denoiser: v-prediction, min-SNR weights
with gamma {unet.SNR_GAMMA:.0f} and at least {unet.LEAST_WEIGHT}, captions empty in
{unet.CAPTION_DROPOUT:.0%}; a rare identifier stands before the noun phrase in
{vocabulary.IDENTIFIER_SHARE:.0%} of the captions, so that an unknown word is a neutral modifier.
The text encoder (width {clip.TEXT_WIDTH}) is frozen while the denoiser trains.
{build["notes"]}
Made by `benchmarks/pocket_base.py` at commit {build["commit"]}; torch {build["versions"]["torch"]},
diffusers {build["versions"]["diffusers"]}, transformers {build["versions"]["transformers"]}.
"""


def card_text(figures: Mapping[str, Any], build: Mapping[str, Any]) -> str:
    """The card as Markdown.

    Args:
        figures: what `benchmarks/pocket_base.py` measured.
        build: the build's record: seed, scenes, device, phases, notes, commit, versions, parameters, size_mb.
    """
    header = _HEADER.format(
        size_mb=build["size_mb"],
        class_count=len(scenes.CLASSES),
        colour_count=len(scenes.COLOURS),
        pattern_count=len(scenes.PATTERNS),
        place_count=len(scenes.PLACES),
        style_count=len(scenes.STYLES),
        accessory_count=len(scenes.ACCESSORIES) - 1,
        pose_count=len(scenes.POSES),
        classes=", ".join(scenes.CLASSES),
        places=", ".join(scenes.PLACES),
    )
    use = _USE.format(steps=figures["steps"], guidance=figures["guidance"])
    return header + use + _quality(figures) + _recipe(build, build["parameters"])


def subject_section(record: Mapping[str, Any], steps: int, minutes: float, notes: str = "") -> str:
    """The card's section on the subject encoder.

    Args:
        record: what `benchmarks/subject_encoder.py` measured.
        steps: optimizer steps that it was trained for.
        minutes: training time.
        notes: a sentence on how this one came about.
    """
    found = record["retrieval"]
    rows = "\n".join(f"| {name} | {_share(found['by style'][name])} |" for name in scenes.STYLES)
    return f"""
## Subject encoder

`subject_encoder/` is a ResNet of transformers and a linear projection of its pooled output
({record["parameters"] / 1e6:.2f} M parameters), near for two pictures of one specimen and apart for two
specimens of a class: what DINO is for photos (`lorabooth.pocket.subject.load_subject_encoder`). Trained by
contrast (InfoNCE) for {steps} steps, {minutes:.0f} minutes on one core, on specimens of its own.
{notes}

A specimen of a stream that training has not seen is sought by one picture, in any place, pose and accessory,
among a photo each of {record["among"]} specimens of its class. All styles together:
{_share(found["all"])}; aimed at {record["aimed_at"]:.0%}.

| style of the picture | found |
|---|---|
{rows}

A pencil sketch shares no colour with what it shows; many specimens of a class differ in little else. So the
scores of sketches say less about whose likeness they are.
"""


def with_section(card: str, section: str) -> str:
    """The card with a section, in place of the one of the same heading or at its end."""
    heading = next(line for line in section.splitlines() if line.startswith("## "))
    before, found, rest = card.partition(f"\n{heading}\n")
    if not found:
        return card.rstrip("\n") + "\n" + section
    _, next_heading, after = rest.partition("\n## ")
    return before + section.rstrip("\n") + "\n" + (next_heading + after)


def write_card(folder: Path, figures: Mapping[str, Any], build: Mapping[str, Any]) -> Path:
    """Write README.md into the pipeline's folder; return its path."""
    file = folder / "README.md"
    file.write_text(card_text(figures, build), encoding="utf-8")
    return file
