"""Trains the tiny recipe in a process that a test can kill: `python -m tests.train.trainer_process DATA OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

STEPS = 12


def main(data: Path, out: Path) -> None:
    """Resumes or begins, saves after every step."""
    import torch

    from tests.train.tiny import encoder, recipe
    from train.pretrain import Run, train

    torch.set_num_threads(1)
    run = Run(recipe(steps=STEPS), data, out, encoder=encoder())
    run.resume()
    train(run, workers=1, checkpoint_every_s=0.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
