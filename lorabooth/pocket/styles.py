"""The pocket world's styles: a finished frame redrawn as a pencil sketch or a painting."""

import functools

import numpy as np
from numpy.typing import NDArray

from lorabooth.pocket.raster import F32, Plane, clip01, column


@functools.lru_cache(maxsize=16)
def _hatching(size: int) -> tuple[Plane, Plane]:
    """Return two families of diagonal pencil lines, in [0, 1], for a frame of this size."""
    at = (np.arange(size, dtype=F32) + F32(0.5)) * F32(1 / size)
    x, y = at[None, :], at[:, None]
    wobble = 0.5 * np.sin(x * 9.0 + y * 5.0)
    lines = tuple(clip01(0.5 + 0.5 * np.sin((x + sign * y) * 105.0 + wobble)) for sign in (1.0, -1.0))
    for line in lines:
        line.setflags(write=False)
    return lines[0], lines[1]


@functools.lru_cache(maxsize=16)
def _strokes(size: int, slope: float) -> tuple[NDArray[np.int64], NDArray[np.int64], Plane]:
    """Return, for every pixel, the row and column that colour its brush stroke, and the stroke's tone."""
    at = (np.arange(size, dtype=F32) + F32(0.5)) * F32(1 / size)
    x, y = at[None, :], at[:, None]
    cos, sin = np.float32(np.cos(slope)), np.float32(np.sin(slope))
    bend = 0.015 * np.sin(x * 8.0 + y * 11.0)
    a, b = x * cos + y * sin, y * cos - x * sin + bend
    length, width = 0.105, 0.036
    row = np.floor(b / width)
    shift = np.modf(np.sin(row * 12.9898) * 43.758)[0]
    cell = np.floor(a / length + shift)
    ca, cb = (cell + 0.5 - shift) * length, (row + 0.5) * width
    cx, cy = ca * cos - cb * sin, ca * sin + cb * cos
    tone = np.sin(cell * 3.1 + row * 7.7) * 0.5 + 0.9 * (b / width - row - 0.5)
    pick = [np.clip((c * size).astype(np.int64), 0, size - 1) for c in (cy, cx)]
    return pick[0], pick[1], tone.astype(F32)


def sketch_over(image: Plane, alpha: Plane) -> Plane:
    """Return the frame (3, size, size) as graphite on paper; the body (`alpha`) is drawn more firmly."""
    size = image.shape[1]
    luma = image[0] * 0.30 + image[1] * 0.59 + image[2] * 0.11
    step = max(size // 128, 1)
    stack = np.concatenate((image, alpha[None] * 0.7))
    dx, dy = np.zeros_like(stack), np.zeros_like(stack)
    dx[:, :, step:-step] = stack[:, :, 2 * step :] - stack[:, :, : -2 * step]
    dy[:, step:-step] = stack[:, 2 * step :] - stack[:, : -2 * step]
    edge = np.sqrt((dx * dx + dy * dy).max(axis=0))
    line = clip01(edge * (1.3 + 1.5 * alpha) - 0.22)
    first, second = _hatching(size)
    firm = 0.42 + 0.33 * alpha
    graphite = first * clip01((0.72 - luma) * 1.7) * firm + second * clip01((0.42 - luma) * 2.2) * firm
    tone = clip01(1.0 - graphite) * (0.80 + 0.20 * clip01(luma * 1.5))
    tone = tone * (1.0 - 0.88 * line)
    paper, lead = column((0.96, 0.945, 0.90)), column((0.19, 0.19, 0.21))
    out: Plane = lead + tone * (paper - lead)
    return out


def paint_over(image: Plane, ground: Plane, alpha: Plane) -> Plane:
    """Return the frame (3, size, size) in oil: oriented strokes, finer on the body, deeper colours.

    `ground` is the frame without its body, so that no stroke beside the body takes the body's colour.
    """
    size = image.shape[1]
    rows, columns, tone = _strokes(size, -0.5)
    # a stroke is loaded with a patch's mean colour, or bricks and cobbles would fall apart into confetti
    blocks = ground.reshape(3, size // 4, 4, size // 4, 4).sum(axis=4).sum(axis=2) * F32(1 / 16)
    strokes = blocks[:, rows // 4, columns // 4] + 0.055 * tone
    step = max(size // 64, 1)
    smooth = image.copy()
    smooth[:, step:-step] = (image[:, : -2 * step] + image[:, step:-step] + image[:, 2 * step :]) * F32(1 / 3)
    _, _, fine = _strokes(size, 0.9)
    body = smooth + 0.06 * fine
    mixed = strokes + clip01(alpha * 1.2) * (body - strokes)
    grey = mixed.mean(axis=0)
    rich = grey + 1.35 * (mixed - grey)
    rich = (rich - 0.5) * 1.10 + 0.47
    levels = 7.0
    scaled = clip01(rich) * levels
    low = np.floor(scaled)
    t = clip01((scaled - low - 0.5) * 3.0 + 0.5)
    out: Plane = (low + t) * (1.0 / levels)
    return out * column((1.0, 0.97, 0.88)) + column((0.02, 0.01, 0.0))
