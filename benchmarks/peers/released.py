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
    done, started, used = 0, 0.0, 0.0
    for batch in batches:
        model(batch.numpy())
        done += len(batch)
        if not started and done >= 64:
            started, used, done = time.perf_counter(), _cpu_s(), 0
    took = time.perf_counter() - started
    print(json.dumps({"images_per_s": done / took, "cpu_s_per_1000": (_cpu_s() - used) / done * 1000}))


def _cpu_s() -> float:
    """Of this process and the loader's."""
    own = psutil.Process()
    return sum(sum(member.cpu_times()[:2]) for member in (own, *own.children()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
