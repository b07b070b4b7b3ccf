"""Who runs the course: the commands of each contestant and their environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from worker.embedded import free_port


@dataclass(frozen=True)
class Contestant:
    """`commands`: given the broker's address and the model, the processes to start, each with its environment."""

    name: str
    commands: Callable[[str, str], list[tuple[list[str], dict[str, str]]]]
    group: str = "peer"
    """In Kafka."""
    ours: bool = False


def _python(module: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.peers.{module}"]


def _environment(bootstrap: str, model: str, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_")}
    return kept | {"PEER_BOOTSTRAP": bootstrap, "PEER_MODEL": model} | more


def _ours(bootstrap: str, model: str, **more: str) -> list[tuple[list[str], dict[str, str]]]:
    settings = {
        "WORKER_KAFKA__BOOTSTRAP_SERVERS": bootstrap,
        "WORKER_KAFKA__SESSION_TIMEOUT_MS": "6000",
        "WORKER_CACHE__ENABLED": "false",  # the peers have none
        "WORKER_HTTP__PORT": "0",
        "WORKER_LOG__LEVEL": "WARNING",
    }
    return [(_python("ours"), _environment(bootstrap, model, **settings, **more))]


def _ours_twice(bootstrap: str, model: str) -> list[tuple[list[str], dict[str, str]]]:
    """Two processes, each with a core of the model's threads and one decoder: as FastStream's two."""
    return _ours(bootstrap, model, WORKER_ENGINE__THREADS="1", WORKER_DECODE__PROCESSES="1") * 2


def _faststream(bootstrap: str, model: str) -> list[tuple[list[str], dict[str, str]]]:
    return [(_python("faststream_app"), _environment(bootstrap, model))]


def _faststream_twice(bootstrap: str, model: str) -> list[tuple[list[str], dict[str, str]]]:
    """Two processes, as `faststream run --workers 2` has them, each with a core of the model's threads."""
    return [(_python("faststream_app"), _environment(bootstrap, model, PEER_THREADS="1"))] * 2


def _litserve(bootstrap: str, model: str) -> list[tuple[list[str], dict[str, str]]]:
    port = str(free_port())
    url = f"http://127.0.0.1:{port}/predict"
    return [
        (_python("litserve_app"), _environment(bootstrap, model, PEER_PORT=port)),
        (_python("http_consumer"), _environment(bootstrap, model, PEER_URL=url, PEER_JSON="1")),
    ]


def _mosec(bootstrap: str, model: str) -> list[tuple[list[str], dict[str, str]]]:
    port = str(free_port())
    url = f"http://127.0.0.1:{port}/inference"
    return [
        # Its time-out of 3 s for a request answers 408 to the last of a backlog on a slow machine.
        (
            [*_python("mosec_app"), "--address", "127.0.0.1", "--port", port, "--timeout", "60000"],
            _environment(bootstrap, model, PEER_PORT=port),
        ),
        (_python("http_consumer"), _environment(bootstrap, model, PEER_URL=url)),
    ]


def _ray(bootstrap: str, model: str) -> list[tuple[list[str], dict[str, str]]]:
    port, ready = str(free_port()), str(free_port())
    url = f"http://127.0.0.1:{port}/predict"
    return [
        (_python("ray_app"), _environment(bootstrap, model, PEER_PORT=ready, PEER_SERVE_PORT=port)),
        (_python("http_consumer"), _environment(bootstrap, model, PEER_URL=url)),
    ]


CONTESTANTS = (
    Contestant("this worker", _ours, "code-worker", ours=True),
    Contestant("this worker, two processes", _ours_twice, "code-worker", ours=True),
    Contestant("FastStream", _faststream),
    Contestant("FastStream, two processes", _faststream_twice),
    Contestant("aiokafka + LitServe", _litserve),
    Contestant("aiokafka + Mosec", _mosec),
    Contestant("aiokafka + Ray Serve", _ray),
)


OURS = frozenset(contestant.name for contestant in CONTESTANTS if contestant.ours)
