"""Connections for http and https: names resolved once, every address judged, exactly the judged address connected to.

The resolver's answer is used for the connection itself, so a name that changes its address in between gains nothing
(DNS rebinding). Every wait (resolver, connect, TLS, read, write) ends at the fetch's own deadline.
"""

from __future__ import annotations

import queue
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import httpcore

from worker.clock import Deadline
from worker.errors import Code, TransientItemError
from worker.stages.addresses import allowed
from worker.stages.fetch_urls import denied

Lookup = Callable[[str, int], Iterable[str]]
SocketOptions = Iterable[Any]

MAX_ADDRESSES_TRIED = 4
MIN_CONNECT_S = 1.0


def system_lookup(host: str, port: int) -> list[str]:
    """Addresses of a name in the system's order of preference (RFC 6724), zone included; raises OSError."""
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(address[0]) for *_, address in answers))


@dataclass(frozen=True, slots=True)
class _Question:
    host: str
    port: int
    answer: Future[tuple[str, ...]]


class Resolver:
    """Name resolution that can be given up: `getaddrinfo` has no time-out, so it runs in a few threads of its own.

    The threads are daemons: one that hangs in the C library must not hold up the end of the process.
    """

    def __init__(self, threads: int, lookup: Lookup = system_lookup) -> None:
        self._lookup = lookup
        self._max_threads = threads
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._questions: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()

    def resolve(self, host: str, port: int, timeout_s: float) -> tuple[str, ...]:
        """The addresses of a name, at least one.

        Raises:
            TimeoutError: no answer in time.
            OSError: no such name, or no resolver.
        """
        question = _Question(host, port, Future())
        with self._lock:
            if len(self._threads) < self._max_threads:
                thread = threading.Thread(target=self._answer, name=f"fetch-resolver-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._questions.put(question)
        try:
            return question.answer.result(timeout_s)
        finally:
            question.answer.cancel()  # one that nobody waits for any more need not be asked

    def close(self) -> None:
        """Let idle threads end."""
        with self._lock:
            for _ in self._threads:
                self._questions.put(None)

    def _answer(self) -> None:
        while (question := self._questions.get()) is not None:
            if not question.answer.set_running_or_notify_cancel():
                continue
            try:
                addresses = tuple(self._lookup(question.host, question.port))
                if not addresses:
                    raise OSError("the name has no address")
            except Exception as error:  # noqa: BLE001  handed to the thread that asked, which knows what to do with it
                question.answer.set_exception(error)
            else:
                question.answer.set_result(addresses)


class CheckedNetwork(httpcore.NetworkBackend):
    """httpcore's way to the network, with addresses judged and deadlines kept."""

    def __init__(self, resolver: Resolver, *, allow_private: bool, inner: httpcore.NetworkBackend | None = None) -> None:
        """`inner` makes the connections; it is only ever given addresses, never names."""
        self._resolver = resolver
        self._allow_private = allow_private
        self._inner = inner or httpcore.SyncBackend()
        self._fetch = threading.local()

    @contextmanager
    def until(self, deadline: Deadline, name: str) -> Iterator[None]:
        """All that this thread does on the network within the body ends at `deadline`; `name` is the host's in messages."""
        self._fetch.deadline = deadline
        self._fetch.name = name
        self._fetch.connected = False
        try:
            yield
        finally:
            del self._fetch.deadline

    @property
    def connected(self) -> bool:
        """Whether this thread opened a connection since `until`, instead of using one that was kept alive."""
        return bool(self._fetch.connected)

    def remaining_s(self) -> float:
        """Seconds this thread may still wait; 0 when its time is up."""
        return float(self._fetch.deadline.remaining())

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: SocketOptions | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address of `host` that answers.

        Raises:
            ItemError: fetch.denied where any of its addresses is not allowed: a name that mixes is up to no good.
            TransientItemError: fetch.timeout, fetch.unavailable from the resolver.
            httpcore.ConnectError, httpcore.ConnectTimeout: none of them could be reached.
        """
        addresses = self._checked(host, port)[:MAX_ADDRESSES_TRIED]
        self._fetch.connected = True
        failure: Exception = httpcore.ConnectTimeout("no time left to connect")
        for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            remaining = self.remaining_s()
            if remaining <= 0:
                break
            share = min(remaining, max(remaining / left, MIN_CONNECT_S))  # a dead address leaves time for the next
            try:
                stream = self._inner.connect_tcp(address, port, timeout=share, socket_options=socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                return _DeadlineStream(stream, self)
        raise failure

    def _checked(self, host: str, port: int) -> tuple[str, ...]:
        try:
            addresses: tuple[str, ...] = (str(ip_address(host)),)
        except ValueError:
            addresses = self._resolved(host, port)
        for address in addresses:
            if not allowed(ip_address(address), allow_private=self._allow_private):
                raise denied(f"{self._fetch.name} leads to an address that is not allowed")
        return addresses

    def _resolved(self, host: str, port: int) -> tuple[str, ...]:
        name = self._fetch.name
        try:
            return self._resolver.resolve(host, port, self.remaining_s())
        except TimeoutError as error:
            raise TransientItemError(Code.FETCH_TIMEOUT, f"{name} was not resolved in time") from error
        except OSError as error:
            raise TransientItemError(Code.FETCH_UNAVAILABLE, f"{name} cannot be resolved") from error
        except UnicodeError as error:  # the standard library's idna codec, on names that ours lets through
            raise denied(f"{name} cannot be resolved") from error


class _DeadlineStream(httpcore.NetworkStream):
    """A connection whose every wait ends at the deadline of the fetch that uses it at the moment."""

    def __init__(self, stream: httpcore.NetworkStream, network: CheckedNetwork) -> None:
        self._stream = stream
        self._network = network

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, timeout=self._remaining(httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, timeout=self._remaining(httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        remaining = self._remaining(httpcore.ConnectTimeout)
        return _DeadlineStream(self._stream.start_tls(ssl_context, server_hostname, timeout=remaining), self._network)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

    def _remaining(self, too_late: type[httpcore.TimeoutException]) -> float:
        remaining = self._network.remaining_s()
        if remaining <= 0:
            raise too_late("the fetch's time is up")
        return remaining
