"""A start for the patch filters that hears high frequencies: eigenvectors of the data's own patches, scaled to equal loudness.

Natural images carry almost all of their energy in low frequencies, so randomly initialised filters answer to content and leave
the faint residue of a decoder to be found by many steps of gradient descent. Some of the filters therefore start whitened: each
band they cover has the same voice at step 0 (the first layer of github KellerJordan/cifar10-airbench is made so).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from train.sources import Source
from train.views import PATCH_PX

PATCHES = 24_000
SKIPPED = 48


def whitened_filters(
    source: Source, filters: int, seed: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> NDArray[np.float32]:
    """float32[filters, 3, 16, 16], rows for `patch_embed.proj.weight`; patches are drawn from both classes alike."""
    rng = np.random.default_rng((seed, 77))
    size = 3 * PATCH_PX**2
    rows = np.empty((PATCHES, size), np.float32)
    for i in range(PATCHES):
        rgb = source.random_pixels(i % 2, rng)
        top, left = (int(rng.integers(extent - PATCH_PX + 1)) for extent in rgb.shape[:2])
        patch = rgb[top : top + PATCH_PX, left : left + PATCH_PX].astype(np.float32) / 255
        rows[i] = ((patch - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)).transpose(2, 0, 1).reshape(-1)
    rows -= rows.mean(0)
    values, vectors = np.linalg.eigh(rows.T @ rows / PATCHES)
    values, vectors = values[::-1], vectors[:, ::-1]
    # The loudest directions carry content, which random filters hear anyway; the rest is sampled evenly down to the quietest.
    chosen = np.linspace(SKIPPED, size - 1, filters).round().astype(int)
    # Half a grey level of noise is the floor: below it there is only rounding.
    floor = (0.5 / 255 / float(np.mean(std))) ** 2
    scaled = vectors[:, chosen] / np.sqrt(values[chosen] + floor)
    return np.ascontiguousarray(scaled.T.reshape(filters, 3, PATCH_PX, PATCH_PX), dtype=np.float32)
