"""Raw scores against scikit-learn's own estimators, and for every embedding that may come."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engine.heads import EMBEDDING_DIM, HEADS, Heads, HeadsError, unit_rows
from tests.engine.bundles import random_heads


def clouds(seed: int, count: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Two overlapping clouds of embeddings and their labels (1 = AI-generated)."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % 3 == 0).astype(np.uint8)
    centre = rng.standard_normal(EMBEDDING_DIM)
    embeddings = rng.standard_normal((count, EMBEDDING_DIM)) + np.where(labels[:, None] == 1, centre, -centre)
    return embeddings.astype(np.float32), labels


def test_scores_are_those_of_scikit_learn() -> None:
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import OneClassSVM

    embeddings, every_label = clouds(0, 320)
    train, labels, queries = embeddings[:120], every_label[:120], embeddings[120:]
    linear = LogisticRegression(C=0.316, class_weight="balanced", max_iter=1500).fit(train, labels)
    knn = KNeighborsClassifier(n_neighbors=1, metric="cosine").fit(train, labels)
    svm = OneClassSVM(nu=0.1, kernel="poly", degree=3, gamma="auto", coef0=0.0).fit(train[labels == 0])
    heads = Heads(
        linear_weight=linear.coef_[0].astype(np.float32),
        linear_bias=np.float32(linear.intercept_[0]),  # type: ignore[arg-type] # a scalar is taken too
        knn_gallery=unit_rows(train),
        knn_labels=labels,
        svm_vectors=svm.support_vectors_.astype(np.float32),
        svm_dual=svm.dual_coef_[0].astype(np.float32),
        svm_intercept=np.array(svm.intercept_[0], np.float32),
        svm_gamma=1 / EMBEDDING_DIM,
        svm_degree=3,
        svm_coef0=0.0,
    )
    raw = heads.raw_scores(queries)
    np.testing.assert_allclose(raw[:, 0], linear.decision_function(queries), atol=1e-4)
    np.testing.assert_array_equal(raw[:, 1] > 0, knn.predict(queries) == 1)
    # Minus: scikit-learn's +1 is an inlier, so a real image.
    np.testing.assert_allclose(raw[:, 2], -svm.decision_function(queries), rtol=1e-4, atol=1e-4)
    assert ((raw[:, 2] > 0) == (svm.predict(queries) == -1)).all()
    assert 0 < (raw[:, 1] > 0).sum() < 200 and 0 < (raw[:, 2] > 0).sum() < 200


def test_the_knn_margin_is_that_of_the_nearest_of_each_class() -> None:
    heads = random_heads(4)
    queries, _ = clouds(2, 20)
    for query, score in zip(queries, heads.raw_scores(queries)[:, 1], strict=True):
        cosines = [float(row @ query / np.linalg.norm(query)) for row in heads.knn_gallery.astype(np.float64)]
        best = [max(c for c, label in zip(cosines, heads.knn_labels, strict=True) if label == want) for want in (1, 0)]
        assert score == pytest.approx(best[0] - best[1], abs=1e-5)


def test_every_head_grows_towards_generated_images() -> None:
    """A generated image from the gallery scores above 0 on kNN; one pushed along the weights scores higher on linear."""
    heads = random_heads(0)
    fake, real = heads.knn_gallery[heads.knn_labels == 1][:1], heads.knn_gallery[heads.knn_labels == 0][:1]
    assert heads.raw_scores(fake)[0, 1] > 0 > heads.raw_scores(real)[0, 1]
    step = heads.linear_weight[None]
    assert heads.raw_scores(fake + step)[0, 0] > heads.raw_scores(fake)[0, 0]
    # One-class SVM: far along a support vector of the reals is an inlier, its opposite an outlier.
    along = 10 * heads.svm_vectors[:1]
    assert heads.raw_scores(along)[0, 2] < 0 < heads.raw_scores(-along)[0, 2]


any_float = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, (3, EMBEDDING_DIM), elements=any_float), st.integers(1, 6))
def test_finite_embeddings_have_finite_scores(embedding: np.ndarray, degree: int) -> None:
    with np.errstate(all="raise", under="ignore", over="raise"):
        raw = replace(random_heads(0), svm_degree=degree).raw_scores(embedding)
    assert raw.dtype == np.float32 and raw.shape == (3, len(HEADS))
    assert np.isfinite(raw).all()
    assert (np.abs(raw[:, 1]) <= 2.001).all()


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_broken_embedding_is_nan_in_its_row_only(broken: float) -> None:
    heads = random_heads(0)
    embedding, _ = clouds(3, 4)
    expected = heads.raw_scores(embedding)
    embedding[2, 100] = broken
    raw = heads.raw_scores(embedding)
    assert np.isnan(raw[2]).all()
    np.testing.assert_array_equal(raw[[0, 1, 3]], expected[[0, 1, 3]])


def test_no_rows_and_all_zero_rows() -> None:
    heads = random_heads(0)
    assert heads.raw_scores(np.empty((0, EMBEDDING_DIM), np.float32)).shape == (0, 3)
    zero = heads.raw_scores(np.zeros((1, EMBEDDING_DIM), np.float32))[0]
    assert zero[0] == heads.linear_bias and zero[1] == 0.0 and zero[2] == -heads.svm_intercept


@pytest.mark.parametrize("embedding", [np.zeros((2, 191), np.float32), np.zeros(192, np.float32), np.zeros((2, 192), np.int32)])
def test_other_embeddings_are_refused(embedding: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected embeddings as float \[n, 192\]"):
        random_heads(0).raw_scores(embedding)


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"linear_weight": np.zeros(191, np.float32)}, "linear_weight"),
        ({"linear_weight": np.zeros(192, np.float64)}, "linear_weight"),
        ({"linear_bias": np.zeros(1, np.float32)}, "linear_bias"),
        ({"linear_bias": 0.5}, "linear_bias"),
        ({"svm_dual": np.full(24, np.nan, np.float32)}, "svm_dual"),
        ({"svm_dual": np.zeros(23, np.float32)}, "svm_dual"),
        ({"svm_vectors": np.zeros((0, 192), np.float32), "svm_dual": np.zeros(0, np.float32)}, "svm_vectors"),
        ({"knn_labels": np.zeros(48, np.uint8)}, "knn_labels"),
        ({"knn_labels": np.arange(48, dtype=np.uint8) % 3}, "knn_labels"),
        ({"knn_labels": np.zeros(48, np.int64)}, "knn_labels"),
        ({"knn_gallery": np.ones((48, 192), np.float32)}, "knn_gallery"),
        ({"knn_gallery": np.ones((48,), np.float32)}, "knn_gallery"),
        ({"knn_ids": ("one",)}, "knn_ids"),
        ({"svm_gamma": 0.0}, "svm_gamma"),
        ({"svm_gamma": float("inf")}, "svm_gamma"),
        ({"svm_degree": 0}, "svm_degree"),
        ({"svm_coef0": float("nan")}, "svm_coef0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_arrays_are_named(changes: dict[str, object], tensor: str) -> None:
    with pytest.raises(HeadsError) as caught:
        replace(random_heads(0), **changes)
    assert caught.value.tensor == tensor
    assert str(caught.value).startswith(f"{tensor}: ")
