"""Drift: how far the images of the last hours lie from what the model saw when it was made (the bundle's `reference`).

Two figures, each over exponentially fading memory of about `MEMORY_CROPS` crops that reached the engine (cached images do not):

- scores: the population stability index of the calibrated scores of each head against the reference's histogram,
  sum((p - q) ln(p / q)) over its bins, half a count added to each. Usual reading: under 0.1 alike, over 0.25 another population.
- embeddings: the root mean square over the 192 values of (mean - reference mean) / reference standard deviation.

A platform's own mix differs from the reference from the first day on: what matters is a change of these figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engine.heads import HEADS
from engine.manifest import Histogram, Reference
from worker.metrics import Metrics

MEMORY_CROPS = 4096
MIN_CROPS = 256
"""Below, chance alone moves the figures: they are NaN, which no alert's comparison holds for."""
INTERVAL_S = 5.0
_SMALLEST_STD = 1e-6


class DriftMonitor:
    """Follows one model; called by the one thread that calls its engine. Sets the gauges every few seconds."""

    def __init__(self, reference: Reference, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._mean = np.array(reference.embedding_mean)
        self._std = np.maximum(np.array(reference.embedding_std), _SMALLEST_STD)
        self._bins = {
            HEADS.index(head): (head, np.array(histogram.edges), _shares(np.array(histogram.counts, np.float64)))
            for head, histogram in reference.scores.items()
            if _covers_probabilities(histogram)
        }
        self._metrics = metrics
        self._clock = clock
        self._next = clock() + INTERVAL_S
        self._crops = 0.0
        self._sum = np.zeros_like(self._mean)
        self._counts = {column: np.zeros(len(shares)) for column, (_, _, shares) in self._bins.items()}

    def see(self, embedding: NDArray[np.float32], probabilities: NDArray[np.float32]) -> None:
        """Take in a batch: embeddings f32 [n, 192], calibrated probabilities f32 [n, 3]; rows not finite are left out."""
        sound = np.isfinite(probabilities).all(axis=1) & np.isfinite(embedding).all(axis=1)
        embedding, probabilities = embedding[sound], probabilities[sound]
        fading = (1.0 - 1.0 / MEMORY_CROPS) ** len(embedding)
        self._crops = self._crops * fading + len(embedding)
        self._sum = self._sum * fading + embedding.sum(axis=0, dtype=np.float64)
        for column, (_, edges, _) in self._bins.items():
            counts, _ = np.histogram(probabilities[:, column], edges)
            self._counts[column] = self._counts[column] * fading + counts
        now = self._clock()
        if now >= self._next:
            self._next = now + INTERVAL_S
            self.publish()

    def embedding(self) -> float:
        """The embeddings' figure; NaN while too few crops are in memory."""
        if self._crops < MIN_CROPS:
            return float("nan")
        shift = (self._sum / self._crops - self._mean) / self._std
        return float(np.sqrt(np.mean(shift**2)))

    def scores(self) -> dict[str, float]:
        """The scores' figure by head; NaN while too few crops are in memory."""
        found: dict[str, float] = {}
        for column, (head, _, expected) in self._bins.items():
            if self._crops < MIN_CROPS:
                found[head] = float("nan")
            else:
                seen = _shares(self._counts[column])
                found[head] = float(np.sum((seen - expected) * np.log(seen / expected)))
        return found

    def publish(self) -> None:
        """Set the gauges."""
        self._metrics.embedding_drift.set(self.embedding())
        self._metrics.drift_crops.set(self._crops)
        for head, figure in self.scores().items():
            self._metrics.score_drift.labels(head).set(figure)


def _shares(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    smoothed: NDArray[np.float64] = counts + 0.5
    smoothed /= smoothed.sum()
    return smoothed


def _covers_probabilities(histogram: Histogram) -> bool:
    return histogram.edges[0] <= 0.0 and histogram.edges[-1] >= 1.0
