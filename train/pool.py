"""The pool: augmented crops made once and read many times, for machines whose processor must both augment and train.

A step of a small encoder on a few patches costs less than the JPEG round trips of its views. The pool holds `copies` crops of
each image of the store: the first as the image was delivered, the others after the preset `platform` at full strength. Steps then
differ in which copies and patches they take. An aligned fake's crops share every draw with its real's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.augment import PRESETS
from train.data import DataError
from train.store import PixelStore, Rgb

FORMAT = "code-pool/1"
SEED = 5
"""A pool has a seed of its own, so that recipes can share it."""


def shape(store: PixelStore, copies: int) -> tuple[int, int, int, int, int]:
    """Of the pool's pixels: uint8[items, copies, 224, 224, 3]."""
    from train.views import CROP_PX

    return len(store.items), copies, CROP_PX, CROP_PX, 3


def crop_of(store: PixelStore, number: int, copy: int) -> Rgb:
    """uint8[224, 224, 3]: one copy of one item; copy 0 is not augmented."""
    from train.views import base_image, random_crop

    item = store.items[number]
    rng = np.random.default_rng((SEED, 41, item.pair if item.pair >= 0 else number, copy))
    image = base_image(store, item, rng)
    return random_crop(PRESETS["platform"](image, rng, 1.0) if copy else image, rng)


def build(store_folder: Path, folder: Path, copies: int, on_image: Callable[[int], None] | None = None) -> None:
    """Makes the pool in `folder`, or does nothing where it is there already; an unfinished one is begun anew."""
    store = PixelStore(store_folder)
    wanted = _facts(store, copies)
    if _held(folder) == wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pool.json").unlink(missing_ok=True)
    pixels = np.memmap(folder / "pool.bin", np.uint8, "w+", shape=shape(store, copies))
    for number in range(len(store.items)):
        for copy in range(copies):
            pixels[number, copy] = crop_of(store, number, copy)
        if on_image is not None:
            on_image(number + 1)
    pixels.flush()
    partial = folder / "pool.json.partial"
    partial.write_text(json.dumps(wanted), encoding="utf-8")
    partial.replace(folder / "pool.json")


def opened(store: PixelStore, folder: Path, copies: int | None = None) -> NDArray[np.uint8]:
    """The pool's pixels, memory-mapped. copies: how many it must hold of each image; None: as many as it does.

    Raises DataError where `folder` holds no such pool of this store.
    """
    held = _held(folder)
    found = int(str(held["copies"])) if held is not None and copies is None else copies or 0
    if held is None or held != _facts(store, found):
        what = f"{found} copies of this store" if found else "this store"
        raise DataError(f"{folder / 'pool.json'}: no pool of {what}; `train pretrain` makes it by a recipe's pool_copies")
    return np.memmap(folder / "pool.bin", np.uint8, "r", shape=shape(store, found))


class Joined:
    """Pools as one: items of the first, then those of the next."""

    def __init__(self, parts: Sequence[NDArray[np.uint8]]) -> None:
        self._parts = list(parts)

    def __getitem__(self, number: int) -> NDArray[np.uint8]:
        """uint8[copies, 224, 224, 3] of an item."""
        for part in self._parts:
            if number < len(part):
                crops: NDArray[np.uint8] = part[number]
                return crops
            number -= len(part)
        raise IndexError(number)


Crops = NDArray[np.uint8] | Joined
"""What a step's crops are taken from: [item] -> uint8[copies, 224, 224, 3]."""


def _facts(store: PixelStore, copies: int) -> dict[str, object]:
    return {"format": FORMAT, "store": store.digest, "copies": copies, "seed": SEED}


def _held(folder: Path) -> dict[str, object] | None:
    path = folder / "pool.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
