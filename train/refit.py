"""Refits the three heads on the replay and a few newly labelled images, weighted so that neither side drowns the other.

Ten to 150 labelled images recover much of what a new generator cost (arXiv 2501.08763, 2312.00195). Beside a replay of thousands
they would not be heard at all, and with all the weight in the world they would be all that is heard; so:

* `WHOLE` labelled images of a class count as much as all of that class's replay, and more of them no more (`MAX_SHARE`); in the
  linear head's fit what counts so weighs `EMPHASIS` times, and the regularisation is `LOOSER` times weaker than in the first fit.
  That one was chosen for sources never seen; labelled images are of the very generator that will come again. Both were chosen by
  leaving whole generators of the training sources out of the replay, and other sources of reals for the false positives
  (docs/refresh.md, "Measured");
* images that look alike to the encoder (cosine of at least `ALIKE`: re-encodings, resizes, a flood of one picture) share one
  weight;
* what one reviewer decided weighs at most as much as `REVIEWER_IMAGES` images;
* a group of look-alikes that was labelled both ways teaches nothing and is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from engine.heads import Heads, unit_rows
from train import probe, replay
from train.embed import Embedded

WHOLE = 50.0
MAX_SHARE = 1.0
EMPHASIS = 2.0
LOOSER = 3.0
ALIKE = 0.99
REVIEWER_IMAGES = 50.0
FOLDS = 5

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Weighted:
    """Labelled images that teach: rows, the weight of each (in replayed images of its class) and its group of look-alikes."""

    rows: Embedded
    weights: Floats
    groups: NDArray[np.int64]
    contradictory: list[str]
    """Keys of what was left out."""


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A linear head: raw score = embedding @ weight + bias."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    def __call__(self, embedding: NDArray[np.float32]) -> Floats:
        """float64[n] logits of embeddings float32[n, 192]."""
        scores: Floats = embedding.astype(np.float64) @ self.weight.astype(np.float64) + float(self.bias)
        return scores


def weigh(labelled: Embedded, reviewers: Sequence[str], train: Embedded, reviewer_images: float = REVIEWER_IMAGES) -> Weighted:
    """Weights of labelled images by the rules above. `reviewers`: who decided each row; "" is nobody, and under no cap."""
    groups = alike(labelled.embedding)
    labels = labelled.labels
    both = {group for group in set(groups.tolist()) if len(set(labels[groups == group].tolist())) > 1}
    kept = np.array([group not in both for group in groups], np.bool_)
    rows, groups, labels = labelled.where(kept), groups[kept], labels[kept]
    names = [name for name, keep in zip(reviewers, kept, strict=True) if keep]
    sizes = Counter(groups.tolist())
    images = np.array([1.0 / sizes[group] for group in groups.tolist()], np.float64)
    for name in set(names) - {""}:
        mine = np.array([other == name for other in names])
        images[mine] *= min(1.0, reviewer_images / images[mine].sum())
    weights = images.copy()
    for label in (0, 1):
        of_class = labels == label
        if of_class.any():
            share = min(images[of_class].sum() / WHOLE, MAX_SHARE)
            weights[of_class] *= share * int((train.labels == label).sum()) / images[of_class].sum()
    contradictory = [facts.key for facts, keep in zip(labelled.facts, kept, strict=True) if not keep]
    return Weighted(rows, weights, groups, contradictory)


def alike(embedding: NDArray[np.float32], least: float = ALIKE) -> NDArray[np.int64]:
    """int64[n]: the same number for rows connected by cosines of at least `least`."""
    unit = unit_rows(embedding)
    groups = np.arange(len(unit), dtype=np.int64)
    for row in range(len(unit)):
        near = np.flatnonzero(unit[: row + 1] @ unit[row] >= least)
        merged = np.unique(groups[near])
        groups[np.isin(groups, merged)] = merged[0]
    return groups


def fit_linear(train: Embedded, labelled: Weighted, c: float = probe.C, only: NDArray[np.bool_] | None = None) -> Linear:
    """The linear head on replay and labelled images (those for which `only` holds). c: inverse regularisation of the first fit,
    `LOOSER` here where there are labels."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    chosen = np.ones(len(labelled.weights), np.bool_) if only is None else only
    labels = np.concatenate((train.labels, labelled.rows.labels[chosen]))
    # The classes of the replay weigh the same, as class_weight="balanced" makes them; a label weighs in units of its class.
    share = train.labels.mean()
    balance = np.where(labels == 1, 0.5 / share, 0.5 / (1 - share))
    weights = np.concatenate((np.ones(len(train.facts)), EMPHASIS * labelled.weights[chosen])) * balance
    embedding = np.concatenate((train.embedding, labelled.rows.embedding[chosen])).astype(np.float64)
    model = LogisticRegression(C=c * (LOOSER if chosen.any() else 1.0), max_iter=probe.MAX_ITER)
    # One thread: sums in one order, so that a job that is started again ends with the same bits.
    with threadpool_limits(1):
        model.fit(embedding, labels, sample_weight=weights)
    return Linear(model.coef_[0].astype(np.float32), np.asarray(model.intercept_[0], np.float32))


def refit(champion: Heads, train: Embedded, labelled: Weighted, c: float = probe.C) -> Heads:
    """All three heads. The gallery takes every labelled image beside a fair choice of the replay; the one-class head is refitted
    only where real images were labelled."""
    linear = fit_linear(train, labelled, c)
    everything = replay.joined([train, labelled.rows])
    chosen = probe.fair_choice(train, probe.GALLERY_PER_CLASS, seed=0)
    chosen = np.concatenate((chosen, np.arange(len(train.facts), len(everything.facts))))
    heads = replace(
        champion,
        linear_weight=linear.weight,
        linear_bias=linear.bias,
        knn_gallery=unit_rows(everything.embedding[chosen]),
        knn_labels=everything.labels[chosen],
        knn_ids=tuple(probe.gallery_name(everything.facts[row]) for row in chosen.tolist()),
    )
    new_reals = labelled.rows.embedding[labelled.rows.labels == 0]
    if not len(new_reals):
        return heads
    vectors, dual, intercept = probe.fit_one_class(np.concatenate((train.embedding[train.labels == 0], new_reals)))
    return replace(heads, svm_vectors=vectors, svm_dual=dual, svm_intercept=intercept, svm_gamma=1.0 / train.embedding.shape[1],
                   svm_degree=probe.DEGREE, svm_coef0=probe.COEF0)  # fmt: skip


def held_out_models(train: Embedded, labelled: Weighted, c: float = probe.C) -> list[tuple[NDArray[np.int64], Linear]]:
    """Of each fold the labelled rows it holds out, and a linear head fitted without them. Look-alikes share a fold."""
    names = np.unique(labelled.groups)
    order = np.random.default_rng(59).permutation(len(names))
    fold_of = dict(zip(names[order].tolist(), (np.arange(len(names)) % FOLDS).tolist(), strict=True))
    folds = np.array([fold_of[group] for group in labelled.groups.tolist()], np.int64)
    return [
        (np.flatnonzero(folds == fold), fit_linear(train, labelled, c, folds != fold))
        for fold in range(FOLDS)
        if (folds == fold).any()
    ]
