"""Peer (c): Mosec with a decoding stage of two processes and a batching stage. https://mosecorg.github.io/mosec/examples/pytorch.html"""

from __future__ import annotations

import sys

import numpy as np
from mosec import Server, Worker

from benchmarks.peers.model import Model, crop


class Decode(Worker):  # type: ignore[misc]
    """File to crop, in processes of their own."""

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> np.ndarray:
        return crop(data)


class Infer(Worker):  # type: ignore[misc]
    """Batches of crops to scores."""

    def __init__(self) -> None:
        self.model = Model()

    def forward(self, data: list[np.ndarray]) -> list[dict[str, float]]:
        return [{"score": score} for score in self.model(np.stack(data))]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Decode, num=2)
    server.append_worker(Infer, num=1, max_batch_size=32, max_wait_time=5)
    sys.exit(server.run())
