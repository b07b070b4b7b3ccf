"""The published CoDE weights into a bundle: a transformers ViTModel folder and three pickled scikit-learn heads.

    config.json                                 architecture; its layer_norm_eps is taken, not timm's nor transformers' default
    model.safetensors | pytorch_model.bin       the encoder without pooler; .bin is read with torch's `weights_only`
    sklearn/linear_tot_classifier_epoch-32.sav
    sklearn/knn_tot_classifier_epoch-32.sav
    sklearn/ocsvm_kernel_poly_gamma_auto_nu_0_1_crop.joblib

Nothing inside a pickle is executed (`train.pickled_heads`).
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import bundle as bundles
from engine.bundle import encoder_shapes
from engine.calibration import Platt
from engine.heads import HEADS, Heads
from train import stages
from train.data import DataError
from train.pickled_heads import PickleError, read, to_heads

HEAD_FILES = {
    "LogisticRegression": "linear_tot_classifier_epoch-32.sav",
    "KNeighborsClassifier": "knn_tot_classifier_epoch-32.sav",
    "OneClassSVM": "ocsvm_kernel_poly_gamma_auto_nu_0_1_crop.joblib",
}
"""Under `sklearn/`, as published (Hugging Face aimagelab/CoDE)."""

_ARCHITECTURE = {
    "model_type": "vit",
    "hidden_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_act": "gelu",
    "qkv_bias": True,
}
# What transformers' ViTConfig stands for where a config.json leaves a field out.
_LEFT_OUT = {"image_size": 224, "patch_size": 16, "num_channels": 3, "hidden_act": "gelu", "qkv_bias": True}
_LAYER_NORM_EPS = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Published:
    """What a folder held: timm-named float32 arrays, heads, the gallery's raw embeddings float32[n, 192], facts for the card."""

    encoder: dict[str, NDArray[np.float32]]
    layer_norm_eps: float
    heads: Heads
    gallery: NDArray[np.float32]
    nu: float | None
    c: float | None
    facts: dict[str, str]


def load(folder: Path) -> Published:
    """Reads a folder of the published layout.

    Raises:
        DataError: a file is missing, damaged or of another architecture; the message names it.
        PickleError: a head's pickle is not taken.
    """
    eps = _layer_norm_eps(folder / "config.json")
    weights_file, weights = _weights(folder)
    encoder = to_timm(weights, weights_file)
    files = {name: folder / "sklearn" / file for name, file in HEAD_FILES.items()}
    estimators = {name: read(path, name) for name, path in files.items()}
    heads, gallery = to_heads(*(estimators[name] for name in HEAD_FILES))
    facts = {"layer_norm_eps": f"{eps:g}", weights_file.name: _sha256(weights_file)}
    for name, path in files.items():
        version = estimators[name].version or "unknown"
        facts[path.name] = f"{_sha256(path)}, fitted by scikit-learn {version}"
    return Published(
        encoder=encoder,
        layer_norm_eps=eps,
        heads=heads,
        gallery=gallery,
        nu=_optional(estimators["OneClassSVM"].plain.get("nu")),
        c=_optional(estimators["LogisticRegression"].plain.get("C")),
        facts=facts,
    )


def run(folder: Path, out: Path, name: str, version: str) -> tuple[Path, Published]:
    """Writes OUT/bundles/<version>-probe, as `train probe` would, and OUT/facts.json; `train calibrate` goes on from there.

    Raises as `load`; BundleError where the bundle cannot be written.
    """
    published = load(folder)
    scale = np.maximum(np.std(published.heads.raw_scores(published.gallery), axis=0), 1e-6)
    draft = bundles.Draft(
        name=name,
        version=version,
        encoder=published.encoder,
        heads=published.heads,
        # Monotone placeholders until `calibrate`: ranking is right, probabilities are not.
        calibration={head: Platt(slope=float(1 / scale[i])) for i, head in enumerate(HEADS)},
        layer_norm_eps=published.layer_norm_eps,
        model_card=f"# {name} {version}\n\nImported, not calibrated and not evaluated: not for use.\n",
        linear_c=published.c,
        svm_nu=published.nu,
    )
    written = out / "bundles" / f"{version}-probe"
    if written.exists():
        # A step's own folder may be made again; what was promoted lies elsewhere and is never replaced.
        shutil.rmtree(written)
    bundles.write(written, draft)
    stages.write_facts(
        out,
        name=name,
        imported=published.facts,
        notes=[],
        summary={"origin": "imported from published weights, not trained here", **published.facts},
        encoder_sha256=bundles.read_manifest(written)[0].encoder.sha256,
        pretrain_command=f"python -m train import --from $WEIGHTS --out $RUN --version {version} --name {name}",
    )
    return written, published


def warnings(published: Published) -> list[str]:
    """What a user should know about versions, a line each: heads fitted by a scikit-learn that is not the one here."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        here = version("scikit-learn")
    except PackageNotFoundError:
        return []
    found = sorted({text.rpartition(" ")[2] for text in published.facts.values() if "scikit-learn" in text} - {here})
    return [
        f"heads fitted by scikit-learn {other}, here is {here}: taken as arrays, no scikit-learn code was run" for other in found
    ]


def _layer_norm_eps(path: Path) -> float:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise DataError(f"{path}: no such file; give a transformers ViTModel folder") from exc
    except ValueError as exc:
        raise DataError(f"{path}: not JSON ({exc})") from exc
    if not isinstance(config, dict):
        raise DataError(f"{path}: not a model's configuration")
    for name, value in _ARCHITECTURE.items():
        found = config.get(name, _LEFT_OUT.get(name))
        if found != value:
            raise DataError(f"{path}: {name} is {found!r}, CoDE's encoder has {value!r}")
    eps = config.get("layer_norm_eps", _LAYER_NORM_EPS)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1e-2:
        raise DataError(f"{path}: layer_norm_eps is {eps!r}, not a small number")
    return float(eps)


def _weights(folder: Path) -> tuple[Path, dict[str, NDArray[Any]]]:
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if safe.exists():
        return safe, _safetensors(safe)
    if pickled.exists():
        return pickled, _weights_only(pickled)
    raise DataError(f"{folder}: holds neither {safe.name} nor {pickled.name}")


def _safetensors(path: Path) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, KeyError, TypeError) as exc:
        # KeyError, TypeError: types that numpy has not (bfloat16).
        raise DataError(f"{path}: not a safetensors file of float32 or float16 ({exc})") from exc


def _weights_only(path: Path) -> dict[str, NDArray[Any]]:
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError) as exc:
        reason = next((line for line in str(exc).splitlines() if "Unsupported" in line or "GLOBAL" in line), type(exc).__name__)
        raise DataError(f"{path}: refused: not a plain file of weights ({' '.join(reason.split())[:200]})") from exc
    if not isinstance(found, dict) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise DataError(f"{path}: not a dictionary of tensors")
    return {str(name): tensor.float().numpy() for name, tensor in found.items()}


def to_timm(weights: Mapping[str, NDArray[Any]], path: Path) -> dict[str, NDArray[np.float32]]:
    """transformers' names to timm's, float32; query, key and value become one matrix. Raises DataError naming path and tensor."""
    # A ViTForImageClassification keeps the same model under this prefix.
    left = {name.removeprefix("vit."): array for name, array in weights.items() if not name.startswith("classifier.")}

    def take(name: str) -> NDArray[Any]:
        if name not in left:
            raise DataError(f"{path}: tensor {name} is missing")
        return left.pop(name)

    found = {
        "cls_token": take("embeddings.cls_token"),
        "pos_embed": take("embeddings.position_embeddings"),
    }
    for kind in ("weight", "bias"):
        found[f"patch_embed.proj.{kind}"] = take(f"embeddings.patch_embeddings.projection.{kind}")
        found[f"norm.{kind}"] = take(f"layernorm.{kind}")
        for block in range(12):
            theirs, ours = f"encoder.layer.{block}", f"blocks.{block}"
            parts = [take(f"{theirs}.attention.attention.{name}.{kind}") for name in ("query", "key", "value")]
            if len({part.shape for part in parts}) != 1:
                raise DataError(f"{path}: {theirs}.attention.attention: query, key and value differ in shape")
            found[f"{ours}.attn.qkv.{kind}"] = np.concatenate(parts)
            for timm, transformers in _LAYERS.items():
                found[f"{ours}.{timm}.{kind}"] = take(f"{theirs}.{transformers}.{kind}")
    # A pooler is not part of CoDE; published without, tolerated.
    others = sorted(name for name in left if not name.startswith("pooler."))
    if others:
        raise DataError(f"{path}: unexpected tensor {others[0]}" + (f" and {len(others) - 1} more" if others[1:] else ""))
    for name, shape in encoder_shapes().items():
        array = found[name]
        if array.shape != shape or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise DataError(f"{path}: {name}: expected finite floats {list(shape)}, found {array.dtype} {list(array.shape)}")
    return {name: np.ascontiguousarray(found[name], np.float32) for name in encoder_shapes()}


_LAYERS = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def _sha256(path: Path) -> str:
    return f"SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def _optional(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


__all__ = ["HEAD_FILES", "PickleError", "Published", "load", "run", "to_timm", "warnings"]
