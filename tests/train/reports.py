"""A tiny evaluated data set for the tests of the report: a random bundle, made-up images, everything `evaluate` computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine import backends
from engine.detector import Detector
from engine.heads import HEADS
from tests.engine.bundles import random_bundle
from train.embed import Facts
from train.scoring import Scored


def detector(folder: Path, **options: str) -> Detector:
    """A random bundle on the null backend."""
    return Detector.from_parts(random_bundle(folder), backends.create("null"), **options)


def scored(labels: Sequence[int], scores: NDArray[np.float64], sources: Sequence[str] | None = None) -> Scored:
    """Scores as given for every head, in (0, 1); sources "s0" and "s1" by label unless named."""
    column = np.clip(np.asarray(scores, np.float32), 1e-6, 1 - 1e-6)
    probability = np.repeat(column[:, None], len(HEADS), axis=1)
    names = sources or [f"s{label}" for label in labels]
    facts = [Facts(f"image-{i}", int(y), names[i], f"g-{names[i]}", names[i]) for i, y in enumerate(labels)]
    embedding = np.random.default_rng(0).normal(0, 1, (len(column), 192)).astype(np.float32)
    raw = np.log(probability / (1 - probability))
    return Scored(raw, probability, embedding, facts)
