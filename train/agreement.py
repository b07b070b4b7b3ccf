"""Agreement of the backends that run here with torch, on validation crops: the report's `parity` block, which the gate judges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import backends, parity
from engine.backends.base import BackendUnavailable
from engine.bundle import Bundle
from engine.preprocess import CROP_PX, center_crop
from train.data import Damage, DataError, Entry
from train.embed import from_files

CROPS = 64
REFERENCE = "torch"


def measure(
    bundle: Bundle, crops: NDArray[np.uint8] | None = None, candidates: Sequence[str] = backends.AUTO_ORDER
) -> dict[str, Any]:
    """Compares each backend that can run here with torch on crops uint8[n, 224, 224, 3]; None: made-up ones (`made_up_crops`).

    Returns `reference`, `crops`, `compared` (a row each: backend, device, precision, tolerance, max_probability and flipped by
    head, agrees) and `not_run` (backend, why). A device that fails, rather than is missing, is the caller's error.
    """
    crops = made_up_crops() if crops is None else crops
    compared: list[dict[str, Any]] = []
    not_run: list[list[str]] = []
    for name in candidates:
        if name == REFERENCE:
            continue
        try:
            agreements = list(parity.compare(bundle, crops, parity.Spec(REFERENCE), [parity.Spec(name)]))
        except BackendUnavailable as exc:
            not_run.append([name, " ".join(str(exc).split())])
        else:
            compared += [_row(name, agreement) for agreement in agreements]
    return {"reference": REFERENCE, "crops": len(crops), "compared": compared, "not_run": not_run}


def crops_of(entries: Sequence[Entry]) -> NDArray[np.uint8]:
    """At most 64 centre crops uint8[n, 224, 224, 3], spread evenly over `entries`. Raises DataError where none can be decoded."""
    step = max(1, len(entries) // CROPS)
    images = from_files(entries[::step], Damage())
    crops = [center_crop(rgb) for rgb, _ in images][:CROPS]
    if not crops:
        raise DataError("no image to compare the backends on")
    return np.stack(crops)


def made_up_crops(count: int = 16, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth noise with fine grain uint8[count, 224, 224, 3], for where no image is at hand: the arithmetic is the same."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 7, 7, 3)).repeat(32, axis=1).repeat(32, axis=2)
    grain = rng.integers(-24, 25, (count, CROP_PX, CROP_PX, 3))
    crops: NDArray[np.uint8] = np.clip(coarse + grain, 0, 255).astype(np.uint8)
    return crops


def _row(name: str, agreement: parity.Agreement) -> dict[str, Any]:
    # Of a few crops a single one that lies on the threshold by chance must not decide.
    allowed = max(1, int(parity.MAX_FLIPPED_SHARE * agreement.crops))
    worst = {head: found.max_probability for head, found in agreement.heads.items()}
    flipped = {head: found.flipped for head, found in agreement.heads.items()}
    # Not `>`: a NaN does not agree.
    agrees = all(value <= agreement.tolerance for value in worst.values()) and all(n <= allowed for n in flipped.values())
    return {
        "backend": name,
        "device": agreement.device,
        "precision": agreement.precision,
        "tolerance": agreement.tolerance,
        "max_probability": worst,
        "flipped": flipped,
        "agrees": agrees,
    }
