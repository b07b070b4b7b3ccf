"""Aligned fakes: the autoencoder's layers, its errors, the cache and the fallback."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.train.pictures import picture
from train.aligned import UPSAMPLERS, AlignedError, ReconstructionCache, TinyAutoencoder, reconstruction, upsampled


def _rgb(height: int = 64, width: int = 48) -> np.ndarray:
    return np.asarray(picture(1, height, width))


def test_reconstruct_keeps_the_size_and_random_weights_load(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    from train import aligned

    for name, part in (("encoder", aligned._encoder()), ("decoder", aligned._decoder())):
        save_file({key: value.half() for key, value in part.state_dict().items()}, tmp_path / f"{name}.safetensors")
    with torch.no_grad():
        out = TinyAutoencoder(tmp_path).reconstruct(_rgb(61, 45))
    assert out.shape == (61, 45, 3) and out.dtype == np.uint8


def test_a_missing_or_foreign_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from safetensors.numpy import save_file

    with pytest.raises(AlignedError, match=r"encoder\.safetensors: no such file"):
        TinyAutoencoder(tmp_path)
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "encoder.safetensors")
    with pytest.raises(AlignedError, match=r"encoder\.safetensors: not the weights of the tiny autoencoder"):
        TinyAutoencoder(tmp_path)


def test_the_cache_reconstructs_once_and_by_content(tmp_path: Path) -> None:
    calls: list[int] = []

    def invert(rgb: np.ndarray) -> np.ndarray:
        calls.append(1)
        return 255 - rgb

    for _ in range(2):
        assert np.array_equal(ReconstructionCache(tmp_path, invert)(_rgb()), 255 - _rgb())
    ReconstructionCache(tmp_path, invert)(_rgb(48, 64))
    assert len(calls) == 2


@pytest.mark.parametrize("kind", UPSAMPLERS)
def test_upsampling_leaves_a_periodic_trace_and_repeats_with_its_seed(kind: str) -> None:
    rgb = np.asarray(picture(3, 128, 128))
    fake = upsampled(rgb, np.random.default_rng(4), kind)
    assert np.array_equal(fake, upsampled(rgb, np.random.default_rng(4), kind)) and fake.shape == rgb.shape
    assert 20 < 10 * np.log10(255**2 / np.mean((fake.astype(float) - rgb) ** 2)) < 50

    def phases(image: np.ndarray) -> float:
        """How much the mean curvature between neighbours depends on the column's place modulo four."""
        steps = np.abs(np.diff(image.astype(float), n=2, axis=1)).mean((0, 2))[:124]
        by_phase = steps.reshape(-1, 4).mean(0)
        return float(by_phase.std() / by_phase.mean())

    assert phases(fake) > 2 * phases(rgb)


def test_every_kind_of_upsampling_is_drawn_and_odd_sizes_stay() -> None:
    rgb = _rgb(33, 5)
    drawn = {upsampled(rgb, np.random.default_rng(seed)).tobytes() for seed in range(24)}
    assert len(drawn) == 24 and upsampled(_rgb(1, 1), np.random.default_rng(0)).shape == (1, 1, 3)


def test_what_makes_the_fakes_of_a_run(tmp_path: Path) -> None:
    made = reconstruction(None, tmp_path)(_rgb())
    assert made.shape == _rgb().shape and not np.array_equal(made, _rgb())
    pytest.importorskip("torch")
    with pytest.raises(AlignedError, match=r"encoder\.safetensors: no such file"):
        reconstruction(tmp_path, tmp_path)


@pytest.mark.skipif("AUTOENCODER" not in os.environ, reason="AUTOENCODER does not name the tiny autoencoder's folder")
def test_the_real_autoencoder_comes_close() -> None:
    out = TinyAutoencoder(Path(os.environ["AUTOENCODER"])).reconstruct(_rgb(128, 128))
    assert 10 * np.log10(255**2 / np.mean((out.astype(float) - _rgb(128, 128)) ** 2)) > 22
