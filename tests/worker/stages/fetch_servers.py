"""Servers that misbehave on purpose, for the tests of the fetcher."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import httpcore

from worker.clock import SystemClock
from worker.items import Delivery, Event, Item, Position, Record, Timings
from worker.settings import FetchSettings
from worker.stages.fetch import Fetcher

Handler = Callable[[socket.socket, str], bool]
"""Answers one request (its target) on a connection; True: the connection stays open for the next."""


def answer(status: int = 200, body: bytes = b"", *headers: str) -> bytes:
    """A well-formed response."""
    head = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


class RawServer:
    """Counts connections, keeps requests, answers by path prefix from `routes`."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self.active = 0
        self.most_active = 0
        self.requests: list[bytes] = []
        self.routes: dict[str, Handler] = {}
        self.closing = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, path: str = "/ok", host: str = "127.0.0.1") -> str:
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}{path}"

    def route(self, path: str) -> Callable[[Handler], Handler]:
        def register(handler: Handler) -> Handler:
            self.routes[path] = handler
            return handler

        return register

    def fixed(self, path: str, *parts: bytes, keep: bool = True) -> str:
        """Answer `path` with these bytes; returns its URL."""

        def send(connection: socket.socket, _: str) -> bool:
            for part in parts:
                connection.sendall(part)
            return keep

        self.routes[path] = send
        return self.url(path)

    def close(self) -> None:
        """Refuse connections from now on; those that drip end soon."""
        self.closing.set()
        try:
            self._listener.shutdown(socket.SHUT_RDWR)  # close alone would not wake the thread in accept
        except OSError:
            return  # closed before
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            if self._tls:
                connection = self._tls.wrap_socket(connection, server_side=True)
            with connection:
                while self._one(connection):
                    pass
        except OSError:
            pass  # the client broke off, which is what half of the tests are about

    def _one(self, connection: socket.socket) -> bool:
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            part = connection.recv(65_536)
            if not part:
                return False
            request += part
        self.requests.append(request)
        target = request.split(b" ")[1].decode()
        path = target.partition("?")[0]
        handler = next((self.routes[known] for known in sorted(self.routes, reverse=True) if path.startswith(known)), None)
        if handler is None:
            connection.sendall(answer(404))
            return True
        with self._lock:
            self.active += 1
            self.most_active = max(self.most_active, self.active)
        try:
            return handler(connection, target)
        finally:
            with self._lock:
                self.active -= 1


def drip(parts: Iterable[bytes], every_s: float, closing: threading.Event) -> Handler:
    """Send parts one by one, slowly."""

    def send(connection: socket.socket, _: str) -> bool:
        for part in parts:
            connection.sendall(part)
            if closing.wait(every_s):
                break
        return False

    return send


def reset(connection: socket.socket, _: str) -> bool:
    """End the connection with RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False


class Detour(httpcore.NetworkBackend):
    """Pretends to be the internet: notes which address was asked for and connects to a local server instead."""

    def __init__(self, port: int, only: set[str] | None = None) -> None:
        self._port = port
        self._only = only
        self.asked: list[tuple[str, int]] = []

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, **_: Any) -> httpcore.NetworkStream:
        self.asked.append((host, port))
        if self._only is not None and host not in self._only:
            raise httpcore.ConnectError("nobody there")
        return httpcore.SyncBackend().connect_tcp("127.0.0.1", self._port, timeout=timeout)


class NoNetwork(httpcore.NetworkBackend):
    """Notes every connection that should not have been made."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, **_: Any) -> httpcore.NetworkStream:
        self.asked.append((host, port))
        raise httpcore.ConnectError("there is no network here")


def make_item(url: str | None = None, inline: bytes | None = None, sha256: str | None = None) -> Item:
    record = Record(Position("image.uploads", 0, 1, 0), None, b"{}", (), 0)
    event = Event(event_id="e1", url=url, inline=inline, sha256=sha256)
    return Item(record, event, Delivery(), Timings(started=time.monotonic()))


def make_fetcher(*, lookup: Any = None, network: Any = None, **settings: Any) -> Fetcher:
    """A fetcher that may reach local servers unless told otherwise."""
    values = {"allow_private_addresses": True, "timeout_s": 5.0, "max_bytes": 1_000_000, "concurrency": 4} | settings
    seams = {} if lookup is None else {"lookup": lookup}
    return Fetcher(FetchSettings(**values), SystemClock(), network=network, **seams)
