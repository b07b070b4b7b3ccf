"""Calibration: methods recover known truths, thresholds hold their rate, copies of an image count once."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn")

from engine.calibration import Platt, Temperature
from engine.manifest import Threshold
from train import calibrate, metrics


def _logistic(n: int, slope: float, intercept: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    raw = rng.normal(0, 2, n)
    labels = (rng.random(n) < 1 / (1 + np.exp(-(slope * raw + intercept)))).astype(np.uint8)
    return raw, labels


def test_platt_is_the_weighted_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    raw, labels = _logistic(800, 1.7, -0.8)
    model = LogisticRegression(C=1e9, class_weight="balanced").fit(raw[:, None], labels)
    got = calibrate.fit_method("platt", raw, labels)
    assert isinstance(got, Platt)
    assert got.slope == pytest.approx(model.coef_[0, 0], rel=1e-3)
    assert got.intercept == pytest.approx(model.intercept_[0], abs=2e-3)


def test_temperature_is_recovered_and_chosen_for_logits() -> None:
    raw, labels = _logistic(4000, 0.5, 0.0, seed=1)
    got = calibrate.fit_method("temperature", raw, labels)
    assert isinstance(got, Temperature) and got.temperature == pytest.approx(2.0, rel=0.1)
    chosen, losses = calibrate.choose(raw, labels, [str(i) for i in range(len(raw))], logits=True)
    assert chosen.method != "isotonic" and set(losses) == {"temperature", "platt", "isotonic"}


def test_isotonic_is_chosen_where_a_logistic_cannot_fit() -> None:
    rng = np.random.default_rng(2)
    raw = rng.uniform(-3, 3, 3000)
    probability = np.where(raw < -1, 0.05, np.where(raw < 2, 0.5, 0.97))
    labels = (rng.random(3000) < probability).astype(np.uint8)
    chosen, _ = calibrate.choose(raw, labels, [str(i) for i in range(3000)], logits=False)
    assert chosen.method == "isotonic"
    calibrated = chosen.apply(np.linspace(-4, 4, 50).astype(np.float32))
    assert (np.diff(calibrated) >= 0).all() and calibrated.min() >= 0.01 - 1e-6


def test_folds_never_cut_a_group() -> None:
    groups = [f"prompt-{i // 3}" for i in range(60)]
    folds = calibrate._folds(groups)
    assert all(len({int(f) for f, g in zip(folds, groups, strict=True) if g == name}) == 1 for name in set(groups))
    assert set(folds.tolist()) == set(range(calibrate.FOLDS))


def test_thresholds_hold_their_rate_with_bounds() -> None:
    rng = np.random.default_rng(3)
    labels = np.repeat([0, 1], (400, 200)).astype(np.uint8)
    probability = np.clip(rng.normal(0.3 + 0.4 * labels, 0.15), 0, 1)
    found = calibrate.thresholds(probability, labels, [str(i) for i in range(600)])
    one = found["fpr_0.01"]
    assert one.reals == 400 and 0.0 < one.fpr <= 0.01 and one.fpr < one.fpr_upper < 0.03
    assert one.fpr == (probability[labels == 0] >= one.threshold).mean()
    assert one.tpr == (probability[labels == 1] >= one.threshold).mean()
    assert found["fpr_0.001"].fpr == 0.0 and found["fpr_0.001"].threshold > one.threshold
    # No image's own score: the rounding of another backend must not turn a decision.
    assert min(abs(probability - value.threshold).min() for value in found.values()) > 1e-4


def test_copies_of_an_image_count_once_by_the_worse() -> None:
    labels = np.array([0, 0, 1, 1], np.uint8)
    found = calibrate.thresholds(np.array([0.1, 0.6, 0.9, 0.4]), labels, ["real", "real", "fake", "fake"])
    assert found["fpr_0.01"].reals == 1 and found["fpr_0.01"].fakes == 1
    assert found["fpr_0.01"].threshold > 0.6 and found["fpr_0.01"].tpr == 0.0


@pytest.mark.parametrize(
    ("reals", "errors", "says"),
    [
        (299, 0, "yes"),
        (298, 0, "no: takes 299 reals without an error"),
        (200, 2, "no: takes {} reals with 2 above the threshold"),
    ],
)
def test_a_rate_is_certified_only_by_enough_reals(reals: int, errors: int, says: str) -> None:
    from scipy.stats import binom

    upper = metrics.clopper_pearson_upper(errors, reals)
    one = Threshold(target_fpr=0.01, threshold=0.5, fpr=errors / reals, fpr_upper=upper, reals=reals)
    # The least n at which so few errors would be a surprise if the rate were above 1%.
    needed = next(n for n in range(errors + 1, 9999) if binom.cdf(errors, n, 0.01) <= 0.05)
    assert calibrate.certification(one) == says.format(needed)


def test_of_five_crops_the_mean_probability_is_calibrated() -> None:
    """An independent oracle: the loss of the fit is not above that of its neighbours, and equal crops are one crop."""
    raw, labels = _logistic(400, 1.2, 0.3, seed=7)
    crops = raw[:, None] + np.random.default_rng(8).normal(0, 1.5, (400, 5))
    share = labels.mean()
    weights = np.where(labels == 1, 0.5 / share, 0.5 / (1 - share))

    def loss(slope: float, intercept: float) -> float:
        mean = (1 / (1 + np.exp(-(slope * crops + intercept)))).mean(axis=1)
        return float(-(weights * np.log(np.where(labels == 1, mean, 1 - mean))).sum())

    found = calibrate.fit_method("platt", crops, labels)
    assert isinstance(found, Platt)
    best = loss(found.slope, found.intercept)
    for slope, intercept in ((1.05, 0), (0.95, 0), (1, 0.05), (1, -0.05)):
        assert best < loss(found.slope * slope, found.intercept + intercept)
    alone, repeated = (calibrate.fit_method("platt", rows, labels) for rows in (raw, raw[:, None].repeat(5, axis=1)))
    assert isinstance(alone, Platt) and isinstance(repeated, Platt)
    assert repeated.slope == pytest.approx(alone.slope, rel=1e-3)
    scores = np.repeat(crops[:, :, None], 3, axis=2).astype(np.float32)
    keys = [str(i) for i in range(400)]
    calibrations, named, _ = calibrate.calibrate(scores, labels, keys, keys, "five")
    threshold = named["linear"]["fpr_0.01"]
    assert threshold.crops == "five" and threshold.reals == int((labels == 0).sum())
    mean = calibrations["linear"].apply(scores[..., 0].ravel()).reshape(400, 5).mean(axis=1)
    assert (mean[labels == 0] >= threshold.threshold).mean() == pytest.approx(threshold.fpr) and threshold.fpr <= 0.01
