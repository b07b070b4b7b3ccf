"""Checkpoints of a pretraining run: written whole and synced or not at all, read without executing anything.

code-pretrain/2 holds recipe and data digests, number of processes, weights, averaged weights, optimiser, step, the generators'
states, the early stop's memory, damaged members met and the seconds trained. The data position is the step. code-pretrain/1
lacks what came later and is read too.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from train.pretrain_errors import PretrainError

FORMAT = "code-pretrain/2"
READABLE = ("code-pretrain/1", FORMAT)


def write(path: Path, state: dict[str, Any]) -> None:
    """Replaces `path` atomically; after a power cut it holds the old checkpoint or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: Path, device: torch.device) -> dict[str, Any]:
    """The state at `path`. Raises PretrainError if it cannot be read or is of another format."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as exc:
        raise PretrainError(f"{path}: not a readable checkpoint ({(str(exc).splitlines() or ['empty'])[0][:120]})") from exc
    found = state.get("format") if isinstance(state, dict) else None
    if found not in READABLE:
        raise PretrainError(f"{path}: format {found!r} is none of {', '.join(READABLE)}")
    return dict(state)


def generators() -> dict[str, Any]:
    """States of torch's own generators. Nothing in a step draws from them today; a model with dropout would."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_generators(states: dict[str, Any]) -> None:
    """Puts back what `generators` gave, where the devices are the same."""
    torch.set_rng_state(states["cpu"].cpu())
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
