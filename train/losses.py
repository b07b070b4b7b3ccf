"""CoDE's contrastive loss (arXiv 2407.20337, section 3.2), as in the paper and as in the released training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed
import torch.nn.functional as functional
from torch import Tensor

from train.recipe import TEMPERATURE, Variant


@dataclass(frozen=True, slots=True)
class ViewEmbeddings:
    """One class's embeddings in a step, each float32[n, d] and not normalised; row i of all four is image i."""

    plain: Tensor
    augmented: Tensor
    whole: Tensor
    local: Tensor


def info_nce(query: Tensor, positive: Tensor, negatives: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Mean over rows of the cross entropy of [q.k+, q.K-] / temperature with label 0, all vectors L2-normalised.

    query, positive: float[n, d]; negatives: float[m, d], shared by all rows. Returns a scalar.
    """
    query, positive, negatives = (functional.normalize(v.float(), dim=-1) for v in (query, positive, negatives))
    logits = torch.cat(((query * positive).sum(-1, keepdim=True), query @ negatives.T), dim=1) / temperature
    return functional.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def class_loss(own: ViewEmbeddings, other: ViewEmbeddings, permutation: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """L of one class: half class-supervised (positives permuted within the class), half local against global of one image.

    Negatives are the other class alone. permutation: int64[n].
    """
    supervised = info_nce(own.plain, own.augmented[permutation], other.augmented, temperature)
    same_image = info_nce(own.local, own.whole, other.whole, temperature)
    return (supervised + same_image) / 2


def code_loss(
    real: ViewEmbeddings,
    fake: ViewEmbeddings,
    variant: Variant = "paper",
    *,
    generator: torch.Generator | None = None,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """`paper`: L_real + L_fake. `as_released`: 2 L_real, which the released step optimises (L_fake is only logged there).

    generator: source of the two permutations; the same seed on every rank, or ranks disagree about the loss.
    """
    order = _permutation(len(real.plain), generator, real.plain.device)
    l_real = class_loss(real, fake, order, temperature)
    if variant == "as_released":
        return 2 * l_real
    order = _permutation(len(fake.plain), generator, fake.plain.device)
    return l_real + class_loss(fake, real, order, temperature)


def _permutation(n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    return torch.randperm(n, generator=generator).to(device)


class _Gather(torch.autograd.Function):
    """all_gather along rows whose backward sums every rank's gradient and keeps this rank's part.

    all_reduce and a slice instead of reduce_scatter: gloo has no reduce_scatter, and the rows are few.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        first = distributed.get_rank() * ctx.rows
        return total[first : first + ctx.rows]


def gathered_rows(rows: Tensor) -> Tensor:
    """float[n, ...] of each rank -> float[ranks * n, ...] in rank order, with gradient; itself where nothing is distributed.

    Every rank then computes the loss of the joined batch. The backward of the gather sums over ranks and DDP averages, so
    the parameters' gradients are those of one process with the joined batch. Ranks must hold equally many rows.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return rows
    out: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return out


def gathered(views: ViewEmbeddings) -> ViewEmbeddings:
    """All ranks' rows of one class, in rank order, with gradient (`gathered_rows`), in one exchange."""
    stacked = torch.stack((views.plain, views.augmented, views.whole, views.local), dim=1)
    return ViewEmbeddings(*gathered_rows(stacked).unbind(dim=1))
