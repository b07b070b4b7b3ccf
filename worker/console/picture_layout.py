"""Which pieces of a picture travel from the decoder process: a preview in tiles, the centre crop, and a grid of local windows.

Pure arithmetic on width and height, so that both processes cut and join alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.preprocess import CROP_PX

PREVIEW_TILES = 4
PREVIEW_PX = PREVIEW_TILES * CROP_PX
"""Longest side of a preview."""
MOST_A_SIDE = 6
MAX_PIECES = 1 + MOST_A_SIDE**2 + PREVIEW_TILES**2


@dataclass(frozen=True, slots=True)
class Window:
    """A part of the picture that is scored by itself, in the picture's pixels."""

    top: int
    left: int
    height: int
    width: int


def preview_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of the preview: never larger than the picture."""
    scale = min(1.0, PREVIEW_PX / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def tiles(width: int, height: int) -> tuple[int, int]:
    """Columns and rows of tiles that a preview of this size fills."""
    return math.ceil(width / CROP_PX), math.ceil(height / CROP_PX)


def windows(width: int, height: int) -> list[Window]:
    """Overlapping windows that cover the picture, row by row; at most 36.

    As large as the encoder's crop where two of them fit beside each other; smaller ones, which the crop pads with black as it
    does small images, where they would not tell one part of the picture from another.
    """
    longest = max(width, height)
    side = CROP_PX if longest >= 2 * CROP_PX else CROP_PX // 2 if longest >= CROP_PX else max(16, longest // 2)
    wide, high = min(side, width), min(side, height)
    return [Window(top, left, high, wide) for top in _starts(height, side) for left in _starts(width, side)]


def _starts(size_px: int, side_px: int) -> list[int]:
    if size_px <= side_px:
        return [0]
    count = min(MOST_A_SIDE, math.ceil((size_px - side_px) / (side_px / 2)) + 1)
    return [round(step * (size_px - side_px) / (count - 1)) for step in range(count)]


def split(preview: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A preview uint8 [h, w, 3] as tiles uint8 [n, 224, 224, 3], row by row, black beyond its edges."""
    height, width = preview.shape[:2]
    columns, rows = tiles(width, height)
    padded = np.zeros((rows * CROP_PX, columns * CROP_PX, 3), np.uint8)
    padded[:height, :width] = preview
    grid = padded.reshape(rows, CROP_PX, columns, CROP_PX, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(grid.reshape(rows * columns, CROP_PX, CROP_PX, 3))


def join(pieces: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """The inverse of `split` for a preview of this width and height."""
    columns, rows = tiles(width, height)
    grid = pieces.reshape(rows, columns, CROP_PX, CROP_PX, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(grid.reshape(rows * CROP_PX, columns * CROP_PX, 3)[:height, :width])
