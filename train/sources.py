"""What a step's images come from, seen alike by the views: a pixel store, labelled images beside one, or shards as they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from train.recipe import Recipe
from train.store import PixelStore, Rgb, Tables

STORE_INDEX, SHARD_INDEX, MIXTURE = "index.json", "shards.npz", "mixture.json"


@dataclass(frozen=True, slots=True)
class Picture:
    """One drawn image, RGB. `lossless`: its pixels carry no JPEG or WebP quantisation. `aligned`: a fake made from the real image
    of its slot, which shares that image's draws."""

    image: Image.Image
    lossless: bool
    aligned: bool = False


@dataclass(frozen=True, slots=True)
class Slots:
    """A step's images: `pairs[i]` is the real and the fake of slot i; `skipped` names the damaged members met, with reasons."""

    pairs: list[tuple[Picture, Picture]]
    skipped: tuple[tuple[str, str], ...] = ()


class Source(Protocol):
    """Draws a step's images: a function of (seed, rank, step) and the data alone, so that any step can be had again."""

    @property
    def tables(self) -> Sequence[Tables]:
        """Quantisation tables of the set's photographs: first compressions for what is lossless."""

    @property
    def digest(self) -> str:
        """Names the data: a checkpoint belongs to it."""

    def slots(self, recipe: Recipe, step: int, rank: int) -> Slots:
        """The step's `records` pairs of the recipe's phase, aligned ones first."""

    def random_pixels(self, label: int, rng: np.random.Generator) -> Rgb:
        """uint8[h, w, 3] of some image of a class (no aligned fake), for statistics of the data."""


def open_source(folder: Path, recipe: Recipe, world_size: int = 1) -> Source:
    """The source that lies in a folder: a pixel store, a mixture of two, or an index of shards. Raises DataError."""
    if (folder / SHARD_INDEX).exists():
        from train.shard_source import ShardSource

        return ShardSource(folder / SHARD_INDEX, recipe, world_size)
    if (folder / MIXTURE).exists():
        from train import mixture

        return mixture.opened(folder, recipe)
    from train import pool
    from train.views import Sampler

    store = PixelStore(folder)
    crops = pool.opened(store, folder / "pool", recipe.pool_copies) if recipe.pool_copies else None
    return Sampler(store, recipe.source_balance, crops)
