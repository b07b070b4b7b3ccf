"""The three heads on CoDE's embedding, as arrays: raw scores in numpy, the reference every backend's graph must meet.

All heads take the embedding raw (the CLS token after the final LayerNorm, not L2-normalised) and give a score that is larger
the more likely the image is AI-generated. Source: arXiv 2407.20337 and its released heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

EMBEDDING_DIM = 192
Head = Literal["linear", "knn", "ocsvm"]
HEADS: tuple[Head, ...] = get_args(Head)

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_LARGEST = float(np.finfo(np.float32).max)


class HeadsError(ValueError):
    """An array of the heads has a wrong shape, dtype or value; `tensor` names it."""

    def __init__(self, tensor: str, message: str) -> None:
        super().__init__(f"{tensor}: {message}")
        self.tensor = tensor


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """Parameters of the heads; checked when made.

    `linear_weight` f32[192], `linear_bias` f32[]: logistic regression; the score is its logit.

    `knn_gallery` f32[N,192] with unit rows, `knn_labels` uint8[N] (1 = AI-generated), `knn_ids`: N names or None. The score is
    the largest cosine to a generated image minus the largest to a real one: its sign is the answer of a 1-nearest-neighbour
    classifier with cosine distance, its size the margin.

    `svm_vectors` f32[S,192], `svm_dual` f32[S], `svm_intercept` f32[], `svm_gamma`, `svm_degree`, `svm_coef0`: a one-class SVM
    with kernel (gamma x.v + coef0)^degree, fitted on real images only. The score is minus scikit-learn's decision_function:
    there +1 is an inlier, so a real image, and the release's docstring has it the wrong way round.

    Raises:
        HeadsError: wrong shape or dtype, a value that is not finite, rows that are not unit, or a gallery of one class.
    """

    linear_weight: Float32
    linear_bias: Float32
    knn_gallery: Float32
    knn_labels: NDArray[np.uint8]
    svm_vectors: Float32
    svm_dual: Float32
    svm_intercept: Float32
    svm_gamma: float = 1.0 / EMBEDDING_DIM
    svm_degree: int = 3
    svm_coef0: float = 0.0
    knn_ids: tuple[str, ...] | None = None
    _fakes: Float32 = field(init=False, repr=False)
    _reals: Float32 = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("linear_bias", "svm_intercept"):
            value = getattr(self, name)
            # numpy's arithmetic turns arrays of no dimension into scalars: take those too.
            object.__setattr__(self, name, np.asarray(value) if isinstance(value, np.generic) else value)
        _check(self)
        object.__setattr__(self, "_fakes", self.knn_gallery[self.knn_labels == 1])
        object.__setattr__(self, "_reals", self.knn_gallery[self.knn_labels == 0])

    def raw_scores(self, embedding: Float32) -> Float32:
        """Scores of every head, before calibration.

        Args:
            embedding: f32 [n, 192].

        Returns:
            f32 [n, 3], columns in the order of `HEADS`; finite for every finite row (clipped to float32's range), NaN in the
            whole row where the embedding is not finite, so that a broken row is never taken for a score.

        Raises:
            ValueError: not floating point [n, 192].
        """
        if embedding.ndim != 2 or embedding.shape[1] != EMBEDDING_DIM or embedding.dtype.kind != "f":
            raise ValueError(f"expected embeddings as float [n, {EMBEDDING_DIM}], got {embedding.dtype} {list(embedding.shape)}")
        # Doubles, because the products of large but finite floats overflow in float32; the gallery is safe after scaling.
        wide = embedding.astype(np.float64)
        broken = ~np.isfinite(wide).all(axis=1)
        wide[broken] = 0.0
        columns = (self._linear(wide), self._knn(wide), self._ocsvm(wide))
        raw = np.clip(np.stack(columns, axis=1), -_LARGEST, _LARGEST).astype(np.float32)
        raw[broken] = np.nan
        return raw

    def _linear(self, wide: Float64) -> Float64:
        logits: Float64 = wide @ self.linear_weight.astype(np.float64) + float(self.linear_bias)
        return logits

    def _knn(self, wide: Float64) -> Float64:
        unit = unit_rows(wide)
        to_fake: Float32 = (unit @ self._fakes.T).max(axis=1)
        to_real: Float32 = (unit @ self._reals.T).max(axis=1)
        return (to_fake - to_real).astype(np.float64)

    def _ocsvm(self, wide: Float64) -> Float64:
        with np.errstate(over="ignore"):
            base = self.svm_gamma * (wide @ self.svm_vectors.astype(np.float64).T) + self.svm_coef0
        # Beyond 1e40 the score is clipped to float32's range anyway; here it keeps the power and the sum finite.
        kernel = np.clip(base, -1e40, 1e40) ** self.svm_degree
        decision: Float64 = kernel @ self.svm_dual.astype(np.float64) + float(self.svm_intercept)
        return -decision


def unit_rows(embedding: Float32 | Float64) -> Float32:
    """Rows scaled to length one, as a cosine needs them; a row of zeros stays zeros.

    Args:
        embedding: float [n, d], finite.

    Returns:
        f32 [n, d].
    """
    wide = embedding.astype(np.float64)
    # Scaled by the largest component first: the squares of large floats would overflow.
    largest = np.abs(wide).max(axis=1, keepdims=True, initial=0.0)
    wide = np.divide(wide, largest, out=np.zeros_like(wide), where=largest > 0)
    length = np.sqrt((wide * wide).sum(axis=1, keepdims=True))
    unit: Float64 = np.divide(wide, length, out=np.zeros_like(wide), where=length > 0)
    return unit.astype(np.float32)


def _check(heads: Heads) -> None:
    rows, vectors = heads.knn_gallery.shape[:1], heads.svm_vectors.shape[:1]
    _array("linear_weight", heads.linear_weight, np.float32, (EMBEDDING_DIM,))
    _array("linear_bias", heads.linear_bias, np.float32, ())
    _array("knn_gallery", heads.knn_gallery, np.float32, (*rows, EMBEDDING_DIM))
    _array("knn_labels", heads.knn_labels, np.uint8, rows)
    _array("svm_vectors", heads.svm_vectors, np.float32, (*vectors, EMBEDDING_DIM))
    _array("svm_dual", heads.svm_dual, np.float32, vectors)
    _array("svm_intercept", heads.svm_intercept, np.float32, ())
    if set(np.unique(heads.knn_labels).tolist()) != {0, 1}:
        raise HeadsError("knn_labels", "the gallery needs images of both classes, labelled 0 (real) and 1 (AI-generated)")
    lengths = np.linalg.norm(heads.knn_gallery.astype(np.float64), axis=1)
    if np.abs(lengths - 1.0).max() > 1e-3:
        raise HeadsError("knn_gallery", f"row {int(np.abs(lengths - 1.0).argmax())} is not of length one")
    if heads.knn_ids is not None and len(heads.knn_ids) != rows[0]:
        raise HeadsError("knn_ids", f"{len(heads.knn_ids)} names for {rows[0]} rows")
    if not vectors[0]:
        raise HeadsError("svm_vectors", "no support vectors")
    if not (np.isfinite(heads.svm_gamma) and heads.svm_gamma > 0):
        raise HeadsError("svm_gamma", f"must be finite and above 0, is {heads.svm_gamma}")
    if not 1 <= heads.svm_degree <= 6:
        raise HeadsError("svm_degree", f"must lie between 1 and 6, is {heads.svm_degree}")
    if not np.isfinite(heads.svm_coef0):
        raise HeadsError("svm_coef0", f"must be finite, is {heads.svm_coef0}")


def _array(name: str, array: NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise HeadsError(name, f"expected {np.dtype(dtype)} {list(shape)}, found {found}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise HeadsError(name, "holds a value that is not finite")
