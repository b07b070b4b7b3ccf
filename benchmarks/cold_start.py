"""How long a worker takes from its start to readiness, where that time goes, and what it holds in memory then.

A worker process is started several times against the embedded broker (or a named one), and /readyz is asked until it says yes.
Everything is as in production: the packaged bundle, the backend that `auto` takes, decoder processes. The group's join is shown
apart: how long it takes is the broker's decision (Kafka waits `group.initial.rebalance.delay.ms`, 3 s unless set, for an empty
group; the embedded broker half of the session timeout, here 3 s as well).

    python -m benchmarks.cold_start [--runs 5] [--bootstrap HOST:PORT] [--backend openvino]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks import record
from worker.embedded import EmbeddedBroker, EmbeddedCache, free_port

DEADLINE_S = 300.0
POLL_S = 0.01


def start(bootstrap: str, cache_url: str, backend: str, log: Path) -> dict[str, float]:
    """Start one worker, wait until it is ready, end it; seconds since its start, and its size when ready."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_")}
    environment |= {
        "WORKER_KAFKA__BOOTSTRAP_SERVERS": bootstrap,
        "WORKER_KAFKA__CREATE_TOPICS": "true",
        "WORKER_KAFKA__SESSION_TIMEOUT_MS": "6000",  # the least that Kafka grants
        "WORKER_CACHE__URL": cache_url,
        "WORKER_ENGINE__BACKEND": backend,
        "WORKER_HTTP__HOST": "127.0.0.1",
        "WORKER_HTTP__PORT": str(port),
        "WORKER_LOG__FORMAT": "json",
    }
    with log.open("wb") as stream:
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "worker", "run"], env=environment, stderr=stream)
    try:
        seen = _watch(process, port, began)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        times = [member.cpu_times() for member in family]
        memory = [member.memory_info().rss / 2**20 for member in family]
        loaded = [json.loads(line) for line in log.read_text().splitlines() if '"engine.loaded"' in line]
        return {
            "answers_s": seen["live"],
            "engine_s": seen["engine"],
            "ready_s": seen["ready"],
            "join_s": seen["ready"] - seen["engine"],
            "engine_load_s": loaded[0]["duration_ms"] / 1000,
            "cpu_s": sum(used.user + used.system for used in times),
            "worker_mib": memory[0],
            "decoder_mib": max(memory[1:], default=0.0),
            "all_mib": sum(memory),
        }
    finally:
        process.terminate()
        process.wait(60)


def _watch(process: subprocess.Popen[bytes], port: int, began: float) -> dict[str, float]:
    """Seconds until /readyz answers at all, until the engine is warm, and until it says yes."""
    seen: dict[str, float] = {}
    while "ready" not in seen:
        if process.poll() is not None or time.monotonic() - began > DEADLINE_S:
            raise SystemExit("the worker ended or did not get ready")
        time.sleep(POLL_S)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                conditions, ready = json.load(answer), True
        except urllib.error.HTTPError as refusal:
            conditions, ready = json.load(refusal), False
        except OSError:
            continue
        now = time.monotonic() - began
        seen.setdefault("live", now)
        if conditions["engine"]:
            seen.setdefault("engine", now)
        if ready:
            seen["ready"] = now
    return seen


def main(runs: int = 5, bootstrap: str | None = None, backend: str = "auto") -> dict[str, Any]:
    """Measure and write benchmarks/results/cold_start.json; the first start (files not in memory yet) stands apart."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory()))
        cache = stack.enter_context(EmbeddedCache())
        broker = bootstrap or stack.enter_context(EmbeddedBroker()).bootstrap
        starts = [start(broker, cache.url, backend, scratch / f"{number}.log") for number in range(runs + 1)]
    first, rest = starts[0], starts[1:]
    figures: dict[str, Any] = {
        "broker": "named" if bootstrap else "embedded",
        "runs": runs,
        "first_ready_s": first["ready_s"],
        "median": {name: statistics.median(one[name] for one in rest) for name in rest[0]},
        "fastest": {name: min(one[name] for one in rest) for name in rest[0]},
        "load_average": os.getloadavg()[0],
    }
    record.write("cold_start", figures)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="starts after the first one (default 5)")
    parser.add_argument("--bootstrap", help="a broker to start against (default: an embedded one)")
    parser.add_argument("--backend", default="auto", help="the engine's backend (default auto)")
    arguments = parser.parse_args()
    for name, value in main(arguments.runs, arguments.bootstrap, arguments.backend).items():
        print(f"{name}: {value}")
