"""Opens hostile image files: eight formats told by their bytes, one decoder each, sizes checked before pixels are allocated.

Pillow's plugin classes are called directly, never `PIL.Image.open`, so that no other decoder can be reached, whatever the
bytes claim. Metadata is cut away before Pillow sees a JPEG or a PNG: broken or bloated EXIF, ICC profiles, text chunks and
MPO indexes cost nothing and fail nothing; the orientation is read by `engine.tiff_tags`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import PIL.Image
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from pillow_heif import as_plugin as heif_plugin
from pillow_heif import options as heif_options

from engine import containers, tiff_tags
from engine.containers import AVIF, BMP, GIF, HEIC, JPEG, PNG, TIFF, WEBP

MAX_WALKED_FRAMES = 2_000
"""Frames of an animation within reach of the choice: later ones are not looked at, or 100,000 tiny frames would take minutes."""
MAX_WALKED_PIXELS = 1 << 28
"""The same bound for large frames, each of which must be decoded to reach the next: 2**28 pixels are some seconds of work."""

MAX_RLE_PIXELS = 1 << 23
"""Pixels of a run-length encoded BMP: Pillow unpacks it in Python, a second for 8 megapixels, out of a file of some bytes."""
MAX_CHUNKS = 200_000
"""Chunks of a PNG: 1.7 million empty ones fit into 20 MB and would take half a minute and half a gigabyte."""

_SUBFILE_TYPE, _COMPRESSION = 0x00FE, 0x0103
_TILE = (0x0142, 0x0143)
_REDUCED, _MASK = 1, 4
_RLE = (1, 2)
_PNG_ANIMATION = frozenset({b"acTL", b"fcTL", b"fdAT"})
_PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}) | _PNG_ANIMATION
_APP0, _APP14, _APP15, _COM, _SOS = 0xE0, 0xEE, 0xEF, 0xFE, 0xDA

# Our own limit on pixels stands in for Pillow's, which would overrule a larger setting.
PIL.Image.MAX_IMAGE_PIXELS = None
# One thread a decoder: the caller decodes several images at a time, and threads would need address space of their own.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
heif_options.DECODE_THREADS = 1
heif_options.THUMBNAILS = heif_options.DEPTH_IMAGES = heif_options.AUX_IMAGES = False
# Without a handler of their own Pillow's loggers print what they think of hostile files to standard error.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class ImageError(Exception):
    """An image that cannot be read. The message is one short line about the content, without names or paths."""


class UnsupportedImage(ImageError):  # noqa: N818 - the name says what is the case
    """Not one of the eight formats, or a variant of one that no decoder here knows."""


class CorruptImage(ImageError):  # noqa: N818 - the name says what is the case
    """Broken or cut short."""


class TooManyPixels(ImageError):  # noqa: N818 - the name says what is the case
    """A frame is larger than the limit."""


class OutOfMemory(ImageError):  # noqa: N818 - the name says what is the case
    """The decoder needed more memory than it may have."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one image may cost: pixels of a frame, and frames of an animation that are decoded to be looked at."""

    max_pixels: int
    max_frames: int = 4

    def check(self, width: int, height: int) -> None:
        """Refuse a frame by its size.

        Raises:
            TooManyPixels: more than `max_pixels`.
            CorruptImage: a side of zero.
        """
        if width <= 0 or height <= 0:
            raise CorruptImage(f"a frame of {width} x {height} pixels")
        if width * height > self.max_pixels:
            raise TooManyPixels(f"{width} x {height} pixels are more than {self.max_pixels}")


@dataclass(frozen=True, slots=True)
class Opened:
    """An image file whose header was read and whose first frame is within the limits; no pixel is decoded yet."""

    file: ImageFile.ImageFile
    format: str
    frame_count: int
    """Frames, or pages, in the file."""
    reachable: Sequence[int]
    """Their indices in order of importance, as far as they may be chosen; never empty."""
    orientation: int = 1
    """EXIF orientation still to be applied, 1 to 8."""


def open_image(data: bytes, limits: Limits) -> Opened:
    """Sniff and open.

    Raises:
        UnsupportedImage, CorruptImage, TooManyPixels: see there.
        Exception: whatever Pillow raises on broken files; `engine.images` maps it.
    """
    name = containers.sniff(data)
    if name is None:
        raise UnsupportedImage("none of " + ", ".join(containers.FORMATS) if data else "no bytes")
    opened = _OPEN[name](data, limits)
    limits.check(*opened.file.size)
    return opened


def _open_jpeg(data: bytes, limits: Limits) -> Opened:
    """The first picture of a JPEG or MPO. APP0 and APP14 stay: they tell libjpeg the colour space."""
    kept, copied, marker = [], 0, b""
    segments = list(containers.jpeg_segments(data))
    orientation = tiff_tags.jpeg_orientation(data, segments)
    for segment in segments:
        marker = segment.name
        if (_APP0 < marker[1] <= _APP15 and marker[1] != _APP14) or marker[1] == _COM:
            kept.append(memoryview(data)[copied : segment.begin])
            copied = segment.end
    if kept and marker == bytes((0xFF, _SOS)):
        data = b"".join((*kept, memoryview(data)[copied:]))
    return Opened(_file(JpegImagePlugin.JpegImageFile, data), JPEG, 1, (0,), orientation)


def _open_png(data: bytes, limits: Limits) -> Opened:
    """A PNG or APNG. The default image of an APNG that is no part of the animation counts as a frame."""
    chunks = list(itertools.islice(containers.png_chunks(data), MAX_CHUNKS + 1))
    if len(chunks) > MAX_CHUNKS:
        raise CorruptImage(f"PNG: more than {MAX_CHUNKS} chunks")
    controls = containers.apng_frames(data, chunks)
    dropped = frozenset() if controls else _PNG_ANIMATION
    kept, orientation, copied = [], 1, 0
    for chunk in chunks:
        if chunk.name in dropped or (chunk.name not in _PNG_KEPT and chunk.name[0] & 0x20):
            kept.append(memoryview(data)[copied : chunk.begin])
            copied = chunk.end + 4
            if chunk.name == b"eXIf":
                orientation = tiff_tags.orientation(data[chunk.start : chunk.end])
    if kept:
        data = b"".join((*kept, memoryview(data)[copied:]))
    file: Any = _file(PngImagePlugin.PngImageFile, data)
    _scale_key(file, data[24])
    # What acTL claims is not to be believed.
    count = max(1, min(file.n_frames, controls + bool(file.default_image)))
    return Opened(file, PNG, count, _walked(count, file.size), orientation)


def _scale_key(file: ImageFile.ImageFile, depth: int) -> None:
    """Bring the transparent colour to the depth at which Pillow hands out samples; it leaves it at the file's own."""
    key = file.info.get("transparency")
    if isinstance(key, int) and depth in (2, 4):
        file.info["transparency"] = key * 255 // (2**depth - 1)
    elif isinstance(key, tuple) and depth == 16:
        file.info["transparency"] = tuple(value >> 8 for value in key)


def _open_webp(data: bytes, limits: Limits) -> Opened:
    """A WebP, still or animated. Its decoder allocates the canvas when it is opened, so the header is read first."""
    canvas = containers.webp_canvas(data)
    if canvas:
        limits.check(*canvas)
    exif = next((data[chunk.start : chunk.end] for chunk in containers.riff_chunks(data) if chunk.name == b"EXIF"), b"")
    file: Any = _file(WebPImagePlugin.WebPImageFile, data)
    return Opened(file, WEBP, file.n_frames, _walked(file.n_frames, file.size), tiff_tags.orientation(exif))


def _open_gif(data: bytes, limits: Limits) -> Opened:
    """A GIF. Its canvas grows with the frames on it, and Pillow finds out too late, so all block headers are read first."""
    frames = containers.gif_frames(data)
    limits.check(frames.width, frames.height)
    if not frames.frame_count:
        raise CorruptImage("GIF: no frame in it")
    reachable = _walked(frames.frame_count, (frames.width, frames.height))
    return Opened(_file(GifImagePlugin.GifImageFile, data), GIF, frames.frame_count, reachable)


def _open_bmp(data: bytes, limits: Limits) -> Opened:
    file = _file(BmpImagePlugin.BmpImageFile, data)
    if file.info["compression"] in _RLE:
        Limits(min(limits.max_pixels, MAX_RLE_PIXELS)).check(*file.size)
    return Opened(file, BMP, 1, (0,))


def _open_tiff(data: bytes, limits: Limits) -> Opened:
    """A TIFF with its pages as frames; thumbnails and masks among them are left out. Pillow applies the orientation itself."""
    wanted = frozenset({_SUBFILE_TYPE, _COMPRESSION, *_TILE})
    directories = list(tiff_tags.directories(data, wanted, MAX_WALKED_FRAMES))
    if not directories:
        raise CorruptImage("TIFF: no readable directory")
    for tags in directories:
        if all(tag in tags for tag in _TILE):  # libtiff allocates a whole tile, however small the page
            limits.check(*(int.from_bytes(tags[tag], "little") for tag in _TILE))
    compression = int.from_bytes(directories[0].get(_COMPRESSION, b"\1")[:2], "little")
    if compression not in TiffImagePlugin.COMPRESSION_INFO:
        raise UnsupportedImage(f"TIFF: compression {compression} is not supported")
    kinds = [int.from_bytes(tags.get(_SUBFILE_TYPE, b"\0"), "little") for tags in directories]
    pages = [page for page, kind in enumerate(kinds) if not kind & (_REDUCED | _MASK)] or [0]
    return Opened(_file(TiffImagePlugin.TiffImageFile, data), TIFF, len(pages), pages)


def _open_avif(data: bytes, limits: Limits) -> Opened:
    """An AVIF image or sequence. Pillow turns the rotation and mirroring of the container into an EXIF orientation."""
    file: Any = _file(AvifImagePlugin.AvifImageFile, data)
    orientation = tiff_tags.orientation(file.info.get("exif") or b"")
    return Opened(file, AVIF, file.n_frames, _walked(file.n_frames, file.size), orientation)


def _open_heic(data: bytes, limits: Limits) -> Opened:
    """A HEIC with its pictures as frames, the primary one first. libheif applies rotation and mirroring itself."""
    file: Any = _file(heif_plugin.HeifImageFile, data)
    primary = file.tell()
    others = (index for index in range(min(file.n_frames, MAX_WALKED_FRAMES)) if index != primary)
    return Opened(file, HEIC, file.n_frames, (primary, *others))


_OPEN: dict[str, Callable[[bytes, Limits], Opened]] = {
    JPEG: _open_jpeg,
    PNG: _open_png,
    WEBP: _open_webp,
    GIF: _open_gif,
    BMP: _open_bmp,
    TIFF: _open_tiff,
    AVIF: _open_avif,
    HEIC: _open_heic,
}


def _file(plugin: type[ImageFile.ImageFile], data: bytes) -> ImageFile.ImageFile:
    return plugin(BytesIO(data))


def _walked(count: int, size: tuple[int, int]) -> range:
    """The frames that may be reached by decoding all before them."""
    return range(min(count, MAX_WALKED_FRAMES, max(1, MAX_WALKED_PIXELS // max(1, size[0] * size[1]))))
