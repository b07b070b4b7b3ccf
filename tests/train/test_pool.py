"""The pool: made once, the same by any run, refused for another store; batches take patches from where the index says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.train.pictures import corpus  # noqa: E402
from tests.train.tiny import recipe  # noqa: E402
from train import pool  # noqa: E402
from train.data import DataError, read_manifest  # noqa: E402
from train.embed import from_pool  # noqa: E402
from train.store import PixelStore, build  # noqa: E402
from train.views import Sampler, batch_at, loader, patchified  # noqa: E402

COPIES = 4


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    build(read_manifest(corpus(folder / "in"), "train"), folder / "store", lambda rgb: rgb)
    pool.build(folder / "store", folder / "store" / "pool", COPIES)
    return folder / "store"


def test_a_pool_is_made_once_and_again_the_same(store: Path, tmp_path: Path) -> None:
    before = (store / "pool" / "pool.bin").stat().st_mtime_ns
    pool.build(store, store / "pool", COPIES)
    assert (store / "pool" / "pool.bin").stat().st_mtime_ns == before
    pool.build(store, tmp_path / "again", COPIES)
    assert (tmp_path / "again" / "pool.bin").read_bytes() == (store / "pool" / "pool.bin").read_bytes()


def test_an_unfinished_pool_or_one_of_other_copies_is_refused(store: Path, tmp_path: Path) -> None:
    opened = PixelStore(store)
    with pytest.raises(DataError, match=r"pool\.json: no pool of 4 copies"):
        pool.opened(opened, tmp_path, COPIES)
    with pytest.raises(DataError, match="no pool of 3 copies"):
        pool.opened(opened, store / "pool", 3)
    facts = json.loads((store / "pool" / "pool.json").read_text())
    (tmp_path / "pool.json").write_text(json.dumps({**facts, "store": "0" * 64}))
    with pytest.raises(DataError, match="no pool"):
        pool.opened(opened, tmp_path, COPIES)


def test_every_view_shows_patches_of_its_own_image_at_the_places_of_its_index(store: Path) -> None:
    opened = PixelStore(store)
    crops = pool.opened(opened, store / "pool", COPIES)
    assert crops.shape == (len(opened.items), COPIES, 224, 224, 3)
    tiny = recipe(pool_copies=COPIES, aligned=0.0)
    batch = batch_at(Sampler(opened, 0.5, crops), tiny, 1)
    reals, fakes = Sampler(opened, 0.5).draw(tiny.phases[0], np.random.default_rng((tiny.seed, 0, 1)))
    patches = batch.patches.reshape(4, 2, 3, 5, 3, 16, 16).numpy()
    index = batch.index.reshape(4, 2, 3, 5).numpy()
    for side, chosen in enumerate((reals, fakes)):
        for slot, number in enumerate(chosen):
            taken = set()
            for view in range(4):
                found = [
                    copy
                    for copy in range(COPIES)
                    if np.array_equal(patchified(crops[number, copy])[index[view, side, slot]], patches[view, side, slot])
                ]
                assert found, (side, slot, view)
                taken |= set(found)
            assert len(taken) == COPIES


def test_an_aligned_fake_takes_what_its_real_takes(store: Path) -> None:
    opened = PixelStore(store)
    batch = batch_at(Sampler(opened, 0.5, pool.opened(opened, store / "pool", COPIES)), recipe(aligned=1.0, records=4), 0)
    index = batch.index.reshape(4, 2, 4, 5)
    assert torch.equal(index[:, 0], index[:, 1])
    patches = batch.patches.reshape(4, 2, 4, 5, 3, 16, 16).float()
    assert (patches[:, 0] - patches[:, 1]).abs().mean() < 6


def test_heads_are_fitted_on_the_augmented_copies(store: Path) -> None:
    opened = PixelStore(store)
    crops = pool.opened(opened, store / "pool")
    given = list(from_pool(opened, crops, COPIES - 1, aligned=False))
    plain = [number for number, item in enumerate(opened.items) if item.pair < 0]
    assert len(given) == len(plain) * (COPIES - 1) and {f.key for _, f in given} == {opened.items[n].name for n in plain}
    assert np.array_equal(given[1][0], crops[plain[0], 2])
    with pytest.raises(DataError, match="3 augmented crops an image, not 4"):
        list(from_pool(opened, crops, COPIES, aligned=False))


def test_the_loader_reads_the_pool_from_any_step(store: Path) -> None:
    tiny = recipe(steps=3, pool_copies=COPIES)
    whole, late = list(loader(store, tiny, 0, workers=0)), list(loader(store, tiny, 2, workers=1))
    assert [b.step for b in late] == [2] and torch.equal(whole[2].patches, late[0].patches)
