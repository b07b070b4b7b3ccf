"""A logit shift from an unlabelled sample of a platform's own uploads (arXiv 2602.01973): repairs a calibration that has drifted.

On a new platform scores drift, mostly towards "real". Of a sample without labels one thing is often known: about what share of it
was generated. The shift b is the one number that makes the mean posterior of the sample equal that share:

    mean_i sigmoid(logit(p_i) + b + log(share / (1 - share))) = share        (p: calibrated with equal classes)

It moves probabilities and never the order of images. Thresholds at named FPRs move with them, so the decisions they stand for,
and their measured bounds, stay what they were; a policy's own numbers and the abstain band then mean on this platform what they
say.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.calibration import Calibration, Isotonic, Platt, Temperature
from engine.manifest import Threshold

MAX_SHIFT = 4.0
"""A sample that asks for more than odds of 55 to 1 is not drifted, but of something else."""
MIN_SAMPLE = 50
_EDGE = 1e-6

Floats = NDArray[np.float64]


def logit_shift(probability: NDArray[np.float32], share: float) -> float:
    """The shift b for calibrated probabilities float32[n] of a sample of which `share` is AI-generated.

    Raises:
        ValueError: fewer than 50 scores, or a share outside (0, 1).
    """
    if len(probability) < MIN_SAMPLE:
        raise ValueError(f"{len(probability)} images are too few for a shift; at least {MIN_SAMPLE}")
    if not 0 < share < 1:
        raise ValueError(f"the expected share of AI-generated images must lie between 0 and 1, is {share}")
    logits = _logit(probability.astype(np.float64)) + np.log(share / (1 - share))
    low, high = -MAX_SHIFT, MAX_SHIFT
    for _ in range(60):
        middle = (low + high) / 2
        if _sigmoid(logits + middle).mean() < share:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def shifted(calibration: Calibration, shift: float) -> Calibration:
    """The calibration whose logits lie `shift` higher."""
    if isinstance(calibration, Platt):
        return Platt(slope=calibration.slope, intercept=calibration.intercept + shift)
    if isinstance(calibration, Temperature):
        return Platt(slope=1 / calibration.temperature, intercept=shift)
    moved = _sigmoid(_logit(np.array(calibration.probability)) + shift)
    return Isotonic(raw=calibration.raw, probability=tuple(np.clip(moved, 0, 1).tolist()))


def moved_threshold(threshold: Threshold, shift: float) -> Threshold:
    """The threshold that stands for the same decisions after the shift; one that nothing reaches stays out of reach."""
    if threshold.threshold >= 1:
        return threshold
    return threshold.model_copy(update={"threshold": float(_sigmoid(_logit(np.array([threshold.threshold])) + shift)[0])})


def _logit(probability: Floats) -> Floats:
    p = np.clip(probability, _EDGE, 1 - _EDGE)
    logits: Floats = np.log(p / (1 - p))
    return logits


def _sigmoid(logit: Floats) -> Floats:
    values: Floats = 1 / (1 + np.exp(-logit))
    return values
