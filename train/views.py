"""From the pixel store to a step's batch: four views of as many real as fake images, as uint8 patches.

A batch depends on (seed, rank, step) alone, so a run resumes at any step with the very batches it would have had.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from train import pool
from train.augment import PRESETS, jpeg_tables
from train.recipe import Phase, Recipe
from train.store import Item, PixelStore, Rgb

if TYPE_CHECKING:
    import torch

CROP_PX = 224
PATCH_PX = 16
GRID = CROP_PX // PATCH_PX
VIEWS = ("plain", "augmented", "whole", "local")
_BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True, slots=True)
class Batch:
    """patches: uint8[n, k, 3, 16, 16]; index: int64[n, k] places in the 14x14 grid; n = 4 views x 2 classes x records, in that
    order with real first, so that a result reshapes to [4, 2, records]."""

    patches: torch.Tensor
    index: torch.Tensor
    records: int
    step: int


class Sampler:
    """Draws the images of a step, balanced over sources, with aligned fakes beside their own reals."""

    def __init__(self, store: PixelStore, balance: float, pool: NDArray[np.uint8] | None = None) -> None:
        self.store, self.pool = store, pool
        partners = {item.pair: i for i, item in enumerate(store.items) if item.pair >= 0}
        self._partner = partners
        self._reals = _Balanced([i for i, item in enumerate(store.items) if not item.label], store, balance)
        self._paired = _Balanced(sorted(partners), store, balance) if partners else None
        self._fakes = _Balanced([i for i, item in enumerate(store.items) if item.label and item.pair < 0], store, balance)

    def sides(self) -> tuple[list[int], list[int]]:
        """Indices of all reals and of all fakes that are not aligned ones."""
        items = list(enumerate(self.store.items))
        return [i for i, item in items if not item.label], [i for i, item in items if item.label and item.pair < 0]

    def draw(self, phase: Phase, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Indices of `records` reals and as many fakes; the first `aligned` share of the fakes are those of the same reals."""
        aligned = round(phase.aligned * phase.records) if self._paired is not None else 0
        paired = self._paired.draw(aligned, rng) if self._paired is not None and aligned else []
        reals = paired + self._reals.draw(phase.records - aligned, rng)
        fakes = [self._partner[i] for i in paired] + self._fakes.draw(phase.records - aligned, rng)
        return reals, fakes


class _Balanced:
    """Draws items so that a source (with its generator) counts with its size to the power `balance`: 0 evens them out."""

    def __init__(self, indices: list[int], store: PixelStore, balance: float) -> None:
        if not indices:
            raise ValueError("a class has no images to draw from")
        by_source: dict[tuple[str, str], list[int]] = defaultdict(list)
        for i in indices:
            by_source[(store.items[i].source, store.items[i].generator)].append(i)
        self._sources = [by_source[key] for key in sorted(by_source)]
        weights = np.array([len(members) ** balance for members in self._sources])
        self._weights = weights / weights.sum()

    def draw(self, n: int, rng: np.random.Generator) -> list[int]:
        chosen = rng.choice(len(self._sources), size=n, p=self._weights)
        return [self._sources[s][int(rng.integers(len(self._sources[s])))] for s in chosen]


def batch_at(sampler: Sampler, recipe: Recipe, step: int, rank: int = 0) -> Batch:
    """The batch of one step. An aligned fake shares every draw of its views with its real: crop, operations and kept patches."""
    import torch

    phase, progress = recipe.phase_at(step)
    strength = phase.strength_from + (phase.strength_to - phase.strength_from) * progress
    reals, fakes = sampler.draw(phase, np.random.default_rng((recipe.seed, rank, step)))
    patches = np.empty((len(VIEWS), 2, phase.records, phase.tokens, 3, PATCH_PX, PATCH_PX), np.uint8)
    index = np.empty((len(VIEWS), 2, phase.records, phase.tokens), np.int64)
    for side, chosen in enumerate((reals, fakes)):
        for slot, number in enumerate(chosen):
            item = sampler.store.items[number]
            # The seed's slot is the pair's, so that a real and its aligned fake draw alike.
            shared = slot if side == 0 or item.pair >= 0 else phase.records + slot
            if sampler.pool is not None:
                _fill_from_pool(sampler.pool[number], phase.tokens, (recipe.seed, rank, step, shared), patches, index, side, slot)
                continue
            base = base_image(sampler.store, item, np.random.default_rng((recipe.seed, rank, step, shared, 9)))
            for v, view in enumerate(VIEWS):
                rng = np.random.default_rng((recipe.seed, rank, step, shared, v))
                crop = _VIEW_OF[phase.geometry](base, view, phase, strength, rng)
                places = _places(view if phase.geometry == "native" else "whole", phase.tokens, rng)
                index[v, side, slot] = places
                patches[v, side, slot] = patchified(crop)[places]
    n = len(VIEWS) * 2 * phase.records
    return Batch(
        torch.from_numpy(patches.reshape(n, phase.tokens, 3, PATCH_PX, PATCH_PX)),
        torch.from_numpy(index.reshape(n, phase.tokens)),
        phase.records,
        step,
    )


def _fill_from_pool(
    copies: NDArray[np.uint8],
    tokens: int,
    seed: tuple[int, ...],
    patches: NDArray[np.uint8],
    index: NDArray[np.int64],
    side: int,
    slot: int,
) -> None:
    """Four views of one image from its copies uint8[copies, 224, 224, 3] in the pool, different ones as far as they go."""
    order = np.random.default_rng((*seed, 9)).permutation(len(copies))
    for v, view in enumerate(VIEWS):
        places = _places(view, tokens, np.random.default_rng((*seed, v)))
        index[v, side, slot] = places
        grid = copies[order[v % len(order)]].reshape(GRID, PATCH_PX, GRID, PATCH_PX, 3)
        patches[v, side, slot] = grid[places // GRID, :, places % GRID].transpose(0, 3, 1, 2)


def patchified(crop: Rgb) -> Rgb:
    """uint8[224, 224, 3] -> uint8[196, 3, 16, 16], row by row."""
    grid = crop.reshape(GRID, PATCH_PX, GRID, PATCH_PX, 3).transpose(0, 2, 4, 1, 3)
    return grid.reshape(GRID * GRID, 3, PATCH_PX, PATCH_PX)


def base_image(store: PixelStore, item: Item, rng: np.random.Generator) -> Image.Image:
    """An image as a camera or a site would have delivered it: what is lossless gets a photograph's first compression."""
    mirror, drawn = rng.random() < 0.5, int(rng.integers(max(1, len(store.tables))))
    image = Image.fromarray(store.pixels(item))
    if item.lossless and store.tables:
        image = jpeg_tables(image, store.tables[drawn].values, store.tables[drawn].subsampling)
    return ImageOps.mirror(image) if mirror else image


def _native(base: Image.Image, view: str, phase: Phase, strength: float, rng: np.random.Generator) -> Rgb:
    """Crops at native resolution, never resized to fit: what serving does. Augmentation precedes the crop."""
    image = base if view == "plain" else PRESETS[phase.preset](base, rng, strength)
    return random_crop(image, rng)


def _paper(base: Image.Image, view: str, phase: Phase, strength: float, rng: np.random.Generator) -> Rgb:
    """The paper's views: resized plain and augmented ones, RandomResizedCrop for whole (0.4-1) and local (0.05-0.4)."""
    augment = PRESETS[phase.preset]
    if view in ("plain", "augmented"):
        image = base if view == "plain" else augment(base, rng, strength)
        scale = 248 / min(image.size)
        image = image.resize((max(CROP_PX, round(image.width * scale)), max(CROP_PX, round(image.height * scale))), _BICUBIC)
        left, top = (image.width - CROP_PX) // 2, (image.height - CROP_PX) // 2
        return np.asarray(image.crop((left, top, left + CROP_PX, top + CROP_PX)))
    image = augment(_resized_crop(base, (0.4, 1.0) if view == "whole" else (0.05, 0.4), rng), rng, strength)
    return np.asarray(image.resize((CROP_PX, CROP_PX), _BICUBIC))


_VIEW_OF = {"native": _native, "paper": _paper}


def _resized_crop(image: Image.Image, scale: tuple[float, float], rng: np.random.Generator) -> Image.Image:
    area = image.width * image.height
    for _ in range(10):
        target = area * float(rng.uniform(*scale))
        ratio = float(np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3))))
        width, height = round((target * ratio) ** 0.5), round((target / ratio) ** 0.5)
        if 0 < width <= image.width and 0 < height <= image.height:
            left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
            return image.resize((CROP_PX, CROP_PX), _BICUBIC, box=(left, top, left + width, top + height))
    return image.resize((CROP_PX, CROP_PX), _BICUBIC)


def random_crop(image: Image.Image, rng: np.random.Generator) -> Rgb:
    """uint8[224, 224, 3] at a random place; a side that is too short is padded with black, the image in the middle."""
    left = int(rng.integers(max(1, image.width - CROP_PX + 1)))
    top = int(rng.integers(max(1, image.height - CROP_PX + 1)))
    rgb = np.asarray(image.crop((left, top, min(image.width, left + CROP_PX), min(image.height, top + CROP_PX))))
    height, width = rgb.shape[:2]
    if (height, width) == (CROP_PX, CROP_PX):
        return rgb
    out = np.zeros((CROP_PX, CROP_PX, 3), np.uint8)
    top, left = (CROP_PX - height) // 2, (CROP_PX - width) // 2
    out[top : top + height, left : left + width] = rgb
    return out


def _places(view: str, tokens: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Which patches a view keeps: scattered ones, or for the local view a block of neighbours."""
    if tokens == GRID * GRID:
        return np.arange(tokens)
    if view == "local":
        side = int(np.ceil(tokens**0.5))
        top, left = (int(v) for v in rng.integers(GRID - side + 1, size=2))
        block = (np.arange(top, top + side)[:, None] * GRID + np.arange(left, left + side)).reshape(-1)
        return block[:tokens]
    return np.sort(rng.choice(GRID * GRID, size=tokens, replace=False))


def loader(store_folder: Path, recipe: Recipe, first_step: int, rank: int = 0, workers: int = 1) -> Iterator[Batch]:
    """Batches from `first_step` to the recipe's end, made in `workers` processes (0: in this one), always in step order."""
    from torch.utils.data import DataLoader, Dataset

    class Steps(Dataset[Batch]):
        """Step number -> batch; opens the store in the process that uses it."""

        def __init__(self) -> None:
            self._sampler: Sampler | None = None

        def __len__(self) -> int:
            return recipe.steps

        def __getitem__(self, step: int) -> Batch:
            if self._sampler is None:
                store = PixelStore(store_folder)
                crops = pool.opened(store, store_folder / "pool", recipe.pool_copies) if recipe.pool_copies else None
                self._sampler = Sampler(store, recipe.source_balance, crops)
            return batch_at(self._sampler, recipe, step, rank)

    steps = DataLoader(
        Steps(),
        batch_size=None,
        sampler=range(first_step, recipe.steps),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    yield from steps
