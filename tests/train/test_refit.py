"""Refit with replay: a few labels move the linear head, a flood or one reviewer moves it no further, and the replay is kept."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn")

from tests.train.refreshed import DIM, rows
from train import metrics, probe, refit
from train.embed import Embedded, Facts


def labelled(count: int, label: int = 1, seed: int = 9, spread: float = 1.0) -> Embedded:
    """A kind of image that the replay has not: far out along another axis, on the reals' side."""
    rng = np.random.default_rng(seed)
    embedding = (0.3 * spread * rng.standard_normal((count, DIM))).astype(np.float32)
    embedding[:, 0] = rng.standard_normal(count) - 3.0
    embedding[:, 1] += 5.0
    return Embedded(embedding, [Facts(f"l{seed}-{i}", label, "labels", "labelled", "ada") for i in range(count)])


TRAIN = rows(150, "t", 1)


def test_without_labels_it_is_the_probe() -> None:
    nobody = refit.weigh(labelled(0), [], TRAIN)
    weight, bias = probe.fit_linear(TRAIN.embedding, TRAIN.labels)
    found = refit.fit_linear(TRAIN, nobody)
    assert np.allclose(found.weight, weight, atol=1e-4) and np.allclose(found.bias, bias, atol=1e-4)


def test_a_few_labels_are_learned_and_the_replay_is_not_forgotten() -> None:
    champion = probe.fit(TRAIN)
    new, unseen, old = labelled(20), labelled(60, seed=10), rows(100, "v", 7)
    heads = refit.refit(champion, TRAIN, refit.weigh(new, [""] * 20, TRAIN))
    reals = old.embedding[old.labels == 0]

    def found(of: object, embedding: np.ndarray) -> float:
        scores = np.concatenate((of.raw_scores(embedding)[:, 0], of.raw_scores(reals)[:, 0]))  # type: ignore[attr-defined]
        return metrics.auroc(np.repeat([1, 0], [len(embedding), len(reals)]).astype(np.uint8), scores.astype(np.float64))

    assert found(champion, unseen.embedding) < 0.8 < 0.95 < found(heads, unseen.embedding)
    assert found(heads, old.embedding[old.labels == 1]) > 0.98
    assert heads.knn_labels.sum() == champion.knn_labels.sum() + 20, "every label is in the gallery"
    assert heads.knn_ids is not None and heads.knn_ids[-1] == "labels / labelled / l9-19", "and every row has a name"
    assert np.array_equal(heads.svm_dual, champion.svm_dual), "the one-class head learns from real images only"
    real = refit.refit(champion, TRAIN, refit.weigh(labelled(5, label=0), [""] * 5, TRAIN))
    assert not np.array_equal(real.svm_intercept, champion.svm_intercept)


def test_the_gallery_keeps_its_names_and_names_what_was_labelled() -> None:
    new = labelled(20)
    heads = refit.refit(probe.fit(TRAIN), TRAIN, refit.weigh(new, [""] * 20, TRAIN))
    assert heads.knn_ids is not None and len(heads.knn_ids) == len(heads.knn_gallery)
    assert heads.knn_ids[-20:] == tuple(probe.gallery_name(facts) for facts in new.facts)
    known = {probe.gallery_name(facts): row for row, facts in zip(probe.unit_rows(TRAIN.embedding), TRAIN.facts, strict=True)}
    for name, row in zip(heads.knn_ids[:-20], heads.knn_gallery[:-20], strict=True):
        assert np.allclose(known[name], row)


def test_look_alikes_share_one_weight_and_contradictions_teach_nothing() -> None:
    one = labelled(1).embedding
    flood = Embedded(np.concatenate((one + 0.01 * np.arange(30)[:, None], labelled(2, seed=11).embedding)).astype(np.float32),
                     [Facts(f"f{i}", 1, "labels", "g", "ada") for i in range(32)])  # fmt: skip
    weighted = refit.weigh(flood, [""] * 32, TRAIN)
    share = weighted.weights / weighted.weights.sum()
    assert share[:30].sum() == pytest.approx(1 / 3) and share[30] == pytest.approx(1 / 3)
    mixed = Embedded(flood.embedding, [*flood.facts[:29], Facts("f29", 0, "labels", "g", "bob"), *flood.facts[30:]])
    weighted = refit.weigh(mixed, [""] * 32, TRAIN)
    assert len(weighted.contradictory) == 30 and [f.key for f in weighted.rows.facts] == ["f30", "f31"]


def test_caps_of_a_reviewer_and_of_all_labels() -> None:
    many = labelled(100, spread=3.0)
    assert len(set(refit.alike(many.embedding).tolist())) == 100
    names = ["ada"] * 90 + ["bob"] * 10
    weighted = refit.weigh(many, names, TRAIN, reviewer_images=10)
    assert weighted.weights[:90].sum() == pytest.approx(weighted.weights[90:].sum())
    assert weighted.weights.sum() == pytest.approx(20 / refit.WHOLE * 150), "what ten and ten images may weigh"
    everyone = refit.weigh(many, [""] * 100, TRAIN)
    assert everyone.weights.sum() == pytest.approx(refit.MAX_SHARE * 150)
    few = refit.weigh(labelled(3, spread=3.0), [""] * 3, TRAIN)
    assert few.weights == pytest.approx([150 / refit.WHOLE] * 3)


def test_groups_are_connected_by_cosines() -> None:
    angles = np.deg2rad([0.0, 5.0, 10.0, 90.0])
    points = np.zeros((4, DIM), np.float32)
    points[:, 0], points[:, 1] = np.cos(angles), np.sin(angles)
    groups = refit.alike(points * np.array([[1], [3], [9], [2]], np.float32))
    assert groups[0] == groups[1] == groups[2] != groups[3]


def test_no_held_out_image_is_in_the_model_that_scores_it() -> None:
    new = labelled(20, spread=2.0)
    weighted = refit.weigh(new, [""] * 20, TRAIN)
    folds = refit.held_out_models(TRAIN, weighted)
    assert sorted(np.concatenate([held for held, _ in folds]).tolist()) == list(range(20))
    held, model = folds[0]
    rest = np.ones(20, np.bool_)
    rest[held] = False
    assert np.allclose(model.weight, refit.fit_linear(TRAIN, weighted, only=rest).weight)
