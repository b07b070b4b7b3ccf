"""Peer (c): Ray Serve, decoding replicas in front of one that batches. https://docs.ray.io/en/latest/serve/advanced-guides/dyn-req-batch.html"""

from __future__ import annotations

import os
import signal
import socket
from typing import Any

import numpy as np
import ray
from ray import serve
from starlette.requests import Request

from benchmarks.peers.model import Model, crop


@serve.deployment(ray_actor_options={"num_cpus": 0.5}, max_ongoing_requests=128)
class Infer:
    """Batches of crops to scores."""

    def __init__(self) -> None:
        self.model = Model()

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)
    async def __call__(self, crops: list[np.ndarray]) -> list[float]:
        return self.model(np.stack(crops))


@serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 0.5}, max_ongoing_requests=64)
class Decode:
    """File to crop, in two processes; the ingress."""

    def __init__(self, infer: Any) -> None:
        self.infer = infer

    async def __call__(self, request: Request) -> dict[str, float]:
        return {"score": await self.infer.remote(crop(await request.body()))}


if __name__ == "__main__":
    # Its workers else yield to everything else on the machine: here that is the broker.
    os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["PEER_SERVE_PORT"])})
    serve.run(Decode.bind(Infer.bind()), route_prefix="/predict")
    with socket.create_server(("127.0.0.1", int(os.environ["PEER_PORT"]))):  # the proxy answers 503 before the replicas are up
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
