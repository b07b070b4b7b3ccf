"""A folder of the published layout with random weights, and the scikit-learn heads that were pickled into it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.engine.bundles import random_encoder
from train.imports import HEAD_FILES

CONFIG = {
    "model_type": "vit",
    "hidden_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "layer_norm_eps": 1e-12,
}


def to_transformers(encoder: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """timm's names to transformers', written from the method's table, the other way round than the import."""
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    found = {theirs: encoder[ours] for ours, theirs in names.items()}
    for kind in ("weight", "bias"):
        found[f"embeddings.patch_embeddings.projection.{kind}"] = encoder[f"patch_embed.proj.{kind}"]
        found[f"layernorm.{kind}"] = encoder[f"norm.{kind}"]
        for i in range(12):
            layer, block = f"encoder.layer.{i}", f"blocks.{i}"
            qkv = encoder[f"{block}.attn.qkv.{kind}"]
            for row, name in enumerate(("query", "key", "value")):
                found[f"{layer}.attention.attention.{name}.{kind}"] = qkv[192 * row : 192 * (row + 1)]
            found[f"{layer}.attention.output.dense.{kind}"] = encoder[f"{block}.attn.proj.{kind}"]
            found[f"{layer}.layernorm_before.{kind}"] = encoder[f"{block}.norm1.{kind}"]
            found[f"{layer}.layernorm_after.{kind}"] = encoder[f"{block}.norm2.{kind}"]
            found[f"{layer}.intermediate.dense.{kind}"] = encoder[f"{block}.mlp.fc1.{kind}"]
            found[f"{layer}.output.dense.{kind}"] = encoder[f"{block}.mlp.fc2.{kind}"]
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def embeddings(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """float32[n, 192] around one centre a class, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    centres = np.random.default_rng(7).normal(0, 0.5, (2, 192))
    return (rng.normal(0, 1, (n, 192)) + centres[labels]).astype(np.float32), labels


def heads(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """The three estimators, fitted with the paper's settings; `changes`: knn or svm arguments."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import OneClassSVM

    x, y = embeddings(80, seed)
    knn = {"n_neighbors": 1, "metric": "cosine"} | changes.get("knn", {})
    svm = {"nu": 0.1, "kernel": "poly", "gamma": "auto"} | changes.get("svm", {})
    return {
        "LogisticRegression": LogisticRegression(C=0.316, class_weight="balanced", max_iter=1500).fit(x, y),
        "KNeighborsClassifier": KNeighborsClassifier(**knn).fit(x, y),
        "OneClassSVM": OneClassSVM(**svm).fit(x[y == 0]),
    }


def write(
    folder: Path,
    estimators: dict[str, Any],
    dump: Callable[[Any, Path], object] | None = None,
    seed: int = 0,
    **config: Any,
) -> dict[str, np.ndarray]:
    """Writes everything; returns the encoder by timm's names. `dump`: how estimators are pickled, joblib.dump by default."""
    import joblib
    from safetensors.numpy import save_file

    encoder = random_encoder(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(to_transformers(encoder), folder / "model.safetensors")
    (folder / "sklearn").mkdir(exist_ok=True)
    for name, file in HEAD_FILES.items():
        (dump or joblib.dump)(estimators[name], folder / "sklearn" / file)
    return encoder
