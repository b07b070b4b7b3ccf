"""From an RGB frame to crops: the one preprocessing that training, evaluation and serving share, and its id.

CoDE looks at native-resolution pixels: a 224-pixel centre crop, no resize, black around smaller images (arXiv
2407.20337, released inference). Crops stay uint8; scaling and normalisation happen inside the backend's graph.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

CROP_PX = 224
Layout = Literal["center", "five"]
LAYOUTS: tuple[str, ...] = get_args(Layout)
RGB = tuple[int, int, int]
Box = tuple[int, int, int, int]
"""Top, left, bottom, right."""
Region = Callable[[int, int, int, int], NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class Preprocess:
    """What is done to an image before the encoder sees it.

    `mean` and `std` are of channels scaled to [0, 1] (ImageNet's by default), applied in the graph; `pad_rgb` fills around
    images smaller than the crop; `alpha_over_rgb` is the background of transparent images.
    """

    crop_px: int = CROP_PX
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    pad_rgb: RGB = (0, 0, 0)
    alpha_over_rgb: RGB = (255, 255, 255)

    @property
    def id(self) -> str:
        """16 hex digits of the SHA-256 of the canonical JSON of these values and of the name of the procedure."""
        values = {"procedure": "center-crop-native/1", **asdict(self)}
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def center_crop(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The middle 224 x 224 pixels, as torchvision's CenterCrop takes them, bit for bit.

    A half pixel is rounded to the even one (Python's `round`); an image smaller in a dimension is padded with black, the odd
    pixel of padding at the right or bottom.

    Args:
        rgb: uint8 [H, W, 3], any H and W from 1.

    Returns:
        uint8 [224, 224, 3], contiguous, a copy: it does not keep the frame in memory.

    Raises:
        ValueError: not uint8 [H, W, 3].
    """
    crop: NDArray[np.uint8] = crops(rgb, "center")[0]
    return crop


def crops(rgb: NDArray[np.uint8], layout: Layout = "center") -> NDArray[np.uint8]:
    """The crops of one frame, cut at native resolution.

    Args:
        rgb: uint8 [H, W, 3].
        layout: `center`, or `five`: the centre, then top left, top right, bottom left, bottom right.

    Returns:
        uint8 [k, 224, 224, 3]; k is 1 for `center` and for an image that fits into one crop, 5 otherwise. Of an image that is
        smaller than the crop in one dimension only, corners coincide pairwise.

    Raises:
        ValueError: not uint8 [H, W, 3], or an unknown layout.
    """
    _check(rgb)
    height, width = rgb.shape[:2]
    return crops_of(lambda top, left, bottom, right: rgb[top:bottom, left:right], height, width, layout)


def crops_of(region: Region, height: int, width: int, layout: Layout = "center") -> NDArray[np.uint8]:
    """As `crops`, for a frame whose pixels are read by region, so that the whole of it need never be converted or decoded.

    Args:
        region: (top, left, bottom, right) within the frame -> uint8 [bottom - top, right - left, 3].
        height: of the frame.
        width: of the frame.
        layout: as for `crops`.

    Raises:
        ValueError: an unknown layout.
    """
    places = _places(height, width, layout)
    cut = np.zeros((len(places), CROP_PX, CROP_PX, 3), np.uint8)
    for crop, (top, left) in zip(cut, places, strict=True):
        _place(region, height, width, top, left, crop)
    return cut


def regions(height: int, width: int, layout: Layout = "center") -> list[Box]:
    """The regions of a frame that `crops_of` will ask for, in its order.

    Raises:
        ValueError: an unknown layout.
    """
    return [_within(height, width, top, left) for top, left in _places(height, width, layout)]


def _check(rgb: NDArray[np.uint8]) -> None:
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or 0 in rgb.shape:
        raise ValueError(f"expected a frame as uint8 [H, W, 3], got {rgb.dtype} {list(rgb.shape)}")


def _places(height: int, width: int, layout: Layout) -> list[tuple[int, int]]:
    """Top and left of each crop; negative where padding goes before it."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown crops layout {layout!r}; known are {', '.join(LAYOUTS)}")
    places = [(_middle(height), _middle(width))]
    if layout == "five" and (height > CROP_PX or width > CROP_PX):
        top, bottom = _ends(height)
        left, right = _ends(width)
        places += [(top, left), (top, right), (bottom, left), (bottom, right)]
    return places


def _within(height: int, width: int, top: int, left: int) -> Box:
    """The part of the frame that a crop at `top` and `left` covers."""
    return max(top, 0), max(left, 0), min(top + CROP_PX, height), min(left + CROP_PX, width)


def _middle(size_px: int) -> int:
    """First pixel of the middle crop along one axis; negative where padding goes before it."""
    if size_px < CROP_PX:
        return -((CROP_PX - size_px) // 2)
    return round((size_px - CROP_PX) / 2)


def _ends(size_px: int) -> tuple[int, int]:
    """First pixel of the two outermost crops along one axis; the padded one where the image is smaller."""
    return (_middle(size_px), _middle(size_px)) if size_px <= CROP_PX else (0, size_px - CROP_PX)


def _place(region: Region, height: int, width: int, top: int, left: int, crop: NDArray[np.uint8]) -> None:
    """Fill a black crop with the frame's pixels, read from its region at `top` and `left`; negative ones leave padding."""
    y, x = max(-top, 0), max(-left, 0)
    part = region(*_within(height, width, top, left))
    crop[y : y + part.shape[0], x : x + part.shape[1]] = part
