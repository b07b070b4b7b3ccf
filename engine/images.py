"""Bytes to RGB: the one decoder of worker, command line, evaluation and training. Formats and conversions: docs/images.md."""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from engine import jpeg_region, pixels, preprocess
from engine.containers import BMP, JPEG, TIFF, sniff
from engine.image_files import (
    CorruptImage,
    ImageError,
    Limits,
    Opened,
    OutOfMemory,
    TooManyPixels,
    UnsupportedImage,
    open_image,
)

__all__ = [
    "CorruptImage",
    "Crops",
    "Image",
    "ImageError",
    "Limits",
    "OutOfMemory",
    "TooManyPixels",
    "UnsupportedImage",
    "read",
    "read_crops",
]

MAX_MESSAGE_CHARS = 160
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
_UNSUPPORTED = re.compile(r"not (yet )?supported|unsupported|not installed|cannot handle|unknown pixel mode", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Image:
    """The chosen frames of an image.

    `frames`: uint8 [H, W, 3] each, RGB, as a viewer shows them, read-only; pages of a TIFF may differ in size. `width` and
    `height` are the first frame's. `frame_count` is the number of frames in the file.
    """

    frames: list[NDArray[np.uint8]]
    format: str
    width: int
    height: int
    frame_count: int


@dataclass(frozen=True, slots=True)
class Crops:
    """The crops of the chosen frames of an image, without the frames.

    `crops`: uint8 [frames * crops_per_frame, 224, 224, 3], RGB, frame-major; the rest as in `Image`.
    """

    crops: NDArray[np.uint8]
    crops_per_frame: int
    format: str
    width: int
    height: int
    frame_count: int


def read(data: bytes, limits: Limits) -> Image:
    """Decode an image: up to `limits.max_frames` frames, evenly spread, the first among them.

    Raises:
        UnsupportedImage: not JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC, or a variant of one that cannot be read.
        CorruptImage: broken or cut short.
        TooManyPixels: a frame is larger than `limits.max_pixels`.
        OutOfMemory: it needs more memory than this process may have.
    """
    with _mapped(data):
        opened = open_image(data, limits)
        frames: list[NDArray[np.uint8]] = []
        size = (0, 0)
        for frame in _frames(opened, limits):
            width, height = frame.size
            size = size if frames else (width, height)
            frames.append(frame.rgb(0, 0, height, width))
        return Image(frames, opened.format, *size, opened.frame_count)


def read_crops(data: bytes, limits: Limits, layout: preprocess.Layout = "center") -> Crops:
    """Decode an image and keep its crops only: one frame is in memory at a time, and only the crops' pixels become RGB.

    Of a plain JPEG no more is decoded than its crops need (`engine.jpeg_region`).

    The crops are those of `preprocess.crops` on the frames of `read`, bit for bit. Where frames differ in their number of
    crops (pages of a TIFF, some of which fit into one crop), the single crop of a small one is repeated.

    Raises:
        ImageError: as `read`.
    """
    with _mapped(data):
        if (jpeg := jpeg_region.read_crops(data, limits, layout) if sniff(data) == JPEG else None) is not None:
            return Crops(jpeg.crops, len(jpeg.crops), JPEG, jpeg.width, jpeg.height, 1)
        opened = open_image(data, limits)
        cut: list[NDArray[np.uint8]] = []
        size = (0, 0)
        for frame in _frames(opened, limits):
            width, height = frame.size
            size = size if cut else (width, height)
            cut.append(preprocess.crops_of(frame.rgb, height, width, layout))
        most = max(len(crops) for crops in cut)
        crops = np.concatenate([crops if len(crops) == most else np.repeat(crops, most, axis=0) for crops in cut])
        return Crops(crops, most, opened.format, *size, opened.frame_count)


def _frames(opened: Opened, limits: Limits) -> Iterator[pixels.Frame]:
    """The chosen frames, each valid until the next is asked for."""
    file = opened.file
    for place in spread(len(opened.reachable), limits.max_frames):
        file.seek(opened.reachable[place])
        limits.check(*file.size)
        file.load()
        limits.check(*file.size)  # libheif learns the true size while it decodes
        yield pixels.Frame(_settled(file, opened.format), opened.orientation)


def _settled(file: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """What depends on a frame as a whole and must be decided before regions are cut."""
    if name == BMP:
        return pixels.drop_empty_alpha(file)
    if name != TIFF:
        return pixels.narrow(file)
    tags = getattr(file, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    return pixels.narrow(file, bits=bits if 8 < bits < 16 else 16, white_is_zero=tags.get(_PHOTOMETRIC) == 0)


def spread(count: int, most: int) -> Sequence[int]:
    """Up to `most` of `count` places, evenly spread from the first to the last."""
    if count <= most:
        return range(count)
    if most == 1:
        return (0,)
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


@contextmanager
def _mapped(data: bytes) -> Iterator[None]:
    """The one boundary at which whatever decoders raise on hostile bytes becomes an `ImageError`."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
            yield
    except ImageError:
        raise
    except MemoryError as exc:
        raise OutOfMemory("the decoder ran out of memory") from exc
    except Exception as exc:  # on broken files Pillow raises almost anything
        cut_short = isinstance(exc.__cause__ or exc, struct.error | IndexError | EOFError)
        text = "ends too early" if cut_short else re.sub(r"[^\x20-\x7e]+", " ", str(exc)) or type(exc).__name__
        message = f"{sniff(data)}: {text}"[:MAX_MESSAGE_CHARS]
        raise (UnsupportedImage if _UNSUPPORTED.search(text) else CorruptImage)(message) from exc
