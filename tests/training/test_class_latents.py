"""Class images are trained on as the latents that the sampler ended with; without them, as what they show."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorabooth.data.cache import Store
from lorabooth.errors import OutOfMemoryError
from lorabooth.evaluation.generate import generate
from lorabooth.progress import Silent
from lorabooth.training.caching import Examples, encode_examples
from lorabooth.training.class_images import ClassExamples, class_examples
from lorabooth.training.setting import Clock, Setting, open_setting
from lorabooth.training.studio import Studio
from lorabooth.types import Record
from tests.training import runs
from tests.training.sessions import Listener


def studio(draw: Any = generate) -> Studio:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("not for class images")

    return Studio(generate=draw, draw_grid=never, file_name=never)


def setting_of(base: Path | str, photos: Path, *overrides: str) -> Setting:
    return open_setting(runs.recipe(Path(base), photos, *overrides), Clock(), Silent())


def drawn(setting: Setting, root: Path, listener: Silent | None = None, **more: Any) -> ClassExamples:
    return class_examples(setting, studio(**more), Store(root), listener or Silent())


def encoded(setting: Setting, classes: Sequence[Record], root: Path) -> Examples:
    return encode_examples(
        setting.family, setting.parts, setting.recipe, (), classes, store=Store(root), reporter=Silent()
    )


def means(examples: Examples, records: Sequence[Record]) -> Tensor:
    return torch.stack([examples.latents.of(record, 0).moments.mean for record in records])


def stds(examples: Examples, records: Sequence[Record]) -> Tensor:
    return torch.stack([examples.latents.of(record, 0).moments.std for record in records])


def test_the_samplers_latent_is_trained_on_and_nothing_is_encoded(
    tiny_sd: Path, photos: Path, tmp_path: Path
) -> None:
    final: list[Tensor] = []

    def noting(*args: Any, on_latent: Any, **kwargs: Any) -> Any:
        def both(index: int, latent: Tensor) -> None:
            final.append(latent.clone())
            on_latent(index, latent)

        return generate(*args, on_latent=both, **kwargs)

    setting = setting_of(tiny_sd, photos)
    records = drawn(setting, tmp_path, draw=noting).records
    vae: Any = setting.parts.vae
    vae.encode = None  # nobody asks it
    examples = encoded(setting, records, tmp_path)
    assert torch.equal(means(examples, records), torch.stack(final[: len(records)]))
    assert not stds(examples, records).any()
    assert (examples.latents.computed, examples.latents.reused) == (0, 3)
    again = drawn(setting, tmp_path)
    assert (again.facts["drawn"], again.facts["reused"]) == (0, 3)
    assert torch.equal(
        means(encoded(setting, again.records, tmp_path), again.records), means(examples, records)
    )


def test_a_denoiser_in_bf16_draws_beside_the_one_that_trains(
    tiny_sd: Path, photos: Path, tmp_path: Path
) -> None:
    """It draws as one that was loaded in bf16; the run's own stays as it was, and so do images in float32."""
    setting = setting_of(tiny_sd, photos, "model.dtype=fp32", "prior.dtype=bf16")
    loaded = setting.family.load(setting.parts.source, torch.bfloat16).denoiser
    other = setting.family.pipeline(replace(setting.parts, denoiser=loaded, text_encoders={}))
    latents: list[Tensor] = []

    def twice(pipeline: Any, *args: Any, on_latent: Any, **kwargs: Any) -> Any:
        assert pipeline.unet.dtype == torch.bfloat16
        assert pipeline.vae.dtype == torch.float32
        generate(other, *args, on_latent=lambda _, latent: latents.append(latent), **kwargs)
        return generate(pipeline, *args, on_latent=on_latent, **kwargs)

    before = {name: tensor.clone() for name, tensor in setting.parts.denoiser.state_dict().items()}
    made = drawn(setting, tmp_path, draw=twice)
    torch.testing.assert_close(setting.parts.denoiser.state_dict(), before, rtol=0, atol=0)
    kept = means(encoded(setting, made.records, tmp_path), made.records)
    assert torch.equal(kept, torch.stack(latents[: len(made.records)]))
    in_full = drawn(setting_of(tiny_sd, photos, "model.dtype=fp32"), tmp_path)
    assert (in_full.facts["drawn"], in_full.facts["reused"]) == (3, 0)


def test_without_the_latent_the_image_is_encoded(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    setting = setting_of(tiny_sd, photos)
    records = drawn(setting, tmp_path).records
    stored = means(encoded(setting, records, tmp_path), records)
    shutil.rmtree(tmp_path / "latents")
    fallen_back = encoded(setting, records, tmp_path)
    assert (fallen_back.latents.computed, fallen_back.latents.reused) == (3, 0)
    assert stds(fallen_back, records).all()
    assert not torch.allclose(means(fallen_back, records), stored)


def test_an_image_that_was_changed_is_what_it_shows(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    from PIL import Image, ImageOps

    setting = setting_of(tiny_sd, photos)
    records = drawn(setting, tmp_path).records
    with Image.open(records[1].path) as image:
        changed = ImageOps.mirror(image.convert("RGB"))
    changed.save(records[1].path)
    examples = encoded(setting, records, tmp_path)
    assert (examples.latents.computed, examples.latents.reused) == (1, 2)


@pytest.mark.parametrize("overrides", [("prior.mode=images",), ("images.resolution=48",)])
def test_ones_own_images_and_other_sizes_are_encoded(
    tiny_sd: Path, photos: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """The same bytes as class images of one's own, and images that would be cut."""
    setting = setting_of(tiny_sd, photos)
    records = drawn(setting, tmp_path).records
    folder = records[0].path.parent
    if "images" in overrides[0].split("=")[1]:
        overrides = (*overrides, f"prior.images={folder}")
    other = setting_of(tiny_sd, photos, *overrides)
    examples = encoded(other, records, tmp_path)
    assert (examples.latents.computed, examples.latents.reused) == (3, 0)


def test_a_killed_drawing_leaves_no_image_without_its_latent(
    tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two writes of the second image: it is drawn again, with its latent."""
    import os

    setting = setting_of(tiny_sd, photos)
    whole = drawn(setting, tmp_path / "whole").records
    plain, pngs = os.replace, []

    def dying(source: Any, target: Any, **kwargs: Any) -> None:
        if str(target).endswith(".png"):
            pngs.append(target)
            if len(pngs) == 2:
                raise KeyboardInterrupt
        plain(source, target, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            drawn(setting, tmp_path / "killed")
    assert len(pngs) == 2
    records = drawn(setting, tmp_path / "killed").records
    ours, theirs = (
        encoded(setting, found, tmp_path / name) for found, name in ((records, "killed"), (whole, "whole"))
    )
    assert ours.latents.computed == 0
    assert torch.equal(means(ours, records), means(theirs, whole))
    assert [r.path.read_bytes() for r in records] == [r.path.read_bytes() for r in whole]


def test_what_did_not_fit_once_is_not_tried_again(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    asked: list[int] = []

    def small(
        pipeline: Any, prompts: Any, seeds: Any, *, batch_size: int, on_smaller: Any, **kwargs: Any
    ) -> Any:
        asked.append(batch_size)
        if batch_size > 2:
            on_smaller(2)
        return generate(pipeline, prompts, seeds, batch_size=2, on_smaller=on_smaller, **kwargs)

    listener = Listener()
    setting = setting_of(tiny_sd, photos, "prior.count=10")
    drawn(setting, tmp_path, listener, draw=small)
    assert asked == [4, 2, 2]
    assert len(listener.warnings) == 1
    assert "2 at once from now on" in listener.warnings[0]


def test_the_samplers_of_a_real_shortage_are_told(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real generator halves, says so, and gives up at one."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, local_files_only=True)
    plain, told = type(pipeline.unet).forward, []

    def crowded(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.shape[0] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, x, *args, **kwargs)

    monkeypatch.setattr(type(pipeline.unet), "forward", crowded)
    limit = 2  # with guidance twice as many go in as come out
    options = {"steps": 1, "guidance": 3.0, "height_px": 32, "width_px": 32}
    images = generate(pipeline, ["a dog"] * 4, range(4), batch_size=4, on_smaller=told.append, **options)
    assert (len(images), told) == (4, [2, 1])
    limit = 1
    with pytest.raises(OutOfMemoryError):
        generate(pipeline, ["a dog"], [0], **options)


def test_on_a_trained_base_the_latent_is_close_to_what_the_image_shows(photos: Path, tmp_path: Path) -> None:
    """The pocket base: the sampler's latent, and its image encoded again, nearly agree."""
    setting = setting_of("pocket", photos, "prior.sampler_steps=10", "prior.count=4", "images.resolution=64")
    records = drawn(setting, tmp_path).records
    ours = means(encoded(setting, records, tmp_path), records)
    shutil.rmtree(tmp_path / "latents")
    encoded_again = means(encoded(setting, records, tmp_path), records)
    off = float((ours - encoded_again).square().mean().sqrt() / encoded_again.std())
    assert 0 < off < 0.35, off
    decoded = setting.family.decode_latents(setting.parts, torch.cat([ours, encoded_again]))
    pixels, pixels_again = decoded.chunk(2)
    assert float((pixels - pixels_again).abs().mean()) < 0.1
