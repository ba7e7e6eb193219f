from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from lorabooth.data.photo import PhotoError, decode, read, to_rgb


def scene(height: int = 24, width: int = 32) -> np.ndarray:
    """Four different corners, so that every turn and flip looks different."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = (255, 255, 0)
    return pixels


def undo(upright: np.ndarray, orientation: int) -> np.ndarray:
    """How a camera stores the picture under an orientation, from the EXIF table."""
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    return np.ascontiguousarray(stored[orientation](upright))


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations_come_out_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{suffix}"
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    Image.fromarray(undo(scene(), orientation)).save(path, exif=exif, **options)
    pixels = decode(path)
    assert pixels.shape == (24, 32, 3)
    tolerance = 3 if suffix == "jpg" else 0
    assert np.abs(pixels.astype(int) - scene()).max() <= tolerance


@pytest.mark.parametrize("orientation", [3, 6])
def test_16_bit_pictures_are_turned_too(tmp_path: Path, orientation: int) -> None:
    upright = np.arange(12 * 8, dtype=np.uint16).reshape(12, 8) * 600
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(undo(upright, orientation)).save(tmp_path / "a.png", exif=exif)
    expected = np.rint(upright / 257).astype(np.uint8)
    assert np.array_equal(decode(tmp_path / "a.png"), np.repeat(expected[..., None], 3, 2))


def test_odd_exif_is_survived(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(scene()).save(buffer, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x07garbage")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    assert decode(tmp_path / "a.jpg").shape == (24, 32, 3)


def alpha_ramp() -> np.ndarray:
    return np.tile(np.linspace(0, 255, 32).round().astype(np.uint8), (24, 1))


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255.0
    return np.rint(colour * share + 255 * (1 - share))


def test_transparency_is_put_on_white(tmp_path: Path) -> None:
    expected = on_white(scene(), alpha_ramp())
    rgba = Image.fromarray(np.dstack([scene(), alpha_ramp()]), "RGBA")
    rgba.save(tmp_path / "rgba.png")
    assert np.abs(decode(tmp_path / "rgba.png") - expected).max() <= 1
    assert "transparency" in read(tmp_path / "rgba.png").notes[0]

    grey = np.full((24, 32), 40, np.uint8)
    Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha_ramp())]).save(tmp_path / "la.png")
    expected = on_white(np.dstack([grey] * 3), alpha_ramp())
    assert np.abs(decode(tmp_path / "la.png") - expected).max() <= 1


def test_opaque_alpha_is_not_remarked_upon(tmp_path: Path) -> None:
    Image.fromarray(scene()).convert("RGBA").save(tmp_path / "a.png")
    photo = read(tmp_path / "a.png")
    assert np.array_equal(photo.pixels, scene())
    assert photo.notes == ()


def test_transparent_colours_without_an_alpha_channel(tmp_path: Path) -> None:
    white_where_red = scene()
    white_where_red[:12, :16] = 255
    Image.fromarray(scene()).save(tmp_path / "rgb.png", transparency=(255, 0, 0))
    assert np.array_equal(decode(tmp_path / "rgb.png"), white_where_red)

    palette = Image.fromarray(scene()).quantize(4, dither=Image.Dither.NONE)
    red = palette.getpixel((0, 0))
    palette.save(tmp_path / "p.png", transparency=red)
    palette.save(tmp_path / "p.gif", transparency=red)
    assert np.array_equal(decode(tmp_path / "p.png"), white_where_red)
    assert np.array_equal(decode(tmp_path / "p.gif"), white_where_red)
    by_entry = bytes(0 if index == red else 255 for index in range(4))
    palette.save(tmp_path / "pb.png", transparency=by_entry)
    assert np.array_equal(decode(tmp_path / "pb.png"), white_where_red)

    grey16 = np.full((8, 8), 30000, np.uint16)
    grey16[:4] = 5
    Image.fromarray(grey16).save(tmp_path / "g16.png", transparency=5)
    assert decode(tmp_path / "g16.png")[0, 0].tolist() == [255] * 3
    assert decode(tmp_path / "g16.png")[7, 7].tolist() == [117] * 3


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "YCbCr", "CMYK", "LAB", "HSV", "RGBX"])
def test_every_colour_mode_keeps_its_colours(mode: str) -> None:
    plain = np.zeros((24, 32, 3), np.uint8)
    plain[:, 16:] = 255
    source = plain if mode in ("1", "L") else scene()
    image = Image.fromarray(source).convert(mode)
    rgb, _ = to_rgb(image)
    assert rgb.mode == "RGB"
    assert np.abs(np.asarray(rgb).astype(int) - source).max() <= (
        24 if mode == "LAB" else 4
    )  # 8-bit LAB rounds coarsely


@pytest.mark.parametrize(("straight", "premultiplied"), [("RGBA", "RGBa"), ("LA", "La")])
def test_premultiplied_alpha_is_the_same_picture(straight: str, premultiplied: str) -> None:
    image = Image.fromarray(np.dstack([scene(), alpha_ramp()]), "RGBA").convert(straight)
    expected = np.asarray(to_rgb(image)[0]).astype(int)
    assert np.abs(np.asarray(to_rgb(image.convert(premultiplied))[0]) - expected).max() <= 2


def test_palette_with_alpha() -> None:
    image = Image.fromarray(np.dstack([scene(), alpha_ramp()]), "RGBA").convert("PA")
    assert np.asarray(to_rgb(image)[0])[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("suffix", ["tiff", "jpg"])
def test_cmyk_files(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(scene()).convert("CMYK").save(tmp_path / f"a.{suffix}", quality=100)
    photo = read(tmp_path / f"a.{suffix}")
    assert photo.mode == "CMYK"
    # Chroma is halved in JPEG, so colours bleed at the borders.
    assert np.median(np.abs(photo.pixels.astype(int) - scene())) <= 3


RAMP16 = np.linspace(0, 65535, 24 * 32).round().astype(np.uint16).reshape(24, 32)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(RAMP16).save(tmp_path / f"a.{suffix}")
    photo = read(tmp_path / f"a.{suffix}")
    assert photo.mode.startswith("I;16")
    assert np.array_equal(photo.pixels[..., 0], np.rint(RAMP16 / 257).astype(np.uint8))
    assert "scaled" in photo.notes[0]


def test_big_endian_16_bit() -> None:
    image = Image.frombytes("I;16B", (32, 24), RAMP16.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(to_rgb(image)[0])[..., 1], np.rint(RAMP16 / 257).astype(np.uint8))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 65535], [257, 32768]], np.int32), [0, 255, 1, 128]),
        (np.array([[0, 255], [1, 128]], np.int32), [0, 255, 1, 128]),
        (np.array([[-1000, 1000], [0, 500]], np.int32), [0, 255, 128, 191]),
        (np.array([[0, 2**30], [2**29, 2**28]], np.int32), [0, 255, 128, 64]),
        (np.array([[0.0, 1.0], [0.5, 0.25]], np.float32), [0, 255, 128, 64]),
        (np.array([[0.0, 255.0], [1.0, 128.0]], np.float32), [0, 255, 1, 128]),
        (np.array([[-1.0, 1.0], [0.0, 0.5]], np.float32), [0, 255, 128, 191]),
        (np.array([[-5.0, -5.0], [-5.0, -5.0]], np.float32), [0, 0, 0, 0]),
    ],
)
def test_wide_numbers_find_their_white(tmp_path: Path, values: np.ndarray, expected: list[int]) -> None:
    Image.fromarray(values).save(tmp_path / "a.tiff")
    photo = read(tmp_path / "a.tiff")
    assert np.abs(photo.pixels[..., 0].reshape(-1).astype(int) - expected).max() <= 1
    assert photo.mode in ("I", "F")


def test_not_finite_pixels_are_a_problem(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, np.nan]], np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(PhotoError, match="not finite"):
        decode(tmp_path / "a.tiff")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_the_first_frame_is_taken_and_said(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    photo = read(tmp_path / f"a.{suffix}")
    assert photo.pixels[10, 10].tolist() == [255, 0, 0]
    assert "the first of 3 frames" in photo.notes


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif(tmp_path: Path) -> None:
    Image.fromarray(scene()).save(tmp_path / "a.avif", quality=100, subsampling="4:4:4")
    assert np.median(np.abs(decode(tmp_path / "a.avif").astype(int) - scene())) <= 4


def encoded(suffix: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tiff": "TIFF"}[suffix])
    return buffer.getvalue()


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, share: float) -> None:
    whole = encoded(suffix)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(PhotoError) as caught:
        decode(path)
    assert caught.value.path == path
    assert str(path) in str(caught.value)


def test_truncated_files_are_refused_even_if_another_library_allows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    (tmp_path / "a.jpg").write_bytes(encoded("jpg")[:2000])
    with pytest.raises(PhotoError):
        decode(tmp_path / "a.jpg")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True  # and its setting is left as it was


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_flipped_bytes_give_a_photo_or_a_photo_error_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    whole = encoded(suffix)
    draw = np.random.default_rng(1)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for place in draw.integers(0, min(len(data), 300), 4):
            data[place] = draw.integers(256)
        try:
            assert read(Path("a"), bytes(data)).pixels.dtype == np.uint8
        except PhotoError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    "data",
    [
        b"just some text, named .jpg\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"P6 2 2 255\n" + bytes(12),
    ],
)
def test_what_is_not_a_photo(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(PhotoError, match="not an image"):
        decode(tmp_path / "a.jpg")


def test_empty_and_absent_files(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(PhotoError, match="empty"):
        decode(tmp_path / "a.jpg")
    with pytest.raises(PhotoError, match="cannot be read"):
        decode(tmp_path / "b.jpg")


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [10_000, 60_000])  # Pillow only warns of the first
def test_decompression_bombs_are_refused(tmp_path: Path, side: int) -> None:
    (tmp_path / "a.png").write_bytes(png_of_size(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(PhotoError, match="too many pixels"):
            decode(tmp_path / "a.png")
