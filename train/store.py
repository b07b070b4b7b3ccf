"""The pixel store: a training set decoded once into one memory-mapped file, so that the loader decodes nothing.

Beside the pixels stands what alignment needs: each photograph's own quantisation tables (to give its aligned fake, and lossless
fakes, a first compression of the same kind), and which aligned fake belongs to which real image.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin

from engine.images import ImageError, Limits, read
from train.augment import jpeg_tables
from train.data import Damage, DataError, Entry, digest

Rgb = NDArray[np.uint8]
FORMAT = "code-store/1"
SIDE_PX = 320
NAME_CHARS = 16
LIMITS = Limits(max_pixels=64_000_000, max_frames=1)


@dataclass(frozen=True, slots=True)
class Item:
    """One image of the store. `lossless`: its pixels carry no JPEG or WebP quantisation. `pair`: index of the real image
    that an aligned fake was made from, else -1. `tables`: index into the store's quantisation tables, or -1. `name`: the first
    16 digits of the file's SHA-256, with `#1` for a quarter and `+aligned` for an aligned fake; stores of before have none."""

    offset: int
    height: int
    width: int
    label: int
    source: str
    generator: str
    group: str
    lossless: bool
    pair: int
    tables: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class Tables:
    """A JPEG's quantisation tables and chroma subsampling (Pillow's 0, 1, 2)."""

    values: list[list[int]]
    subsampling: int


class PixelStore:
    """An opened store: `pixels(item)` gives uint8[h, w, 3] without copying."""

    def __init__(self, folder: Path) -> None:
        try:
            index: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        except FileNotFoundError as exc:
            raise DataError(f"{folder / 'index.json'}: no such file; the store was not built") from exc
        if index.get("format") != FORMAT:
            raise DataError(f"{folder / 'index.json'}: format {index.get('format')!r} is not {FORMAT}")
        self.digest: str = index["digest"]
        self.items = [Item(**item) for item in index["items"]]
        self.tables = [Tables(**tables) for tables in index["tables"]]
        self._memory = np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="r")

    def pixels(self, item: Item) -> Rgb:
        size = item.height * item.width * 3
        return self._memory[item.offset : item.offset + size].reshape(item.height, item.width, 3)


def build(
    entries: Sequence[Entry],
    folder: Path,
    reconstruct: Callable[[Rgb], Rgb] | None = None,
    on_image: Callable[[int], None] | None = None,
    lent: Sequence[Tables] = (),
) -> tuple[PixelStore, Damage]:
    """Decodes `entries` into a store in `folder`, or opens the one that is there when it holds the same data.

    Images are cut to at most 320 px around their middle (a multiple of 16 px from the origin, so a JPEG's grid stays); a 2x2 grid
    becomes four images. `reconstruct` makes the aligned fake of a real image. `lent`: quantisation tables of another store's
    photographs, for a set that may have none of its own. What cannot be decoded is skipped and reported.
    """
    borrowed = f"|{json.dumps([asdict(tables) for tables in lent])}" if lent else ""
    named = f"{FORMAT}|{digest(entries)}|{SIDE_PX}|{reconstruct is not None}{borrowed}"
    wanted = hashlib.sha256(named.encode()).hexdigest()
    if (folder / "index.json").exists() and (store := PixelStore(folder)).digest == wanted:
        return store, Damage()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.json").unlink(missing_ok=True)
    damage, writer = Damage(), _Writer(lent)
    with (folder / "pixels.bin").open("wb") as pixels:
        for done, entry in enumerate(entries):
            try:
                _add(writer, entry, reconstruct)
            except (ImageError, OSError) as exc:
                damage.add(str(entry.path), str(exc) or type(exc).__name__)
            for chunk in writer.drained():
                pixels.write(chunk)
            if on_image is not None:
                on_image(done + 1)
    index = {
        "format": FORMAT,
        "digest": wanted,
        "items": [asdict(item) for item in writer.items],
        "tables": [asdict(tables) for tables in writer.tables],
    }
    partial = folder / "index.json.partial"
    partial.write_text(json.dumps(index), encoding="utf-8")
    partial.replace(folder / "index.json")
    return PixelStore(folder), damage


class _Writer:
    """Collects items and tables; hands out pixel bytes in order."""

    def __init__(self, lent: Sequence[Tables] = ()) -> None:
        self.items: list[Item] = []
        self.tables = list(lent)
        self._offset = 0
        self._chunks: list[bytes] = []

    def add(self, rgb: Rgb, entry: Entry, *, label: int, generator: str, lossless: bool, name: str,
            pair: int = -1, tables: int = -1) -> int:  # fmt: skip
        height, width = rgb.shape[:2]
        self.items.append(
            Item(self._offset, height, width, label, entry.source, generator, entry.group, lossless, pair, tables, name)
        )
        self._chunks.append(np.ascontiguousarray(rgb).tobytes())
        self._offset += rgb.size
        return len(self.items) - 1

    def drained(self) -> Iterator[bytes]:
        chunks, self._chunks = self._chunks, []
        yield from chunks


def _add(writer: _Writer, entry: Entry, reconstruct: Callable[[Rgb], Rgb] | None) -> None:
    data = entry.path.read_bytes()
    decoded = read(data, LIMITS)
    rgb = decoded.frames[0]
    lossless = decoded.format == "PNG" or (decoded.format == "WEBP" and b"VP8L" in data[:64])
    tables = tables_of(data) if decoded.format == "JPEG" else None
    name = (entry.sha256 or hashlib.sha256(data).hexdigest())[:NAME_CHARS]
    if entry.layout == "grid2x2":
        h, w = rgb.shape[0] // 2, rgb.shape[1] // 2
        for number, part in enumerate((rgb[:h, :w], rgb[:h, w:], rgb[h:, :w], rgb[h:, w:])):
            # A quarter's origin may lie off the file's 8 px grid, which is fine: so does an upload that was cropped.
            quarter = f"{name}#{number}"
            writer.add(_cut(part), entry, label=entry.label, generator=entry.generator, lossless=lossless, name=quarter)
        return
    number = -1
    if tables is not None and not entry.label:
        writer.tables.append(tables)
        number = len(writer.tables) - 1
    rgb = _cut(rgb)
    real = writer.add(rgb, entry, label=entry.label, generator=entry.generator, lossless=lossless, name=name, tables=number)
    if reconstruct is None or entry.label:
        return
    fake = Image.fromarray(reconstruct(rgb))
    if tables is not None:
        fake = jpeg_tables(fake, tables.values, tables.subsampling)
    aligned = f"{name}+aligned"
    writer.add(
        np.asarray(fake), entry, label=1, generator="aligned", lossless=tables is None, name=aligned, pair=real, tables=number
    )


def tables_of(data: bytes) -> Tables | None:
    """The quantisation tables of a JPEG's bytes, without decoding it; None for another format."""
    with Image.open(io.BytesIO(data)) as image:
        if not isinstance(image, JpegImagePlugin.JpegImageFile):
            return None
        quantization: dict[int, list[int]] = image.quantization
        values = [list(quantization[i]) for i in sorted(quantization)]
        subsampling = JpegImagePlugin.get_sampling(image)
    # Grey or unusual samplings are written as 4:2:0, the commonest.
    return Tables((values * 2)[:2], subsampling if subsampling in (0, 1, 2) else 2)


def _cut(rgb: Rgb) -> Rgb:
    top, left = (max(0, (side - SIDE_PX) // 2 // 16 * 16) for side in rgb.shape[:2])
    return rgb[top : top + SIDE_PX, left : left + SIDE_PX]
