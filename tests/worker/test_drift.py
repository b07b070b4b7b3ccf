"""Drift figures against slow formulas; what fades, what is left out, and that a real bundle's reference reaches the gauges."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from engine.heads import HEADS
from engine.manifest import Histogram, Reference
from tests.engine.bundles import random_bundle
from worker import drift
from worker.drift import DriftMonitor
from worker.metrics import Metrics

EDGES = tuple(np.linspace(0, 1, 11).tolist())
COUNTS = (40, 30, 20, 10, 10, 10, 10, 20, 20, 30)


def reference() -> Reference:
    scores = {head: Histogram(edges=EDGES, counts=COUNTS) for head in HEADS}
    return Reference(images=200, embedding_mean=(1.0,) * 192, embedding_std=(2.0,) * 192, scores=scores)


def like_the_reference(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    bins = rng.choice(10, (n, 3), p=np.array(COUNTS) / sum(COUNTS))
    scores = (bins + rng.uniform(0, 1, (n, 3))) / 10
    return rng.normal(1.0, 2.0, (n, 192)).astype(np.float32), scores.astype(np.float32)


@pytest.fixture
def monitor() -> DriftMonitor:
    return DriftMonitor(reference(), Metrics())


def test_images_like_the_references_move_nothing(monitor: DriftMonitor) -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        monitor.see(*like_the_reference(rng, 32))
    assert monitor.embedding() < 0.1
    assert all(figure < 0.1 for figure in monitor.scores().values())


def test_figures_are_the_formulas(monitor: DriftMonitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "MEMORY_CROPS", 10**12)  # nothing fades
    rng = np.random.default_rng(2)
    embeddings, scores = rng.normal(3, 1, (500, 192)).astype(np.float32), rng.beta(2, 5, (500, 3)).astype(np.float32)
    for start in range(0, 500, 50):
        monitor.see(embeddings[start : start + 50], scores[start : start + 50])
    shifts = [(sum(float(v) for v in embeddings[:, d]) / 500 - 1.0) / 2.0 for d in range(192)]
    assert monitor.embedding() == pytest.approx(math.sqrt(sum(s * s for s in shifts) / 192), rel=1e-6)
    for column, head in enumerate(HEADS):
        psi = 0.0
        for b in range(10):
            last = b == 9
            seen = sum(EDGES[b] <= float(v) < EDGES[b + 1] or (last and float(v) == 1.0) for v in scores[:, column]) + 0.5
            p, q = seen / (500 + 5), (COUNTS[b] + 0.5) / (sum(COUNTS) + 5)
            psi += (p - q) * math.log(p / q)
        assert monitor.scores()[head] == pytest.approx(psi, rel=1e-6)


def test_what_is_past_fades(monitor: DriftMonitor) -> None:
    rng = np.random.default_rng(3)
    embeddings, scores = like_the_reference(rng, 64)
    for _ in range(50):
        monitor.see(embeddings + 5, np.full_like(scores, 0.999))
    high = monitor.embedding(), monitor.scores()["linear"]
    for _ in range(600):
        monitor.see(*like_the_reference(rng, 64))
    assert high[0] > 2 and high[1] > 1
    assert monitor.embedding() < 0.1 and monitor.scores()["linear"] < 0.1


def test_too_few_crops_say_nothing_and_broken_rows_do_not_count(monitor: DriftMonitor) -> None:
    embeddings, scores = like_the_reference(np.random.default_rng(4), drift.MIN_CROPS - 1)
    monitor.see(embeddings, scores)
    monitor.see(np.full((8, 192), np.nan, np.float32), np.full((8, 3), np.nan, np.float32))
    assert math.isnan(monitor.embedding()) and all(math.isnan(figure) for figure in monitor.scores().values())
    monitor.see(embeddings[:8], scores[:8])
    assert not math.isnan(monitor.embedding())


def test_gauges_are_set_every_few_seconds_and_a_new_model_starts_anew() -> None:
    now, metrics = [0.0], Metrics()
    monitor = DriftMonitor(reference(), metrics, lambda: now[0])
    embeddings, scores = like_the_reference(np.random.default_rng(5), 512)
    monitor.see(embeddings + 4, scores)
    assert b"code_worker_embedding_drift NaN" in metrics.page()
    now[0] = drift.INTERVAL_S
    monitor.see(embeddings + 4, scores)
    page = metrics.page().decode()
    assert 'code_worker_score_drift{head="linear"}' in page
    assert f"code_worker_embedding_drift {monitor.embedding()}" in page
    metrics.set_engine("other", "null", "cpu")
    page = metrics.page().decode()
    assert "code_worker_embedding_drift NaN" in page and "score_drift{" not in page


def test_the_engine_shows_its_outputs_to_the_monitor(tmp_path: Path) -> None:
    from engine.backends import create
    from engine.detector import Detector
    from worker.engines import engine_of

    detector = Detector.from_parts(random_bundle(tmp_path / "bundle", seed=3), create("null", "cpu"))
    seen: list[tuple[tuple[int, ...], np.ndarray]] = []

    class Monitor(DriftMonitor):
        def see(self, embedding: np.ndarray, probabilities: np.ndarray) -> None:
            seen.append((embedding.shape, probabilities))

    engine = engine_of(detector, 4, Monitor(reference(), Metrics()))
    crops = np.random.default_rng(6).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    first, second = engine.infer(crops), engine.collect(engine.submit(crops))
    assert [shape for shape, _ in seen] == [(3, 192), (3, 192)]
    for given, (_, probabilities) in zip((first, second), seen, strict=True):
        np.testing.assert_array_equal(given, probabilities)
    np.testing.assert_array_equal(first, engine_of(detector, 4).infer(crops))
