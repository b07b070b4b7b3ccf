"""Heads as arrays agree with scikit-learn's own scores, signs included; the gallery is chosen fairly."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn")

from train import probe
from train.embed import Embedded, Facts


def _clouds(per_source: dict[tuple[int, str], int], seed: int = 0) -> Embedded:
    """Points around one centre a class; facts by (label, source)."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 1, (2, 192))
    rows, facts = [], []
    for (label, source), n in per_source.items():
        rows.append(rng.normal(centres[label], 1.0, (n, 192)))
        facts += [Facts(f"{source}-{i}", label, source, "g", source) for i in range(n)]
    return Embedded(np.concatenate(rows).astype(np.float32), facts)


TRAIN = {(0, "cameras"): 150, (0, "phones"): 30, (1, "big"): 140, (1, "small"): 12}


@pytest.fixture(scope="module")
def fitted():  # type: ignore[no-untyped-def]
    return probe.fit(_clouds(TRAIN)), _clouds({(0, "x"): 20, (1, "y"): 20}, seed=3)


def test_linear_is_scikit_learns_logit(fitted) -> None:  # type: ignore[no-untyped-def]
    from sklearn.linear_model import LogisticRegression

    heads, test = fitted
    data = _clouds(TRAIN)
    model = LogisticRegression(C=0.316, class_weight="balanced", max_iter=1500).fit(
        data.embedding.astype(np.float64), data.labels
    )
    np.testing.assert_allclose(
        heads.raw_scores(test.embedding)[:, 0], model.decision_function(test.embedding), atol=1e-4, rtol=1e-4
    )


def test_knn_answers_as_scikit_learns_nearest_neighbour(fitted) -> None:  # type: ignore[no-untyped-def]
    from sklearn.neighbors import KNeighborsClassifier

    heads, test = fitted
    data = _clouds(TRAIN)
    model = KNeighborsClassifier(1, metric="cosine").fit(data.embedding, data.labels)
    assert len(heads.knn_labels) == len(data.facts)
    assert np.array_equal((heads.raw_scores(test.embedding)[:, 1] > 0).astype(int), model.predict(test.embedding))


def test_one_class_is_minus_scikit_learns_decision_and_sees_reals_only(fitted) -> None:  # type: ignore[no-untyped-def]
    from sklearn.svm import OneClassSVM

    heads, test = fitted
    data = _clouds(TRAIN)
    reals = data.embedding[data.labels == 0].astype(np.float64)
    model = OneClassSVM(nu=0.1, kernel="poly", degree=3, gamma="auto", coef0=0).fit(reals)
    decision = model.decision_function(test.embedding.astype(np.float64))
    got = heads.raw_scores(test.embedding)[:, 2]
    np.testing.assert_allclose(got, -decision, atol=1e-4 * np.abs(decision).max())
    # scikit-learn's -1 is an outlier, so generated: our score must be positive exactly there.
    assert np.array_equal(got > 0, model.predict(test.embedding.astype(np.float64)) == -1)


def test_the_gallery_takes_small_sources_whole_and_both_classes_alike() -> None:
    data = _clouds(TRAIN)
    rows = probe.fair_choice(data, 40, seed=1)
    chosen = [data.facts[row] for row in rows]
    counts = {source: sum(f.source == source for f in chosen) for source in ("cameras", "phones", "big", "small")}
    assert counts == {"cameras": 20, "phones": 20, "big": 28, "small": 12}
    assert np.array_equal(rows, probe.fair_choice(data, 40, seed=1)) and len(set(rows.tolist())) == 80


def test_rows_of_the_gallery_are_named_by_what_they_are(fitted) -> None:  # type: ignore[no-untyped-def]
    heads, _ = fitted
    data = _clouds(TRAIN)
    assert heads.knn_ids[0] == "cameras / g / cameras-0" and len(set(heads.knn_ids)) == len(data.facts)
    # Row by row the name is of the embedding that stands there.
    row = heads.knn_ids.index("small / g / small-3")
    number = [f.key for f in data.facts].index("small-3")
    unit = data.embedding[number] / np.linalg.norm(data.embedding[number])
    np.testing.assert_allclose(heads.knn_gallery[row], unit, atol=1e-6)
    odd = Facts("a\nb" + "x" * 500, 1, "s", "g\x1b[2J", "s")
    assert probe.gallery_name(odd).startswith("s / g [2J / a bx") and len(probe.gallery_name(odd)) == 200
    digest = "0123456789abcdef" * 4
    quarter = Facts(f"{digest}#2", 1, "s", "g", "/private/folder")
    assert probe.gallery_name(quarter) == "s / g / 0123456789abcdef#2", "no folder, and of a digest its first digits"


def test_one_class_only_is_refused() -> None:
    with pytest.raises(ValueError, match="real and generated"):
        probe.fit(_clouds({(1, "a"): 5}))


def test_c_is_chosen_by_sources_that_were_left_out() -> None:
    """Each source has a mark of its own, which a loose fit learns by heart; what all share is weak."""
    rng = np.random.default_rng(3)
    rows, facts = [], []
    for label in (0, 1):
        for source in range(4):
            vectors = rng.standard_normal((40, 192)) + (2 * label - 1) * 0.06
            vectors[:, 10 * (4 * label + source) : 10 * (4 * label + source) + 10] += 3
            rows.append(vectors)
            facts += [Facts(f"{label}{source}{i}", label, f"{label}-{source}", "g", "s") for i in range(40)]
    data = Embedded(np.concatenate(rows).astype(np.float32), facts)
    chosen, ranked = probe.choose_c(data, (1e-4, 1e-2, 10.0))
    assert chosen == max(ranked, key=lambda c: ranked[c]) and ranked[chosen] > ranked[10.0]
    lone = data.where(np.array([f.source in ("0-0", "1-0", "1-1") for f in facts]))
    with pytest.raises(ValueError, match="two sources of each class"):
        probe.choose_c(lone)
