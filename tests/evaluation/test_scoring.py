"""A row of scores is a loop over pairs of embeddings; and each way of being wrong is caught by its metric."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorabooth.evaluation.backbones import Backbones, open_backbones
from lorabooth.evaluation.metrics import by_group, difference
from lorabooth.evaluation.scoring import Drawn, Scores, real_row, score
from lorabooth.pocket.base import pocket_dir
from lorabooth.pocket.scenes import Specimen, full_caption, render, sample_scene, sample_specimen
from tests.evaluation.tiny_backbones import images, make_clip, make_resnet, make_vit


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Backbones:
    folder = tmp_path_factory.mktemp("made")
    return open_backbones(str(make_resnet(folder / "r")), str(make_clip(folder / "c")), base="x", strict=True)


@pytest.fixture(scope="module")
def shots() -> list[Drawn]:
    """Two prompts of three images, one of a single image."""
    prompts = ["a zwx dog"] * 3 + ["a zwx dog in snow"] * 3 + ["a red zwx dog"]
    return [
        Drawn(prompt, 10 + i, image, prompt.replace("zwx ", ""))
        for i, (prompt, image) in enumerate(zip(prompts, images(7), strict=True))
    ]


def test_a_row_is_a_loop_over_pairs(tiny: Backbones, shots: list[Drawn]) -> None:
    photos, plain = images(4, seed=1), images(3, seed=2)
    classes = [Drawn("a dog", i, image) for i, image in enumerate(plain)]
    found = score(tiny, photos=photos, images=shots, class_images=classes)
    assert tiny.subject is not None
    assert tiny.clip is not None
    assert tiny.distance is not None
    cosines = [[float(tiny.subject([s.image])[0] @ tiny.subject([p])[0]) for p in photos] for s in shots]
    assert found.dino.values == pytest.approx(np.mean(cosines, axis=1), abs=1e-5)
    assert found.dino.mean == pytest.approx(np.mean(cosines), abs=1e-5)
    assert found.dino.groups == tuple(shot.prompt for shot in shots)
    cosines = [
        [float(tiny.clip.images([s.image])[0] @ tiny.clip.images([p])[0]) for p in photos] for s in shots
    ]
    assert found.clip_i.values == pytest.approx(np.mean(cosines, axis=1), abs=1e-5)
    texts = [float(tiny.clip.images([s.image])[0] @ tiny.clip.texts([s.caption])[0]) for s in shots]
    assert found.clip_t.values == pytest.approx(texts, abs=1e-5)
    cosines = [[float(tiny.subject([c])[0] @ tiny.subject([p])[0]) for p in photos] for c in plain]
    assert found.pres.mean == pytest.approx(np.mean(cosines), abs=1e-5)
    assert found.pres.low is not None  # one prompt: its images are drawn
    for group, shown in (("a zwx dog", shots[:3]), ("a zwx dog in snow", shots[3:6])):
        pairs = [float(tiny.distance([a.image], [b.image])[0]) for a, b in combinations(shown, 2)]
        assert by_group(found.div)[group] == pytest.approx(np.mean(pairs), abs=1e-5)
    assert len(found.div.values) == 2  # a prompt with one image has no pairs
    assert found.drift is None


def test_clip_t_reads_the_caption_or_else_the_prompt(tiny: Backbones, shots: list[Drawn]) -> None:
    bare = [replace(shot, caption=None, prompt="a dog") for shot in shots]
    said = [replace(shot, caption="a dog") for shot in shots]
    assert (
        score(tiny, photos=[], images=bare).clip_t.values == score(tiny, photos=[], images=said).clip_t.values
    )
    assert (
        score(tiny, photos=[], images=shots).clip_t.values
        != score(tiny, photos=[], images=said).clip_t.values
    )


def test_drift_is_between_the_same_prompt_and_seed(tiny: Backbones) -> None:
    before = [
        Drawn(prompt, seed, images(1, seed=seed)[0]) for prompt in ("a cup", "a hat") for seed in (1, 2)
    ]
    same = score(tiny, photos=[], images=[], unrelated=before, unrelated_before=before[::-1]).drift
    assert same.values == pytest.approx([0] * 4, abs=1e-6)
    moved = [replace(shot, image=images(1, seed=9)[0]) for shot in before[:2]] + before[2:]
    drift = score(tiny, photos=[], images=[], unrelated=moved, unrelated_before=before).drift
    assert min(drift.values[:2]) > 1e-3
    assert by_group(drift)["a hat"] == pytest.approx(0, abs=1e-6)
    assert by_group(drift)["a cup"] > 1e-3
    other = [replace(shot, seed=shot.seed + 100) for shot in before[:3]]
    only = score(tiny, photos=[], images=[], unrelated=[*other, before[3]], unrelated_before=before).drift
    assert len(only.values) == 1
    assert score(tiny, photos=[], images=[], unrelated=other, unrelated_before=before).drift is None


def test_the_real_row_is_of_different_photos(tiny: Backbones) -> None:
    photos = images(3)
    found = real_row(tiny, photos)
    pairs = [float(tiny.subject([a])[0] @ tiny.subject([b])[0]) for a, b in combinations(photos, 2)]
    assert found.dino.mean == pytest.approx(np.mean(pairs), abs=1e-5)
    assert found.clip_i.mean < 1
    assert found.clip_t is found.pres is found.div is found.drift is None
    assert real_row(tiny, photos[:1]) == Scores()


class Counted:
    """A backbone that counts what it is asked to look at."""

    def __init__(self, inner: object) -> None:
        self.inner, self.name = inner, "counted"
        self.seen: list[int] = []

    def __call__(self, batch: Sequence[Image.Image]) -> np.ndarray:
        self.seen += [id(image) for image in batch]
        return self.inner(batch)

    images = __call__

    def texts(self, prompts: Sequence[str]) -> np.ndarray:
        self.seen += [hash(prompt) for prompt in prompts]
        return self.inner.texts(prompts)


def test_no_image_and_no_caption_is_embedded_twice(tiny: Backbones, shots: list[Drawn]) -> None:
    subject, clip = Counted(tiny.subject), Counted(tiny.clip.images)
    captions = Counted(tiny.clip)
    clip.texts = captions.texts
    score(Backbones(subject, clip, None), photos=images(3, seed=1), images=shots, class_images=shots[:2])
    assert len(subject.seen) == 3 + 7 + 2
    assert len(clip.seen) == len(set(clip.seen)) == 3 + 7
    assert len(captions.seen) == len(set(captions.seen)) == 3


def test_what_is_missing_leaves_its_metrics_out(tiny: Backbones, shots: list[Drawn], tmp_path: Path) -> None:
    only_clip = score(Backbones(None, tiny.clip, None), photos=images(2, seed=1), images=shots)
    assert [name for name, one in only_clip.items() if one is not None] == ["clip_i", "clip_t"]
    vit = open_backbones(str(make_vit(tmp_path / "v")), base="x")
    found = score(replace(vit, clip=None), photos=images(2, seed=1), images=shots, class_images=shots)
    assert [name for name, one in found.items() if one is not None] == ["dino", "pres", "div"]
    assert score(tiny, photos=[], images=[]) == Scores()
    assert score(Backbones(None, None, None), photos=images(2), images=shots) == Scores()


def test_json_comes_back(tiny: Backbones, shots: list[Drawn]) -> None:
    found = score(tiny, photos=images(2, seed=1), images=shots)
    text = json.dumps(found.to_json(), allow_nan=False)
    again = Scores.from_json(json.loads(text))
    assert json.dumps(again.to_json()) == text
    assert again.pres is None
    assert again.dino.mean == pytest.approx(found.dino.mean, rel=1e-5)
    assert list(found.to_json()) == ["dino", "clip_i", "clip_t", "pres", "div", "drift"]


# ---- known answers, with the pocket world's own backbones ----

needs_encoder = pytest.mark.skipif(
    not (pocket_dir() / "subject_encoder" / "config.json").is_file(),
    reason="the pocket base is without its subject encoder",
)


@pytest.fixture(scope="module")
def pocket() -> Backbones:
    return open_backbones(base="pocket")


def rendered(specimen: Specimen, first: int, count: int, prompts: int = 3) -> list[Drawn]:
    """Pictures of a specimen, a prompt (a place) for each few of them."""
    shots = []
    for i in range(count):
        place = ("beach", "grass", "snow")[i % prompts]
        rng = np.random.default_rng((first, i))
        scene = sample_scene(rng, specimen, place=place, style="photo", accessory="none", pose="upright")
        image = Image.fromarray(render(scene, 64))
        shots.append(Drawn(f"a photo of a zwx in {place}", i, image, full_caption(scene)))
    return shots


CLASSES = ("mug", "cat")


@pytest.fixture(scope="module", params=CLASSES)
def subject(request: pytest.FixtureRequest) -> tuple[str, Specimen]:
    return request.param, sample_specimen(np.random.default_rng(7), request.param)


@pytest.fixture(scope="module")
def photos(subject: tuple[str, Specimen]) -> list[Image.Image]:
    return [shot.image for shot in rendered(subject[1], 100, 5)]


@needs_encoder
def test_images_of_the_subject_score_like_the_real_image_row(
    pocket: Backbones, subject: tuple[str, Specimen], photos: list[Image.Image]
) -> None:
    real = real_row(pocket, photos)
    found = score(pocket, photos=photos, images=rendered(subject[1], 200, 12))
    gap = difference(found.dino, real.dino)
    assert abs(gap.mean) < 0.06
    assert abs(difference(found.clip_i, real.clip_i).mean) < 0.06
    assert found.div.low > 0


@needs_encoder
def test_another_of_the_class_is_caught_by_dino_and_black_by_both(
    pocket: Backbones, subject: tuple[str, Specimen], photos: list[Image.Image]
) -> None:
    noun, specimen = subject
    right = rendered(specimen, 200, 12)
    others = [
        shot
        for i in range(6)
        for shot in rendered(sample_specimen(np.random.default_rng(50 + i), noun), 300 + i, 3)
    ]
    black = [replace(shot, image=Image.new("RGB", (64, 64))) for shot in right]
    rows = {
        name: score(pocket, photos=photos, images=shots)
        for name, shots in (("right", right), ("others", others), ("black", black))
    }
    for wrong in ("others", "black"):
        assert difference(rows["right"].dino, rows[wrong].dino, paired=False).low > 0.15
    assert difference(rows["right"].clip_t, rows["black"].clip_t).low > 0.15
    # Another of the class follows the prompt as well: only DINO can tell.
    assert abs(rows["right"].clip_t.mean - rows["others"].clip_t.mean) < 0.1
    assert rows["black"].div.mean == pytest.approx(0, abs=1e-6)


@needs_encoder
def test_copies_of_one_photo_are_caught_by_diversity_and_by_the_prompt(
    pocket: Backbones, subject: tuple[str, Specimen], photos: list[Image.Image]
) -> None:
    right = rendered(subject[1], 200, 12)
    copies = [replace(shot, image=photos[0].copy()) for shot in right]
    good, copied = (score(pocket, photos=photos, images=shots) for shots in (right, copies))
    assert copied.div.values == pytest.approx([0] * 3, abs=1e-6)
    assert good.div.low > 0.02
    assert copied.dino.mean > good.dino.mean - 0.06  # fidelity alone would call them perfect
    assert copied.clip_t.mean < good.clip_t.mean - 0.05


@needs_encoder
def test_a_class_that_has_become_the_subject_is_caught_by_pres(
    pocket: Backbones, subject: tuple[str, Specimen], photos: list[Image.Image]
) -> None:
    noun, specimen = subject
    sound = [
        replace(rendered(sample_specimen(np.random.default_rng(70 + i), noun), 400 + i, 1)[0], prompt=noun)
        for i in range(12)
    ]
    collapsed = [replace(shot, prompt=noun) for shot in rendered(specimen, 500, 12)]
    kept, lost = (
        score(pocket, photos=photos, images=[], class_images=shots).pres for shots in (sound, collapsed)
    )
    assert lost.low > kept.high + 0.1
