"""Peer (a): the released CoDE way, without Kafka: Pillow, one image at a time, or a DataLoader's batches."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.peers.model import Model, crop


class Files(Dataset):  # type: ignore[type-arg]
    """Crops of the files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(crop(self._paths[index].read_bytes())))


def main(folder: Path, way: str) -> None:
    """Score the folder, the first 64 images to warm up."""
    model, files = Model(), Files(folder)
    if way == "one":
        batches = (files[index][None] for index in range(len(files)))
    else:
        batches = iter(DataLoader(files, batch_size=32, num_workers=2))
    done, started, used, memory = 0, 0.0, 0.0, 0.0
    for batch in batches:
        model(batch.numpy())
        done += len(batch)
        if not started and done >= 64:
            started, used, done = time.perf_counter(), _cpu_s(), 0
        elif started and not memory:
            memory = _memory_mib()
    took = time.perf_counter() - started
    figures = {"images_per_s": done / took, "cpu_s_per_1000": (_cpu_s() - used) / done * 1000, "memory_mib": memory}
    print(json.dumps(figures))


def _cpu_s() -> float:
    """Of this process and the loader's: it ends them after the last batch, and then they count as ended children."""
    own = psutil.Process()
    return sum(own.cpu_times()[:4]) + sum(sum(child.cpu_times()[:2]) for child in own.children())


def _memory_mib() -> float:
    """Of this process and the loader's, pages that they share counted once."""
    own = psutil.Process()
    return sum(member.memory_full_info().pss for member in (own, *own.children())) / 2**20


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
