"""HTTP for probes and metrics: /livez, /readyz, /metrics. Bounded in connections, time and size; reads only.

Liveness is the age of the poll loop's heartbeat and nothing else: a broker that is away must not have the pod killed.
Readiness is every condition that was declared: engine, group, intake, running.
"""

from __future__ import annotations

import io
import json
import socket
import socketserver
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from worker.clock import Clock, SystemClock
from worker.errors import ConfigurationError
from worker.metrics import Metrics
from worker.settings import HttpSettings, environment_name

MAX_CONNECTIONS = 32
"""More are closed unanswered."""
REQUEST_TIMEOUT_S = 5.0
"""From the connection to the end of its one answer."""
CONDITIONS = ("engine", "group", "intake", "running")


class Health:
    """What the probes are told. Thread-safe; nothing here blocks."""

    def __init__(self, clock: Clock | None = None, *, stale_after_s: float, starting_s: float = 1800.0) -> None:
        """
        Args:
            clock: monotonic time of heartbeats.
            stale_after_s: a heartbeat older than this means the poll loop hangs.
            starting_s: how long the first heartbeat may take: loading and compiling an engine.
        """
        self._clock = clock or SystemClock()
        self._stale_after_s = stale_after_s
        self._starting_s = starting_s
        self._lock = threading.Lock()
        self._started = self._clock.monotonic()
        self._beat: float | None = None
        self._conditions = dict.fromkeys(CONDITIONS, False)
        self._conditions["running"] = self._conditions["intake"] = True

    def beat(self) -> None:
        """The poll loop turned once more."""
        self._beat = self._clock.monotonic()

    def set(self, condition: str, fulfilled: bool) -> None:
        """Declare one condition; readiness needs all.

        `engine`: loaded and warm; `group`: joined; `intake`: not stopped by the circuit on dead letters; `running`: not draining.
        """
        with self._lock:
            self._conditions[condition] = fulfilled

    @property
    def ready(self) -> bool:
        """Whether every condition holds and the poll loop lives."""
        return self.live()[0] and all(self._conditions.values())

    def live(self) -> tuple[bool, dict[str, Any]]:
        """Whether the poll loop turns, and its heartbeat's age."""
        now, beat = self._clock.monotonic(), self._beat
        if beat is None:
            age = now - self._started
            return age <= self._starting_s, {"starting_s": round(age, 3)}
        age = now - beat
        return age <= self._stale_after_s, {"heartbeat_age_s": round(age, 3)}

    def report(self) -> tuple[bool, dict[str, Any]]:
        """Readiness, and every condition by name."""
        alive, _ = self.live()
        with self._lock:
            conditions = {"live": alive, **self._conditions}
        return all(conditions.values()), conditions


class HealthServer:
    """Serves `Health` and `Metrics`; one short-lived thread a request."""

    def __init__(self, settings: HttpSettings, health: Health, metrics: Metrics) -> None:
        """
        Raises:
            ConfigurationError: the address cannot be bound; names the setting.
        """
        try:
            self._server = _Server((settings.host, settings.port), health, metrics)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigurationError(
                f"{environment_name('http', 'port')}: cannot listen on {settings.host}:{settings.port}: {reason}"
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="http", daemon=True)

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stop listening. May be called again."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], health: Health, metrics: Metrics) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.health = health
        self.metrics = metrics
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """As the standard library's, without its look-up of our own name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """One thread a connection, up to the limit."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread to be had
            self._free.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Gives the place back whatever the connection did."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that hangs up, stalls or speaks no HTTP is no concern of ours: no traceback."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "code-worker"
    sys_version = ""
    # HTTP/1.0: one request a connection, so that no idle one keeps a place.

    def setup(self) -> None:
        super().setup()
        self._deadline = time.monotonic() + REQUEST_TIMEOUT_S
        self.connection.settimeout(REQUEST_TIMEOUT_S)
        self.rfile = io.BufferedReader(_DeadlineReader(self.connection, self._deadline))

    def do_GET(self) -> None:
        """Answer one of the three pages."""
        path = self.path.partition("?")[0].rstrip("/") or "/"
        if path == "/livez":
            self._json(*self.server.health.live())
        elif path == "/readyz":
            self._json(*self.server.health.report())
        elif path == "/metrics":
            self.server.metrics.ready.set(self.server.health.ready)
            self._send(HTTPStatus.OK, "text/plain; version=0.0.4; charset=utf-8", self.server.metrics.page())
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"/livez /readyz /metrics\n")

    do_HEAD = do_GET  # noqa: N815  the base class looks for this name

    def _json(self, good: bool, details: dict[str, Any]) -> None:
        status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
        body = {"status": "ok" if good else "unavailable", **details}
        self._send(status, "application/json", json.dumps(body).encode() + b"\n")

    def _send(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.connection.settimeout(max(0.1, self._deadline - time.monotonic()))
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every few seconds: no lines."""


class _DeadlineReader(io.RawIOBase):
    """Reads a socket until one moment, however slowly its peer sends."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("request took too long")
        self._connection.settimeout(remaining)
        return self._connection.recv_into(buffer)
