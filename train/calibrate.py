"""From raw scores to probabilities, thresholds and an abstain band, on images that neither training nor evaluation uses.

Both classes weigh the same whatever their numbers, so 0.5 means that the score is as likely from either: a likelihood ratio, to
which a platform adds its own prior. Every image counts once, by the worse of its copies (clean and degraded), so that the bounds
are over independent images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.calibration import Calibration, Isotonic, Platt, Temperature
from engine.heads import HEADS, Head
from engine.manifest import Band, Threshold
from engine.preprocess import Layout
from train.metrics import clopper_pearson_upper, threshold_at_fpr, trials_to_certify

TARGETS = {"fpr_0.01": 0.01, "fpr_0.001": 0.001}
FOLDS = 5
# Odds of less than two to one either way are no answer.
ABSTAIN = Band(low=1 / 3, high=2 / 3)
# A step function is worth its ties only when it is clearly better.
ISOTONIC_MARGIN = 0.02

Floats = NDArray[np.float64]


def fit_method(method: str, raw: Floats, labels: NDArray[np.uint8]) -> Calibration:
    """One calibration of raw scores float[n] or, of k crops, float[n, k], classes weighted equally; of several crops the mean
    probability is fitted, as serving reports it (isotonic: each crop's own). method: temperature, platt or isotonic."""
    weights = _balanced(labels)
    raw = raw.reshape(len(labels), -1)
    if method == "isotonic":
        from sklearn.isotonic import IsotonicRegression

        crops = raw.shape[1]
        model = IsotonicRegression(out_of_bounds="clip", y_min=0.01, y_max=0.99)
        model.fit(raw.ravel(), labels.repeat(crops), sample_weight=weights.repeat(crops))
        knots, first = np.unique(model.X_thresholds_.astype(np.float64), return_index=True)
        values = np.maximum.accumulate(model.y_thresholds_[first])
        return Isotonic(raw=tuple(knots.tolist()), probability=tuple(np.clip(values, 0, 1).tolist()))
    from scipy.optimize import minimize

    scale = float(np.std(raw)) or 1.0

    def nll(parameters: Floats) -> float:
        intercept = parameters[1] if method == "platt" else 0.0
        logit = np.exp(parameters[0]) * raw / scale + intercept
        # Minus the log of the mean over crops of the probability of the right class.
        right = -np.logaddexp(0.0, np.where(labels[:, None] == 1, -logit, logit))
        return float(np.sum(weights * (np.log(raw.shape[1]) - np.logaddexp.reduce(right, axis=1))))

    found = minimize(nll, np.zeros(2 if method == "platt" else 1), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9})
    slope = float(np.exp(found.x[0])) / scale
    return Platt(slope=slope, intercept=float(found.x[1])) if method == "platt" else Temperature(temperature=1 / slope)


def choose(
    raw: Floats, labels: NDArray[np.uint8], groups: Sequence[str], *, logits: bool
) -> tuple[Calibration, dict[str, float]]:
    """The method with the least cross-validated negative log likelihood, folds cut between groups, refitted on everything.

    logits: whether the scores are logits; a temperature (no intercept) makes sense for those only. Returns the calibration and
    each method's loss.
    """
    methods = ("temperature", "platt", "isotonic") if logits else ("platt", "isotonic")
    folds = _folds(groups)
    losses: dict[str, float] = {}
    for method in methods:
        total = 0.0
        for fold in range(FOLDS):
            fit, held = folds != fold, folds == fold
            if len(np.unique(labels[fit])) < 2 or not held.any():
                continue
            p = probabilities(fit_method(method, raw[fit], labels[fit]), raw[held])
            p = np.clip(p, 1e-6, 1 - 1e-6)
            total += float(np.sum(_balanced(labels)[held] * -np.log(np.where(labels[held] == 1, p, 1 - p))))
        losses[method] = total / len(labels)
    best = min((m for m in methods if m != "isotonic"), key=losses.__getitem__)
    if losses["isotonic"] < losses[best] * (1 - ISOTONIC_MARGIN):
        best = "isotonic"
    return fit_method(best, raw, labels), losses


def probabilities(calibration: Calibration, raw: NDArray[Any]) -> Floats:
    """float64[n] of raw scores [n], or the mean over crops of [n, k], as `Detector.combine` reports it."""
    each = calibration.apply(raw.astype(np.float32).ravel()).astype(np.float64).reshape(raw.shape)
    mean: Floats = each if each.ndim == 1 else each.mean(axis=1)
    return mean


def thresholds(
    probability: Floats, labels: NDArray[np.uint8], keys: Sequence[str], crops: Layout = "center"
) -> dict[str, Threshold]:
    """Thresholds on calibrated probabilities at the named FPRs, counted over images: of a real's copies the highest counts,
    of a generated image's copies the lowest. Each keeps off the scores of all copies, see `threshold_at_fpr`."""
    reals = _per_image(probability, labels == 0, keys, max)
    fakes = _per_image(probability, labels == 1, keys, min)
    found = {}
    for name, target in TARGETS.items():
        threshold = threshold_at_fpr(reals, target, probability)
        flagged = int((reals >= threshold).sum())
        found[name] = Threshold(
            target_fpr=target,
            threshold=threshold,
            fpr=flagged / len(reals),
            fpr_upper=clopper_pearson_upper(flagged, len(reals)),
            reals=len(reals),
            tpr=float((fakes >= threshold).mean()),
            fakes=len(fakes),
            crops=crops,
        )
    return found


def certification(threshold: Threshold) -> str:
    """Whether these reals prove the rate that a threshold is named after, and how many it would take if not."""
    if threshold.fpr_upper <= threshold.target_fpr:
        return "yes"
    errors = round(threshold.fpr * threshold.reals)
    needed = trials_to_certify(threshold.target_fpr, errors)
    with_errors = "without an error" if not errors else f"with {errors} above the threshold"
    return f"no: takes {needed:,} reals {with_errors}"


def calibrate(
    raw: NDArray[np.float32],
    labels: NDArray[np.uint8],
    groups: Sequence[str],
    keys: Sequence[str],
    crops: Layout = "center",
) -> tuple[dict[Head, Calibration], dict[Head, dict[str, Threshold]], dict[Head, dict[str, float]]]:
    """Calibrations, thresholds and cross-validated losses of all heads from raw scores float32[n, 3], or float32[n, k, 3] of
    images cut into k crops as `crops` says."""
    calibrations: dict[Head, Calibration] = {}
    named: dict[Head, dict[str, Threshold]] = {}
    losses: dict[Head, dict[str, float]] = {}
    for column, head in enumerate(HEADS):
        scores = raw[..., column].astype(np.float64)
        calibrations[head], losses[head] = choose(scores, labels, groups, logits=head == "linear")
        named[head] = thresholds(probabilities(calibrations[head], raw[..., column]), labels, keys, crops)
    return calibrations, named, losses


def _per_image(values: Floats, mask: NDArray[np.bool_], keys: Sequence[str], worst: Callable[[list[float]], float]) -> Floats:
    by_key: dict[str, list[float]] = {}
    for value, keep, key in zip(values, mask, keys, strict=True):
        if keep:
            by_key.setdefault(key, []).append(float(value))
    return np.array([worst(copies) for copies in by_key.values()])


def _balanced(labels: NDArray[np.uint8]) -> Floats:
    share = labels.mean()
    weights: Floats = np.where(labels == 1, 0.5 / share, 0.5 / (1 - share))
    return weights


def _folds(groups: Sequence[str]) -> NDArray[np.int64]:
    names = sorted(set(groups))
    order = np.random.default_rng(53).permutation(len(names))
    fold = {name: int(order[i]) % FOLDS for i, name in enumerate(names)}
    return np.array([fold[group] for group in groups])
