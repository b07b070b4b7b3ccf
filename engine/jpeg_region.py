"""Crops of a JPEG without decoding the whole of it: what plainly is of the common kind, by libjpeg-turbo; all else is left alone.

CoDE looks at 224 pixels of a photograph's 4,000. Rows and columns nobody asks for are entropy-decoded at most, and rows below the
last crop not even that. Of a baseline file the blocks of a crop are first copied into a small JPEG (`engine/_jpeg_crop.c`, a
lossless crop that walks through entropy-coded data faster than libjpeg does); of others libjpeg-turbo skips the rest by itself, a
progressive one by a header that claims to end below its last crop: every scan of it is then read as far as that, and no further.
The pixels are libjpeg-turbo's in both cases (`engine/_jpeg_region.c`), in the copy that Pillow's wheel carries. Both files are
compiled where the project is installed with a C compiler at hand (the library's headers are not needed: `engine/_jpeg_abi.h`);
its absence costs time only.

Pillow's full decode decides what an image is and what counts as damaged. A file comes this way only where both must say the
same: a header of known segments; 8-bit grey or YCbCr at 4:4:4, 4:2:2, 4:4:0 or 4:2:0, baseline or complete progressive; not one
warning of libjpeg on the way; and an end-of-image marker behind the last scan, in a file of one scan with all restart markers in
place, which is what a full decode needs in order not to run out of data. Before the first use the two are compared on some small
pictures.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from engine import containers, preprocess, tiff_tags
from engine.containers import Part
from engine.image_files import Limits
from engine.pixels import stored_box

_Box = tuple[int, int, int, int]
"""Left, top, right, bottom; stored pixels."""

_decode: Callable[..., tuple[bytes, ...] | None] | None = None
_cut: Callable[..., tuple[bytes, ...] | None] | None = None
with contextlib.suppress(ImportError):  # not compiled on this machine
    from engine._jpeg_region import cut as _cut
    from engine._jpeg_region import decode as _decode
    from engine._jpeg_region import use as _use

_PROGRESSIVE = b"\xff\xc2"
_FRAMES = frozenset({b"\xff\xc0", b"\xff\xc1", _PROGRESSIVE})
_TABLES = frozenset({b"\xff\xc4", b"\xff\xdb", b"\xff\xdd"})
_SCAN = b"\xff\xda"
_APP0, _APP14, _APP15, _COM = b"\xff\xe0", b"\xff\xee", b"\xff\xef", b"\xff\xfe"
_PIECES_FROM_PIXELS = 300_000
"""Of a smaller picture libjpeg skips faster than tables for the walk are made (measured)."""
_SHORTEST_KNOWN_APP_BYTES = 12
"""Of a JFIF or Adobe segment that Pillow reads without complaint."""


class Header(NamedTuple):
    """What the header of a plain JPEG says."""

    width: int
    """Stored, before orientation."""
    height: int
    height_at: int
    """Offset of its two bytes."""
    mcu_rows: int
    """8, or 16 where rows of chroma are fewer."""
    orientation: int
    scan: int
    """Offset of the first entropy-coded byte."""
    progressive: bool


class Cut(NamedTuple):
    """Crops uint8 [k, 224, 224, 3], and the size of the picture as a viewer shows it."""

    crops: NDArray[np.uint8]
    width: int
    height: int


def header(data: bytes) -> Header | None:
    """The header, where every segment is of a kind that Pillow and libjpeg read alike; None otherwise."""
    segments = list(containers.jpeg_segments(data))
    if not segments or segments[-1].name != _SCAN:
        return None
    frames = [segment for segment in segments if segment.name in _FRAMES]
    if len(frames) != 1 or not all(_is_known(data, segment) for segment in segments):
        return None
    frame, scan = frames[0], segments[-1]
    if frame.end - frame.start < 6:
        return None
    height, width = (int.from_bytes(data[frame.start + at : frame.start + at + 2], "big") for at in (1, 3))
    if not width or not height:
        return None
    samplings = data[frame.start + 7 : frame.end : 3]
    mcu_rows = 8 if all(sampling & 15 == 1 for sampling in samplings) else 16
    orientation = tiff_tags.jpeg_orientation(data, segments)
    return Header(width, height, frame.start + 1, mcu_rows, orientation, scan.end, frame.name == _PROGRESSIVE)


def _is_known(data: bytes, segment: Part) -> bool:
    name = segment.name
    if name in (_APP0, _APP14):
        return segment.end - segment.start >= _SHORTEST_KNOWN_APP_BYTES
    return name in _FRAMES or name in _TABLES or _APP0 < name <= _APP15 or name in (_COM, _SCAN)


def read_crops(data: bytes, limits: Limits, layout: preprocess.Layout) -> Cut | None:
    """The crops, exactly those of a full decode; None where a full decode has to be made.

    Raises:
        TooManyPixels: as a full decode would, by the header.
    """
    if not usable():
        return None
    found = header(data)
    if found is None:
        return None
    limits.check(found.width, found.height)
    turned = found.orientation >= 5
    width, height = (found.height, found.width) if turned else (found.width, found.height)
    wanted = preprocess.regions(height, width, layout)
    boxes = [stored_box((left, top, right, bottom), found[:2], found.orientation) for top, left, bottom, right in wanted]
    large = not found.progressive and found.width * found.height >= _PIECES_FROM_PIXELS
    parts = _pieces(data, found, boxes) if large else None
    if parts is None:
        parts = _regions(data, found, boxes)
    if parts is None:
        return None
    cut = {region: turn(part, found.orientation) for region, part in zip(wanted, parts, strict=True)}
    return Cut(preprocess.crops_of(lambda *region: cut[region], height, width, layout), width, height)


class _Band(NamedTuple):
    """Stored rows from `top` on, columns from `left` on."""

    top: int
    left: int
    pixels: NDArray[np.uint8]


def _pieces(data: bytes, found: Header, boxes: Sequence[_Box]) -> list[NDArray[np.uint8]] | None:
    """The boxes' pixels of a baseline file by way of small files; None where it is to be tried otherwise."""
    if _cut is None:
        return None
    parts = _cut(data, found.scan, found.width, found.height, tuple(boxes))
    if parts is None:
        return None
    shapes = [(bottom - top, right - left, 3) for left, top, right, bottom in boxes]
    return [np.frombuffer(part, np.uint8).reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _regions(data: bytes, found: Header, boxes: Sequence[_Box]) -> list[NDArray[np.uint8]] | None:
    """The boxes' pixels from rows and columns that cover them all; None where the safe decoder has to decide."""
    if _decode is None:
        return None
    left, right = min(box[0] for box in boxes), max(box[2] for box in boxes)
    rows = _union((box[1], box[3]) for box in boxes)
    height = found.height
    if found.progressive and (lowest := _lowest(rows[-1][1], found.mcu_rows)) < height:
        data = b"".join((data[: found.height_at], lowest.to_bytes(2, "big"), memoryview(data)[found.height_at + 2 :]))
        height = lowest
    parts = _decode(data, found.scan, found.width, height, left, right, rows)
    if parts is None:
        return None
    bands = [
        _Band(top, left, np.frombuffer(part, np.uint8).reshape(bottom - top, right - left, 3))
        for part, (top, bottom) in zip(parts, rows, strict=True)
    ]
    return [_part(bands, box) for box in boxes]


def _lowest(bottom: int, mcu_rows: int) -> int:
    """How many rows a progressive file must have for those above `bottom` to come out as they are.

    Whole MCUs, with the two rows beyond that upsampling looks at where it does. What a scan holds of rows below is passed over on
    the way to the next marker, and a full decode looks beyond no marker either: both find the same scans and the same end.
    """
    beyond = 2 if mcu_rows > 8 else 0
    return -(-(bottom + beyond) // mcu_rows) * mcu_rows


def _union(intervals: Any) -> tuple[tuple[int, int], ...]:
    """Disjoint intervals, ascending, that cover the same rows."""
    joined: list[tuple[int, int]] = []
    for top, bottom in sorted(intervals):
        if joined and top <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(bottom, joined[-1][1])
        else:
            joined.append((top, bottom))
    return tuple(joined)


def _part(bands: list[_Band], box: _Box) -> NDArray[np.uint8]:
    left, top, right, bottom = box
    band = next(band for band in reversed(bands) if band.top <= top)
    return band.pixels[top - band.top : bottom - band.top, left - band.left : right - band.left]


def turn(stored: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Stored pixels as a viewer shows them."""
    turned: NDArray[np.uint8] = stored.transpose(1, 0, 2) if orientation >= 5 else stored
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    return turned


def usable() -> bool:
    """Whether the region decoder is compiled, has found a libjpeg-turbo, and agrees with Pillow on this machine."""
    return library() is not None


@functools.cache
def library() -> str | None:
    """Path or name of the libjpeg-turbo in use; None where there is none that agrees with Pillow."""
    if _decode is None:
        return None
    pictures = samples()
    for path in _candidates():
        with contextlib.suppress(OSError):
            _use(path)
            if all(_agrees(picture) for picture in pictures):
                return path
    return None


def _candidates() -> Iterator[str]:
    """Pillow's own copy (in its wheels for Linux and macOS), then the system's."""
    package = Path(PIL.__file__).parent
    yield from sorted(map(str, [*package.parent.glob("[pP]illow.libs/libjpeg*.so*"), *package.glob(".dylibs/libjpeg*.dylib")]))
    if system := ctypes.util.find_library("jpeg"):
        yield system


def samples() -> list[bytes]:
    """Small JPEGs of every kind that comes this way."""
    noise = np.random.default_rng(0).integers(0, 256, (14, 18, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(noise).resize((130, 102), PIL.Image.Resampling.BICUBIC)
    made = []
    for options in (
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"progressive": True},
        {"restart_marker_rows": 1},
    ):
        made.append(_saved(picture, **options))
    return [*made, _saved(picture.convert("L"))]


def _saved(picture: PIL.Image.Image, **options: int) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85, **options)
    return out.getvalue()


def _agrees(data: bytes) -> bool:
    box = (37, 41, 75, 78)
    found = header(data)
    if found is None:
        return False
    with PIL.Image.open(io.BytesIO(data), formats=("JPEG",)) as file:
        full = np.asarray(file.convert("RGB").crop(box))
    ways = (_regions,) if found.progressive else (_regions, _pieces)
    answers = [way(data, found, [box]) for way in ways]
    return all(answer is not None and np.array_equal(answer[0], full) for answer in answers)
