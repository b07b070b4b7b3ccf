"""The workers of a run and their keeper, which starts a dead one again as a kubelet would."""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos.netns import Namespace
from worker.embedded import free_port

RESTART_S = 1.0


@dataclass
class Exit:
    """How a worker's process ended."""

    worker: int
    code: int
    wanted: bool
    """Whether the run itself killed or ended it."""
    was_ready: bool
    last_line: str


@dataclass
class Slot:
    """One worker: its process, which may be the third of its name, and what surrounds it."""

    number: int
    log: Path
    clock: mmap.mmap
    namespace: Namespace | None
    port: int
    process: subprocess.Popen[bytes] | None = None
    wanted: bool = True
    killed: bool = False
    due: float = 0.0
    starts: int = 0
    log_begin: int = 0
    """Where in the log the last start begins."""
    environment: dict[str, str] = field(default_factory=dict)


class Workers:
    """Starts, hurts and ends workers. Thread-safe."""

    def __init__(
        self, count: int, folder: Path, settings: dict[str, object], namespaces: bool = False, prefix: Sequence[str] = ()
    ) -> None:
        """`settings`: WORKER_ settings without the prefix; names that begin with CHAOS_ are passed as they are.

        `prefix` stands before every worker's command, and must become it (exec).
        """
        self._prefix = list(prefix)
        self.exits: list[Exit] = []
        self._settings = {name if name.startswith("CHAOS_") else f"WORKER_{name}": str(value) for name, value in settings.items()}
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self.slots: list[Slot] = []
        for number in range(count):
            clock_file = folder / f"clock-{number}"
            clock_file.write_bytes(struct.pack("d", 0.0))
            with clock_file.open("r+b") as opened:
                clock = mmap.mmap(opened.fileno(), 8)
            namespace = Namespace(number) if namespaces else None
            slot = Slot(number, folder / f"worker-{number}.log", clock, namespace, free_port())
            slot.environment = {"CHAOS_CLOCK": str(clock_file)}
            self.slots.append(slot)
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)

    def start(self) -> Workers:
        self._keeper.start()
        return self

    def close(self) -> None:
        """Kill what still runs and take the namespaces away."""
        self._closing.set()
        if self._keeper.ident is not None:
            self._keeper.join()
        for slot in self.slots:
            with self._lock:
                if slot.process is not None and slot.process.poll() is None:
                    slot.process.kill()
                    slot.process.wait()
            if slot.namespace is not None:
                slot.namespace.close()
                slot.namespace = None

    # -- faults
    def kill(self, number: int) -> None:
        """kill -9; the keeper starts another one."""
        with self._lock:
            self.slots[number].killed = True
            self.signal(number, signal.SIGKILL)

    def signal(self, number: int, which: signal.Signals) -> None:
        with self._lock:
            process = self.slots[number].process
            if process is not None and process.poll() is None:
                process.send_signal(which)

    def signal_decoder(self, number: int, which: signal.Signals, seed: float) -> int | None:
        """Signal one decoder process of a worker; its process id, None where there is none at the moment."""
        with self._lock:
            process = self.slots[number].process
            if process is None or process.poll() is not None:
                return None
            try:
                decoders = sorted(child.pid for child in psutil.Process(process.pid).children())
                pid = random.Random(seed).choice(decoders) if decoders else None
                if pid is not None:
                    os.kill(pid, which)
            except (psutil.NoSuchProcess, ProcessLookupError):
                return None
            return pid

    def step_clock(self, number: int, seconds: float) -> None:
        """Move its wall clock; it stays moved, also for the next process of its name."""
        self.slots[number].clock[:] = struct.pack("d", seconds)

    def retire(self, number: int, within_s: float = 180) -> int:
        """SIGTERM, and no other in its place; its exit code."""
        slot = self.slots[number]
        with self._lock:
            slot.wanted = False
            process = slot.process
            if process is None:
                return 0
            slot.killed = True
            if process.poll() is None:
                process.terminate()
        try:
            return process.wait(within_s)
        except subprocess.TimeoutExpired:
            return -1

    def employ(self, number: int) -> None:
        """Start it (again)."""
        with self._lock:
            self.slots[number].wanted = True

    # -- looks
    def get(self, number: int, page: str, timeout_s: float = 30.0) -> tuple[int, str]:
        """Status and body of one of its pages; 0 where it does not answer."""
        slot = self.slots[number]
        host = slot.namespace.address if slot.namespace else "127.0.0.1"
        request = urllib.request.Request(f"http://{host}:{slot.port}/{page}")
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def ready(self, number: int) -> bool:
        return self.get(number, "readyz")[0] == 200

    def metrics(self, number: int) -> dict[str, float]:
        """Every series by its full name; empty where it does not answer."""
        lines = self.get(number, "metrics")[1].splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line and not line.startswith("#")}

    def pid(self, number: int) -> int:
        process = self.slots[number].process
        if process is None:
            raise RuntimeError(f"worker {number} was never started")
        return process.pid

    def log(self, number: int) -> str:
        return self.slots[number].log.read_text(errors="replace")

    # -- keeper
    def _keep(self) -> None:
        while not self._closing.wait(0.1):
            for slot in self.slots:
                with self._lock:
                    self._look_after(slot)

    def _look_after(self, slot: Slot) -> None:
        if slot.process is not None and slot.process.poll() is not None:
            said = slot.log.read_bytes()[slot.log_begin :].decode(errors="replace")
            last_line = said.strip().rpartition("\n")[2]
            self.exits.append(Exit(slot.number, slot.process.returncode, slot.killed, '"worker.ready"' in said, last_line))
            slot.process, slot.killed, slot.due = None, False, time.monotonic() + RESTART_S
        if slot.process is None and slot.wanted and time.monotonic() >= slot.due:
            self._launch(slot)

    def _launch(self, slot: Slot) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_")}
        environment |= {
            "WORKER_HTTP__PORT": str(slot.port),
            "WORKER_HTTP__HOST": slot.namespace.address if slot.namespace else "127.0.0.1",
            **self._settings,
            **slot.environment,
        }
        command = [
            *self._prefix,
            *(slot.namespace.prefix if slot.namespace else []),
            sys.executable,
            "-m",
            "tests.chaos.chaos_worker",
        ]
        with slot.log.open("ab") as log:
            slot.log_begin = log.tell()
            slot.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        slot.starts += 1
