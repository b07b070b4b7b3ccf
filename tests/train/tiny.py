"""A tiny recipe and encoder for the training tests."""

from __future__ import annotations

from typing import Any

from train.recipe import Phase, Recipe


def recipe(**changes: Any) -> Recipe:
    """Six steps of three records and five patches; fields may be replaced, those of the phase too."""
    names = set(Phase.__dataclass_fields__)
    phase = {"steps": 6, "records": 3, "tokens": 5, "geometry": "native", "preset": "platform", "aligned": 0.4, "depth": 2}
    phase.update({k: v for k, v in changes.items() if k in names})
    rest = {"name": "tiny", "seed": 5, "learning_rate": 1e-3, "bf16": False, "ema_decay": 0.9, "cross_entropy_weight": 1.0}
    rest.update({k: v for k, v in changes.items() if k not in names})
    return Recipe(phases=rest.pop("phases", (Phase(**phase),)), **rest)


def encoder() -> Any:
    """A two-block encoder of 24 dimensions on the same 224 px grid."""
    import torch

    from engine.model import VisionTransformer

    torch.manual_seed(1)
    return VisionTransformer(dim=24, depth=2, heads=3, mlp_dim=32)
