"""Aligned fakes: the autoencoder's layers, its errors, the cache and the fallback."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.train.pictures import picture
from train.aligned import AlignedError, ReconstructionCache, TinyAutoencoder, upsampled


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


def test_upsampling_leaves_a_periodic_trace_and_repeats_with_its_seed() -> None:
    rgb = np.asarray(picture(3, 128, 128))
    fake = upsampled(rgb, np.random.default_rng(4))
    assert np.array_equal(fake, upsampled(rgb, np.random.default_rng(4))) and fake.shape == rgb.shape
    assert 20 < 10 * np.log10(255**2 / np.mean((fake.astype(float) - rgb) ** 2)) < 50

    def phases(image: np.ndarray) -> float:
        """How much the mean absolute step between neighbours depends on the column's place modulo four."""
        steps = np.abs(np.diff(image.astype(float), axis=1)).mean((0, 2))[:124]
        by_phase = steps.reshape(-1, 4).mean(0)
        return float(by_phase.std() / by_phase.mean())

    assert phases(fake) > 3 * phases(rgb)


@pytest.mark.skipif("AUTOENCODER" not in os.environ, reason="AUTOENCODER does not name the tiny autoencoder's folder")
def test_the_real_autoencoder_comes_close() -> None:
    out = TinyAutoencoder(Path(os.environ["AUTOENCODER"])).reconstruct(_rgb(128, 128))
    assert 10 * np.log10(255**2 / np.mean((out.astype(float) - _rgb(128, 128)) ** 2)) > 22
