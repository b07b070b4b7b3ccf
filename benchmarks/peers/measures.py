"""What is measured of a contestant: throughput over a backlog, latency at a given load, and what a kill costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.contestants import Contestant
from benchmarks.peers.course import Field, Others, running
from benchmarks.simulated_device import poisson
from worker.embedded import EmbeddedBroker

WARM_UP = 100
BEYOND = 300
"""Events behind those that are counted: who reads and decodes far ahead has as much under way at the end as at the start."""

JOINED_S = 6.0
"""Between the first verdicts and the paced uploads: one of two processes may have made them all before the other joined."""


def throughput(contestant: Contestant, model: str, pictures: list[bytes], scratch: Path) -> dict[str, float]:
    """Events a second over a backlog that stands in the topic before the start; CPU and memory of all its processes."""
    with EmbeddedBroker() as broker, closing(Field(broker)) as field:
        field.send(pictures, "backlog")
        field.send(pictures[:BEYOND], "beyond")
        with running(contestant, field, model, scratch) as process:
            field.wait(WARM_UP, process)
            before, seen, started, others = process.cpu_s(), len(field.seen), time.monotonic(), Others()
            field.wait(len(pictures), process)
            took, used, done = time.monotonic() - started, process.cpu_s() - before, len(field.seen) - seen
            return {
                "events_per_s": done / took,
                "cpu_s_per_1000": used / done * 1000,
                "memory_mib": process.proportional_mib(),
                "others_share": others.share(),
            }


def latency(
    contestant: Contestant, model: str, pictures: list[bytes], rate_per_s: float, seconds: float, scratch: Path
) -> dict[str, float]:
    """Milliseconds from a produced upload to its verdict, uploads coming at random moments, the same for everybody."""
    moments = poisson(rate_per_s, seconds, seed=5)
    with EmbeddedBroker() as broker, closing(Field(broker)) as field, running(contestant, field, model, scratch) as process:
        field.send(pictures[:WARM_UP], "warm")
        field.wait(WARM_UP, process)
        field.rest(JOINED_S)
        field.send(pictures[:WARM_UP], "warm again")
        field.wait(2 * WARM_UP, process)
        sent: dict[str, float] = {}
        begun, before, others = time.monotonic(), process.cpu_s(), Others()
        for number, moment in enumerate(moments):
            while (left := begun + moment - time.monotonic()) > 0:
                field.look(min(left, 0.01))
            event_id = f"paced-{number}"
            sent[event_id] = time.monotonic()
            field.send_one(event_id, pictures[number % len(pictures)])
        field.wait(2 * WARM_UP + len(sent), process)
        taken = np.array([field.seen[event_id][0] - at for event_id, at in sent.items()]) * 1000
        return {
            "p50_ms": float(np.median(taken)),
            "p99_ms": float(np.percentile(taken, 99)),
            "cpu_s_per_1000": (process.cpu_s() - before) / len(sent) * 1000,
            "others_share": others.share(),
            "rate_per_s": rate_per_s,
            "events": len(sent),
        }


def killed(contestant: Contestant, model: str, pictures: list[bytes], scratch: Path) -> dict[str, int]:
    """Verdicts missing and doubled when all of it dies (-9) in the middle of a backlog and is started again."""
    with EmbeddedBroker() as broker, closing(Field(broker)) as field:
        ids = field.send(pictures, "killed")
        with running(contestant, field, model, scratch) as process:
            field.wait(len(pictures) // 3, process)
            process.kill()
        with running(contestant, field, model, scratch) as process:
            field.settle(len(ids), contestant.group, process)
        return {
            "events": len(ids),
            "lost": sum(event_id not in field.seen for event_id in ids),
            "repeated": sum(len(moments) - 1 for moments in field.seen.values()),
        }


def released(model: str, pictures: list[bytes], scratch: Path) -> dict[str, Any]:
    """Images a second and CPU of the released way, from files, without Kafka."""
    folder = scratch / "files"
    folder.mkdir(exist_ok=True)
    for number, picture in enumerate(pictures):
        (folder / f"{number:06}.jpg").write_bytes(picture)
    found = {}
    for way in ("one", "dataloader"):
        command = [sys.executable, "-m", "benchmarks.peers.released", str(folder), way]
        done = subprocess.run(command, env=os.environ | {"PEER_MODEL": model}, capture_output=True, text=True, check=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    return found
