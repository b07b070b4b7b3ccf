"""Peer (c): LitServe with its dynamic batching. https://lightning.ai/docs/litserve/features/batching"""

from __future__ import annotations

import base64
import os
from typing import Any

import litserve
import numpy as np

from benchmarks.peers.model import Model, crop


class Api(litserve.LitAPI):  # type: ignore[misc]
    """Decodes a request, scores a batch, encodes a response."""

    def setup(self, device: Any) -> None:
        self.model = Model()

    def decode_request(self, request: dict[str, str]) -> np.ndarray:
        return crop(base64.b64decode(request["image"]))

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, crops: np.ndarray) -> list[float]:
        return self.model(crops)

    def unbatch(self, output: list[float]) -> list[float]:
        return output

    def encode_response(self, output: float) -> dict[str, float]:
        return {"score": output}


if __name__ == "__main__":
    api = Api(max_batch_size=32, batch_timeout=0.005)
    litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=60, fast_queue=True).run(
        host="127.0.0.1", port=int(os.environ["PEER_PORT"]), log_level="warning", generate_client_file=False
    )
