"""Scores a bundle on validation images through `engine.detector`, by source and generator, clean and re-encoded, with intervals.

What is evaluated is what ships: the bundle's own heads and calibration on a real backend. Rows of sources that the calibration
has seen are reported apart from rows of sources that neither training nor calibration has seen.
"""

from __future__ import annotations

import json
import platform as machine
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.backends.base import Outputs
from engine.detector import Detector
from engine.heads import HEADS
from train import metrics
from train.augment import jpeg
from train.data import Damage, Entry
from train.embed import Facts, Rgb, from_files

REPORT_FORMAT = "code-report/1"
RESAMPLES = 500
BATCH = 16
MIN_IMAGES = 5


def _clean(image: Image.Image) -> Image.Image:
    return image


def _jpeg75(image: Image.Image) -> Image.Image:
    return jpeg(image, 75)


CONDITIONS: dict[str, Callable[[Image.Image], Image.Image]] = {"clean": _clean, "jpeg75": _jpeg75}


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Raw scores float32[n, 3], calibrated probabilities float32[n, 3] and embeddings float32[n, 192] of n images."""

    raw: NDArray[np.float32]
    probability: NDArray[np.float32]
    embedding: NDArray[np.float32]
    facts: list[Facts]

    @property
    def labels(self) -> NDArray[np.uint8]:
        """uint8[n], 1 = AI-generated."""
        return np.array([f.label for f in self.facts], np.uint8)


def score(
    detector: Detector,
    entries: Sequence[Entry],
    change: Callable[[Image.Image], Image.Image],
    damage: Damage,
    on_image: Callable[[int], None] | None = None,
) -> Scored:
    """Scores of the images of `entries` after `change`, centre crops, as serving computes them."""
    from engine.preprocess import center_crop

    outputs: list[Outputs] = []
    facts: list[Facts] = []
    waiting: list[Rgb] = []

    def flush() -> None:
        if waiting:
            outputs.append(detector.outputs(np.stack(waiting)))
            waiting.clear()

    for rgb, known in from_files(entries, damage):
        waiting.append(center_crop(np.asarray(change(Image.fromarray(rgb)))))
        facts.append(known)
        if len(waiting) == BATCH:
            flush()
            if on_image is not None:
                on_image(len(facts))
    flush()
    raw = np.concatenate([o.raw for o in outputs])
    return Scored(raw, detector.calibrate(raw), np.concatenate([o.embedding for o in outputs]), facts)


def report(
    detector: Detector, conditions: dict[str, Scored], calibrated_on: frozenset[str], data_digest: str, damage: Damage
) -> dict[str, Any]:
    """report.json's content: plain values only; NaN becomes null."""
    manifest = detector.bundle.manifest
    content = {
        "format": REPORT_FORMAT,
        "model": {"name": manifest.name, "encoder_sha256": manifest.encoder.sha256, "heads_sha256": manifest.heads.sha256},
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "data_sha256": data_digest,
        "backend": f"{detector.backend_name} on {detector.device}",
        "machine": f"{machine.machine()}, {machine.system()}, Python {machine.python_version()}",
        "crops": detector.crops,
        "bootstrap": {"resamples": RESAMPLES, "confidence": 0.95},
        "skipped": [list(pair) for pair in damage.skipped],
        "calibrated_on_sources": sorted(calibrated_on),
        "conditions": {name: _condition(detector, scored, calibrated_on) for name, scored in conditions.items()},
    }
    plain: dict[str, Any] = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return plain


def _condition(detector: Detector, scored: Scored, calibrated_on: frozenset[str]) -> dict[str, Any]:
    sources = np.array([f.source for f in scored.facts])
    seen = np.isin(sources, sorted(calibrated_on))
    parts = {"unseen_sources": ~seen, "calibration_sources": seen}
    return {name: _part(detector, scored, mask) for name, mask in parts.items() if mask.any()}


def _part(detector: Detector, scored: Scored, mask: NDArray[np.bool_]) -> dict[str, Any]:
    labels = scored.labels
    serving = HEADS.index(detector.head)
    raw = scored.raw[:, serving].astype(np.float64)
    sources = np.array([f.source for f in scored.facts])
    generators = np.array([f.generator for f in scored.facts])
    slices: list[dict[str, Any]] = []
    for kind, names, label in (("source", sources, 1), ("generator", generators, 1), ("source", sources, 0)):
        for name in sorted(set(names[mask & (labels == label)].tolist())):
            # One kind of image against everything of the other class in this part.
            rows = mask & ((labels != label) | (names == name))
            count = int((rows & (labels == label)).sum())
            row = {"slice": kind, "name": name, "label": "fake" if label else "real", "images": count}
            slices.append(row | (_ranking(labels[rows], raw[rows]) if count >= MIN_IMAGES else {"note": "too few images"}))
    fakes = [s["auroc"]["value"] for s in slices if s["slice"] == "source" and s["label"] == "fake" and "auroc" in s]
    reals = [s["auroc"]["value"] for s in slices if s["slice"] == "source" and s["label"] == "real" and "auroc" in s]
    return {
        "images": {"real": int((mask & (labels == 0)).sum()), "fake": int((mask & (labels == 1)).sum())},
        "heads": {head: _overall(detector, scored, mask, i) for i, head in enumerate(HEADS)},
        "macro_auroc_over_fake_sources": float(np.mean(fakes)) if fakes else None,
        "macro_auroc_over_real_sources": float(np.mean(reals)) if reals else None,
        "slices": slices,
    }


def _overall(detector: Detector, scored: Scored, mask: NDArray[np.bool_], column: int) -> dict[str, Any]:
    labels, head = scored.labels[mask], HEADS[column]
    probability = scored.probability[mask, column].astype(np.float64)
    found: dict[str, Any] = _ranking(labels, scored.raw[mask, column].astype(np.float64))
    found["ece"] = _measured(metrics.expected_calibration_error, labels, probability)
    thresholds = {"probability_0.5": 0.5} | {
        name: t.threshold for name, t in detector.bundle.manifest.thresholds.get(head, {}).items()
    }
    found["at"] = {name: _at(labels, probability, value) for name, value in thresholds.items()}
    return found


def _at(labels: NDArray[np.uint8], probability: NDArray[np.float64], threshold: float) -> dict[str, Any]:
    flagged = probability >= threshold
    return {
        "threshold": threshold,
        "balanced_accuracy": _measured(metrics.balanced_accuracy(threshold), labels, probability),
        "fpr": float(flagged[labels == 0].mean()) if (labels == 0).any() else None,
        "tpr": float(flagged[labels == 1].mean()) if (labels == 1).any() else None,
    }


def _ranking(labels: NDArray[np.uint8], scores: NDArray[np.float64]) -> dict[str, Any]:
    return {
        "auroc": _measured(metrics.auroc, labels, scores),
        "average_precision": _measured(metrics.average_precision, labels, scores),
        "tpr_at_fpr_0.01": _measured(metrics.tpr_at_fpr(0.01), labels, scores),
        "tpr_at_fpr_0.001": _measured(metrics.tpr_at_fpr(0.001), labels, scores),
    }


def _measured(measure: metrics.Measure, labels: NDArray[np.uint8], scores: NDArray[np.float64]) -> dict[str, float]:
    low, high = metrics.bootstrap_interval(measure, labels, scores, resamples=RESAMPLES)
    return {"value": measure(labels, scores), "low": low, "high": high}
