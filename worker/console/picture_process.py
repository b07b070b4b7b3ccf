"""What the console's decoder process does with an image: runs inside the sandbox of `worker.stages.decode_process`."""

from __future__ import annotations

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from engine import images, preprocess
from engine.preprocess import CROP_PX, Layout
from worker.console import picture_layout
from worker.stages import provenance


def decode_picture(data: bytes, limits: images.Limits, layout: Layout) -> tuple[images.Crops, dict[str, str | None]]:
    """The first frame's centre crop, local windows and preview, in this order, as pieces of one size.

    Raises:
        engine.images.ImageError: it cannot be decoded.
    """
    image = images.read(data, images.Limits(limits.max_pixels, 1))
    frame = image.frames[0]
    local = [_padded(frame, window) for window in picture_layout.windows(image.width, image.height)]
    size = picture_layout.preview_size(image.width, image.height)
    shrunk = PIL.Image.fromarray(frame).resize(size, PIL.Image.Resampling.LANCZOS, reducing_gap=3.0)
    tiles = picture_layout.split(np.asarray(shrunk))
    pieces = np.concatenate([preprocess.center_crop(frame)[None], np.stack(local), tiles])
    return images.Crops(pieces, 1, image.format, image.width, image.height, image.frame_count), provenance.read(data)


def _padded(frame: NDArray[np.uint8], window: picture_layout.Window) -> NDArray[np.uint8]:
    part = frame[window.top : window.top + window.height, window.left : window.left + window.width]
    return part if part.shape[:2] == (CROP_PX, CROP_PX) else preprocess.center_crop(part)
