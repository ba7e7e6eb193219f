"""Labelled grids of images: a title, a header per column, a wrapped label per row. Pixels in, pixels out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_PAPER = (255, 255, 255)
_INK = (28, 30, 36)
_FAINT_INK = (108, 113, 125)
_HOLE = (240, 241, 244)
_SMALL_BELOW_PX = 192
_LARGEST_UPSCALE = 4
_LARGEST_SIDE_PX = 4096


@dataclass(frozen=True, slots=True)
class _Style:
    """Sizes in pixels, in proportion to the cells so that large grids stay readable when shrunk."""

    margin: int
    gap: int
    text: int
    title: int
    label_width: int


def draw_grid(
    images: Sequence[Sequence[Image.Image | None]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    subtitle: str = "",
) -> Image.Image:
    """Lay images out in rows and columns with their labels.

    Images narrower than 192 px are enlarged 2 to 4 times (Lanczos), so that 64 px samples can be seen;
    a grid that would be wider or higher than 4096 px is shrunk.

    Args:
        images: rows of images, any sizes and modes; None leaves a hole. Rows may differ in length.
        row_labels: one per row, or none at all.
        column_labels: one per column, or none at all.
        title: above everything, wrapped.
        subtitle: below the title in fainter ink, wrapped.

    Returns:
        An RGB image.

    Raises:
        ValueError: no image at all, or the number of labels is not that of rows or columns.
    """
    columns = max((len(row) for row in images), default=0)
    if not any(image for row in images for image in row):
        raise ValueError("a grid needs at least one image")
    if row_labels and len(row_labels) != len(images):
        raise ValueError(f"{len(row_labels)} row labels for {len(images)} rows")
    if column_labels and len(column_labels) != columns:
        raise ValueError(f"{len(column_labels)} column labels for {columns} columns")
    cell = _cell_size(images, columns)
    style = _style_for(cell, bool(any(row_labels)))
    left = style.margin + (style.label_width + style.gap * 2 if style.label_width else 0)
    width = left + columns * (cell[0] + style.gap) - style.gap + style.margin
    text, bold, large = _font(style.text), _font(style.text, bold=True), _font(style.title, bold=True)

    sheet = _Sheet.blank(width)
    y = style.margin
    for words, font, ink, space in ((title, large, _INK, 4), (subtitle, text, _FAINT_INK, 8)):
        if words:
            lines = wrap(words, font, width - 2 * style.margin, most_lines=3)
            y = sheet.text((style.margin, y), lines, font, ink) + style.gap * space // 4
    if column_labels:
        wrapped = [wrap(label, bold, cell[0], most_lines=3) for label in column_labels]
        deepest = max(len(lines) for lines in wrapped)
        y += style.gap
        for column, lines in enumerate(wrapped):
            centre = left + column * (cell[0] + style.gap) + cell[0] // 2
            top = y + (deepest - len(lines)) * _line_height(bold)
            sheet.text((centre, top), lines, bold, _INK, anchor="ma")
        y += deepest * _line_height(bold) + style.gap
    elif title or subtitle:
        y += style.gap
    for index, row in enumerate(images):
        if row_labels and row_labels[index]:
            most = max(1, cell[1] // _line_height(text))
            lines = wrap(row_labels[index], text, style.label_width, most_lines=most)
            top = y + (cell[1] - len(lines) * _line_height(text)) // 2
            sheet.text((style.margin, top), lines, text, _INK)
        for column in range(columns):
            image = row[column] if column < len(row) else None
            sheet.cell((left + column * (cell[0] + style.gap), y), cell, image)
        y += cell[1] + style.gap
    return sheet.cut(y - style.gap + style.margin)


def wrap(text: str, font: ImageFont.FreeTypeFont, width_px: int, *, most_lines: int) -> list[str]:
    """Break a text into lines no wider than `width_px`; words too long are broken, the rest is "…"."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width_px:
            line = joined
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width_px and len(word) > 1:
            fits = (n for n in range(len(word) - 1, 1, -1) if font.getlength(word[:n]) <= width_px)
            cut = next(fits, 1)
            cut = word.rfind("-", 0, cut) + 1 or cut
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    lines.append(line)
    if len(lines) <= most_lines:
        return lines
    last = lines[most_lines - 1]
    while last and font.getlength(last + "…") > width_px:
        last = last[:-1]
    return [*lines[: most_lines - 1], last.rstrip() + "…"]


@dataclass(frozen=True, slots=True)
class _Sheet:
    """A page of fixed width that grows downwards: drawn high enough, then cut."""

    page: Image.Image
    pen: ImageDraw.ImageDraw

    @staticmethod
    def blank(width: int) -> _Sheet:
        page = Image.new("RGB", (width, 3 * _LARGEST_SIDE_PX), _PAPER)
        return _Sheet(page, ImageDraw.Draw(page))

    def text(
        self,
        at: tuple[int, int],
        lines: Sequence[str],
        font: ImageFont.FreeTypeFont,
        ink: tuple[int, int, int],
        anchor: str = "la",
    ) -> int:
        """Draw lines from `at` downwards; returns the y below them."""
        x, y = at
        for line in lines:
            self.pen.text((x, y), line, font=font, fill=ink, anchor=anchor)
            y += _line_height(font)
        return y

    def cell(self, at: tuple[int, int], size: tuple[int, int], image: Image.Image | None) -> None:
        """Paste an image, fitted and centred, or mark a hole."""
        if image is None:
            self.pen.rectangle((*at, at[0] + size[0] - 1, at[1] + size[1] - 1), fill=_HOLE)
            return
        scale = min(size[0] / image.width, size[1] / image.height)
        fitted = image.convert("RGB")
        if scale != 1:
            sides = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            fitted = fitted.resize(sides, Image.Resampling.LANCZOS)
        left, top = (size[0] - fitted.width) // 2, (size[1] - fitted.height) // 2
        self.page.paste(fitted, (at[0] + left, at[1] + top))

    def cut(self, height: int) -> Image.Image:
        """The page without the empty rest."""
        return self.page.crop((0, 0, self.page.width, height))


def _cell_size(images: Sequence[Sequence[Image.Image | None]], columns: int) -> tuple[int, int]:
    present = [image for row in images for image in row if image is not None]
    width = max(image.width for image in present)
    height = max(image.height for image in present)
    scale = 1.0
    if width < _SMALL_BELOW_PX:
        scale = min(_LARGEST_UPSCALE, -(-_SMALL_BELOW_PX // width))
    scale = min(
        scale,
        _LARGEST_SIDE_PX * 0.8 / (columns * width),
        _LARGEST_SIDE_PX * 0.9 / (len(images) * height),
    )
    return max(16, round(width * scale)), max(16, round(height * scale))


def _style_for(cell: tuple[int, int], labelled: bool) -> _Style:
    text = max(13, min(24, round(cell[0] * 0.075)))
    return _Style(
        margin=text * 2,
        gap=max(6, text // 2),
        text=text,
        title=round(text * 1.5),
        label_width=max(text * 9, min(text * 13, cell[0])) if labelled else 0,
    )


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic and more; no CJK."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return round(font.size * 1.3)
