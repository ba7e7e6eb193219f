"""The pocket renderer: same scene, same picture; captions say what is drawn; what differs looks different."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorabooth
from lorabooth.pocket import scenes
from lorabooth.pocket.canvas import Pattern, pattern_albedo
from lorabooth.pocket.scenes import ACCESSORIES, CLASSES, COLOURS, PATTERNS, PLACES, POSES, STYLES, Scene


def any_scene(seed: int, **given_parts: str) -> Scene:
    return scenes.sample_scene(np.random.default_rng(seed), **given_parts)


def centred(scene: Scene, **changes: object) -> Scene:
    plain = {"x": 0.5, "y": 0.85, "scale": 0.66, "rotation_rad": 0.0, "flip": False, "light": (1.2, 1.0)}
    return dataclasses.replace(scene, **{**plain, **changes})


def test_vocabulary_is_large_enough() -> None:
    assert len(CLASSES) >= 12
    assert set(scenes.LIVE_CLASSES) < set(CLASSES)
    assert len(COLOURS) >= 10
    assert len(PLACES) >= 10
    assert len(set(PLACES.values())) == len(PLACES)


@pytest.mark.parametrize("size_px", [32, 64, 128])
def test_picture_has_the_size_asked_for_and_repeats_exactly(size_px: int) -> None:
    scene = any_scene(3)
    first = scenes.render(scene, size_px)
    assert first.shape == (size_px, size_px, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, scenes.render(scene, size_px))


@pytest.mark.parametrize("size_px", [0, 15, 63])
def test_a_size_that_cannot_be_drawn_is_refused(size_px: int) -> None:
    with pytest.raises(ValueError, match=str(size_px)):
        scenes.render(any_scene(3), size_px)


def test_seed_decides_the_scene_and_the_picture_shows_it() -> None:
    assert any_scene(5) == any_scene(5)
    pictures = {scenes.render(any_scene(seed)).tobytes() for seed in range(20)}
    assert len(pictures) == 20


def test_sizes_show_the_same_picture() -> None:
    scene = any_scene(8, style="photo", place="grass", accessory="none")
    small = scenes.render(scene, 32).astype(np.float32)
    large = scenes.render(scene, 128).reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
    assert np.abs(small - large).mean() < 8.0


@pytest.mark.slow
def test_every_combination_renders_and_is_not_flat() -> None:
    rng = np.random.default_rng(0)
    for combination in itertools.product(CLASSES, PLACES, STYLES, ACCESSORIES, POSES):
        class_name, place, style, accessory, pose = combination
        scene = scenes.sample_scene(
            rng, class_name=class_name, place=place, style=style, accessory=accessory, pose=pose
        )
        assert (scene.specimen.class_name, scene.place, scene.style) == (class_name, place, style)
        assert (scene.accessory, scene.pose) == (accessory, pose)
        assert scenes.render(scene, 32).std() > 8.0, combination


@pytest.mark.parametrize("class_name", CLASSES)
def test_body_is_large_whole_and_stands_on_its_line(class_name: str) -> None:
    for seed in range(12):
        scene = any_scene(seed, class_name=class_name, place="grass", pose="upright", accessory="none")
        mask = scenes.body_mask(scene)
        rows, columns = np.flatnonzero(mask.max(axis=1) > 0.5), np.flatnonzero(mask.max(axis=0) > 0.5)
        longer = max(len(rows), len(columns)) / 64
        assert 0.38 <= longer <= 0.97
        assert mask.mean() > 0.05
        assert abs((rows[-1] + 1) / 64 - scene.y) <= 0.03
        assert rows[0] >= 1


def body_pixels(scene: Scene) -> np.ndarray:
    """Return the picture where only the body shows, grey elsewhere."""
    inside = scenes.body_mask(scene) > 0.999
    return np.where(inside[..., None], scenes.render(scene), 128)


@pytest.mark.parametrize("class_name", CLASSES)
def test_a_specimen_keeps_its_looks_in_every_place(class_name: str) -> None:
    rng = np.random.default_rng(11)
    specimen = scenes.sample_specimen(rng, class_name)
    # these places share the light, so the body may not change at all
    shown = [
        body_pixels(centred(scenes.sample_scene(rng, specimen, place=p, style="photo", accessory="none")))
        for p in ("beach", "grass", "brick wall", "cobblestones")
    ]
    for other in shown[1:]:
        assert np.abs(shown[0].astype(int) - other).max() <= 1
    stranger = scenes.sample_specimen(rng, class_name)
    scene = scenes.sample_scene(rng, stranger, place="grass", style="photo", accessory="none")
    assert np.abs(shown[0].astype(int) - body_pixels(centred(scene))).mean() > 2.0


def test_moving_a_body_moves_its_pixels() -> None:
    scene = centred(any_scene(2, class_name="robot", place="grass", style="photo", accessory="none"), x=0.5)
    moved = dataclasses.replace(scene, x=0.5 + 6 / 64)
    assert np.array_equal(np.roll(body_pixels(scene), 6, axis=1), body_pixels(moved))


def test_light_from_the_other_side_shades_the_other_side() -> None:
    specimen = dataclasses.replace(
        scenes.sample_specimen(np.random.default_rng(1), "ball"), pattern="plain", mark="none"
    )
    base = scenes.sample_scene(
        np.random.default_rng(1), specimen, place="grass", style="photo", accessory="none"
    )
    lit = {
        side: body_pixels(centred(base, light=(angle, 1.0))).astype(float).sum(axis=2)
        for side, angle in (("right", 0.3), ("left", 2.84))
    }
    assert lit["right"][:, 36:].mean() > lit["left"][:, 36:].mean()
    assert lit["right"][:, :28].mean() < lit["left"][:, :28].mean()


@pytest.mark.parametrize("class_name", CLASSES)
def test_accessories_change_the_picture_where_they_sit(class_name: str) -> None:
    scene = centred(any_scene(21, class_name=class_name, place="beach", style="photo", pose="upright"))
    bare = scenes.render(dataclasses.replace(scene, accessory="none")).astype(int)
    for accessory in ACCESSORIES[1:]:
        worn = scenes.render(dataclasses.replace(scene, accessory=accessory)).astype(int)
        changed = np.abs(worn - bare).max(axis=2) > 24
        assert 25 <= changed.sum() <= 0.35 * 64 * 64, accessory


def test_upside_down_puts_the_roof_below() -> None:
    scene = centred(any_scene(4, class_name="house", place="grass", style="photo", accessory="none"))
    upright = scenes.body_mask(scene) > 0.5
    turned = scenes.body_mask(dataclasses.replace(scene, rotation_rad=np.pi, pose="upside down")) > 0.5
    assert np.mean(np.flip(upright[upright.any(1)], axis=(0, 1))[:20].sum(1)) == pytest.approx(
        np.mean(turned[turned.any(1)][:20].sum(1)), abs=2.0
    )


def coarse(picture: np.ndarray) -> np.ndarray:
    """Return what is left of a picture at 8x8: mean colours, and the detail lost there."""
    blocks = picture.astype(np.float32).reshape(8, 8, 8, 8, 3)
    means, detail = blocks.mean(axis=(1, 3)), blocks.std(axis=(1, 3))
    return np.concatenate([means[[0, 1, 2, 6, 7]].ravel(), detail[[0, 1, 2, 6, 7]].ravel()])


def test_places_and_styles_are_told_apart_by_their_nearest_mean() -> None:
    rng = np.random.default_rng(5)
    kinds = [(p, "photo") for p in PLACES] + [("grass", "pencil sketch"), ("grass", "painting")]
    features = {
        kind: np.stack(
            [coarse(scenes.render(scenes.sample_scene(rng, place=kind[0], style=kind[1]))) for _ in range(40)]
        )
        for kind in kinds
    }
    means = np.stack([features[kind][:20].mean(axis=0) for kind in kinds])
    hits = [
        np.linalg.norm(means - feature, axis=1).argmin() == index
        for index, kind in enumerate(kinds)
        for feature in features[kind][20:]
    ]
    assert np.mean(hits) > 0.93


def test_sketches_are_grey_and_paintings_are_not() -> None:
    for seed in range(10):
        photo = any_scene(seed, place="beach", style="photo")
        spread = {
            style: np.ptp(scenes.render(dataclasses.replace(photo, style=style)).astype(int), axis=2).mean()
            for style in STYLES
        }
        assert spread["pencil sketch"] < 20 < spread["photo"] < spread["painting"] + 15


def test_the_colour_in_the_caption_is_the_bodys_and_the_pattern_leaves_it_the_larger_part() -> None:
    rng = np.random.default_rng(13)
    v, u = np.meshgrid(np.linspace(-2, 2, 200), np.linspace(-2, 2, 200), indexing="ij")
    for _ in range(200):
        s = scenes.sample_specimen(rng)
        distance = {name: np.linalg.norm(np.subtract(rgb, s.body_rgb)) for name, rgb in COLOURS.items()}
        assert min(distance, key=distance.__getitem__) == s.colour
        assert np.linalg.norm(np.subtract(s.second_rgb, s.body_rgb)) > 0.35
        pattern = Pattern(s.pattern, s.body_rgb, s.second_rgb, 2.0, s.pattern_phase, s.pattern_angle_rad)
        albedo = np.broadcast_to(pattern_albedo(pattern, u, v, 0.02), (3, 200, 200))
        step = np.subtract(s.second_rgb, s.body_rgb)
        share = np.tensordot(step, albedo - np.reshape(s.body_rgb, (3, 1, 1)), 1).mean() / np.sum(step**2)
        assert abs(share) < 1e-4 if s.pattern == "plain" else 0.2 < share < 0.48


def reference_caption(scene: Scene, *, without: frozenset[str] = frozenset()) -> str:
    said = {
        "pose": "" if scene.pose == "upright" else scene.pose,
        "colour": scene.specimen.colour,
        "pattern": "" if scene.specimen.pattern == "plain" else scene.specimen.pattern,
    }
    body = " ".join(
        [word for key, word in said.items() if word and key not in without] + [scene.specimen.class_name]
    )
    text = f"an {body}" if body.startswith(("orange", "upside")) else f"a {body}"
    if "style" not in without:
        text = f"a {scene.style} of {text}"
    worn = {"red hat": "a red hat", "striped scarf": "a striped scarf", "sunglasses": "sunglasses"}
    if scene.accessory != "none" and "accessory" not in without:
        text += f" wearing {worn[scene.accessory]}"
    return text if "place" in without else f"{text} {PLACES[scene.place]}"


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_captions_say_the_scene_and_leave_out_only_what_they_may(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = scenes.sample_scene(rng)
    assert scenes.full_caption(scene) == reference_caption(scene)
    assert scenes.caption(scene, rng, drop=0.0) == reference_caption(scene)
    optional = [
        "pose",
        "colour",
        "pattern",
        "accessory",
        "place",
        *(["style"] if scene.style == "photo" else []),
    ]
    allowed = {
        reference_caption(scene, without=frozenset(left_out))
        for count in range(len(optional) + 1)
        for left_out in itertools.combinations(optional, count)
    }
    assert scenes.caption(scene, rng) in allowed
    least = {"colour", "pattern", "place"}
    assert scenes.caption(scene, rng, drop=1.0) in {
        reference_caption(scene, without=frozenset(least | set(left_out)))
        for count in range(4)
        for left_out in itertools.combinations(set(optional) - least, count)
    }


def test_captions_are_as_published() -> None:
    specimen = dataclasses.replace(
        scenes.sample_specimen(np.random.default_rng(0), "cat"), colour="orange", pattern="striped"
    )
    rng, sketch = np.random.default_rng(0), "pencil sketch"
    scene = scenes.sample_scene(
        rng, specimen, place="snow", style=sketch, accessory="red hat", pose="upside down"
    )
    assert scenes.full_caption(scene) == (
        "a pencil sketch of an upside down orange striped cat wearing a red hat in the snow"
    )
    scene = dataclasses.replace(scene, style="photo", accessory="none", pose="upright", place="water")
    assert scenes.full_caption(scene) == "a photo of an orange striped cat floating on water"


def test_frequencies_are_as_documented() -> None:
    rng = np.random.default_rng(17)
    drawn = [scenes.sample_scene(rng) for _ in range(3000)]
    assert np.mean([s.style == "photo" for s in drawn]) == pytest.approx(0.80, abs=0.03)
    assert np.mean([s.accessory == "none" for s in drawn]) == pytest.approx(0.75, abs=0.03)
    assert np.mean([s.pose == "upright" for s in drawn]) == pytest.approx(0.80, abs=0.03)
    assert np.mean([s.pose == "upside down" for s in drawn]) == pytest.approx(0.08, abs=0.02)
    for field, names in (("class_name", CLASSES), ("colour", tuple(COLOURS)), ("pattern", PATTERNS)):
        counts = [sum(getattr(s.specimen, field) == n for s in drawn) for n in names]
        assert min(counts) > 0.6 * 3000 / len(names) * (1 if field != "pattern" else 0.9)
    captions = [scenes.caption(s, rng) for s in drawn]
    named = np.mean([PLACES[s.place] in text for s, text in zip(drawn, captions, strict=True)])
    assert named == pytest.approx(0.65, abs=0.03)


def test_importing_the_renderer_does_not_import_torch() -> None:
    code = "import sys, lorabooth.pocket.scenes; sys.exit('torch' in sys.modules)"
    root = Path(lorabooth.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
