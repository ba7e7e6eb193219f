from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lorabooth.data import images
from lorabooth.data.images import bucket_for, check, fit, require_good, square_for, target_for, variants
from lorabooth.data.photo import PhotoError
from lorabooth.data.records import Skipped
from lorabooth.errors import DataError, RecipeError
from lorabooth.recipe import ImagesSection
from lorabooth.rng import generator_for
from lorabooth.types import Record, Role


def record(path: Path) -> Record:
    return Record(path, "a photo", Role.INSTANCE, "dog")


def save(path: Path, height: int, width: int) -> Record:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return record(path)


def test_every_bad_file_is_named_in_one_error(tmp_path: Path) -> None:
    good = save(tmp_path / "good.png", 64, 64)
    tiny = save(tmp_path / "tiny.png", 4, 4)
    strip = save(tmp_path / "strip.png", 20, 400)
    text = record(tmp_path / "text.jpg")
    text.path.write_text("hello")
    torn = record(tmp_path / "torn.jpg")
    torn.path.write_bytes(good.path.read_bytes()[:900])
    report = check([good, tiny, strip, text, torn, good], resolution_px=64)
    assert [facts.path for facts in report.used] == [good.path]
    assert (report.used[0].height_px, report.used[0].width_px, report.used[0].mode) == (64, 64, "RGB")
    reasons = dict(report.problems)
    assert reasons.keys() == {tiny.path, strip.path, text.path, torn.path}
    assert "4x4 px is too small" in reasons[tiny.path]
    assert "strip" in reasons[strip.path]
    with pytest.raises(DataError) as caught:
        require_good(report)
    assert "4 of 5 photos" in str(caught.value)
    assert all(str(path) in str(caught.value) for path in reasons)


def test_captions_and_other_files_are_in_the_same_report(tmp_path: Path) -> None:
    good = save(tmp_path / "good.png", 64, 64)
    report = check([good], resolution_px=64)
    left_out = [Skipped(tmp_path / "x\n.md", "not a photo")]
    require_good(report, skipped=left_out)
    with pytest.raises(DataError) as caught:
        require_good(
            report, captions=[Skipped(tmp_path / "1\x1b.txt", "the caption is empty")], skipped=left_out
        )
    assert str(caught.value).splitlines() == [
        "1 caption cannot be used:",
        rf"  {tmp_path}/1\x1b.txt: the caption is empty",
        "1 other file left out:",
        rf"  {tmp_path}/x\n.md: not a photo",
        "Mend a caption, or delete it to use the prompt.",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names")
def test_photos_with_control_characters_in_their_names_are_shown_escaped(tmp_path: Path) -> None:
    torn = record(tmp_path / "torn\n\x1b[2J.jpg")
    torn.path.write_text("hello")
    report = check([torn], resolution_px=64)
    assert report.problems[0][0] == torn.path
    with pytest.raises(DataError) as caught:
        require_good(report)
    with pytest.raises(PhotoError) as alone:
        images.decode(torn.path)
    for error in (caught, alone):
        assert r"torn\n\x1b[2J.jpg: not an image" in str(error.value)
        assert "\x1b" not in str(error.value)


def test_a_good_report_passes_and_warns_of_small_photos(tmp_path: Path) -> None:
    small, long = save(tmp_path / "small.png", 30, 40), save(tmp_path / "long.png", 64, 256)
    report = check([small, long], resolution_px=64)
    require_good(report)
    assert dict(report.warnings).keys() == {small.path, long.path}
    told = dict(report.warnings)
    assert "40x30 px, enlarged 2.2 times to reach 64 px" in told[small.path]
    assert "cut off" in told[long.path]
    assert check([small], resolution_px=30).warnings == ()


sides = st.integers(16, 6000)


@given(sides, sides, st.integers(64, 1536), st.sampled_from([1, 8, 16, 64]))
def test_buckets_fit_the_area_and_the_aspect(height: int, width: int, resolution: int, multiple: int) -> None:
    bucket_h, bucket_w = bucket_for(height, width, resolution, multiple)
    assert bucket_h % multiple == 0
    assert bucket_w % multiple == 0
    assert bucket_h * bucket_w <= resolution**2
    assert max(bucket_h, bucket_w) <= 2 * min(bucket_h, bucket_w)
    # As large as the shorter side allows, or else the plain square.
    longer, shorter = max(bucket_h, bucket_w), min(bucket_h, bucket_w)
    assert (longer + multiple) * shorter > resolution**2 or (bucket_h, bucket_w) == square_for(
        resolution, multiple
    )
    assert bucket_for(width, height, resolution, multiple) == (bucket_w, bucket_h)
    # No worse than the square: less of the photo is cut away.
    assert kept(height, width, bucket_h, bucket_w) >= kept(height, width, 1, 1) - 1e-6


def kept(height: int, width: int, target_h: int, target_w: int) -> float:
    """Share of the photo that a covering crop keeps."""
    ratio = (width / height) / (target_w / target_h)
    return min(ratio, 1 / ratio)


def test_familiar_buckets() -> None:
    assert bucket_for(512, 512, 512, 64) == (512, 512)
    assert bucket_for(1024, 1024, 1024, 64) == (1024, 1024)
    assert bucket_for(3000, 2000, 512, 64) == (640, 384)  # 3:2 is nearer to 5:3 than to 9:7
    assert bucket_for(100, 900, 512, 64) == (384, 640)
    assert bucket_for(1000, 1000, 100, 8) == (96, 96)
    assert bucket_for(64, 64, 64, 64) == (64, 64)


def test_a_resolution_below_one_multiple_is_the_recipes_error() -> None:
    with pytest.raises(RecipeError, match=r"images\.resolution"):
        square_for(32, 64)


def test_target_is_square_unless_buckets_are_on() -> None:
    assert target_for(300, 600, ImagesSection(), 512, 8) == (512, 512)
    assert target_for(300, 600, ImagesSection(buckets=True), 512, 8) == (368, 712)


@given(
    st.integers(16, 90),
    st.integers(16, 90),
    st.integers(1, 64),
    st.integers(1, 64),
    st.sampled_from(["center", "random"]),
    st.booleans(),
    st.integers(0, 9),
)
def test_the_crop_covers_the_target_and_stays_inside(
    height: int, width: int, target_h: int, target_w: int, crop: str, flip: bool, seed: int
) -> None:
    pixels_u8 = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    before = pixels_u8.copy()
    pixels, geometry = fit(
        pixels_u8, (target_h, target_w), crop=crop, flip=flip, generator=generator_for(seed, 0, 0, "crop")
    )
    assert pixels.shape == (3, target_h, target_w)
    assert pixels.dtype == torch.float32
    assert float(pixels.min()) >= -1
    assert float(pixels.max()) <= 1
    assert geometry.original_px == (height, width)
    assert geometry.target_px == (target_h, target_w)
    assert geometry.flipped is flip
    scale = max(target_h / height, target_w / width)
    top, left = geometry.crop_px
    assert 0 <= top <= max(0, round(height * scale) - target_h)
    assert 0 <= left <= max(0, round(width * scale) - target_w)
    assert np.array_equal(before, pixels_u8)


def test_without_resizing_pixels_are_cut_exactly_where_geometry_says() -> None:
    pixels_u8 = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    seen = set()
    for seed in range(20):
        pixels, geometry = fit(
            pixels_u8,
            (40, 40),
            crop="random",
            flip=bool(seed % 2),
            generator=generator_for(seed, 0, 0, "crop"),
        )
        top, left = geometry.crop_px
        cut = pixels_u8[top : top + 40, left : left + 40]
        cut = cut[:, ::-1] if geometry.flipped else cut
        assert torch.equal(pixels, torch.from_numpy(cut.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1)
        seen.add(left)
    assert len(seen) > 8
    assert fit(pixels_u8, (40, 40), crop="center", flip=False, generator=generator_for(0, 0, 0, "c"))[
        1
    ].crop_px == (0, 12)


def test_black_and_white_reach_the_ends_of_the_range() -> None:
    pixels_u8 = np.zeros((16, 16, 3), np.uint8)
    pixels_u8[:, 8:] = 255
    pixels, _ = fit(pixels_u8, (16, 16), crop="center", flip=False, generator=generator_for(0, 0, 0, "c"))
    assert pixels[0, 0, 0] == -1
    assert pixels[0, 0, 15] == 1


def test_scaling_down_is_antialiased() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels, _ = fit(stripes, (32, 32), crop="center", flip=False, generator=generator_for(0, 0, 0, "c"))
    assert float(pixels.abs().max()) < 0.1  # grey, not an alias


def test_variants() -> None:
    assert len(variants(ImagesSection())) == 1
    assert len(variants(ImagesSection(flip=True))) == 2
    both = variants(ImagesSection(flip=True, crop="random"))
    assert len(both) == len(set(both)) == 2 * images.CROP_VARIANTS
    assert variants(ImagesSection(flip=True))[0].flipped is False
