"""Batches: a function of seed, rank and step; pairs share their draws; patches lie where the index says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.train.pictures import corpus  # noqa: E402
from tests.train.tiny import recipe  # noqa: E402
from train.data import read_manifest  # noqa: E402
from train.store import PixelStore, build  # noqa: E402
from train.views import CROP_PX, Sampler, batch_at, loader, patchified  # noqa: E402


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("views")
    build(read_manifest(corpus(folder / "in"), "train"), folder / "store", lambda rgb: rgb)
    return folder / "store"


def test_patches_are_cut_row_by_row() -> None:
    crop = np.random.default_rng(0).integers(0, 256, (CROP_PX, CROP_PX, 3), dtype=np.uint8)
    patches = patchified(crop)
    assert patches.shape == (196, 3, 16, 16)
    assert np.array_equal(patches[15], crop[16:32, 16:32].transpose(2, 0, 1))


@pytest.mark.parametrize("geometry", ["native", "paper"])
def test_a_batch_depends_on_seed_rank_and_step_alone(store: Path, geometry: str) -> None:
    tiny = recipe(geometry=geometry, preset="code" if geometry == "paper" else "platform")
    sampler = Sampler(PixelStore(store), 0.5)
    first, again = batch_at(sampler, tiny, 2), batch_at(Sampler(PixelStore(store), 0.5), tiny, 2)
    assert first.patches.shape == (4 * 2 * 3, 5, 3, 16, 16) and first.index.shape == (24, 5)
    assert torch.equal(first.patches, again.patches) and torch.equal(first.index, again.index)
    for other in (batch_at(sampler, tiny, 3), batch_at(sampler, tiny, 2, rank=1)):
        assert not torch.equal(first.index, other.index)


def test_an_aligned_fake_draws_what_its_real_draws(store: Path) -> None:
    """With the identity as autoencoder and no further compression the two are nearly equal in every view."""
    batch = batch_at(Sampler(PixelStore(store), 0.5), recipe(aligned=1.0, records=4), 0)
    patches = batch.patches.reshape(4, 2, 4, 5, 3, 16, 16).float()
    index = batch.index.reshape(4, 2, 4, 5)
    assert torch.equal(index[:, 0], index[:, 1])
    # What differs is one more JPEG with the same tables; other pictures differ by tens of grey levels.
    assert (patches[:, 0] - patches[:, 1]).abs().mean() < 4
    assert (patches[:, 0] - patches[:, 0].roll(1, 1)).abs().mean() > 20


def test_local_views_are_blocks_and_the_others_scatter(store: Path) -> None:
    batch = batch_at(Sampler(PixelStore(store), 0.5), recipe(tokens=9), 0)
    index = batch.index.reshape(4, 2, 3, 9).numpy()
    rows, columns = index // 14, index % 14
    spread = (rows.max(-1) - rows.min(-1)) + (columns.max(-1) - columns.min(-1))
    assert (spread[3] == 4).all() and (spread[:3] > 4).all()


def test_the_loader_gives_the_same_batches_from_any_step_and_any_number_of_workers(store: Path) -> None:
    tiny = recipe(steps=4)
    inline = list(loader(store, tiny, 0, workers=0))
    late = list(loader(store, tiny, 2, workers=2))
    assert [b.step for b in inline] == [0, 1, 2, 3] and [b.step for b in late] == [2, 3]
    assert torch.equal(inline[2].patches, late[0].patches) and torch.equal(inline[3].patches, late[1].patches)


def test_sources_are_balanced(store: Path) -> None:
    opened = PixelStore(store)
    sampler = Sampler(opened, 0.0)
    reals, fakes = sampler.draw(recipe(records=400, aligned=0.0).phases[0], np.random.default_rng(0))
    assert {opened.items[i].label for i in reals} == {0} and {opened.items[i].label for i in fakes} == {1}
    assert all(opened.items[i].pair < 0 for i in fakes)
    share = np.mean([opened.items[i].source == "real-source-0" for i in reals])
    assert 0.4 < share < 0.6
