"""Metadata out of an image's container, unread: EXIF, XMP, C2PA store, PNG texts. Bounded, for hostile bytes."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from engine import containers, tiff_tags

MAX_XMP_BYTES = 1 << 20
_MAX_TEXT_BYTES = 1 << 16
_MAX_TEXTS = 64
_XMP_SEGMENT = b"http://ns.adobe.com/xap/1.0/\x00"
_EXIF_STARTS = (b"II\x2a\0\x08\0\0\0", b"MM\0\x2a\0\0\0\x08")
_C2PA_BOX = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")
_C2PA_EXTENSION = b"\x21\xff\x0bC2PA_GIF"
_XMP_TAG, _C2PA_TAG = 0x02BC, 0xCD41


@dataclass(slots=True)
class Metadata:
    """What was found, still unread; empty where there was nothing."""

    exif: bytes = b""
    xmp: bytes = b""
    manifest: bytes = b""
    """A C2PA store; empty where there is none."""
    texts: list[tuple[str, str]] = field(default_factory=list)


def collect(data: bytes) -> Metadata:
    """Whatever of these the file holds, by its format."""
    match containers.sniff(data):
        case containers.JPEG:
            return _from_jpeg(data)
        case containers.PNG:
            return _from_png(data)
        case containers.WEBP:
            names = (b"EXIF", b"XMP ", b"C2PA")
            chunks = {chunk.name: data[chunk.start : chunk.end] for chunk in containers.riff_chunks(data) if chunk.name in names}
            exif, xmp, store = (chunks.get(name, b"") for name in names)
            return Metadata(exif, xmp, _c2pa(store))
        case containers.TIFF:
            tags = tiff_tags.read(data, frozenset({_XMP_TAG, _C2PA_TAG}))
            return Metadata(data, tags.get(_XMP_TAG, b""), _c2pa(tags.get(_C2PA_TAG, b"")))
        case containers.AVIF | containers.HEIC:
            return _from_boxes(data)
        case containers.GIF:
            return Metadata(xmp=_search_xmp(data), manifest=_c2pa(_gif_blocks(data, data.find(_C2PA_EXTENSION))))
    return Metadata()


def _from_jpeg(data: bytes) -> Metadata:
    found = Metadata()
    stores: dict[bytes, bytearray] = {}
    for segment in containers.jpeg_segments(data):
        marker, start, end = segment.name[1], segment.start, segment.end
        if marker == 0xE1 and not found.exif and data.startswith(tiff_tags.EXIF_PREFIX, start):
            found.exif = data[start:end]
        elif marker == 0xE1 and not found.xmp and data.startswith(_XMP_SEGMENT, start):
            found.xmp = data[start + len(_XMP_SEGMENT) : end]
        elif marker == 0xEB and data.startswith(b"JP", start):
            # CI, box instance and sequence number; from the second segment of a box on its header is repeated.
            first = int.from_bytes(data[start + 4 : start + 8], "big") <= 1
            store = stores.setdefault(data[start + 2 : start + 4], bytearray())
            store += data[start + 8 if first else start + 16 : end]
    found.manifest = next((bytes(store) for store in stores.values() if is_c2pa(bytes(store))), b"")
    return found


def _from_png(data: bytes) -> Metadata:
    found = Metadata()
    texts = 0
    for chunk in containers.png_chunks(data):
        if chunk.name == b"caBX" and not found.manifest:
            found.manifest = _c2pa(data[chunk.start : chunk.end])
        elif chunk.name == b"eXIf" and not found.exif:
            found.exif = data[chunk.start : chunk.end]
        elif chunk.name in (b"tEXt", b"zTXt", b"iTXt") and texts < _MAX_TEXTS:
            texts += 1
            key, value = _png_text(chunk.name, data[chunk.start : min(chunk.end, chunk.start + MAX_XMP_BYTES)])
            if key == "XML:com.adobe.xmp":
                found.xmp = found.xmp or value.encode()
            else:
                found.texts.append((key, value[:_MAX_TEXT_BYTES]))
    return found


def _png_text(kind: bytes, payload: bytes) -> tuple[str, str]:
    key, _, value = payload.partition(b"\0")
    packed, encoding = kind == b"zTXt", "latin-1"
    if packed:
        value = value[1:]
    elif kind == b"iTXt":
        packed, encoding = value[:1] == b"\1", "utf-8"
        value = value[2:].partition(b"\0")[2].partition(b"\0")[2]
    if packed:
        try:
            value = zlib.decompressobj().decompress(value, MAX_XMP_BYTES)
        except zlib.error:
            value = b""
    return key.decode("latin-1"), value.decode(encoding, "replace")


def _from_boxes(data: bytes) -> Metadata:
    """AVIF and HEIC keep EXIF and XMP as items anywhere in the file: found by how they begin, without the item tables."""
    found = Metadata(xmp=_search_xmp(data))
    starts = [at for at in map(data.find, _EXIF_STARTS) if at >= 0]
    if starts:
        found.exif = data[min(starts) : min(starts) + MAX_XMP_BYTES]
    for box in containers.boxes(data):
        if box.name == b"uuid" and data.startswith(_C2PA_BOX, box.start):
            # Version and flags, the purpose "manifest", the offset of a Merkle tree, then the store.
            purpose = data.find(b"\0", box.start + 20, box.end)
            if data[box.start + 20 : purpose] == b"manifest":
                found.manifest = _c2pa(data[purpose + 9 : box.end])
    return found


def _gif_blocks(data: bytes, extension: int) -> bytes:
    """The payload of an application extension, out of its blocks of 255 bytes."""
    if extension < 0:
        return b""
    at, blocks = extension + 14, []
    while at < len(data) and (length := data[at]):
        blocks.append(data[at + 1 : at + 1 + length])
        at += 1 + length
    return b"".join(blocks)


def _search_xmp(data: bytes) -> bytes:
    start = data.find(b"<x:xmpmeta")
    end = data.find(b"</x:xmpmeta>", start, start + MAX_XMP_BYTES) if start >= 0 else -1
    return data[start : end + len(b"</x:xmpmeta>")] if end >= 0 else b""


def is_c2pa(store: bytes) -> bool:
    """Whether the bytes begin with a JUMBF superbox of C2PA's kind."""
    outer = next(containers.boxes(store), None)
    if outer is None or outer.name != b"jumb":
        return False
    description = next(containers.boxes(store, outer.start, outer.end), None)
    return description is not None and description.name == b"jumd" and store.startswith(b"c2pa", description.start)


def _c2pa(store: bytes) -> bytes:
    return store if is_c2pa(store) else b""
