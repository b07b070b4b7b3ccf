"""A step's images straight from shards: of a record only its real image and one of its fakes are read and decoded.

A damaged member is skipped with its slot's record, another record takes the place, and the batch names it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from engine.images import ImageError, Limits, read
from train.data import DataError
from train.lanes import Records, Stream, dealt, lanes_for, position
from train.recipe import Recipe
from train.shard_index import ShardIndex, read_member
from train.sources import Picture, Slots
from train.store import Rgb, Tables

LIMITS = Limits(max_pixels=64_000_000, max_frames=1)
ATTEMPTS = 20
WHOLE_SHARE = 0.99
WINDOW_PX = 512
"""Of a larger picture the native geometry sees a window, at a multiple of 16 px so that a JPEG's grid stays."""
POOL = 128
"""Images of each class that stand for all in statistics of the data."""


class ShardSource:
    """The part of the shards that one rank reads; `recipe` gives seed and lanes."""

    def __init__(self, path: Path, recipe: Recipe, world_size: int = 1) -> None:
        self.index = ShardIndex(path)
        self._world_size, self._seed = world_size, recipe.seed
        real, fake = self.index.has("real"), np.zeros(len(self.index), np.bool_)
        for role in self.index.fake_roles:
            fake |= self.index.has(role)
        self._aligned = np.flatnonzero(self.index.has("aligned") & real)
        # Records that hold both give both, so that content and caption are shared; a few that lost one side are left out.
        self._whole = (real & fake).sum() >= WHOLE_SHARE * max(real.sum(), fake.sum(), 1)
        if self._whole:
            real = fake = real & fake
        self._reals, self._fakes = np.flatnonzero(real), np.flatnonzero(fake)
        self._check(path, recipe, world_size)
        fewest = min(len(part) for part in (self._reals, self._fakes, self._aligned) if len(part))
        self.lanes = lanes_for(fewest, world_size, recipe.lanes)
        self._streams: dict[tuple[str, int, int], Stream] = {}
        self._pool: dict[tuple[int, int], Rgb] = {}

    def _check(self, path: Path, recipe: Recipe, world_size: int) -> None:
        shares = [phase.aligned for phase in recipe.phases]
        if not len(self._reals) or not (len(self._fakes) or min(shares) == 1):
            raise DataError(f"{path}: the shards hold no images of one class, real or fake")
        if max(shares) and not len(self._aligned):
            raise DataError(
                f"{path}: the recipe asks for aligned fakes and the shards hold none; write them with "
                "`train pack --autoencoder`, or set aligned = 0 in its phases"
            )
        for kind, part in (("real", self._reals), ("fake", self._fakes), ("aligned", self._aligned)):
            if 0 < len(part) < world_size:
                raise DataError(f"{path}: {len(part)} {kind} images are too few for {world_size} processes")

    @property
    def tables(self) -> list[Tables]:
        return self.index.tables

    @property
    def digest(self) -> str:
        return self.index.digest

    def slots(self, recipe: Recipe, step: int, rank: int) -> Slots:
        """Slot i of a step holds the lane's next record; the phase's `aligned` share are records with an aligned fake."""
        phase, _ = recipe.phase_at(step)
        lane, first = position(recipe, step, self.lanes)
        aligned = round(phase.aligned * phase.records)
        skipped: list[tuple[str, str]] = []
        pairs = [
            self._pair(recipe, (rank, lane, step), slot, first + slot, slot < aligned, skipped) for slot in range(phase.records)
        ]
        return Slots(pairs, tuple(skipped))

    def _pair(
        self, recipe: Recipe, where: tuple[int, int, int], slot: int, place: int, aligned: bool, skipped: list[tuple[str, str]]
    ) -> tuple[Picture, Picture]:
        rank, lane, step = where
        for attempt in range(ATTEMPTS):
            rng = np.random.default_rng((recipe.seed, rank, step, slot, 11, attempt))
            real, fake = self._records(rank, lane, place, aligned, rng, again=attempt > 0)
            if aligned:
                role = "aligned"
            else:
                held = [role for role in self.index.fake_roles if self.index.member(fake, role).size]
                role = held[int(rng.integers(len(held)))]
            pictures = (self._read(real, "real", skipped), self._read(fake, role, skipped))
            if pictures[0] is not None and pictures[1] is not None:
                if recipe.phase_at(step)[0].geometry == "native":
                    spot = (float(rng.random()), float(rng.random()))
                    return _window(pictures[0], spot), _window(pictures[1], spot)
                return pictures[0], pictures[1]
        raise DataError(f"step {step}: {ATTEMPTS} records in a row are damaged, the last {skipped[-1][0]} ({skipped[-1][1]})")

    def _records(self, rank: int, lane: int, place: int, aligned: bool, rng: np.random.Generator, again: bool) -> tuple[int, int]:
        """(record of the real, record of the fake): one and the same where records hold both."""

        def pick(kind: str) -> int:
            if again:  # in a damaged record's place any other of the whole set
                return int(self._chosen(kind)[int(rng.integers(len(self._chosen(kind))))])
            return self._stream(kind, rank, lane).at(place)

        if aligned:
            record = pick("aligned")
            return record, record
        real = pick("real")
        return real, real if self._whole else pick("fake")

    def _stream(self, kind: str, rank: int, lane: int) -> Stream:
        key = (kind, rank, lane)
        if key not in self._streams:
            blocks = dealt(
                self.index.shard, self._chosen(kind), rank * self.lanes + lane, self._world_size * self.lanes, self._seed
            )
            self._streams[key] = Stream(blocks, (self._seed, rank, lane))
        return self._streams[key]

    def _chosen(self, kind: str) -> Records:
        return {"real": self._reals, "fake": self._fakes, "aligned": self._aligned}[kind]

    def _read(self, record: int, role: str, skipped: list[tuple[str, str]]) -> Picture | None:
        data = read_member(self.index.paths, self.index.member(record, role))
        try:
            decoded = read(data, LIMITS)
        except ImageError as exc:
            skipped.append((self.index.name(record, role), str(exc)))
            return None
        lossless = decoded.format == "PNG" or (decoded.format == "WEBP" and b"VP8L" in data[:64])
        return Picture(Image.fromarray(decoded.frames[0]), lossless, role == "aligned")

    def random_pixels(self, label: int, rng: np.random.Generator) -> Rgb:
        """uint8[h, w, 3] of one of up to 128 images of a class, spread evenly over the records."""
        side = (self._reals, self._fakes if len(self._fakes) else self._aligned)[label]
        number = int(rng.integers(min(POOL, len(side))))
        for shift in range(ATTEMPTS):
            key = (label, (number + shift) % min(POOL, len(side)))
            if key not in self._pool:
                record = int(side[key[1] * len(side) // min(POOL, len(side))])
                held = (role for role in (*self.index.fake_roles, "aligned") if self.index.member(record, role).size)
                role = next(held) if label else "real"
                picture = self._read(record, role, [])
                if picture is None:
                    continue
                self._pool[key] = np.asarray(picture.image)
            return self._pool[key]
        raise DataError(f"{ATTEMPTS} images in a row are damaged")


def _window(picture: Picture, spot: tuple[float, float]) -> Picture:
    left, top = (
        int(share * (max(0, side - WINDOW_PX) // 16 + 1)) * 16 for share, side in zip(spot, picture.image.size, strict=True)
    )
    if picture.image.width <= WINDOW_PX and picture.image.height <= WINDOW_PX:
        return picture
    right, bottom = min(left + WINDOW_PX, picture.image.width), min(top + WINDOW_PX, picture.image.height)
    return dataclasses.replace(picture, image=picture.image.crop((left, top, right, bottom)))
