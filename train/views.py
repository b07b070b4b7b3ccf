"""From a step's images to its batch: four views of as many real as fake images, as uint8 patches.

A batch depends on (seed, rank, step) alone, so a run resumes at any step with the very batches it would have had.
"""

from __future__ import annotations

import dataclasses
import signal
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from train.augment import PRESETS, jpeg, jpeg_tables
from train.data import DataError
from train.recipe import Phase, Recipe
from train.sources import Picture, Slots, Source, open_source
from train.store import Item, PixelStore, Rgb, Tables

if TYPE_CHECKING:
    import torch

    from train.pool import Crops

CROP_PX = 224
PATCH_PX = 16
GRID = CROP_PX // PATCH_PX
VIEWS = ("plain", "augmented", "whole", "local")
FIRST_QUALITIES = (75, 98)
"""First compressions, from and below, where no photograph lends its tables."""
_BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True, slots=True)
class Batch:
    """patches: uint8[n, k, 3, 16, 16]; index: int64[n, k] places in the 14x14 grid; n = 4 views x 2 classes x records, in that
    order with real first, so that a result reshapes to [4, 2, records]. skipped: damaged members met, with reasons.

    Where the device augments, patches are images, uint8[2 x records, 3, s, s], and index their slots: `train.device_views`.
    """

    patches: torch.Tensor
    index: torch.Tensor
    records: int
    step: int
    skipped: tuple[tuple[str, str], ...] = ()

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU overlap with its work."""
        return dataclasses.replace(self, patches=self.patches.pin_memory(), index=self.index.pin_memory())


class Sampler:
    """Draws the images of a step, balanced over sources, with aligned fakes beside their own reals."""

    def __init__(self, store: PixelStore, balance: float, pool: Crops | None = None) -> None:
        self.store, self.pool = store, pool
        partners = {item.pair: i for i, item in enumerate(store.items) if item.pair >= 0}
        self._partner = partners
        items = list(enumerate(store.items))
        self._sides = [i for i, item in items if not item.label], [i for i, item in items if item.label and item.pair < 0]
        self._reals: Draws = Balanced(self._sides[0], store, balance)
        self._paired = Balanced(sorted(partners), store, balance) if partners else None
        self._fakes: Draws = Balanced(self._sides[1], store, balance)

    def sides(self) -> tuple[list[int], list[int]]:
        """Indices of all reals and of all fakes that are not aligned ones."""
        return self._sides

    @property
    def tables(self) -> Sequence[Tables]:
        return self.store.tables

    @property
    def digest(self) -> str:
        return self.store.digest

    def slots(self, recipe: Recipe, step: int, rank: int) -> Slots:
        """The images of a step, balanced over sources; aligned fakes beside their own reals come first."""
        phase, _ = recipe.phase_at(step)
        reals, fakes = self.draw(phase, np.random.default_rng((recipe.seed, rank, step)))
        return Slots([(self._picture(real), self._picture(fake)) for real, fake in zip(reals, fakes, strict=True)])

    def random_pixels(self, label: int, rng: np.random.Generator) -> Rgb:
        """uint8[h, w, 3] of a random image; of a fake, not an aligned one."""
        side = self.sides()[label]
        return self.store.pixels(self.store.items[side[int(rng.integers(len(side)))]])

    def _picture(self, number: int) -> Picture:
        item = self.store.items[number]
        return Picture(Image.fromarray(self.store.pixels(item)), item.lossless, item.pair >= 0)

    def draw(self, phase: Phase, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Indices of `records` reals and as many fakes; the first `aligned` share of the fakes are those of the same reals."""
        aligned = round(phase.aligned * phase.records) if self._paired is not None else 0
        paired = self._paired.draw(aligned, rng) if self._paired is not None and aligned else []
        reals = paired + self._reals.draw(phase.records - aligned, rng)
        fakes = [self._partner[i] for i in paired] + self._fakes.draw(phase.records - aligned, rng)
        return reals, fakes


class Draws(Protocol):
    """Draws of one class."""

    def draw(self, n: int, rng: np.random.Generator) -> list[int]:
        """Indices of n items."""


class Balanced(Draws):
    """Draws items so that a source (with its generator) counts with its size to the power `balance`: 0 evens them out."""

    def __init__(self, indices: list[int], store: PixelStore, balance: float) -> None:
        if not indices:
            raise DataError("the data set has no images of one class, real or fake, to draw from")
        by_source: dict[tuple[str, str], list[int]] = defaultdict(list)
        for i in indices:
            by_source[(store.items[i].source, store.items[i].generator)].append(i)
        self._sources = [by_source[key] for key in sorted(by_source)]
        weights = np.array([len(members) ** balance for members in self._sources])
        self._weights = weights / weights.sum()

    def draw(self, n: int, rng: np.random.Generator) -> list[int]:
        chosen = rng.choice(len(self._sources), size=n, p=self._weights)
        return [self._sources[s][int(rng.integers(len(self._sources[s])))] for s in chosen]


def batch_at(source: Source, recipe: Recipe, step: int, rank: int = 0) -> Batch:
    """The batch of one step. An aligned fake shares every draw of its views with its real: crop, operations and kept patches."""
    phase, progress = recipe.phase_at(step)
    strength = phase.strength_from + (phase.strength_to - phase.strength_from) * progress
    if isinstance(source, Sampler) and source.pool is not None:
        return _pooled_batch(source, source.pool, recipe, step, rank)
    slots = source.slots(recipe, step, rank)
    patches = np.empty((len(VIEWS), 2, phase.records, phase.tokens, 3, PATCH_PX, PATCH_PX), np.uint8)
    index = np.empty((len(VIEWS), 2, phase.records, phase.tokens), np.int64)
    for slot, side, shared, base in bases(source, slots.pairs, recipe, step, rank):
        for v, view in enumerate(VIEWS):
            rng = np.random.default_rng((recipe.seed, rank, step, shared, v))
            crop = _VIEW_OF[phase.geometry](base, view, phase, strength, rng)
            places = kept_places(view if phase.geometry == "native" else "whole", phase.tokens, rng)
            index[v, side, slot] = places
            patches[v, side, slot] = patchified(crop)[places]
    return _batch(patches, index, step, slots.skipped)


def _batch(patches: Rgb, index: NDArray[np.int64], step: int, skipped: tuple[tuple[str, str], ...] = ()) -> Batch:
    import torch

    records, tokens = index.shape[2:]
    n = len(VIEWS) * 2 * records
    flat = patches.reshape(n, tokens, 3, PATCH_PX, PATCH_PX)
    return Batch(torch.from_numpy(flat), torch.from_numpy(index.reshape(n, tokens)), records, step, skipped)


def _pooled_batch(source: Sampler, pool: Crops, recipe: Recipe, step: int, rank: int) -> Batch:
    """As `batch_at`, from crops that were augmented beforehand: uint8[items, copies, 224, 224, 3]."""
    phase, _ = recipe.phase_at(step)
    drawn = source.draw(phase, np.random.default_rng((recipe.seed, rank, step)))
    patches = np.empty((len(VIEWS), 2, phase.records, phase.tokens, 3, PATCH_PX, PATCH_PX), np.uint8)
    index = np.empty((len(VIEWS), 2, phase.records, phase.tokens), np.int64)
    for side, chosen in enumerate(drawn):
        for slot, number in enumerate(chosen):
            shared = slot if side == 0 or source.store.items[number].pair >= 0 else phase.records + slot
            seed, copies = (recipe.seed, rank, step, shared), pool[number]
            order = np.random.default_rng((*seed, 9)).permutation(len(copies))  # different copies as far as they go
            for v, view in enumerate(VIEWS):
                places = kept_places(view, phase.tokens, np.random.default_rng((*seed, v)))
                index[v, side, slot] = places
                grid = copies[order[v % len(order)]].reshape(GRID, PATCH_PX, GRID, PATCH_PX, 3)
                patches[v, side, slot] = grid[places // GRID, :, places % GRID].transpose(0, 3, 1, 2)
    return _batch(patches, index, step)


def bases(
    source: Source, pairs: list[tuple[Picture, Picture]], recipe: Recipe, step: int, rank: int
) -> Iterator[tuple[int, int, int, Image.Image]]:
    """Every image of a step as (slot, side, seed's slot, image), delivered as a camera or a site would have, classes aligned."""
    for slot, pair in enumerate(pairs):
        aligned = same_size(pair, recipe.align_sizes)
        for side, picture in enumerate(aligned):
            # The seed's slot is the pair's, so that a real and its aligned fake draw alike.
            shared = slot if side == 0 or picture.aligned else len(pairs) + slot
            rng = np.random.default_rng((recipe.seed, rank, step, shared, 9))
            yield slot, side, shared, delivered(picture, source.tables, recipe.align_formats, rng)


def patchified(crop: Rgb) -> Rgb:
    """uint8[224, 224, 3] -> uint8[196, 3, 16, 16], row by row."""
    grid = crop.reshape(GRID, PATCH_PX, GRID, PATCH_PX, 3).transpose(0, 2, 4, 1, 3)
    return grid.reshape(GRID * GRID, 3, PATCH_PX, PATCH_PX)


def base_image(store: PixelStore, item: Item, rng: np.random.Generator) -> Image.Image:
    """An image of a store as a camera or a site would have delivered it: see `delivered`, lossless ones compressed."""
    return delivered(Picture(Image.fromarray(store.pixels(item)), item.lossless), store.tables, "lossless", rng)


def delivered(picture: Picture, tables: Sequence[Tables], formats: str, rng: np.random.Generator) -> Image.Image:
    """The picture after its first compression, mirrored or not. formats: `align_formats` of the recipe."""
    mirror, drawn = rng.random() < 0.5, int(rng.integers(max(1, len(tables))))
    image = picture.image
    if formats == "jpeg" or (formats == "lossless" and picture.lossless):
        if tables:
            image = jpeg_tables(image, tables[drawn].values, tables[drawn].subsampling)
        elif formats == "jpeg":
            image = jpeg(image, int(rng.integers(*FIRST_QUALITIES)))
    return ImageOps.mirror(image) if mirror else image


def same_size(pair: tuple[Picture, Picture], how: str) -> tuple[Picture, Picture]:
    """A slot's two pictures at one size, the smaller extent each way. `crop` keeps the middle and a JPEG's grid."""
    width, height = (min(pair[0].image.size[axis], pair[1].image.size[axis]) for axis in (0, 1))
    if how == "none" or pair[0].image.size == pair[1].image.size:
        return pair
    real, fake = (dataclasses.replace(p, image=_fitted(p.image, width, height, how)) for p in pair)
    return real, fake


def _fitted(image: Image.Image, width: int, height: int, how: str) -> Image.Image:
    if image.size == (width, height):
        return image
    if how == "resize":
        return ImageOps.fit(image, (width, height), _BICUBIC)
    left, top = ((extent - kept) // 2 // PATCH_PX * PATCH_PX for extent, kept in zip(image.size, (width, height), strict=True))
    return image.crop((left, top, left + width, top + height))


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


def kept_places(view: str, tokens: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Which patches a view keeps: scattered ones, or for the local view a block of neighbours."""
    if tokens == GRID * GRID:
        return np.arange(tokens)
    if view == "local":
        side = int(np.ceil(tokens**0.5))
        top, left = (int(v) for v in rng.integers(GRID - side + 1, size=2))
        block = (np.arange(top, top + side)[:, None] * GRID + np.arange(left, left + side)).reshape(-1)
        return block[:tokens]
    return np.sort(rng.choice(GRID * GRID, size=tokens, replace=False))


class _Steps:
    """Step number -> batch: a map-style data set. Forked processes share the opened source; spawned ones open their own."""

    def __init__(self, folder: Path, recipe: Recipe, rank: int, world_size: int) -> None:
        self._given = (folder, recipe, rank, world_size)
        self._source = open_source(folder, recipe, world_size)

    def __getstate__(self) -> tuple[Path, Recipe, int, int]:
        return self._given

    def __setstate__(self, given: tuple[Path, Recipe, int, int]) -> None:
        self.__init__(*given)  # type: ignore[misc]

    def __len__(self) -> int:
        return self._given[1].steps

    def __getitem__(self, step: int) -> Batch | DataError:
        try:
            return self._batch(step)
        except DataError as exc:
            # Raised in a loader process it would arrive with a traceback for a message.
            return exc

    def _batch(self, step: int) -> Batch:
        _, recipe, rank, _ = self._given
        if recipe.augment_on == "device":
            from train.device_views import images_at

            return images_at(self._source, recipe, step, rank)
        return batch_at(self._source, recipe, step, rank)


def _worker_signals(_worker: int) -> None:
    # Ctrl-C and torchrun's SIGTERM reach the whole process group; the trainer finishes its step, for which it needs its loaders.
    # They end when it tells them to, or within seconds of its death.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def loader(
    folder: Path, recipe: Recipe, first_step: int, rank: int = 0, workers: int = 1, world_size: int = 1, pin: bool = False
) -> Iterator[Batch]:
    """Batches from `first_step` to the recipe's end, made in `workers` processes (0: in this one), always in step order.

    The same batches whatever `workers` is. `pin` puts them into page-locked memory. Raises DataError.
    """
    from torch.utils.data import DataLoader

    batches: DataLoader[Batch | DataError] = DataLoader(
        _Steps(folder, recipe, rank, world_size),  # type: ignore[arg-type]
        batch_size=None,
        sampler=range(first_step, recipe.steps),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_worker_signals if workers else None,
        pin_memory=pin,
    )
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch
