"""The views of a step computed on the device: the loader delivers square windows of images, the rest is drawn on the CPU and
computed in batches (recipe: `augment_on = "device"`).

As `train.views`, with these differences, all alike for both classes: images are first cut (or enlarged) to a 256 px square; what
`platform` re-encodes as WebP is a JPEG here; RandomResizedCrop samples bicubically without antialiasing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from train.augment import OPERATIONS as CPU_OPERATIONS
from train.augment import PLATFORM_SCALE_SHARES, PLATFORM_SCALES
from train.device_operations import applied, cropped, resized, seeded, to_bytes
from train.recipe import Phase, Recipe
from train.views import CROP_PX, GRID, PATCH_PX, VIEWS, Batch, bases, kept_places

if TYPE_CHECKING:
    from train.sources import Source

WINDOW_PX = 256
Program = list[tuple[str, float]]


def images_at(source: Source, recipe: Recipe, step: int, rank: int = 0) -> Batch:
    """What the loader delivers: patches uint8[2 x records, 3, 256, 256], reals first; index int64[2 x records], seeds' slots."""
    phase, _ = recipe.phase_at(step)
    slots = source.slots(recipe, step, rank)
    images = np.empty((2, phase.records, 3, WINDOW_PX, WINDOW_PX), np.uint8)
    seeds = np.empty((2, phase.records), np.int64)
    for slot, side, shared, base in bases(source, slots.pairs, recipe, step, rank):
        rng = np.random.default_rng((recipe.seed, rank, step, shared, 8))
        images[side, slot] = _window(base, rng).transpose(2, 0, 1)
        seeds[side, slot] = shared
    flat = images.reshape(-1, 3, WINDOW_PX, WINDOW_PX)
    return Batch(torch.from_numpy(flat), torch.from_numpy(seeds.reshape(-1)), phase.records, step, slots.skipped)


def _window(image: Image.Image, rng: np.random.Generator) -> NDArray[np.uint8]:
    if min(image.size) < WINDOW_PX:
        factor = WINDOW_PX / min(image.size)
        size = (max(WINDOW_PX, round(image.width * factor)), max(WINDOW_PX, round(image.height * factor)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (int(rng.integers(side - WINDOW_PX + 1)) for side in image.size)
    return np.asarray(image.crop((left, top, left + WINDOW_PX, top + WINDOW_PX)))


def views_of(images: Tensor, seeds: Tensor, recipe: Recipe, step: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    """uint8[2 x records, 3, 256, 256], seeds' slots -> patches uint8[n, k, 3, 16, 16], index int64[n, k], in a batch's order.

    Every draw depends on (seed, rank, step, slot, view), never on the device.
    """
    phase, progress = recipe.phase_at(step)
    strength = phase.strength_from + (phase.strength_to - phase.strength_from) * progress
    crops, places = [], []
    for v, view in enumerate(VIEWS):
        rngs = [np.random.default_rng((recipe.seed, rank, step, int(slot), v)) for slot in seeds.tolist()]
        make = _paper if phase.geometry == "paper" else _native
        make = _paper if phase.geometry == "paper" else _native
        crops.append(make(images, view, phase, strength, rngs))
        kept = view if phase.geometry == "native" else "whole"
        places.append(np.stack([kept_places(kept, phase.tokens, rng) for rng in rngs]))
    index = torch.from_numpy(np.concatenate(places)).to(images.device)
    whole = torch.cat(crops)
    patches = (
        whole.view(-1, 3, GRID, PATCH_PX, GRID, PATCH_PX)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(-1, GRID * GRID, 3, PATCH_PX, PATCH_PX)
    )
    return patches[torch.arange(len(patches), device=images.device)[:, None], index], index


def _native(images: Tensor, view: str, phase: Phase, strength: float, rngs: list[np.random.Generator]) -> Tensor:
    programs: list[Program] = [[] if view == "plain" else PROGRAMS[phase.preset](rng, strength) for rng in rngs]
    changed = applied(list(images), programs)
    spots = [(float(rng.random()), float(rng.random())) for rng in rngs]
    return torch.stack([cropped(image, CROP_PX, spot) for image, spot in zip(changed, spots, strict=True)])


def _paper(images: Tensor, view: str, phase: Phase, strength: float, rngs: list[np.random.Generator]) -> Tensor:
    if view == "plain":
        return _fitted(list(images), 248, CROP_PX)
    if view == "augmented":
        return _fitted(applied(list(images), [PROGRAMS[phase.preset](rng, strength) for rng in rngs]), 248, CROP_PX)
    scale = (0.4, 1.0) if view == "whole" else (0.05, 0.4)
    cut = _resized_crops(images, [_box(scale, rng) for rng in rngs])
    return _fitted(applied(list(cut), [PROGRAMS[phase.preset](rng, strength) for rng in rngs]), None, CROP_PX)


def _fitted(images: list[Tensor], shorter: int | None, side: int) -> Tensor:
    """uint8[n, 3, side, side]: shorter side to `shorter` px and the middle cut out; None: resized to the square."""
    out = torch.empty((len(images), 3, side, side), dtype=torch.uint8, device=images[0].device)
    groups: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(image.shape, []).append(i)
    for shape, members in groups.items():
        x = torch.stack([images[i] for i in members]).float() / 255
        height, width = shape[-2:]
        if shorter is None:
            x = x if (height, width) == (side, side) else resized(x, side, side)
        else:
            scale = shorter / min(height, width)
            x = resized(x, max(side, round(height * scale)), max(side, round(width * scale)))
        top, left = (x.shape[-2] - side) // 2, (x.shape[-1] - side) // 2
        out[members] = to_bytes(x[..., top : top + side, left : left + side])
    return out


def _box(scale: tuple[float, float], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """RandomResizedCrop's window of a 256 px square: left, top, right, bottom, inclusive."""
    for _ in range(10):
        target = WINDOW_PX**2 * float(rng.uniform(*scale))
        ratio = float(np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3))))
        width, height = round((target * ratio) ** 0.5), round((target / ratio) ** 0.5)
        if 0 < width <= WINDOW_PX and 0 < height <= WINDOW_PX:
            left, top = int(rng.integers(WINDOW_PX - width + 1)), int(rng.integers(WINDOW_PX - height + 1))
            return left, top, left + width - 1, top + height - 1
    return 0, 0, WINDOW_PX - 1, WINDOW_PX - 1


def _resized_crops(images: Tensor, boxes: list[tuple[int, int, int, int]]) -> Tensor:
    from kornia.geometry.transform import crop_and_resize

    corners = [[(left, top), (right, top), (right, bottom), (left, bottom)] for left, top, right, bottom in boxes]
    where = torch.tensor(corners, dtype=torch.float32, device=images.device)
    cut: Tensor = crop_and_resize(images.float() / 255, where, (CROP_PX, CROP_PX), mode="bicubic", align_corners=True)
    return to_bytes(cut)


_SIDES_PX = (64, 176, 288, 400, 512)
_ENHANCEMENTS = (0.5, 0.75, 1.0, 1.25, 1.5)


def _value(name: str, rng: np.random.Generator) -> float:
    """One operation's parameter, drawn as `train.augment` draws it."""
    if name in _UNIFORM:
        return float(rng.uniform(*_UNIFORM[name]))
    if name in _CHOICES:
        value = float(_CHOICES[name][int(rng.integers(len(_CHOICES[name])))])
        if name == "shuffle_pixels":
            return seeded(rng, value, 2)
        # The spot of a crop rides in the fraction: see `device_operations`.
        return value + int(rng.integers(4096)) / 4096 if name == "random_crop" else value
    return 0.0


_UNIFORM = {
    "blur": (0.1, 2.0),
    "brightness": (0.5, 2.0),
    "aspect_ratio": (0.75, 2.0),
    "pixelise": (0.3, 1.0),
    "rotate": (90.0, 270.0),
}
_CHOICES: dict[str, tuple[float, ...]] = {
    "contrast": _ENHANCEMENTS,
    "saturation": _ENHANCEMENTS,
    "jpeg": (40, 55, 70, 85, 100),
    "opacity": (0.2, 0.4, 0.6, 0.8, 1.0),
    "stripes": (0.05, 0.125, 0.2, 0.275, 0.35),
    "pad": (0.01, 0.07, 0.13, 0.19, 0.25),
    "resize_square": _SIDES_PX,
    "random_crop": _SIDES_PX,
    "scale": _ENHANCEMENTS,
    "sharpen": (1.2, 1.4, 1.6, 1.8, 2.0),
    "shuffle_pixels": (0.0, 0.0875, 0.175, 0.2625, 0.35),
    "skew": (-1.0, -0.5, 0.0, 0.5, 1.0),
}


def code_program(rng: np.random.Generator, strength: float) -> Program:
    """`train.augment.code` as a list: 0, 1 or 2 distinct operations of nineteen, in list order."""
    if rng.random() >= strength:
        return []
    chosen = rng.choice(len(CPU_OPERATIONS), size=int(rng.integers(3)), replace=False)
    names = [CPU_OPERATIONS[i][0] for i in sorted(chosen)]
    return [(name, _value(name, rng)) for name in names]


def platform_program(rng: np.random.Generator, strength: float) -> Program:
    """`train.augment.platform` as a list: mild colour, a resize, blur or noise, a screenshot, one to three re-encodings."""
    program: Program = []
    if rng.random() < 0.2 * strength:
        program += [(name, float(rng.uniform(0.85, 1.15))) for name in ("brightness", "contrast", "saturation")]
    if rng.random() < 0.5 * strength:
        # Whole steps of 1/32, so that images meet in groups of one size.
        low, high = PLATFORM_SCALES[int(rng.choice(len(PLATFORM_SCALES), p=PLATFORM_SCALE_SHARES))]
        factor = round(float(rng.uniform(low, high)) * 32) / 32
        if factor > 1.2:
            side = round(WINDOW_PX / factor * 1.1)
            program.append(("random_crop", side + int(rng.integers(4096)) / 4096))
        program.append(("rescale", factor))
    if rng.random() < 0.15 * strength:
        blurred = rng.random() < 0.5
        program.append(
            ("blur", float(rng.uniform(0.3, 1.2))) if blurred else ("noise", seeded(rng, float(rng.uniform(1.0, 6.0)), 16))
        )
    if rng.random() < 0.1 * strength:
        program.append(("rescale", round(float(rng.uniform(0.9, 1.1)) * 32) / 32))
    if rng.random() < 0.75 * strength:
        for _ in range(1 + int(rng.choice(3, p=(0.6, 0.3, 0.1)))):
            if rng.random() < 0.5:
                program.append(("shift", float(rng.integers(64))))
            program.append(("jpeg", float(rng.integers(50, 97))))
    return program


PROGRAMS = {"code": code_program, "platform": platform_program}
