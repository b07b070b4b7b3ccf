"""`python -m benchmarks.peers`: this worker and what one would otherwise put together: same images, model, machine, one run.

For each contestant: throughput over a backlog, CPU seconds and memory; latency at the same load for all; events lost and
repeated when everything of it is killed (-9) in the middle and started again. Packages: extra `peers`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.peers.contestants import CONTESTANTS, Contestant
from benchmarks.pipeline import jpegs
from benchmarks.simulated_device import poisson
from worker.clock import Deadline
from worker.embedded import EmbeddedBroker
from worker.kafka_clients import ensure_topics
from worker.settings import KafkaSettings

WARM_UP = 100
PACKAGES = ("faststream", "aiokafka", "litserve", "mosec", "openvino")


class Field:
    """A broker with fresh topics, and eyes on the verdicts."""

    def __init__(self, broker: EmbeddedBroker) -> None:
        self.bootstrap = broker.bootstrap
        ensure_topics(KafkaSettings(bootstrap_servers=(broker.bootstrap,), create_topics=True), Deadline(60))
        self._producer = KafkaProducer(
            bootstrap_servers=broker.bootstrap, compression_type="lz4", linger_ms=1, max_request_size=8_000_000
        )
        self._consumer = KafkaConsumer(bootstrap_servers=broker.bootstrap, enable_auto_commit=False, fetch_max_wait_ms=5)
        parts = [TopicPartition("image.verdicts", p) for p in self._consumer.partitions_for_topic("image.verdicts") or ()]
        self._consumer.assign(parts)
        self._consumer.seek_to_beginning(*parts)
        self.seen: dict[str, list[float]] = {}
        """Moments (monotonic) at which verdicts of an event came, by its id."""

    def send(self, pictures: list[bytes], prefix: str) -> list[str]:
        ids = [f"{prefix}-{number}" for number in range(len(pictures))]
        for event_id, picture in zip(ids, pictures, strict=True):
            self.send_one(event_id, picture)
        self._producer.flush()
        return ids

    def send_one(self, event_id: str, picture: bytes) -> None:
        headers = [("content-type", b"image/jpeg"), ("event_id", event_id.encode())]
        self._producer.send("image.uploads", picture, headers=headers)

    def look(self, wait_s: float = 0.02) -> None:
        for records in self._consumer.poll(int(wait_s * 1000)).values():
            now = time.monotonic()
            for found in records:
                self.seen.setdefault(json.loads(found.value)["event_id"], []).append(now)

    def wait(self, count: int, running: Running, within_s: float = 300) -> None:
        deadline = time.monotonic() + within_s
        while len(self.seen) < count:
            self.look()
            running.check()
            if time.monotonic() > deadline:
                raise SystemExit(f"{running.name}: stalled at {len(self.seen)} of {count} verdicts\n{running.log()}")

    def settle(self, quiet_s: float, count: int, within_s: float = 120) -> None:
        """Until all are there, or nothing new came for `quiet_s`."""
        deadline, last, had = time.monotonic() + within_s, time.monotonic(), -1
        while time.monotonic() < deadline and (len(self.seen) < count and time.monotonic() - last < quiet_s):
            self.look()
            if len(self.seen) != had:
                had, last = len(self.seen), time.monotonic()


class Running:
    """A contestant's processes."""

    def __init__(self, contestant: Contestant, bootstrap: str, model: str, scratch: Path) -> None:
        self.name = contestant.name
        self._log = scratch / f"{uuid.uuid4().hex}.log"
        self._processes = []
        with self._log.open("ab") as log:
            for command, environment in contestant.commands(bootstrap, model):
                self._processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
                if (port := environment.get("PEER_PORT")) is not None:
                    self._wait_for(int(port))  # a server before its client

    def _wait_for(self, port: int) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            self.check()
            time.sleep(0.2)
        raise SystemExit(f"{self.name}: its server did not come up\n{self.log()}")

    def family(self) -> list[psutil.Process]:
        members = []
        for process in self._processes:
            own = psutil.Process(process.pid)
            members += [own, *own.children(recursive=True)]
        return members

    def cpu_s(self) -> float:
        return sum(sum(member.cpu_times()[:2]) for member in self.family())

    def resident_mib(self) -> float:
        return sum(member.memory_info().rss for member in self.family()) / 2**20

    def check(self) -> None:
        if any(process.poll() is not None for process in self._processes):
            raise SystemExit(f"{self.name}: ended by itself\n{self.log()}")

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    def kill(self) -> None:
        for member in self.family():
            member.kill()
        for process in self._processes:
            process.wait(10)

    def stop(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        _, left = psutil.wait_procs([psutil.Process(p.pid) for p in self._processes if p.poll() is None], timeout=15)
        if left:
            self.kill()


@contextmanager
def running(contestant: Contestant, field: Field, model: str, scratch: Path) -> Iterator[Running]:
    """Started, and ended whatever happens."""
    found = Running(contestant, field.bootstrap, model, scratch)
    try:
        yield found
    finally:
        with_any = [p for p in found._processes if p.poll() is None]
        if with_any:
            found.stop()


def throughput(contestant: Contestant, model: str, pictures: list[bytes], scratch: Path) -> dict[str, float]:
    """Events a second over a backlog that stands in the topic before the start; CPU and memory of all its processes."""
    with EmbeddedBroker() as broker:
        field = Field(broker)
        field.send(pictures, "backlog")
        with running(contestant, field, model, scratch) as process:
            field.wait(WARM_UP, process)
            before, seen, started = process.cpu_s(), len(field.seen), time.monotonic()
            peak = 0.0
            while len(field.seen) < len(pictures):
                field.look(0.2)
                process.check()
                peak = max(peak, process.resident_mib())
            took = time.monotonic() - started
            done = len(field.seen) - seen
            return {"events_per_s": done / took, "cpu_s_per_1000": (process.cpu_s() - before) / done * 1000, "resident_mib": peak}


def latency(
    contestant: Contestant, model: str, pictures: list[bytes], rate_per_s: float, seconds: float, scratch: Path
) -> dict[str, float]:
    """Milliseconds from a produced upload to its verdict, uploads coming at random moments, the same for everybody."""
    moments = poisson(rate_per_s, seconds, seed=5)
    with EmbeddedBroker() as broker:
        field = Field(broker)
        with running(contestant, field, model, scratch) as process:
            field.send(pictures[:WARM_UP], "warm")
            field.wait(WARM_UP, process)
            sent: dict[str, float] = {}
            begun = time.monotonic()
            for number, moment in enumerate(moments):
                while (left := begun + moment - time.monotonic()) > 0:
                    field.look(min(left, 0.01))
                event_id = f"paced-{number}"
                sent[event_id] = time.monotonic()
                field.send_one(event_id, pictures[number % len(pictures)])
            field.wait(WARM_UP + len(sent), process)
            taken = np.array([field.seen[event_id][0] - at for event_id, at in sent.items()]) * 1000
            return {"p50_ms": float(np.median(taken)), "p99_ms": float(np.percentile(taken, 99)), "events": len(sent)}


def killed(contestant: Contestant, model: str, pictures: list[bytes], scratch: Path) -> dict[str, int]:
    """Verdicts missing and doubled when all of it dies (-9) in the middle of a backlog and is started again."""
    with EmbeddedBroker() as broker:
        field = Field(broker)
        ids = field.send(pictures, "killed")
        with running(contestant, field, model, scratch) as process:
            field.wait(len(pictures) // 3, process)
            process.kill()
        with running(contestant, field, model, scratch):
            field.settle(30, len(ids))
        return {
            "events": len(ids),
            "lost": sum(event_id not in field.seen for event_id in ids),
            "repeated": sum(len(moments) - 1 for moments in field.seen.values()),
        }


def released(model: str, pictures: list[bytes], scratch: Path) -> dict[str, float]:
    """Images a second of the released way, from files, without Kafka."""
    folder = scratch / "files"
    folder.mkdir(exist_ok=True)
    for number, picture in enumerate(pictures):
        (folder / f"{number:06}.jpg").write_bytes(picture)
    rates = {}
    for way in ("one", "dataloader"):
        command = [sys.executable, "-m", "benchmarks.peers.released", str(folder), way]
        done = subprocess.run(command, env=os.environ | {"PEER_MODEL": model}, capture_output=True, text=True, check=True)
        rates[way] = json.loads(done.stdout.splitlines()[-1])["images_per_s"]
    return rates


def course(model: str, events: int, seconds: float, load: float, scratch: Path) -> dict[str, Any]:
    """Everybody over the course with one model."""
    pictures = jpegs(events)
    rates = {c.name: throughput(c, model, pictures, scratch) for c in CONTESTANTS}
    rate = load * min(found["events_per_s"] for found in rates.values())
    figures: dict[str, Any] = {"load_per_s": rate, "released": released(model, pictures[: events // 2], scratch)}
    for contestant in CONTESTANTS:
        paced = latency(contestant, model, pictures, rate, seconds, scratch)
        lost = killed(contestant, model, pictures[: events // 2], scratch)
        figures[contestant.name] = rates[contestant.name] | paced | {"killed": lost}
    return figures


def main() -> None:
    """Run, print, write benchmarks/results/peers.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=900)
    parser.add_argument("--seconds", type=float, default=20, help="of paced uploads")
    parser.add_argument("--load", type=float, default=0.6, help="share of the slowest contestant's throughput for the paced part")
    parser.add_argument("--simulated", default="0.004,0.00015", metavar="A,B", help="seconds a batch of n takes: A + B*n")
    parser.add_argument("--only", choices=("openvino", "simulated"))
    given = parser.parse_args()
    figures: dict[str, Any] = {"picture": "512x512 JPEG, inline", "simulated": given.simulated}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        onnx = scratch / "model.onnx"
        subprocess.run([sys.executable, "-m", "engine", "export", "--out", str(onnx)], check=True, capture_output=True)
        for name, model in (("openvino", str(onnx)), ("simulated", given.simulated)):
            if given.only in (None, name):
                figures[name] = course(model, given.events, given.seconds, given.load, scratch)
                show(name, figures[name])
    figures["packages"] = {name: record._version(name) for name in PACKAGES}
    print(record.write("peers", figures))


def show(title: str, figures: dict[str, Any]) -> None:
    """A table."""
    table = Table(
        "", "events/s", "p50 ms", "p99 ms", "CPU s / 1,000", "MiB", "lost", "repeated",
        title=f"{title}: paced at {figures['load_per_s']:.0f}/s; released way: {figures['released']['one']:.0f} images/s "
        f"one by one, {figures['released']['dataloader']:.0f} by DataLoader",
    )  # fmt: skip
    for contestant in CONTESTANTS:
        row = figures[contestant.name]
        cells = [f"{row[key]:.0f}" for key in ("events_per_s", "p50_ms", "p99_ms")]
        cells += [f"{row['cpu_s_per_1000']:.1f}", f"{row['resident_mib']:.0f}", str(row["killed"]["lost"])]
        table.add_row(contestant.name, *cells, str(row["killed"]["repeated"]))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
