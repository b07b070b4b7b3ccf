"""A folder of versions that can be refreshed: a random encoder, and a replay of made-up embeddings, the classes well apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from engine import bundle
from engine.calibration import Platt
from engine.heads import HEADS
from tests.engine.bundles import random_draft
from train import labels_sample, probe, refresh_steps, replay
from train.embed import Embedded, Facts

DIM = 192
SPREAD = 0.05
"""Of dimensions that mean nothing: little, so that nothing is learned by heart in them. The first tells the classes apart."""


def rows(count: int, prefix: str, seed: int, distance: float = 4.0, sources: tuple[str, ...] = ("a",)) -> Embedded:
    """`count` of each class around two centres `distance` apart."""
    rng = np.random.default_rng(seed)
    embedding = SPREAD * rng.standard_normal((2 * count, DIM)).astype(np.float32)
    labels = np.arange(2 * count) % 2
    embedding[:, 0] = rng.standard_normal(2 * count) + distance * (labels - 0.5)
    facts = []
    for i, label in enumerate(labels.tolist()):
        source = f"{'fake' if label else 'real'}-{sources[i // 2 % len(sources)]}"
        facts.append(Facts(f"{prefix}{i}", label, source, "machine" if label else "camera", f"{source}:{i}"))
    return Embedded(embedding, facts)


def noisy(part: Embedded, seed: int) -> Embedded:
    rng = np.random.default_rng(seed)
    return Embedded(part.embedding + 0.1 * rng.standard_normal(part.embedding.shape).astype(np.float32), part.facts)


def replay_parts(distance: float = 4.0) -> replay.Parts:
    """Train and calibration of sources a, evaluation also of unseen sources b."""
    calibrate, judge = rows(50, "c", 2, distance), rows(60, "e", 3, distance, ("a", "b"))
    return {
        replay.TRAIN: rows(80, "t", 1, distance),
        replay.CALIBRATE[0]: calibrate,
        replay.CALIBRATE[1]: noisy(calibrate, 4),
        "evaluate/clean": judge,
        "evaluate/jpeg75": noisy(judge, 5),
    }


def models(folder: Path, version: str = "1", carried: bool = True, **fields: Any) -> Path:
    """FOLDER with one calibrated version and CURRENT."""
    parts = replay_parts()
    plain_scores = {head: Platt(slope=1.0) for head in HEADS}
    plain_scores = {head: Platt(slope=1.0) for head in HEADS}
    draft = random_draft(version=version, heads=probe.fit(parts[replay.TRAIN]), calibration=plain_scores)
    content = {name: getattr(draft, name) for name in bundle.Draft.__dataclass_fields__}
    content, _ = refresh_steps.calibrated(content, parts, {}, None)
    if carried:
        first = bundle.write(folder / "scratch", bundle.Draft(**content))
        content["replay"] = replay.encode(parts, first.manifest.encoder.sha256)
        for file in first.path.iterdir():
            file.unlink()
        first.path.rmdir()
    bundle.write(folder / version, bundle.Draft(**content | fields))
    bundle.publish(folder, version)
    return folder


def decisions(out: Path, fakes: int = 12, reals: int = 0, seed: int = 0) -> Path:
    """A sample of labels with its images; the file of records."""
    return labels_sample.write(out, labels_sample.made_up(fakes, reals, seed), "ada")


def embedding_of(key: str, label: int) -> np.ndarray:
    """What the tests give a labelled image in place of the encoder's: a new kind of fake, on the reals' side but elsewhere."""
    rng = np.random.default_rng(int(key[:8], 16))
    vector = 0.3 * rng.standard_normal(DIM).astype(np.float32)  # apart from each other
    vector[0] = rng.standard_normal() - 3.0
    vector[1] += 6.0 * label
    return vector


def plain(folder: Path) -> dict[str, Any]:
    """What two runs must agree on: every file but for times."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("created_at")
    manifest["model_card"] = None
    manifest["metrics"]["report"].pop("created_at", None)
    return manifest
