"""The whole model as one torch module: uint8 crops in, raw scores and embeddings out."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from engine.bundle import Bundle
from engine.heads import Heads
from engine.model import VisionTransformer
from engine.preprocess import Preprocess


class Normalize(nn.Module):
    """uint8 NHWC to float32 NCHW, scaled to [0, 1] and normalised by channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        mean, std = np.array(preprocess.mean), np.array(preprocess.std)
        self.register_buffer("scale", _float32(1.0 / (255.0 * std)).view(1, 3, 1, 1))
        self.register_buffer("shift", _float32(-mean / std).view(1, 3, 1, 1))

    def forward(self, crops: Tensor) -> Tensor:
        """crops: uint8 [n, h, w, 3]. Returns float32 [n, 3, h, w]."""
        # Cast before the transposition: some compilers cannot transpose bytes.
        images = crops.to(torch.float32).permute(0, 3, 1, 2)
        out: Tensor = images * self.scale + self.shift
        return out


class HeadScores(nn.Module):
    """`Heads.raw_scores` in torch. The SVM is summed in float64: its terms are large and all but cancel."""

    linear_weight: Tensor
    linear_bias: Tensor
    fakes: Tensor
    reals: Tensor
    svm_vectors: Tensor
    svm_dual: Tensor
    svm_intercept: Tensor

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.register_buffer("linear_weight", _float32(heads.linear_weight))
        self.register_buffer("linear_bias", _float32(heads.linear_bias))
        self.register_buffer("fakes", _float32(heads.knn_gallery[heads.knn_labels == 1].T))
        self.register_buffer("reals", _float32(heads.knn_gallery[heads.knn_labels == 0].T))
        self.register_buffer("svm_vectors", torch.tensor(heads.svm_vectors.T, dtype=torch.float64))
        self.register_buffer("svm_dual", torch.tensor(heads.svm_dual, dtype=torch.float64))
        self.register_buffer("svm_intercept", torch.tensor(heads.svm_intercept, dtype=torch.float64))
        self.gamma, self.degree, self.coef0 = heads.svm_gamma, heads.svm_degree, heads.svm_coef0

    def forward(self, embedding: Tensor) -> Tensor:
        """embedding: float32 [n, 192]. Returns float32 [n, 3], columns in the order of `HEADS`."""
        linear = embedding @ self.linear_weight + self.linear_bias
        unit = functional.normalize(embedding, dim=1, eps=1e-20)
        knn = (unit @ self.fakes).amax(dim=1) - (unit @ self.reals).amax(dim=1)
        kernel = (self.gamma * (embedding.double() @ self.svm_vectors) + self.coef0) ** self.degree
        ocsvm = -(kernel @ self.svm_dual + self.svm_intercept)
        return torch.stack((linear, knn, ocsvm.to(torch.float32)), dim=1)


class _InFloat32(nn.Module):
    """Keeps a module out of autocast: the bytes of a pixel do not survive bfloat16 after normalisation, and the patch
    projection is 2% of the arithmetic."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            out: Tensor = self.module(images)
            return out


class Scorer(nn.Module):
    """Normalisation, encoder and heads of a bundle.

    `precision`: the encoder's arithmetic: None for float32, else bfloat16 or float16 by autocast; normalisation, the patch
    projection, the final embedding and the heads are float32 (and float64) always.
    """

    def __init__(self, bundle: Bundle, precision: torch.dtype | None = None) -> None:
        super().__init__()
        self.normalize = Normalize(bundle.preprocess)
        # Without memory or random numbers for weights that are replaced at once.
        with torch.device("meta"):
            self.encoder = VisionTransformer(layer_norm_eps=bundle.manifest.encoder.layer_norm_eps)
        self.encoder.load_state_dict({name: torch.tensor(array) for name, array in bundle.encoder.items()}, assign=True)
        self.encoder.patch_embed = _InFloat32(self.encoder.patch_embed)  # type: ignore[assignment]
        self.heads = HeadScores(bundle.heads)
        self.precision = precision
        self.eval().requires_grad_(False)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """crops: uint8 [n, 224, 224, 3]. Returns raw float32 [n, 3] and embedding float32 [n, 192]."""
        images = self.normalize(crops)
        with torch.autocast(crops.device.type, dtype=self.precision, enabled=self.precision is not None):
            embedding = self.encoder(images)
        embedding = embedding.to(torch.float32)
        return self.heads(embedding), embedding


def _float32(array: NDArray[np.floating]) -> Tensor:
    return torch.tensor(array, dtype=torch.float32)
