"""The module that is trained: the encoder and a linear classifier beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engine.model import VisionTransformer
from train.losses import ViewEmbeddings
from train.views import VIEWS

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Trainee(nn.Module):
    """The encoder and a linear classifier that exists only while training."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: VisionTransformer) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.dim, 1)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, patches: Tensor, index: Tensor, depth: int | None = None) -> tuple[Tensor, Tensor]:
        """uint8[n, k, 3, 16, 16], int64[n, k] -> embeddings float32[n, d], logits float32[n] (larger: fake)."""
        embedding = self.encoder.forward_patches((patches.float() / 255 - self.mean) / self.std, index, depth).float()
        return embedding, self.classifier(embedding)[:, 0]

    def train_blocks(self, depth: int) -> None:
        """Only the first `depth` blocks take gradients: DDP waits for one from every parameter that does."""
        for number, block in enumerate(self.encoder.blocks):
            block.requires_grad_(number < depth)


def start_as_identities(encoder: VisionTransformer, depth: int) -> None:
    """Zeroes what blocks beyond `depth` add to their input: they change nothing until a later phase trains them."""
    with torch.no_grad():
        for block in list(encoder.blocks)[depth:]:
            for name, parameter in block.named_parameters():
                if name.startswith(("attn.proj.", "mlp.fc2.")):
                    parameter.zero_()


def by_class(embedding: Tensor, records: int) -> tuple[ViewEmbeddings, ViewEmbeddings]:
    """float[4 * 2 * records, d] in a batch's order -> the views of the reals and of the fakes."""
    views = embedding.reshape(len(VIEWS), 2, records, -1)
    real, fake = (ViewEmbeddings(*(views[v, side] for v in range(len(VIEWS)))) for side in (0, 1))
    return real, fake


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices alone, as timm does: not on biases, norms and the CLS token."""
    decayed = [p for p in module.parameters() if p.ndim >= 2 and p.shape[0] > 1]
    rest = [p for p in module.parameters() if p.ndim < 2 or p.shape[0] <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
