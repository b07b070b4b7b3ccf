"""Measures of a detector's scores, in numpy: ranking, operating points, calibration, and intervals for each.

labels: uint8[n], 1 = AI-generated; scores: float[n], larger = more likely AI-generated. Every measure returns a float, NaN where
it is not defined (one class only, no images).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.uint8]
Scores = NDArray[np.floating]
Measure = Callable[[Labels, Scores], float]

NEIGHBOURS = 10
"""Reals at and below a threshold whose mean spacing says how near two scores lie there."""


def auroc(labels: Labels, scores: Scores) -> float:
    """Probability that a generated image scores above a real one, ties counting one half (Mann-Whitney)."""
    fakes, reals = scores[labels == 1], np.sort(scores[labels == 0])
    if not len(fakes) or not len(reals):
        return float("nan")
    below = np.searchsorted(reals, fakes, side="left")
    tied = np.searchsorted(reals, fakes, side="right") - below
    return float((below + tied / 2).sum() / (len(fakes) * len(reals)))


def average_precision(labels: Labels, scores: Scores) -> float:
    """Sum over distinct thresholds of precision times the rise in recall; depends on the share of generated images."""
    positives = int((labels == 1).sum())
    if not positives or positives == len(labels):
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(labels[order] == 1)
    last = np.append(np.diff(scores[order]) != 0, True)
    seen = np.arange(1, len(labels) + 1)[last]
    precision, recall = hits[last] / seen, hits[last] / positives
    return float(np.sum(precision * np.diff(np.concatenate(([0.0], recall)))))


def threshold_at_fpr(reals: Scores, fpr: float, others: Scores | None = None) -> float:
    """A threshold that at most `fpr` of the reals reach, as far from every image's score as that leaves it.

    The highest real that must not pass bounds it from below. From there up to the next higher real, or to one `NEIGHBOURS`
    spacing where that is farther (reals that all but tie, or none above), it takes the middle of the widest gap between
    neighbouring scores, `others` included. So no image's own score is the threshold, where the rounding of another backend or
    precision would turn the decision; the price is that it may flag fewer reals than `fpr` allows, never more.

    Args:
        reals: float[n], n at least 1.
        fpr: allowed share of the reals at or above the threshold.
        others: float[m], further scores to keep off, of generated images or further copies; they never loosen the rate.
    """
    ordered = np.sort(np.asarray(reals, np.float64))[::-1]
    allowed = int(np.floor(fpr * len(ordered) + 1e-9))
    if allowed >= len(ordered):
        return float(ordered[-1])
    refused = ordered[allowed]  # nor may any that ties with it
    below = ordered[allowed:][:NEIGHBOURS]
    end = refused + (refused - below[-1]) / max(len(below) - 1, 1)
    above = ordered[ordered > refused]
    if len(above):
        end = max(end, above[-1])
    scores = ordered if others is None else np.concatenate((ordered, np.asarray(others, np.float64)))
    edges = np.unique(np.concatenate(([refused, end], scores[(scores > refused) & (scores < end)])))
    widest = int(np.diff(edges).argmax()) if len(edges) > 1 else 0
    return float(max((edges[widest] + edges[min(widest + 1, len(edges) - 1)]) / 2, np.nextafter(refused, np.inf)))


def tpr_at_fpr(fpr: float) -> Measure:
    """Measure: share of the generated images found when at most `fpr` of these very reals are flagged.

    Every generated image above the highest real that must not pass counts, as on a ROC curve.
    """

    def measure(labels: Labels, scores: Scores) -> float:
        fakes, reals = scores[labels == 1], np.sort(scores[labels == 0])[::-1]
        if not len(fakes) or not len(reals):
            return float("nan")
        allowed = int(np.floor(fpr * len(reals) + 1e-9))
        return 1.0 if allowed >= len(reals) else float((fakes > reals[allowed]).mean())

    return measure


def balanced_accuracy(threshold: float) -> Measure:
    """Measure: mean of the shares of generated images at or above, and of reals below, `threshold`."""

    def measure(labels: Labels, scores: Scores) -> float:
        fakes, reals = scores[labels == 1], scores[labels == 0]
        if not len(fakes) or not len(reals):
            return float("nan")
        return float(((fakes >= threshold).mean() + (reals < threshold).mean()) / 2)

    return measure


def expected_calibration_error(labels: Labels, probabilities: Scores, bins: int = 15) -> float:
    """Mean distance of confidence and frequency over equally wide bins, weighted by their counts (arXiv 1706.04599)."""
    if not len(labels):
        return float("nan")
    place = np.minimum((np.asarray(probabilities, np.float64) * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    gap = np.abs(np.bincount(place, labels == 1, bins) - np.bincount(place, probabilities, bins))
    return float(gap[counts > 0].sum() / len(labels))


def roc(labels: Labels, scores: Scores) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """FPR and TPR at every distinct threshold, from (0, 0) to (1, 1), float64[k] each; empty where a class is missing."""
    fakes = int((labels == 1).sum())
    reals = len(labels) - fakes
    if not fakes or not reals:
        return np.empty(0), np.empty(0)
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)
    hits = np.cumsum(labels[order] == 1)[last]
    seen = np.arange(1, len(labels) + 1)[last]
    return np.concatenate(([0.0], (seen - hits) / reals)), np.concatenate(([0.0], hits / fakes))


def reliability(
    labels: Labels, probabilities: Scores, bins: int = 10
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Mean probability, share of generated images and count of each equally wide bin that holds any, [k] each."""
    place = np.minimum((np.asarray(probabilities, np.float64) * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    held = counts > 0
    confidence = np.bincount(place, probabilities, bins)[held] / counts[held]
    frequency = np.bincount(place, labels == 1, bins)[held] / counts[held]
    return confidence, frequency, counts[held].astype(np.int64)


class Bootstrap:
    """Percentile intervals (Efron 1979) from resamples drawn once, real and generated images each within their class.

    labels: uint8[n]; clusters: int64[n], images of one number are drawn together because they are not independent (the four
    quarters of one file); None: every image for itself.
    """

    def __init__(
        self,
        labels: Labels,
        clusters: NDArray[np.int64] | None = None,
        *,
        resamples: int = 1000,
        seed: int = 0,
        confidence: float = 0.95,
    ) -> None:
        self._labels, self._tail = labels, (1 - confidence) / 2
        self._drawn: list[NDArray[np.int64]] = []
        classes = [_grouped(np.flatnonzero(labels == label), clusters) for label in (1, 0)]
        if all(len(starts) for _, starts, _ in classes):
            rng = np.random.default_rng(seed)
            self._drawn = [np.concatenate([_draw(rng, *each) for each in classes]) for _ in range(resamples)]

    def interval(self, measure: Measure, scores: Scores) -> tuple[float, float]:
        """Lower and upper end; (NaN, NaN) where a class is missing or the measure is not defined."""
        values = np.array([measure(self._labels[rows], scores[rows]) for rows in self._drawn])
        if not len(values) or np.isnan(values).all():
            return float("nan"), float("nan")
        low, high = np.nanquantile(values, (self._tail, 1 - self._tail))
        return float(low), float(high)


def bootstrap_interval(
    measure: Measure, labels: Labels, scores: Scores, *, resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """One measure's interval, every image for itself; see `Bootstrap`."""
    return Bootstrap(labels, resamples=resamples, seed=seed, confidence=confidence).interval(measure, scores)


def _grouped(
    rows: NDArray[np.int64], clusters: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Rows ordered by cluster, where each cluster starts in them, and how long it is."""
    if clusters is None:
        return rows, np.arange(len(rows)), np.ones(len(rows), np.int64)
    rows = rows[np.argsort(clusters[rows], kind="stable")]
    _, starts, lengths = np.unique(clusters[rows], return_index=True, return_counts=True)
    return rows, starts, lengths


def _draw(
    rng: np.random.Generator, rows: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    chosen = rng.integers(len(starts), size=len(starts))
    # Rows of the chosen clusters, one after the other, without a loop: each one's start repeated, plus 0, 1, ... within it.
    counts = lengths[chosen]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    drawn: NDArray[np.int64] = rows[np.repeat(starts[chosen], counts) + within]
    return drawn


def clopper_pearson(errors: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided interval of a rate after `errors` in `trials` (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    if trials < 1 or not 0 <= errors <= trials:
        raise ValueError(f"{errors} errors in {trials} trials")
    tail = (1 - confidence) / 2
    low = 0.0 if errors == 0 else float(beta.ppf(tail, errors, trials - errors + 1))
    high = 1.0 if errors == trials else float(beta.ppf(1 - tail, errors + 1, trials - errors))
    return low, high


def trials_to_certify(rate: float, errors: int = 0, confidence: float = 0.95) -> int:
    """The least number of trials at which `errors` of them still leave the one-sided upper bound at or below `rate`.

    299 for 1% and 2,995 for 0.1% without an error.
    """
    if not 0 < rate < 1:
        raise ValueError(f"a rate of {rate} cannot be certified")
    low, high = errors, max(errors, 1)
    while clopper_pearson_upper(errors, high, confidence) > rate:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if clopper_pearson_upper(errors, middle, confidence) <= rate else (middle, high)
    return high


def clopper_pearson_upper(errors: int, trials: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of a rate after `errors` in `trials` (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    if trials < 1 or not 0 <= errors <= trials:
        raise ValueError(f"{errors} errors in {trials} trials")
    return 1.0 if errors == trials else float(beta.ppf(confidence, errors + 1, trials - errors))
