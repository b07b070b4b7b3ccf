"""The logit shift: an unlabelled sample with a known share moves probabilities to where they mean what they say."""

from __future__ import annotations

import numpy as np
import pytest

from engine.calibration import Isotonic, Platt, Temperature
from engine.manifest import Threshold
from train.shift import logit_shift, moved_threshold, shifted


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def sample(share: float, drift: float, count: int = 20_000) -> np.ndarray:
    """Calibrated logits of +-2 with their own noise (a true likelihood ratio), drifted by `drift`."""
    rng = np.random.default_rng(5)
    labels = rng.random(count) < share
    logits = np.where(labels, 2.0, -2.0) + 2.0 * rng.standard_normal(count)
    return sigmoid(logits + drift).astype(np.float32)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5])
@pytest.mark.parametrize("drift", [-1.5, 0.0, 0.8])
def test_it_undoes_the_drift_of_scores(share: float, drift: float) -> None:
    assert logit_shift(sample(share, drift), share) == pytest.approx(-drift, abs=0.15)


def test_the_order_of_images_stays_and_thresholds_stand_for_the_same_decisions() -> None:
    raw = np.linspace(-4, 4, 101).astype(np.float32)
    for before in (Platt(slope=1.3, intercept=0.2), Temperature(temperature=2.0),
                   Isotonic(raw=(-3.0, 0.0, 3.0), probability=(0.1, 0.5, 0.9))):  # fmt: skip
        after = shifted(before, 0.7)
        p, q = before.apply(raw), after.apply(raw)
        assert (np.diff(q) >= 0).all() and (q >= p - 1e-6).all() and (q > p).any()
        old = Threshold(target_fpr=0.01, threshold=float(p[70]) - 1e-5, fpr=0.0, fpr_upper=0.1, reals=9)
        new = moved_threshold(old, 0.7)
        if not isinstance(before, Isotonic):
            assert np.array_equal(p >= old.threshold, q >= new.threshold)
        assert new.threshold > old.threshold
    out_of_reach = Threshold(target_fpr=0.01, threshold=1.0000001, fpr=0.0, fpr_upper=0.1, reals=9)
    assert moved_threshold(out_of_reach, -2.0) == out_of_reach


def test_too_small_a_sample_and_an_impossible_share_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        logit_shift(np.full(49, 0.5, np.float32), 0.1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        logit_shift(np.full(50, 0.5, np.float32), 1.0)
    assert abs(logit_shift(np.full(50, 1e-9, np.float32), 0.5)) <= 4.0
