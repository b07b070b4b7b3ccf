"""Stored pixels to RGB: every pixel mode that Pillow can hand out, alpha over white, EXIF orientation; see docs/images.md."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL.Image import Transpose

_WHITE = (255, 255, 255)
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
_KEYED_MODES = ("1", "L", "P", "RGB")
_TRANSPOSE = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded frame in its stored mode and orientation; regions of it are turned to RGB when asked for.

    It borrows the decoder's buffer: use it before the next frame is asked for.
    """

    picture: PIL.Image.Image
    orientation: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as a viewer shows it."""
        width, height = self.picture.size
        return (height, width) if self.orientation >= 5 else (width, height)

    def rgb(self, top: int, left: int, bottom: int, right: int) -> NDArray[np.uint8]:
        """A region of the frame as a viewer shows it, uint8 [bottom - top, right - left, 3]; it must lie within the frame."""
        box = stored_box((left, top, right, bottom), self.picture.size, self.orientation)
        whole = box == (0, 0, *self.picture.size)
        region = to_rgb(self.picture if whole else self.picture.crop(box))
        if self.orientation != 1:
            region = region.transpose(_TRANSPOSE[self.orientation])
        return np.asarray(region)


def stored_box(box: tuple[int, int, int, int], size: tuple[int, int], orientation: int) -> tuple[int, int, int, int]:
    """Where a displayed region (left, top, right, bottom) lies among the stored pixels.

    Args:
        box: in displayed coordinates.
        size: stored width and height.
        orientation: EXIF orientation, 1 to 8.
    """
    left, top, right, bottom = box
    width, height = size
    return {
        1: (left, top, right, bottom),
        2: (width - right, top, width - left, bottom),
        3: (width - right, height - bottom, width - left, height - top),
        4: (left, height - bottom, right, height - top),
        5: (top, left, bottom, right),
        6: (top, height - right, bottom, height - left),
        7: (width - bottom, height - right, width - top, height - left),
        8: (width - bottom, left, width - top, right),
    }[orientation]


def to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """RGB of an 8-bit picture, transparent parts over white.

    Raises:
        ValueError: a mode that has no conversion.
    """
    keyed = picture.mode in _KEYED_MODES and picture.info.get("transparency") is not None
    if not keyed and picture.mode not in _ALPHA_MODES:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    rgba = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
    over = PIL.Image.new("RGB", picture.size, _WHITE)
    over.paste(rgba, mask=rgba)
    return over


def narrow(picture: PIL.Image.Image, bits: int = 16, white_is_zero: bool = False) -> PIL.Image.Image:
    """8-bit grey of a picture with wider samples; others are returned as they are.

    16-bit grey keeps its high byte (of `bits`, where fewer are used). 32-bit integers, signed ones and floats are scaled
    linearly: floats that all lie in [0, 1] by 255, anything else from its own minimum and maximum to 0 and 255; what is not
    finite becomes 0.
    """
    if picture.mode.startswith("I;16"):
        stored = np.asarray(picture)
        grey = (stored >> (bits - 8)).astype(np.uint8)
        key = picture.info.get("transparency")
        if isinstance(key, int):
            grey[stored == key] = 255
    elif picture.mode in ("I", "F"):
        grey = _stretch(np.asarray(picture))
    else:
        return picture
    return PIL.Image.fromarray(255 - grey if white_is_zero else grey)


def _stretch(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    levels = values.astype(np.float32)
    finite = np.isfinite(levels)
    if not finite.all():
        levels[~finite] = levels[finite].min() if finite.any() else 0
    low, high = float(levels.min()), float(levels.max())
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    levels -= low
    levels *= 255 / (high - low) if high > low else 0
    return np.rint(levels, out=levels).astype(np.uint8)


def drop_empty_alpha(picture: PIL.Image.Image) -> PIL.Image.Image:
    """RGB of an RGBA picture that is transparent everywhere; others are returned as they are.

    Many writers of 32-bit BMP leave the fourth byte at zero, and viewers show such files as opaque.
    """
    if picture.mode == "RGBA" and picture.getchannel("A").getextrema() == (0, 0):
        return picture.convert("RGB")
    return picture
