"""The batched operations agree with Pillow's; views on the device repeat with their seeds, in any company and on pairs alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("kornia")

from tests.train.pictures import corpus, picture  # noqa: E402
from tests.train.tiny import encoder, recipe  # noqa: E402
from train import augment  # noqa: E402
from train.data import read_manifest  # noqa: E402
from train.device_operations import OPERATIONS, applied  # noqa: E402
from train.device_views import _value, code_program, images_at, platform_program, views_of  # noqa: E402
from train.pretrain import Run, train  # noqa: E402
from train.store import PixelStore, build  # noqa: E402
from train.views import Sampler  # noqa: E402


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    build(read_manifest(corpus(folder / "in"), "train"), folder / "store", lambda rgb: rgb)
    return folder / "store"


def _tensor(image) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return torch.from_numpy(np.array(image).transpose(2, 0, 1))


# Mean difference allowed, in grey levels. Shuffled pixels and crops fall elsewhere: their own tests follow.
CLOSE = {name: 0.6 for name, _ in augment.OPERATIONS if name not in ("shuffle_pixels", "random_crop")}
CLOSE |= {"jpeg": 2.5, "rotate": 2.0, "skew": 2.0, "aspect_ratio": 1.0, "blur": 1.2}


@pytest.mark.parametrize("name", sorted(CLOSE))
def test_an_operation_agrees_with_pillows(name: str) -> None:
    operation = dict(augment.OPERATIONS)[name]
    image = picture(7, 96, 112)
    for seed in range(4):
        expected = np.asarray(operation(image, np.random.default_rng(seed))).transpose(2, 0, 1).astype(float)
        (got,) = applied([_tensor(image)], [[(name, _value(name, np.random.default_rng(seed)))]])
        assert got.dtype == torch.uint8 and got.shape == expected.shape
        assert np.abs(got.numpy() - expected).mean() < CLOSE[name], (name, seed)


def test_every_operation_of_the_paper_is_there() -> None:
    assert {name for name, _ in augment.OPERATIONS} <= set(OPERATIONS)


def test_pixels_are_moved_and_crops_are_windows() -> None:
    image = _tensor(picture(3, 60, 80))
    shuffled, same = applied([image, image], [[("shuffle_pixels", 2 * 5 + 0.35)], [("shuffle_pixels", 2 * 5 + 0.0)]])
    assert torch.equal(same, image)
    moved = (shuffled != image).any(0).float().mean()
    assert 0.25 < moved <= 0.36
    assert torch.equal(*(x.reshape(3, -1).sort(1).values for x in (shuffled, image)))
    (window,) = applied([image], [[("random_crop", 40 + (32 * 64 + 16) / 4096)]])
    assert torch.equal(window, image[:, 10:50, 10:50])
    (padded,) = applied([image], [[("random_crop", 100.0)]])
    assert padded.shape == (3, 100, 100) and padded[:, :20].sum() == 0 and torch.equal(padded[:, 20:80, 10:90], image)


def test_programs_draw_as_the_presets_do() -> None:
    rngs = [np.random.default_rng(i) for i in range(900)]
    lengths = np.bincount([len(code_program(rng, 1.0)) for rng in rngs], minlength=3)
    assert len(lengths) == 3 and (np.abs(lengths - 300) < 75).all()
    assert code_program(np.random.default_rng(0), 0.0) == [] == platform_program(np.random.default_rng(0), 0.0)
    names = {name for seed in range(400) for name, _ in platform_program(np.random.default_rng(seed), 1.0)}
    assert names <= set(OPERATIONS) and {"jpeg", "rescale", "shift", "noise", "blur", "brightness"} <= names


def test_images_in_company_come_out_as_alone() -> None:
    images = [_tensor(picture(i, 64, 64)) for i in range(12)]
    programs = [code_program(np.random.default_rng(i), 1.0) for i in range(12)]
    together = applied(images, programs)
    for image, program, expected in zip(images, programs, together, strict=True):
        (alone,) = applied([image], [program])
        assert alone.shape == expected.shape
        assert (alone.int() - expected.int()).abs().max() <= 1  # batched sums round differently


@pytest.mark.parametrize(("geometry", "preset"), [("native", "platform"), ("paper", "code")])
def test_views_repeat_and_pairs_share_their_draws(store: Path, geometry: str, preset: str) -> None:
    tiny = recipe(geometry=geometry, preset=preset, aligned=1.0, records=3, augment_on="device")
    source = Sampler(PixelStore(store), 0.5)
    batch = images_at(source, tiny, 2)
    assert batch.patches.shape == (6, 3, 256, 256)
    patches, index = views_of(batch.patches, batch.index, tiny, 2)
    assert patches.shape == (24, 5, 3, 16, 16) and patches.dtype == torch.uint8 and index.shape == (24, 5)
    again = views_of(batch.patches, batch.index, tiny, 2)
    assert torch.equal(patches, again[0]) and torch.equal(index, again[1])
    other, _ = views_of(batch.patches, batch.index, tiny, 3)
    assert not torch.equal(patches, other)
    # The autoencoder here is the identity, so a pair differs by one JPEG at most.
    pairs = patches.view(4, 2, 3, 5, 3, 16, 16).float()
    assert torch.equal(index.view(4, 2, 3, 5)[:, 0], index.view(4, 2, 3, 5)[:, 1])
    assert (pairs[:, 0] - pairs[:, 1]).abs().mean() < 6


def test_training_on_the_devices_views_resumes_bit_for_bit(store: Path, tmp_path: Path) -> None:
    tiny = recipe(steps=4, records=2, augment_on="device")
    whole = Run(tiny, store, tmp_path / "whole", encoder=encoder())
    assert train(whole, workers=0) == 4
    train(Run(tiny, store, tmp_path / "cut", encoder=encoder()), workers=0, stop_after=2)
    resumed = Run(tiny, store, tmp_path / "cut", encoder=encoder())
    assert resumed.resume() and train(resumed, workers=1) == 4
    assert all(torch.equal(w, resumed.trainee.state_dict()[name]) for name, w in whole.trainee.state_dict().items())
