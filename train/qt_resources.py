"""Reads the files inside a Qt resource file (`.rcc`), in which some Debian packages ship their pictures.

Layout (Qt's qresource.cpp): `qres`, then big-endian uint32 version and the offsets of tree, data and names. A tree node is 14
bytes (22 from version 2 on): name offset, flags, then for a folder its child count and first child, for a file its locale and
data offset.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from train.data import DataError

COMPRESSED, FOLDER = 1, 2


def files(path: Path) -> Iterator[tuple[str, bytes]]:
    """(path inside, bytes) of every file in a resource file, in the tree's order. Raises DataError where it is none."""
    data = path.read_bytes()
    try:
        magic, version, tree, contents, names = struct.unpack_from(">4s4I", data)
        if magic != b"qres":
            raise DataError(f"{path}: not a Qt resource file")
        yield from _below(data, (tree, contents, names, 22 if version >= 2 else 14), 0, "")
    except (struct.error, zlib.error, UnicodeDecodeError) as exc:
        raise DataError(f"{path}: not a readable Qt resource file: {exc}") from exc


def _below(data: bytes, layout: tuple[int, int, int, int], node: int, parent: str) -> Iterator[tuple[str, bytes]]:
    tree, contents, names, size = layout
    at = tree + node * size
    name_at, flags = struct.unpack_from(">IH", data, at)
    length = struct.unpack_from(">H", data, names + name_at)[0] if node else 0
    start = names + name_at + 6  # after the length and a hash
    inside = f"{parent}/{data[start : start + 2 * length].decode('utf-16-be')}" if node else ""
    if flags & FOLDER:
        children, first = struct.unpack_from(">II", data, at + 6)
        for child in range(first, first + children):
            if child <= node:
                raise DataError(f"node {child} of a Qt resource file lies before its folder")
            yield from _below(data, layout, child, inside)
        return
    begin = contents + int(struct.unpack_from(">I", data, at + 10)[0])
    stored = data[begin + 4 : begin + 4 + int(struct.unpack_from(">I", data, begin)[0])]
    yield inside, zlib.decompress(stored[4:]) if flags & COMPRESSED else stored
