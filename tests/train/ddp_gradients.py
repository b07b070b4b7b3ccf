"""Under torchrun: one forward and backward of a joined batch through DDP; each rank leaves its gradients in OUT."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(store: Path, out: Path) -> None:
    """Gradients of the tiny recipe's first step."""
    import torch

    from tests.train.tiny import encoder, recipe
    from train.pretrain import Run
    from train.ranks import joined
    from train.store import PixelStore
    from train.views import Sampler, batch_at

    torch.set_num_threads(1)
    with joined("cpu") as ranks:
        run = Run(recipe(depth=1), store, out, encoder=encoder(), ranks=ranks)
        numbers = run.gradients(batch_at(Sampler(PixelStore(store), 0.5), run.recipe, 0, ranks.rank))
        gradients = {name: p.grad for name, p in run.trainee.named_parameters() if p.grad is not None}
        torch.save({"contrastive": numbers["contrastive"].detach(), "gradients": gradients}, out / f"{ranks.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stderr.flush()
    os._exit(0)  # as `train.__main__` leaves: gloo's threads may abort an interpreter's teardown
