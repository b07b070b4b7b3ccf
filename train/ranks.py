"""The processes of one training run under torchrun: who this one is, its device, and the few words they exchange.

Gradients and embeddings travel through the default group (nccl on CUDA, gloo on the CPU). Flags and barriers have a gloo group
of their own, so that they neither wait for the GPU nor end at its ten-minute limit while rank 0 prepares the data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as distributed

from train.pretrain_errors import PretrainError, RankLostError

PREPARATION = timedelta(hours=24)
"""How long the other ranks wait while rank 0 decodes a data set."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the run; `control` is the gloo group of the flags, None in a single process."""

    rank: int
    world_size: int
    device: torch.device
    control: Any = None

    @classmethod
    def alone(cls, device: str = "cpu") -> Ranks:
        """The only process of a run."""
        return cls(0, 1, torch.device(device))

    def barrier(self) -> None:
        """Waits until every rank is here."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: the same answer on all of them."""
        return self._largest(int(flag)) == 1

    def agree(self, number: int) -> bool:
        """Whether every rank gave the same number."""
        return self._largest(number) == -self._largest(-number)

    def _largest(self, number: int) -> int:
        if self.control is None:
            return number
        value = torch.tensor(number, dtype=torch.int64)
        distributed.all_reduce(value, distributed.ReduceOp.MAX, group=self.control)
        return int(value)


def chosen_device(name: str, environment: dict[str, str] | None = None) -> torch.device:
    """The device of this process: plain `cuda` under torchrun is the GPU of LOCAL_RANK. Raises PretrainError if it is missing."""
    environment = dict(os.environ) if environment is None else environment
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise PretrainError(f"--device {name}: not a device of torch; give cpu, cuda or cuda:N") from exc
    if device.type == "cuda":
        local = int(environment.get("LOCAL_RANK", "0")) if device.index is None else device.index
        if not torch.cuda.is_available():
            raise PretrainError(f"--device {name}: torch sees no CUDA device here")
        if local >= torch.cuda.device_count():
            raise PretrainError(f"--device {name}: this process needs GPU {local}, and there are {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
    return device


@contextmanager
def joined(device_name: str) -> Iterator[Ranks]:
    """Joins torchrun's processes, by its environment variables; a single process joins nothing.

    Left in good order, all ranks meet once more before the groups are torn down: a rank that went early would look dead to the
    others. Left by an exception, nothing waits for anybody.
    """
    device = chosen_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        with clear_errors(0, 1):
            yield Ranks(0, 1, device)
        return
    try:
        if device.type == "cuda":
            distributed.init_process_group("nccl", device_id=device)
        else:
            distributed.init_process_group("gloo")
        control = distributed.new_group(backend="gloo", timeout=PREPARATION)
    except (RuntimeError, ValueError) as exc:
        raise PretrainError(f"cannot join the other processes: {_first_line(exc)}; start them with torchrun") from exc
    ranks = Ranks(distributed.get_rank(), world_size, device, control)
    with clear_errors(ranks.rank, world_size):
        yield ranks
        ranks.barrier()
        distributed.destroy_process_group()


@contextmanager
def clear_errors(rank: int, world_size: int) -> Iterator[None]:
    """The boundary to torch's RuntimeErrors: a lost process (the transports word it in many ways) and a killed loader process."""
    try:
        yield
    except RuntimeError as exc:
        text = _first_line(exc)
        if text.startswith("DataLoader worker"):
            raise PretrainError(f"{text.strip()} If memory ran out, give fewer --workers") from exc
        lost = isinstance(exc, distributed.DistError) or any(word in text.lower() for word in _TRANSPORT_WORDS)
        if world_size > 1 and lost:
            raise RankLostError(f"rank {rank}: another process is gone ({text[-90:]}); the same command resumes the run") from exc
        raise


_TRANSPORT_WORDS = ("gloo", "nccl", "connection", "socket", "peer")


def _first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]
