"""Tags of a TIFF stream, which is also what EXIF is: read without Pillow, bounded, for hostile bytes; never raises on content."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from engine.containers import Part

EXIF_PREFIX = b"Exif\x00\x00"
_APP1 = b"\xff\xe1"
MAX_DIRECTORY_ENTRIES = 4096
"""libtiff's own bound on the tags of one directory."""
MAX_CHAIN_ENTRIES = 100_000
MAX_TAG_BYTES = 1 << 20

ORIENTATION = 0x0112
_EXIF_DIRECTORY = 0x8769
_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


class _Layout(NamedTuple):
    """How the numbers of a TIFF stream are laid out: classic or BigTIFF, in one of the two byte orders."""

    order: str
    total: str
    entry: str
    offset: str

    @property
    def inline_bytes(self) -> int:
        return struct.calcsize(self.order + self.offset)


def _layout(data: bytes) -> tuple[_Layout, int] | None:
    """Layout and offset of the first directory of a TIFF stream."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 8:
        return None
    if struct.unpack_from(order + "H", data, 2)[0] != 43:
        return _Layout(order, "H", "HHI4s", "I"), struct.unpack_from(order + "I", data, 4)[0]
    if len(data) < 16:
        return None
    return _Layout(order, "Q", "HHQ8s", "Q"), struct.unpack_from(order + "Q", data, 8)[0]


def directories(data: bytes, wanted: frozenset[int], limit: int) -> Iterator[dict[int, bytes]]:
    """The wanted tags of each directory in the main chain of a TIFF stream, `limit` directories at most.

    Values are as `read` gives them.

    Ends at a directory that was seen before, lies outside of the stream, or has more than `MAX_DIRECTORY_ENTRIES` tags, and
    when `MAX_CHAIN_ENTRIES` tags were read in all: directories may overlap, so the size of the file is no bound.
    """
    found = _layout(data)
    if found is None:
        return
    layout, at = found
    seen: set[int] = set()
    entries = 0
    while at and at not in seen and len(seen) < limit and entries < MAX_CHAIN_ENTRIES:
        seen.add(at)
        directory = _directory(data, layout, at, wanted)
        if directory is None:
            return
        yield directory.tags
        at, entries = directory.following, entries + directory.entries


def read(data: bytes, wanted: frozenset[int]) -> dict[int, bytes]:
    """The wanted tags of the first directory and of its EXIF directory: raw values, numbers in little-endian order.

    `data` is a TIFF stream: a TIFF file, or the payload of an EXIF segment with or without its `Exif\\0\\0`. The first of
    two equal tags wins; values over `MAX_TAG_BYTES` are left out.
    """
    if data.startswith(EXIF_PREFIX):
        data = data[len(EXIF_PREFIX) :]
    found = _layout(data)
    if found is None:
        return {}
    layout, at = found
    first = _directory(data, layout, at, wanted | {_EXIF_DIRECTORY})
    if first is None or _EXIF_DIRECTORY not in first.tags:
        return first.tags if first else {}
    inner = _directory(data, layout, int.from_bytes(first.tags.pop(_EXIF_DIRECTORY), "little"), wanted)
    return inner.tags | first.tags if inner else first.tags


class _Directory(NamedTuple):
    tags: dict[int, bytes]
    following: int
    """Offset of the next directory; 0 at the end of the chain."""
    entries: int


def _directory(data: bytes, layout: _Layout, at: int, wanted: frozenset[int]) -> _Directory | None:
    """The directory at `at`; None where there cannot be one."""
    head, width = struct.calcsize(layout.order + layout.total), struct.calcsize(layout.order + layout.entry)
    if at + head > len(data):
        return None
    count: int = struct.unpack_from(layout.order + layout.total, data, at)[0]
    if count > MAX_DIRECTORY_ENTRIES:
        return None
    tags: dict[int, bytes] = {}
    at += head
    complete = min(count, (len(data) - at) // width)
    for place in range(at, at + complete * width, width):
        tag, kind, number, inline = struct.unpack_from(layout.order + layout.entry, data, place)
        length = number * _TYPE_SIZES.get(kind, 0)
        if tag in wanted and tag not in tags and 0 < length <= MAX_TAG_BYTES:
            value = inline[:length]
            if length > layout.inline_bytes:
                offset = struct.unpack(layout.order + layout.offset, inline)[0]
                value = data[offset : offset + length]
            tags[tag] = _little_endian(value, kind) if layout.order == ">" else value
    at += complete * width
    if complete < count or at + layout.inline_bytes > len(data):
        return _Directory(tags, 0, complete)
    return _Directory(tags, struct.unpack_from(layout.order + layout.offset, data, at)[0], complete)


def _little_endian(value: bytes, kind: int) -> bytes:
    width = {3: 2, 4: 4, 8: 2, 9: 4, 13: 4, 16: 8, 17: 8, 18: 8}.get(kind, 1)
    if width == 1 or len(value) > 64:  # long arrays of numbers (strip offsets) are of no use here
        return value
    return b"".join(value[at : at + width][::-1] for at in range(0, len(value), width))


def jpeg_orientation(data: bytes, segments: Iterable[Part]) -> int:
    """EXIF orientation of a JPEG, 1 to 8, of the first EXIF segment among those of its header; 1 where there is none."""
    for segment in segments:
        if segment.name == _APP1 and data.startswith(EXIF_PREFIX, segment.start):
            return orientation(data[segment.start : segment.end])
    return 1


def orientation(exif: bytes) -> int:
    """EXIF orientation 1 to 8 of an EXIF payload; 1 where there is none or it makes no sense."""
    value = int.from_bytes(read(exif, frozenset({ORIENTATION})).get(ORIENTATION, b"\x01")[:2], "little")
    return value if 1 <= value <= 8 else 1
