"""The outer structure of image files, read without decoding a pixel: format, segments, chunks, boxes, blocks.

Everything here is meant for hostile bytes: it never raises on content, looks at each byte at most once, and stops where the
structure stops to make sense. What it yields are ranges of the input, never copies of it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF, HEIC = "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIC"
FORMATS = (JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF, HEIC)

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_TIFF_MAGIC = (b"II\x2a\x00", b"MM\x00\x2a", b"II\x2b\x00", b"MM\x00\x2b")
_BMP_HEADER_SIZES = (12, 40, 52, 56, 64, 108, 124)
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})
_HEIF_BRANDS = frozenset({b"mif1", b"mif2", b"msf1"})


class Part(NamedTuple):
    """A named part of a file: a segment, chunk or box, with the range of its payload."""

    name: bytes
    start: int
    """First byte of the payload."""
    end: int
    """One past the last byte of the payload, within the file even where the length field lies."""
    begin: int
    """First byte of the part itself, its header included."""


def sniff(data: bytes) -> str | None:
    """The format that the first bytes tell, one of `FORMATS`; None for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return JPEG
    if data.startswith(PNG_MAGIC):
        return PNG
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WEBP
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GIF
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADER_SIZES:
        return BMP
    if data.startswith(_TIFF_MAGIC):
        return TIFF
    if data[4:8] == b"ftyp":
        return _sniff_brands(data)
    return None


def _sniff_brands(data: bytes) -> str | None:
    """AVIF or HEIC by the brands of a `ftyp` box: the major one decides, then the compatible ones, then the coded items."""
    end = min(int.from_bytes(data[:4], "big"), 8 + 64 * 4)
    brands = [data[at : at + 4] for at in (8, *range(16, end - 3, 4))]
    for brand in brands:
        if brand in _AVIF_BRANDS:
            return AVIF
        if brand in _HEIC_BRANDS:
            return HEIC
    if _HEIF_BRANDS.intersection(brands):
        head = data[: 1 << 16]
        return HEIC if b"hvc1" in head else AVIF if b"av01" in head else None
    return None


def jpeg_segments(data: bytes) -> Iterator[Part]:
    """Segments of a JPEG's header, named by marker (`b"\\xff\\xe1"`), up to and with the first start of scan.

    Stops early at anything that is no well-formed segment; whoever needs to know whether the scan was reached looks at the
    last name for `b"\\xff\\xda"`.
    """
    at, size = 2, len(data)
    while at + 4 <= size and data[at] == 0xFF:
        if data[at + 1] == 0xFF:  # fill byte
            at += 1
            continue
        name, length = data[at : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        if length < 2 or name[1] in (0x00, 0x01) or 0xD0 <= name[1] <= 0xD9 or at + 2 + length > size:
            return
        yield Part(name, at + 4, at + 2 + length, at)
        if name[1] == 0xDA:
            return
        at += 2 + length


def png_chunks(data: bytes) -> Iterator[Part]:
    """Chunks of a PNG up to and with IEND; the last one may be cut short by the end of the file. CRCs are not checked."""
    at, size = len(PNG_MAGIC), len(data)
    while at + 8 <= size:
        length, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        yield Part(name, at + 8, min(at + 8 + length, size), at)
        if name == b"IEND":
            return
        at += 12 + length


def apng_frames(data: bytes, chunks: Iterable[Part]) -> int:
    """Frames of an APNG; 0 where its chunks break the rules, and viewers show the default image instead (APNG 1.0)."""
    claimed = frames = sequence = 0
    filled = True
    for chunk in chunks:
        if chunk.name == b"acTL":
            if claimed or frames or chunk.end - chunk.start < 8:
                return 0
            claimed = int.from_bytes(data[chunk.start : chunk.start + 4], "big")
        elif chunk.name in (b"fcTL", b"fdAT"):
            if int.from_bytes(data[chunk.start : chunk.start + 4], "big") != sequence:
                return 0
            sequence += 1
            if chunk.name == b"fcTL":
                if not filled or chunk.end - chunk.start < 26:
                    return 0
                frames, filled = frames + 1, False
            elif not frames:
                return 0
            else:
                filled = True
        elif chunk.name == b"IDAT":
            filled = True
    return frames if claimed and filled else 0


def riff_chunks(data: bytes) -> Iterator[Part]:
    """Chunks of a WebP file; the last one may be cut short by the end of the file."""
    at, size = 12, len(data)
    while at + 8 <= size:
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        yield Part(data[at : at + 4], at + 8, min(at + 8 + length, size), at)
        at += 8 + length + (length & 1)


def boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[Part]:
    """Boxes of an ISO media file (AVIF, HEIC) or a JUMBF store between `start` and `end`."""
    at, size = start, len(data) if end is None else end
    while at + 8 <= size:
        length, name, header = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], 8
        if length == 1:
            length, header = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        elif length == 0:
            length = size - at
        if length < header:
            return
        yield Part(name, at + header, min(at + length, size), at)
        at += length


class GifFrames(NamedTuple):
    """What the blocks of a GIF say before any of them is decoded."""

    frame_count: int
    width: int
    height: int
    """The screen, enlarged to what the frames cover, as Pillow enlarges it."""


def gif_frames(data: bytes) -> GifFrames:
    """Count the frames of a GIF and measure what they cover; looks at block headers only."""
    width, height = int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")
    size, count = len(data), 0
    at = 13 + _palette_bytes(data[10] if size > 10 else 0)
    while at < size:
        introducer = data[at]
        if introducer == 0x3B:
            break
        if introducer == 0x21:
            at = _skip_blocks(data, at + 2)
        elif introducer == 0x2C and at + 11 <= size:
            x, y, w, h = struct.unpack_from("<4H", data, at + 1)
            width, height, count = max(width, x + w), max(height, y + h), count + 1
            at = _skip_blocks(data, at + 11 + _palette_bytes(data[at + 9]))
        else:
            at += 1
    return GifFrames(count, width, height)


def _palette_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _skip_blocks(data: bytes, at: int) -> int:
    size = len(data)
    while at < size and (length := data[at]):
        at += length + 1
    return at + 1


def webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Width and height of a WebP's canvas from its first chunk; None where that cannot be read."""
    name = data[12:16]
    if name == b"VP8X" and len(data) >= 30:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if name == b"VP8 " and len(data) >= 30 and data[23:26] == b"\x9d\x01\x2a":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    if name == b"VP8L" and len(data) >= 25 and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
    return None
