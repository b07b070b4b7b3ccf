"""A corpus and labelled images drawn together: shares, weights, pixels, and its digest."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.train import tiny
from tests.train.pictures import corpus
from train import mixture, pool, store
from train.data import DataError, read_manifest
from train.sources import open_source
from train.views import Sampler, batch_at


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A corpus of twelve, and four labelled images of which one real and one fake have weight."""
    known, _ = store.build(read_manifest(corpus(tmp_path / "c"), "train"), tmp_path / "corpus")
    new, _ = store.build(
        read_manifest(corpus(tmp_path / "l", reals=2, fakes=2), "train"), tmp_path / "labelled", lent=known.tables
    )
    assert new.tables[: len(known.tables)] == known.tables
    weights = {new.items[0].name: 2.0, new.items[3].name: 1.0}
    mixture.write(tmp_path / "run", tmp_path / "corpus", tmp_path / "labelled", (0.0, 0.5), weights)
    return tmp_path / "run"


def test_labelled_images_take_their_share_by_weight(folder: Path) -> None:
    source = open_source(folder, tiny.recipe())
    assert isinstance(source, Sampler)
    phase = replace(tiny.recipe().phases[0], records=400, aligned=0.0)
    reals, fakes = source.draw(phase, np.random.default_rng(1))
    labelled = [i for i in fakes if i >= 12]
    assert max(reals) < 12 and len(reals) == len(fakes) == 400
    assert 160 < len(labelled) < 240 and set(labelled) == {15}
    # Pixels are each store's own.
    alone = store.PixelStore(folder.parent / "labelled")
    assert np.array_equal(source.store.pixels(source.store.items[15]), alone.pixels(alone.items[3]))
    assert batch_at(source, tiny.recipe(aligned=0.0), 0).records == 3


def test_with_pools_it_is_drawn_from_both_and_can_be_moved(folder: Path) -> None:
    recipe = tiny.recipe(aligned=0.0, pool_copies=2)
    with pytest.raises(DataError, match="no pool"):
        open_source(folder, recipe)
    for name in ("corpus", "labelled"):
        pool.build(folder.parent / name, folder.parent / name / "pool", 2)
    before = open_source(folder, recipe)
    moved = folder.parent.parent / "moved"
    shutil.copytree(folder.parent, moved)
    after = open_source(moved / "run", recipe)
    assert before.digest == after.digest
    assert all(np.array_equal(batch_at(before, recipe, s).patches, batch_at(after, recipe, s).patches) for s in range(3))


def test_shares_and_weights_are_part_of_the_digest_and_other_formats_are_refused(folder: Path) -> None:
    before = open_source(folder, tiny.recipe()).digest
    other = mixture.write(folder, folder.parent / "corpus", folder.parent / "labelled", (0.0, 0.4), {})
    assert other == open_source(folder, tiny.recipe()).digest != before
    (folder / "mixture.json").write_text("{}")
    with pytest.raises(DataError, match="format"):
        open_source(folder, tiny.recipe())
