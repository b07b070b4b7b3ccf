"""Measures against slow implementations from their definitions and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train import metrics


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    n = draw(st.integers(2, 30))
    labels = np.array(draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)), np.uint8)
    labels[0], labels[1] = 0, 1
    return labels, np.array(draw(st.lists(st.integers(-5, 5), min_size=n, max_size=n)), np.float64)


@given(scored())
@settings(max_examples=60)
def test_auroc_counts_pairs(case: tuple[np.ndarray, np.ndarray]) -> None:
    labels, scores = case
    pairs = [(f > r) + (f == r) / 2 for f in scores[labels == 1] for r in scores[labels == 0]]
    assert metrics.auroc(labels, scores) == pytest.approx(np.mean(pairs))


@given(scored())
@settings(max_examples=60)
def test_average_precision_by_thresholds(case: tuple[np.ndarray, np.ndarray]) -> None:
    labels, scores = case
    expected, recall_before = 0.0, 0.0
    if labels.min() == labels.max():
        return
    for t in sorted(set(scores.tolist()), reverse=True):
        hit = scores >= t
        recall = labels[hit].sum() / labels.sum()
        expected += (recall - recall_before) * labels[hit].mean()
        recall_before = recall
    assert metrics.average_precision(labels, scores) == pytest.approx(expected)


def test_ranking_agrees_with_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200).astype(np.uint8)
    scores = np.round(rng.normal(labels, 1.0), 1)
    assert metrics.auroc(labels, scores) == pytest.approx(sklearn.roc_auc_score(labels, scores))
    assert metrics.average_precision(labels, scores) == pytest.approx(sklearn.average_precision_score(labels, scores))


@given(scored(), st.sampled_from([0.001, 0.01, 0.1, 0.5]))
@settings(max_examples=60)
def test_tpr_at_fpr_is_the_best_threshold_that_keeps_the_rate(case: tuple[np.ndarray, np.ndarray], fpr: float) -> None:
    labels, scores = case
    fakes, reals = scores[labels == 1], scores[labels == 0]
    candidates = [*np.unique(scores), scores.max() + 1]
    allowed = [t for t in candidates if (reals >= t).mean() <= fpr]
    assert metrics.tpr_at_fpr(fpr)(labels, scores) == pytest.approx(max((fakes >= t).mean() for t in allowed))


@given(scored(), st.sampled_from([0.001, 0.01, 0.1, 0.5, 1.0]), st.sampled_from([1.0, 1e-3, 1e-12]))
@settings(max_examples=100)
def test_a_threshold_keeps_the_rate_and_lies_on_no_score(case: tuple[np.ndarray, np.ndarray], fpr: float, scale: float) -> None:
    labels, scores = case
    scores = scores * scale + 0.7
    reals = scores[labels == 0]
    threshold = metrics.threshold_at_fpr(reals, fpr, scores)
    assert (reals >= threshold).mean() <= fpr
    assert fpr == 1.0 or threshold not in scores


def test_a_threshold_lies_midway_to_the_next_higher_real_and_off_the_generated_ones() -> None:
    reals = np.array([0.9, 0.8, *np.linspace(0.1, 0.2, 98)])
    assert metrics.threshold_at_fpr(reals, 0.02) == pytest.approx(0.5)
    assert metrics.threshold_at_fpr(reals, 0.01) == pytest.approx((0.8 + 0.9) / 2)
    # A generated image in the middle: the wider of the two gaps beside it, whatever lies outside.
    assert metrics.threshold_at_fpr(reals, 0.02, np.array([0.05, 0.4, 0.95])) == pytest.approx(0.6)


def test_a_threshold_above_all_reals_keeps_the_distance_that_is_usual_there() -> None:
    reals = np.linspace(0.0, 0.9, 91)
    assert metrics.threshold_at_fpr(reals, 0.001) == pytest.approx(0.905)
    assert metrics.threshold_at_fpr(np.array([0.3]), 0.001) == np.nextafter(0.3, 1)
    assert metrics.threshold_at_fpr(np.full(5, 0.3), 0.1) == np.nextafter(0.3, 1)


def test_reals_that_all_but_tie_at_the_boundary_are_both_kept_off() -> None:
    reals = np.array([*np.linspace(0.0, 0.8, 81), 0.8 + 1e-9])
    threshold = metrics.threshold_at_fpr(reals, 1 / 82)
    assert abs(reals - threshold).min() > 0.004 and (reals >= threshold).sum() == 0


def test_ece_by_hand() -> None:
    labels = np.array([1, 0, 1, 1], np.uint8)
    probabilities = np.array([0.9, 0.9, 0.1, 1.0])
    # With ten bins: 0.9, 0.9 and 1.0 share the last one (mean confidence 2.8/3, frequency 2/3); 0.1 stands alone.
    expected = (3 * abs(2.8 / 3 - 2 / 3) + 1 * abs(0.1 - 1.0)) / 4
    assert metrics.expected_calibration_error(labels, probabilities, bins=10) == pytest.approx(expected)


def test_balanced_accuracy_by_hand() -> None:
    labels = np.array([1, 1, 0, 0, 0], np.uint8)
    assert metrics.balanced_accuracy(0.5)(labels, np.array([0.5, 0.4, 0.1, 0.6, 0.2])) == pytest.approx((1 / 2 + 2 / 3) / 2)


@pytest.mark.parametrize(("reals", "bound"), [(299, 0.01), (2995, 0.001)])
def test_certifying_a_rate_takes_this_many_reals_without_an_error(reals: int, bound: float) -> None:
    assert metrics.clopper_pearson_upper(0, reals) <= bound < metrics.clopper_pearson_upper(0, reals - 1)


@given(scored())
@settings(max_examples=40)
def test_roc_by_thresholds_and_its_area(case: tuple[np.ndarray, np.ndarray]) -> None:
    labels, scores = case
    fpr, tpr = metrics.roc(labels, scores)
    wanted = [(np.mean(scores[labels == 0] >= t), np.mean(scores[labels == 1] >= t)) for t in sorted(set(scores), reverse=True)]
    np.testing.assert_allclose(np.stack((fpr[1:], tpr[1:]), axis=1), wanted)
    assert (fpr[0], tpr[0]) == (0, 0) and np.trapezoid(tpr, fpr) == pytest.approx(metrics.auroc(labels, scores))
    assert len(metrics.roc(np.ones(3, np.uint8), np.ones(3))[0]) == 0


@given(scored(), st.integers(1, 12))
@settings(max_examples=40)
def test_reliability_by_bins_and_its_mean_gap(case: tuple[np.ndarray, np.ndarray], bins: int) -> None:
    labels, scores = case
    p = (scores + 5) / 10
    found = metrics.reliability(labels, p, bins)
    rows = []
    for i in range(bins):
        inside = [k for k in range(len(p)) if min(int(p[k] * bins), bins - 1) == i]
        if inside:
            rows.append((np.mean(p[inside]), np.mean(labels[inside]), len(inside)))
    np.testing.assert_allclose(np.stack(found, axis=1), rows)
    gap = sum(abs(c - f) * n for c, f, n in rows) / len(p)
    assert metrics.expected_calibration_error(labels, p, bins) == pytest.approx(gap)


def test_clopper_pearson_inverts_the_binomial() -> None:
    from scipy.stats import binom

    upper = metrics.clopper_pearson_upper(3, 100)
    assert binom.cdf(3, 100, upper) == pytest.approx(0.05, abs=1e-9)
    assert metrics.clopper_pearson_upper(5, 5) == 1.0


def test_bootstrap_holds_the_value_and_narrows_with_more_images() -> None:
    rng = np.random.default_rng(1)
    widths = []
    for n in (40, 640):
        labels = np.repeat([0, 1], n).astype(np.uint8)
        scores = rng.normal(labels, 1.0)
        low, high = metrics.bootstrap_interval(metrics.auroc, labels, scores, resamples=200)
        assert low < metrics.auroc(labels, scores) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    assert np.isnan(metrics.bootstrap_interval(metrics.auroc, np.ones(3, np.uint8), np.ones(3))[0])


def test_clopper_pearson_inverts_the_binomial_on_both_sides() -> None:
    from scipy.stats import binom

    low, high = metrics.clopper_pearson(7, 60)
    assert binom.sf(6, 60, low) == pytest.approx(0.025, abs=1e-9) and binom.cdf(7, 60, high) == pytest.approx(0.025, abs=1e-9)
    assert metrics.clopper_pearson(0, 9)[0] == 0.0 and metrics.clopper_pearson(9, 9)[1] == 1.0


@pytest.mark.parametrize(("rate", "errors"), [(0.01, 0), (0.001, 0), (0.01, 2), (0.2, 1)])
def test_trials_to_certify_is_the_least_number(rate: float, errors: int) -> None:
    n = metrics.trials_to_certify(rate, errors)
    assert metrics.clopper_pearson_upper(errors, n) <= rate < metrics.clopper_pearson_upper(errors, n - 1)
    assert errors or n == {0.01: 299, 0.001: 2995}[rate]


def test_the_bootstrap_is_the_plain_one_where_nothing_is_clustered() -> None:
    """The oracle resamples by hand, with the same draws."""
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 2, 40).astype(np.uint8)
    scores = rng.normal(labels, 1.0)
    draws, values = np.random.default_rng(9), []
    for _ in range(60):
        rows: list[int] = []
        for label in (1, 0):
            own = [i for i in range(40) if labels[i] == label]
            rows += [own[k] for k in draws.integers(len(own), size=len(own))]
        pairs = [(scores[f] > scores[r]) + (scores[f] == scores[r]) / 2 for f in rows for r in rows if labels[f] > labels[r]]
        values.append(np.mean(pairs))
    got = metrics.bootstrap_interval(metrics.auroc, labels, scores, resamples=60, seed=9)
    assert got == pytest.approx(tuple(np.quantile(values, (0.025, 0.975))))


def test_images_of_one_cluster_are_drawn_together() -> None:
    labels = np.repeat([1, 0], (12, 8)).astype(np.uint8)
    clusters = np.array([0, 5, 0, 5, 0, 5, 7, 7, 7, 8, 8, 8, *range(20, 28)])
    rows = np.arange(20.0)
    seen: list[set[float]] = []

    def remember(_: np.ndarray, scores: np.ndarray) -> float:
        chosen = scores[scores < 12].astype(int)
        counts = [np.sum(chosen == i) for i in range(12)]
        assert all(counts[i] == counts[j] for i in range(12) for j in range(12) if clusters[i] == clusters[j])
        assert len(scores) == 20
        seen.append(set(scores.tolist()))
        return 0.5

    assert metrics.Bootstrap(labels, clusters, resamples=50).interval(remember, rows) == (0.5, 0.5)
    assert len({frozenset(s) for s in seen}) > 10


def test_repeating_every_image_narrows_the_interval_only_without_clusters() -> None:
    rng = np.random.default_rng(5)
    labels = np.repeat([0, 1], 40).astype(np.uint8)
    scores = rng.normal(labels, 1.0)
    four, files = np.repeat(labels, 4), np.repeat(np.arange(80), 4)

    def width(bootstrap: metrics.Bootstrap, values: np.ndarray) -> float:
        low, high = bootstrap.interval(metrics.auroc, values)
        return high - low

    once = width(metrics.Bootstrap(labels, resamples=300), scores)
    naive = width(metrics.Bootstrap(four, resamples=300), np.repeat(scores, 4))
    clustered = width(metrics.Bootstrap(four, files, resamples=300), np.repeat(scores, 4))
    assert naive < 0.65 * once and clustered == pytest.approx(once, rel=0.3)
