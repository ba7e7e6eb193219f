import numpy as np
import pytest
from PIL import Image

from lorabooth.evaluation.grids import _font, draw_grid, wrap

RED, GREEN, BLUE = (220, 0, 0), (0, 160, 0), (0, 0, 200)


def tile(colour, size=(64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def area(grid: Image.Image, colour) -> tuple[int, int, int, int]:
    """left, top, width, height of what has a colour."""
    ys, xs = np.nonzero((np.asarray(grid) == colour).all(axis=2))
    return int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1


def ink(grid: Image.Image, box: tuple[int, int, int, int]) -> int:
    return int((np.asarray(grid.crop(box).convert("L")) < 128).sum())


def test_rows_and_columns_lie_where_they_should() -> None:
    grid = draw_grid([[tile(RED), tile(GREEN)], [tile(BLUE), None]])
    red, green, blue = (area(grid, c) for c in (RED, GREEN, BLUE))
    assert red[2:] == green[2:] == blue[2:] == (192, 192)
    assert red[1] == green[1]
    assert red[0] == blue[0]
    assert green[0] > red[0] + 192
    assert blue[1] > red[1] + 192


@pytest.mark.parametrize(("side", "shown"), [(32, 128), (64, 192), (100, 200), (192, 192), (512, 512)])
def test_small_images_are_enlarged(side: int, shown: int) -> None:
    grid = draw_grid([[tile(RED, (side, side))]])
    assert area(grid, RED)[2:] == (shown, shown)


def test_a_huge_grid_is_shrunk() -> None:
    grid = draw_grid([[tile(RED, (1024, 1024))] * 10] * 2, row_labels=["a", "b"])
    assert max(grid.size) <= 4096


def test_other_shapes_are_fitted_not_stretched() -> None:
    grid = draw_grid([[tile(RED, (300, 300)), tile(GREEN, (300, 150))]])
    left, top, width, height = area(grid, GREEN)
    assert (width, height) == (300, 150)
    assert top == area(grid, RED)[1] + 75
    assert left >= area(grid, RED)[0] + 300


def test_labels_title_and_subtitle_leave_ink_beside_the_images() -> None:
    bare = draw_grid([[tile(RED)]])
    grid = draw_grid(
        [[tile(RED)]],
        row_labels=["ein Übermaß"],
        column_labels=["seed 0"],
        title="Título",
        subtitle="Ελληνικά",
    )
    left, top, _, height = area(grid, RED)
    assert ink(grid, (0, top, left, top + height)) > 20
    assert ink(grid, (left, 0, grid.width, top)) > 20
    assert ink(bare, (0, 0, bare.width, area(bare, RED)[1])) == 0


def test_any_image_mode_and_no_argument_is_changed() -> None:
    modes = [Image.new(mode, (40, 40)) for mode in ("L", "RGBA", "P", "1", "I;16", "CMYK")]
    before = [image.tobytes() for image in modes]
    assert draw_grid([modes]).mode == "RGB"
    assert [image.tobytes() for image in modes] == before


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="2 row labels for 1 rows"):
        draw_grid([[tile(RED)]], row_labels=["a", "b"])
    with pytest.raises(ValueError, match="1 column labels for 2 columns"):
        draw_grid([[tile(RED), tile(RED)]], column_labels=["a"])
    with pytest.raises(ValueError, match="at least one image"):
        draw_grid([[None]])


def test_wrapped_lines_fit_and_lose_nothing() -> None:
    font = _font(15)
    text = "a photo of a Donaudampfschifffahrtsgesellschaftskapitän in-the-middle-of-the snow"
    lines = wrap(text, font, 120, most_lines=99)
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    short = wrap(text, font, 120, most_lines=2)
    assert len(short) == 2
    assert short[1].endswith("…")
    assert font.getlength(short[1]) <= 120
    assert wrap("", font, 120, most_lines=2) == [""]
