"""Random bundles for tests: the real architecture and files, weights that mean nothing. Needs numpy only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engine.bundle import Bundle, Draft, encoder_shapes, write
from engine.calibration import Isotonic, Platt, Temperature
from engine.heads import EMBEDDING_DIM, Heads, unit_rows
from engine.manifest import Band, Histogram, Reference, Threshold


def random_encoder(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights by timm's names, scaled as at the start of a training, so that activations stay tame."""
    rng = np.random.default_rng(seed)
    encoder = {}
    for name, shape in encoder_shapes().items():
        if "norm" in name and name.endswith("weight"):
            encoder[name] = np.ones(shape, np.float32)
        elif name.endswith("bias"):
            encoder[name] = np.zeros(shape, np.float32)
        else:
            encoder[name] = (rng.standard_normal(shape) * 0.05).astype(np.float32)
    return encoder


def random_heads(seed: int = 0, gallery: int = 48, vectors: int = 24) -> Heads:
    """Heads whose scores are of ordinary size for embeddings of LayerNorm's scale."""
    rng = np.random.default_rng(seed + 1)
    labels = (np.arange(gallery) % 2).astype(np.uint8)
    return Heads(
        linear_weight=(rng.standard_normal(EMBEDDING_DIM) * 0.1).astype(np.float32),
        linear_bias=np.array(0.1, np.float32),
        knn_gallery=unit_rows(rng.standard_normal((gallery, EMBEDDING_DIM)).astype(np.float32)),
        knn_labels=labels,
        # As long as `train probe` makes them.
        knn_ids=tuple(
            f"some-source-of-images / generator / {'fake' if one else 'real'}-{row:011}" for row, one in enumerate(labels)
        ),
        svm_vectors=rng.standard_normal((vectors, EMBEDDING_DIM)).astype(np.float32),
        svm_dual=rng.uniform(0.1, 1.0, vectors).astype(np.float32),
        svm_intercept=np.array(-0.1, np.float32),
    )


def random_draft(seed: int = 0, name: str = "random", version: str = "1", **fields: Any) -> Draft:
    """A complete draft; `fields` replace its own."""
    thresholds = {
        f"fpr_{fpr}": Threshold(target_fpr=fpr, threshold=cut, fpr=fpr / 2, fpr_upper=fpr, reals=4000, tpr=0.8, fakes=4000)
        for fpr, cut in ((0.01, 0.9), (0.001, 0.97))
    }
    values: dict[str, Any] = {
        "name": name,
        "version": version,
        "encoder": random_encoder(seed),
        "heads": random_heads(seed),
        "calibration": {
            "linear": Platt(slope=1.0),
            "knn": Temperature(temperature=0.5),
            "ocsvm": Isotonic(raw=(-5.0, 0.0, 5.0), probability=(0.05, 0.5, 0.95)),
        },
        "layer_norm_eps": 1e-6,
        "model_card": "# Random\n\nRandom weights, for tests.\n",
        "thresholds": {"linear": thresholds, "knn": thresholds, "ocsvm": thresholds},
        "abstain": {"linear": Band(low=0.4, high=0.6)},
        "reference": Reference(
            images=100,
            embedding_mean=(0.0,) * EMBEDDING_DIM,
            embedding_std=(1.0,) * EMBEDDING_DIM,
            scores={"linear": Histogram(edges=(0.0, 0.5, 1.0), counts=(50, 50))},
        ),
        "metrics": {"auroc": 0.5},
        "linear_c": 0.316,
        "svm_nu": 0.1,
    }
    return Draft(**{**values, **fields})


def random_bundle(folder: Path, seed: int = 0, name: str = "random", version: str = "1", **fields: Any) -> Bundle:
    """Write a random bundle as `folder` (which must not exist yet) and return it loaded."""
    return write(folder, random_draft(seed, name, version, **fields))
