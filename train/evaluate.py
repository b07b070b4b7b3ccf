"""Measures a bundle on validation images: report.json's content, by source and generator, clean and degraded, with intervals.

What is evaluated is what ships: the bundle's own heads and calibration on a real backend, cropped as serving crops. Sources that
the calibration has seen are reported apart from sources that neither training nor calibration has seen. The fields are described
in `train/report.schema.json` and docs/training.md.
"""

from __future__ import annotations

import json
import platform as machine
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.detector import Detector
from engine.heads import HEADS
from train import metrics
from train.data import Damage
from train.ladder import BY_NAME, REPORTED
from train.scoring import Scored

REPORT_FORMAT = "code-report/1"
RESAMPLES = 500
LADDER_RESAMPLES = 200
MIN_IMAGES = 5
PARTS = ("unseen_sources", "calibration_sources")

Mask = NDArray[np.bool_]


def report(
    detector: Detector,
    conditions: dict[str, Scored],
    calibrated_on: frozenset[str],
    data_digest: str,
    damage: Damage,
    parity: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """report.json's content: plain values only; what is not defined becomes null.

    conditions: by the names of `train.ladder`; those of `REPORTED` are reported whole, all of them as the ladder.
    """
    manifest = detector.bundle.manifest
    content = {
        "format": REPORT_FORMAT,
        "model": {
            "name": manifest.name,
            "version": manifest.version,
            "encoder_sha256": manifest.encoder.sha256,
            "heads_sha256": manifest.heads.sha256,
        },
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "data_sha256": data_digest,
        "backend": f"{detector.backend_name} on {detector.device}",
        "machine": f"{machine.machine()}, {machine.system()}, Python {machine.python_version()}",
        "head": detector.head,
        "crops": detector.crops,
        "thresholds_for_crops": sorted({t.crops for t in detector.thresholds.values()}),
        "bootstrap": {"resamples": RESAMPLES, "ladder_resamples": LADDER_RESAMPLES, "confidence": 0.95},
        "skipped": [list(pair) for pair in damage.skipped],
        "calibrated_on_sources": sorted(calibrated_on),
        "conditions": {
            name: {part: _part(view) for part, view in _views(detector, scored, calibrated_on, RESAMPLES)}
            for name, scored in conditions.items()
            if name in REPORTED
        },
        "ladder": [_rung(detector, name, scored, calibrated_on) for name, scored in conditions.items()],
        "parity": parity,
    }
    plain: dict[str, Any] = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return plain


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """Some of the images of one condition: all of one part, or one kind of image against the other class of its part."""

    detector: Detector
    scored: Scored
    bootstrap: metrics.Bootstrap
    resamples: int

    @classmethod
    def of(cls, detector: Detector, scored: Scored, resamples: int) -> View:
        return cls(detector, scored, metrics.Bootstrap(scored.labels, scored.clusters, resamples=resamples), resamples)

    def where(self, mask: Mask) -> View:
        return View.of(self.detector, self.scored.where(mask), self.resamples)

    @property
    def serving(self) -> int:
        """Column of the serving head."""
        return HEADS.index(self.detector.head)

    def probability(self, column: int) -> NDArray[np.float64]:
        return self.scored.probability[:, column].astype(np.float64)

    def measured(self, measure: metrics.Measure, scores: NDArray[np.float64]) -> dict[str, float]:
        low, high = self.bootstrap.interval(measure, scores)
        return {"value": measure(self.scored.labels, scores), "low": low, "high": high}


def parts_of(scored: Scored, calibrated_on: frozenset[str]) -> Iterator[tuple[str, Scored]]:
    """The parts that have images: those of unseen sources, those of sources that calibration has seen."""
    seen = np.isin([f.source for f in scored.facts], sorted(calibrated_on))
    for name, mask in zip(PARTS, (~seen, seen), strict=True):
        if mask.any():
            yield name, scored.where(mask)


def _views(detector: Detector, scored: Scored, calibrated_on: frozenset[str], resamples: int) -> Iterator[tuple[str, View]]:
    for name, part in parts_of(scored, calibrated_on):
        yield name, View.of(detector, part, resamples)


def _part(view: View) -> dict[str, Any]:
    labels = view.scored.labels
    slices = list(_slices(view))
    means = {
        f"macro_auroc_over_{label}_sources": _mean(
            s["auroc"]["value"] for s in slices if (s["slice"], s["label"]) == ("source", label) and "auroc" in s
        )
        for label in ("fake", "real")
    }
    heads = {head: _overall(view, column) for column, head in enumerate(HEADS)}
    return {"images": _counts(labels), "heads": heads, **means, "slices": slices}


def _slices(view: View) -> Iterator[dict[str, Any]]:
    """One kind of image against everything of the other class in this part, by the serving head."""
    labels, column = view.scored.labels, view.serving
    for row, mask in kinds(view.scored):
        if row["images"] < MIN_IMAGES:
            yield row | {"note": "too few images"}
            continue
        against = view.where(mask | (labels != (row["label"] == "fake")))
        only = view.scored.probability[mask, column].astype(np.float64)
        yield row | _ranking(against, column) | _calibrated(against, column) | {"flagged": _flagged(against, column, only)}


def kinds(scored: Scored) -> Iterator[tuple[dict[str, Any], Mask]]:
    """Each source and generator of generated images and each source of reals: what it is called, and its images bool[n]."""
    labels = scored.labels
    sources = np.array([f.source for f in scored.facts])
    generators = np.array([f.generator for f in scored.facts])
    for kind, names, label in (("source", sources, 1), ("generator", generators, 1), ("source", sources, 0)):
        for name in sorted(set(names[labels == label].tolist())):
            mask = (names == name) & (labels == label)
            yield {"slice": kind, "name": name, "label": "fake" if label else "real", "images": int(mask.sum())}, mask


def _overall(view: View, column: int) -> dict[str, Any]:
    return _ranking(view, column) | _calibrated(view, column) | {"abstain": _abstain(view, column)}


def _ranking(view: View, column: int) -> dict[str, Any]:
    scores = view.scored.ranking(column)
    return {
        "auroc": view.measured(metrics.auroc, scores),
        "average_precision": view.measured(metrics.average_precision, scores),
        "tpr_at_fpr_0.01": view.measured(metrics.tpr_at_fpr(0.01), scores),
        "tpr_at_fpr_0.001": view.measured(metrics.tpr_at_fpr(0.001), scores),
    }


def _calibrated(view: View, column: int) -> dict[str, Any]:
    probability = view.probability(column)
    found: dict[str, Any] = {"ece": view.measured(metrics.expected_calibration_error, probability)}
    found["at"] = {name: _at(view, probability, value) for name, value in _thresholds(view, column).items()}
    return found


def _thresholds(view: View, column: int) -> dict[str, float]:
    shipped = view.detector.bundle.manifest.thresholds.get(HEADS[column], {})
    return {"probability_0.5": 0.5} | {name: t.threshold for name, t in shipped.items()}


def _at(view: View, probability: NDArray[np.float64], threshold: float) -> dict[str, Any]:
    labels, flagged = view.scored.labels, probability >= threshold
    found: dict[str, Any] = {
        "threshold": threshold,
        "balanced_accuracy": view.measured(metrics.balanced_accuracy(threshold), probability),
    }
    for name, label in (("fpr", 0), ("tpr", 1)):
        share = _share(flagged[labels == label])
        found |= {name: share["value"], f"{name}_low": share["low"], f"{name}_high": share["high"]}
    return found


def _flagged(view: View, column: int, only: NDArray[np.float64]) -> dict[str, Any]:
    """Share of a kind's own images at or above each threshold: FPR of a source of reals, TPR of one of generated images."""
    return {name: _share(only >= threshold) for name, threshold in _thresholds(view, column).items()}


def _share(hits: Mask) -> dict[str, float | None]:
    """A share and its two-sided Clopper-Pearson interval, every image for itself."""
    if not len(hits):
        return {"value": None, "low": None, "high": None}
    low, high = metrics.clopper_pearson(int(hits.sum()), len(hits))
    return {"value": float(hits.mean()), "low": low, "high": high}


def _abstain(view: View, column: int) -> dict[str, Any] | None:
    """What the band of uncertain scores costs and gains."""
    band = view.detector.bundle.manifest.abstain.get(HEADS[column])
    if band is None:
        return None
    labels, probability = view.scored.labels, view.probability(column)
    inside = (probability >= band.low) & (probability < band.high)
    # Scores below the band count as real, from its upper end on as generated; those inside are not counted.
    outside = metrics.balanced_accuracy(band.high)(labels[~inside], probability[~inside])
    shares = {name: _share(inside[labels == label])["value"] for name, label in (("real", 0), ("fake", 1))}
    return {"low": band.low, "high": band.high, "uncertain": shares, "balanced_accuracy_outside": outside}


def _rung(detector: Detector, name: str, scored: Scored, calibrated_on: frozenset[str]) -> dict[str, Any]:
    rung = BY_NAME[name]
    parts = {}
    for part, view in _views(detector, scored, calibrated_on, LADDER_RESAMPLES):
        labels, scores = view.scored.labels, view.scored.ranking(view.serving)
        flagged = {name: view.probability(view.serving) >= t for name, t in _thresholds(view, view.serving).items()}
        parts[part] = {
            "auroc": view.measured(metrics.auroc, scores),
            "tpr_at_fpr_0.01": view.measured(metrics.tpr_at_fpr(0.01), scores),
            "at": {
                name: {"fpr": _share(hits[labels == 0])["value"], "tpr": _share(hits[labels == 1])["value"]}
                for name, hits in flagged.items()
            },
            "sources": [
                {"name": row["name"], "label": row["label"], "auroc": metrics.auroc(labels[rows], scores[rows])}
                for row, mask in kinds(view.scored)
                if row["slice"] == "source" and row["images"] >= MIN_IMAGES
                for rows in (mask | (labels != (row["label"] == "fake")),)
            ],
        }
    return {"condition": name, "family": rung.family, "level": rung.level, "parts": parts}


def _counts(labels: NDArray[np.uint8]) -> dict[str, int]:
    return {"real": int((labels == 0).sum()), "fake": int((labels == 1).sum())}


def _mean(values: Iterator[float]) -> float | None:
    found = [value for value in values if np.isfinite(value)]
    return float(np.mean(found)) if found else None


def thresholds_apply(content: dict[str, Any]) -> bool:
    """Whether the shipped thresholds were chosen for the crops that were evaluated."""
    layouts: Sequence[str] = content.get("thresholds_for_crops", ["center"])
    return not layouts or list(layouts) == [content["crops"]]
