"""The pixel store: pixels as decoded, grids cut, aligned fakes with their real's own compression."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.train.pictures import corpus, picture
from train.augment import jpeg_tables
from train.data import DataError, read_manifest
from train.store import SIDE_PX, PixelStore, build


def test_pixels_are_those_of_the_files(tmp_path: Path) -> None:
    entries = read_manifest(corpus(tmp_path / "in"), "train")
    store, damage = build(entries, tmp_path / "store")
    assert not damage.skipped and len(store.items) == 12
    for entry, item in zip(entries, store.items, strict=True):
        assert np.array_equal(store.pixels(item), np.asarray(Image.open(entry.path).convert("RGB")))
        assert item.lossless == (entry.path.suffix == ".png") and item.label == entry.label
        assert item.name == hashlib.sha256(entry.path.read_bytes()).hexdigest()[:16]
    assert len(store.tables) == 6


def test_aligned_fakes_get_their_reals_quantisation(tmp_path: Path) -> None:
    entries = read_manifest(corpus(tmp_path / "in"), "train")
    store, _ = build(entries, tmp_path / "store", lambda rgb: 255 - rgb)
    pairs = [item for item in store.items if item.pair >= 0]
    assert len(pairs) == 6 and all(item.label == 1 and not item.lossless for item in pairs)
    fake = pairs[2]
    real = store.items[fake.pair]
    assert fake.name == f"{real.name}+aligned"
    assert real.label == 0 and real.tables == fake.tables
    tables = store.tables[fake.tables]
    expected = jpeg_tables(Image.fromarray(255 - store.pixels(real)), tables.values, tables.subsampling)
    assert np.array_equal(store.pixels(fake), np.asarray(expected))


def test_grids_become_quarters_and_large_images_are_cut_on_the_jpeg_grid(tmp_path: Path) -> None:
    entries = read_manifest(corpus(tmp_path / "in", reals=1, fakes=1), "train")
    grid, large = entries[1], entries[0]
    picture(1, 480, 480).save(grid.path)
    picture(2, 500, 400).save(large.path, quality=90)
    store, _ = build([large, dataclasses.replace(grid, layout="grid2x2")], tmp_path / "store")
    whole = np.asarray(Image.open(grid.path).convert("RGB"))
    assert len(store.items) == 5 and [item.name[16:] for item in store.items] == ["", "#0", "#1", "#2", "#3"]
    assert np.array_equal(store.pixels(store.items[2]), whole[:240, 240:])
    decoded = np.asarray(Image.open(large.path).convert("RGB"))
    assert np.array_equal(store.pixels(store.items[0]), decoded[80 : 80 + SIDE_PX, 32 : 32 + SIDE_PX])


def test_damaged_files_are_skipped_and_named_and_a_store_is_built_once(tmp_path: Path) -> None:
    entries = read_manifest(corpus(tmp_path / "in"), "train")
    entries[0].path.write_bytes(b"not an image")
    entries[7].path.write_bytes(entries[7].path.read_bytes()[:200])
    store, damage = build(entries, tmp_path / "store")
    assert sorted(Path(name).name for name, _ in damage.skipped) == sorted([entries[0].path.name, entries[7].path.name])
    assert len(store.items) == 10
    before = (tmp_path / "store" / "pixels.bin").stat().st_mtime_ns
    build(entries, tmp_path / "store")
    assert (tmp_path / "store" / "pixels.bin").stat().st_mtime_ns == before
    build(entries[2:], tmp_path / "store")
    assert len(PixelStore(tmp_path / "store").items) == 9


def test_a_folder_without_a_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"index\.json: no such file"):
        PixelStore(tmp_path)
