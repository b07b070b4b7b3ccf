"""The course: a broker with fresh topics, a contestant's processes on it, and eyes on the verdicts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.kafka_ends import Committed, Uploads, Verdicts
from benchmarks.peers.contestants import Contestant
from worker.clock import Deadline
from worker.embedded import EmbeddedBroker
from worker.kafka_clients import ensure_topics
from worker.settings import KafkaSettings

QUIET_S = 10.0
"""Nothing new for so long after everything was committed: what is missing then is lost."""


class Field:
    """A broker with fresh topics, and eyes on the verdicts."""

    def __init__(self, broker: EmbeddedBroker) -> None:
        self.bootstrap = broker.bootstrap
        ensure_topics(KafkaSettings(bootstrap_servers=(broker.bootstrap,), create_topics=True), Deadline(60))
        self._uploads = Uploads(broker.bootstrap, **{"compression.type": "lz4"})
        self._verdicts = Verdicts(broker.bootstrap, "image.verdicts", **{"fetch.wait.max.ms": 5})
        self.seen: dict[str, list[float]] = {}
        """Moments (monotonic) at which verdicts of an event came, by its id."""

    def send(self, pictures: list[bytes], prefix: str) -> list[str]:
        ids = [f"{prefix}-{number}" for number in range(len(pictures))]
        for event_id, picture in zip(ids, pictures, strict=True):
            self.send_one(event_id, picture)
        self._uploads.flush()
        return ids

    def send_one(self, event_id: str, picture: bytes) -> None:
        headers = [("content-type", b"image/jpeg"), ("event_id", event_id.encode())]
        self._uploads.send("image.uploads", picture, headers)

    def look(self, wait_s: float = 0.02) -> None:
        found = self._verdicts.read(wait_s)
        now = time.monotonic()
        for verdict in found:
            self.seen.setdefault(json.loads(verdict)["event_id"], []).append(now)

    def close(self) -> None:
        self._verdicts.close()

    def wait(self, count: int, running: Running, within_s: float = 300) -> None:
        deadline = time.monotonic() + within_s
        while len(self.seen) < count:
            self.look()
            running.check()
            if time.monotonic() > deadline:
                raise SystemExit(f"{running.name}: stalled at {len(self.seen)} of {count} verdicts\n{running.log()}")

    def rest(self, seconds: float) -> None:
        """Only look, for so long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.look(0.1)

    def settle(self, count: int, group: str, running: Running, within_s: float = 400) -> None:
        """Until the group has committed all `count` events and their verdicts are there, or none came for a while after that."""
        deadline, committed_at = time.monotonic() + within_s, float("inf")
        with contextlib.closing(Committed(self.bootstrap, group, "image.uploads")) as committed:
            while len(self.seen) < count or committed_at == float("inf"):
                self.look(0.2)
                running.check()
                now = time.monotonic()
                if committed_at == float("inf") and committed.total() >= count:
                    committed_at = now
                if now - committed_at > QUIET_S:
                    return
                if now > deadline:
                    raise SystemExit(f"{running.name}: stalled at {len(self.seen)} of {count} verdicts\n{running.log()}")
        self.look(1.0)


class Running:
    """A contestant's processes; a contestant of several is started in their order, a server before its client."""

    def __init__(self, contestant: Contestant, bootstrap: str, model: str, scratch: Path) -> None:
        self.name = contestant.name
        self._log = scratch / f"{uuid.uuid4().hex}.log"
        self._processes: list[subprocess.Popen[bytes]] = []
        with self._log.open("ab") as log, contextlib.ExitStack() as stack:
            stack.callback(self.stop)  # those that were started, where the others do not come up
            for command, environment in contestant.commands(bootstrap, model):
                self._processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
                if (port := environment.get("PEER_PORT")) is not None:
                    self._wait_for(int(port))
            stack.pop_all()

    def _wait_for(self, port: int) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            self.check()
            time.sleep(0.2)
        raise SystemExit(f"{self.name}: its server did not come up\n{self.log()}")

    def family(self) -> list[psutil.Process]:
        return [member for process in self._processes for member in _family(process)]

    def cpu_s(self) -> float:
        return sum(sum(member.cpu_times()[:2]) for member in self.family())

    def proportional_mib(self) -> float:
        """Memory, pages that processes share counted once."""
        return sum(member.memory_full_info().pss for member in self.family()) / 2**20

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
        """End what still runs: asked first, then killed."""
        members = [m for p in self._processes if p.poll() is None for m in _family(p)]
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes):
            time.sleep(0.05)
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        for process in self._processes:
            process.wait(10)


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return _members(psutil.Process(process.pid))


def _members(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


class Others:
    """How much of the processors other work takes while something is measured: what a clock says is worth little beside it."""

    def __init__(self) -> None:
        self._before, self._at = self._used(), time.monotonic()

    def share(self) -> float:
        """Of all processors since the start: not this process, and nothing it started."""
        return max(0.0, self._used() - self._before) / (time.monotonic() - self._at) / (os.cpu_count() or 1)

    @staticmethod
    def _used() -> float:
        spent = psutil.cpu_times()
        own = sum(sum(member.cpu_times()[:2]) for member in _members(psutil.Process()))
        return float(sum(spent) - spent.guest - spent.guest_nice - spent.idle - spent.iowait) - own


@contextmanager
def running(contestant: Contestant, field: Field, model: str, scratch: Path) -> Iterator[Running]:
    """Started, and ended whatever happens."""
    found = Running(contestant, field.bootstrap, model, scratch)
    try:
        yield found
    finally:
        found.stop()
