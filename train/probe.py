"""Fits the three heads on embeddings, with the paper's settings, and exports them as arrays (arXiv 2407.20337, section 4.1)."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.heads import Heads, unit_rows
from train.embed import Embedded, Facts

C = 0.316
GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
SOURCE_FOLDS = 4
MAX_ITER = 1500
NU = 0.1
DEGREE = 3
COEF0 = 0.0
GALLERY_PER_CLASS = 1500
MAX_NAME_CHARS = 200
SHA256 = re.compile(r"\b([0-9a-f]{16})[0-9a-f]{48}\b")


def fit(embedded: Embedded, *, gallery_per_class: int = GALLERY_PER_CLASS, seed: int = 0, c: float = C) -> Heads:
    """All three heads from one embedded training set. c: the linear head's inverse regularisation.

    Raises ValueError where a class is missing.
    """
    labels = embedded.labels
    if set(np.unique(labels).tolist()) != {0, 1}:
        raise ValueError("the probe needs real and generated images")
    weight, bias = fit_linear(embedded.embedding, labels, c)
    gallery = fair_choice(embedded, gallery_per_class, seed)
    vectors, dual, intercept = fit_one_class(embedded.embedding[labels == 0])
    return Heads(
        linear_weight=weight,
        linear_bias=bias,
        knn_gallery=unit_rows(embedded.embedding[gallery]),
        knn_labels=labels[gallery],
        knn_ids=tuple(gallery_name(embedded.facts[row]) for row in gallery.tolist()),
        svm_vectors=vectors,
        svm_dual=dual,
        svm_intercept=intercept,
        svm_gamma=1.0 / embedded.embedding.shape[1],
        svm_degree=DEGREE,
        svm_coef0=COEF0,
    )


def gallery_name(facts: Facts) -> str:
    """What a neighbour in the gallery is called where a decision is explained: source, generator and key, one printable line.

    Of a whole SHA-256 the first 16 digits; who decided a label is not in it.
    """
    text = " / ".join((facts.source, facts.generator, SHA256.sub(r"\1", facts.key)))
    return "".join(c if c.isprintable() else " " for c in text)[:MAX_NAME_CHARS]


def fit_linear(
    embedding: NDArray[np.float32], labels: NDArray[np.uint8], c: float = C
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logistic regression on raw features: weight float32[192] and bias float32[]; its logit is larger for generated images."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, class_weight="balanced", max_iter=MAX_ITER)
    model.fit(embedding.astype(np.float64), labels)
    return model.coef_[0].astype(np.float32), np.asarray(model.intercept_[0], np.float32)


def choose_c(embedded: Embedded, grid: Sequence[float] = GRID) -> tuple[float, dict[float, float]]:
    """The regularisation that ranks images of sources left out of the fit best, and the mean AUROC of each of `grid`.

    Sources of each class are dealt to at most four folds, the largest first to the smallest fold, so that both classes of a fold
    are strange to the head that is fitted without it. Raises ValueError where a class has a single source.
    """
    from train.metrics import auroc

    labels, sources = embedded.labels, np.array([f.source for f in embedded.facts])
    counts = [Counter(sources[labels == label].tolist()) for label in (0, 1)]
    folds = min(SOURCE_FOLDS, *map(len, counts))
    if folds < 2:
        raise ValueError("choosing C takes two sources of each class")
    fold_of: dict[tuple[int, str], int] = {}
    for label, counted in enumerate(counts):
        sizes = [0] * folds
        for source, size in sorted(counted.items(), key=lambda pair: (-pair[1], pair[0])):
            smallest = sizes.index(min(sizes))
            fold_of[label, source] = smallest
            sizes[smallest] += size
    fold = np.array([fold_of[f.label, f.source] for f in embedded.facts])
    ranked = {}
    for c in grid:
        found = []
        for held in range(folds):
            weight, bias = fit_linear(embedded.embedding[fold != held], labels[fold != held], c)
            scores = embedded.embedding[fold == held].astype(np.float64) @ weight.astype(np.float64) + float(bias)
            found.append(auroc(labels[fold == held], scores))
        ranked[c] = float(np.mean(found))
    return max(ranked, key=lambda c: (ranked[c], -c)), ranked


def fit_one_class(reals: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """One-class SVM on reals only: support vectors float32[s, 192], dual float32[s], intercept float32[].

    scikit-learn's decision is positive for inliers, that is reals; `engine.heads` turns the sign, so that larger means generated.
    """
    from sklearn.svm import OneClassSVM

    model = OneClassSVM(nu=NU, kernel="poly", degree=DEGREE, gamma="auto", coef0=COEF0)
    model.fit(reals.astype(np.float64))
    return (
        model.support_vectors_.astype(np.float32),
        model.dual_coef_[0].astype(np.float32),
        np.asarray(model.intercept_[0], np.float32),
    )


def fair_choice(embedded: Embedded, per_class: int, seed: int) -> NDArray[np.int64]:
    """Rows of the gallery: at most `per_class` of each class, drawn in turn from its (source, generator) pairs.

    A small source is taken whole before a large one fills the rest, so that no generator is crowded out by size.
    """
    rng = np.random.default_rng((seed, 47))
    chosen: list[int] = []
    for label in (0, 1):
        by_source: dict[tuple[str, str], list[int]] = defaultdict(list)
        for row in rng.permutation(len(embedded.facts)):
            facts = embedded.facts[row]
            if facts.label == label:
                by_source[(facts.source, facts.generator)].append(int(row))
        queues = [by_source[key] for key in sorted(by_source)]
        taken: list[int] = []
        while len(taken) < per_class and any(queues):
            for queue in queues:
                if queue and len(taken) < per_class:
                    taken.append(queue.pop())
        chosen += taken
    return np.sort(np.array(chosen, np.int64))
