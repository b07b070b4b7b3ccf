"""http and https: one GET with our own redirects, limits that hold while the body streams, one deadline for all of it.

httpcore keeps the connections; proxies from the environment, cookies, netrc and automatic decoding do not exist at its
level, so nothing of them can leak in.
"""

from __future__ import annotations

import io
import logging
import os
import ssl
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import lru_cache

import certifi
import httpcore

from worker.clock import Clock, Deadline
from worker.errors import Code, ItemError, TransientItemError
from worker.image_room import Hold, unbounded
from worker.settings import FetchSettings
from worker.stages.fetch_hosts import HostGate
from worker.stages.fetch_network import CheckedNetwork
from worker.stages.fetch_urls import AllowedHosts, HttpUrl, denied, follow, parse_http

MAX_REDIRECTS = 3
MAX_RETRY_AFTER_S = 3_600.0
KEEP_ALIVE_S = 15.0
MAX_READ_OFF_BYTES = 16_384
REQUEST_HEADERS = (
    (b"User-Agent", b"code-moderation-worker"),
    (b"Accept", b"image/*, */*;q=0.5"),
    (b"Accept-Encoding", b"identity"),
)
_ZLIB_WINDOW_OF_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS

_PLAIN = frozenset({b"", b"identity"})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_REFUSALS = frozenset({401, 402, 403, 407, 451})
_LATER = frozenset({421, 423, 425, 429})


class HttpSource:
    """Images by http and https. Thread-safe; connections are kept alive and bounded by FETCH__CONCURRENCY."""

    def __init__(self, settings: FetchSettings, clock: Clock, gate: HostGate, network: CheckedNetwork) -> None:
        self._max_bytes = settings.max_bytes
        self._allow_disguised = settings.allow_private_addresses
        self._allowed_hosts = AllowedHosts(settings.allowed_hosts)
        self._clock = clock
        self._gate = gate
        self._network = network
        # At debug level httpcore logs URLs with their queries, which carry signatures.
        logging.getLogger("httpcore").setLevel(logging.WARNING)
        self._pool = httpcore.ConnectionPool(
            ssl_context=tls_context(),
            max_connections=settings.concurrency,
            max_keepalive_connections=settings.concurrency,
            keepalive_expiry=KEEP_ALIVE_S,
            network_backend=network,
        )

    def read(self, url: str, deadline: Deadline, hold: Hold = unbounded) -> bytes:
        """The bytes behind `url`; `hold` as in `Fetcher.fetch`.

        Raises:
            ItemError: fetch.denied, fetch.not_found, fetch.too_large.
            TransientItemError: fetch.timeout, fetch.unavailable.
        """
        target = parse_http(url, allow_disguised=self._allow_disguised)
        for hop in range(MAX_REDIRECTS + 1):
            if target.host not in self._allowed_hosts:
                raise denied("redirected to a host that is not allowed" if hop else f"host {target.host} is not allowed")
            name = target.host if hop == 0 else "the host it was redirected to"
            with self._gate.visit(target.authority, name, deadline), self._network.until(deadline, name), _foreign_errors(name):
                found = self._exchange(target, name, deadline, hold)
            if isinstance(found, bytes):
                return found
            target = found
        raise denied(f"more than {MAX_REDIRECTS} redirects")

    def close(self) -> None:
        """Close the kept connections."""
        self._pool.close()

    def _exchange(self, target: HttpUrl, name: str, deadline: Deadline, hold: Hold) -> bytes | HttpUrl:
        """One request: the body, or where it redirects to."""
        response = self._request(target)
        try:
            headers = {key.lower(): value for key, value in response.headers}
            if response.status not in (200, 203):
                _read_off(response, headers)
            if response.status in _REDIRECTS and b"location" in headers:
                return follow(target, headers[b"location"], allow_disguised=self._allow_disguised)
            if response.status not in (200, 203):
                raise _refusal(response.status, name, _retry_after_s(headers.get(b"retry-after"), self._clock))
            return self._body(response, headers, deadline, hold)
        finally:
            response.close()

    def _request(self, target: HttpUrl) -> httpcore.Response:
        request = httpcore.Request(
            "GET",
            httpcore.URL(scheme=target.scheme, host=target.host, port=target.port, target=target.target),
            headers=[(b"Host", target.authority.encode("ascii")), *REQUEST_HEADERS],
            extensions={"timeout": {"pool": self._network.remaining_s()}},
        )
        while True:
            try:
                return self._pool.handle_request(request)
            except (httpcore.ReadError, httpcore.WriteError, httpcore.RemoteProtocolError):
                # A server may close a kept connection just as it is used again: only a fresh one tells about the server.
                if self._network.connected:
                    raise

    def _body(self, response: httpcore.Response, headers: dict[bytes, bytes], deadline: Deadline, hold: Hold) -> bytes:
        length = int(headers.get(b"content-length", b"-1"))
        if length > self._max_bytes:
            raise self._too_large()
        encoding = headers.get(b"content-encoding", b"").strip().lower()
        hold(length if length >= 0 and encoding in _PLAIN else self._max_bytes)
        body = io.BytesIO()
        for chunk in self._decoded(response.iter_stream(), encoding):
            if body.tell() + len(chunk) > self._max_bytes:
                raise self._too_large()
            body.write(chunk)
            if deadline.expired():  # many small chunks of one read never come back to the socket
                raise httpcore.ReadTimeout("the fetch's time is up")
        return body.getvalue()

    def _decoded(self, chunks: Iterable[bytes], encoding: bytes) -> Iterable[bytes]:
        """Identity was asked for, but objects stored compressed come compressed from some hosts."""
        if encoding in _PLAIN:
            return chunks
        if encoding in (b"gzip", b"x-gzip", b"deflate"):
            return _inflated(chunks, self._max_bytes)
        raise denied("the host sends a content encoding that was not asked for")

    def _too_large(self) -> ItemError:
        return ItemError(Code.FETCH_TOO_LARGE, f"the image is larger than {self._max_bytes} bytes")


def _inflated(chunks: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    """Unpack gzip or zlib, never holding more than one byte beyond `max_bytes`; raises RemoteProtocolError if broken."""
    stream = zlib.decompressobj(_ZLIB_WINDOW_OF_GZIP_OR_ZLIB)
    received = 0
    try:
        for chunk in chunks:
            received += len(chunk)
            if received > max_bytes:  # a stream of empty blocks never grows, and would otherwise go on for ever
                raise ItemError(Code.FETCH_TOO_LARGE, f"the image is larger than {max_bytes} bytes")
            while chunk:
                yield stream.decompress(chunk, max_bytes + 1)
                chunk = stream.unconsumed_tail or stream.unused_data
                if stream.eof and chunk:  # gzip files may be put one behind another
                    stream = zlib.decompressobj(_ZLIB_WINDOW_OF_GZIP_OR_ZLIB)
    except zlib.error as error:
        raise httpcore.RemoteProtocolError("the compressed body is broken") from error
    if not stream.eof:
        raise httpcore.RemoteProtocolError("the compressed body is cut short")


def _read_off(response: httpcore.Response, headers: dict[bytes, bytes]) -> None:
    """Take a short body that nobody wants off the connection, so that it can be kept."""
    if int(headers.get(b"content-length", MAX_READ_OFF_BYTES + 1)) > MAX_READ_OFF_BYTES:
        return
    try:
        for _ in response.iter_stream():
            pass
    except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError):
        return  # the status is known and decides; all that is lost is this connection


def _refusal(status: int, name: str, retry_after_s: float | None) -> ItemError:
    """What a status other than success means for the event (docs/fetching.md has the table)."""
    message = f"{name} answered {status}"
    if status == 408:
        return TransientItemError(Code.FETCH_TIMEOUT, message, retry_after_s)
    if status in _REFUSALS:
        return ItemError(Code.FETCH_DENIED, message)
    if 400 <= status < 500 and status not in _LATER:
        return ItemError(Code.FETCH_NOT_FOUND, message)
    return TransientItemError(Code.FETCH_UNAVAILABLE, message, retry_after_s)


def _retry_after_s(value: bytes | None, clock: Clock) -> float | None:
    """Seconds from a Retry-After header in either form (RFC 9110, 10.2.3), at most an hour; None if unreadable."""
    if value is None:
        return None
    text = value.decode("latin-1").strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), MAX_RETRY_AFTER_S)
    try:
        moment = parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None
    return min(max(moment - clock.time(), 0.0), MAX_RETRY_AFTER_S)


@contextmanager
def _foreign_errors(name: str) -> Iterator[None]:
    """The one boundary to httpcore; its messages hold addresses, so none of them is passed on."""
    try:
        yield
    except httpcore.TimeoutException as error:
        raise TransientItemError(Code.FETCH_TIMEOUT, f"{name} did not deliver in time") from error
    except httpcore.ConnectError as error:
        secure = isinstance(error.__cause__ or error.__context__, ssl.SSLError)
        what = "TLS with {} failed" if secure else "no connection to {}"
        raise TransientItemError(Code.FETCH_UNAVAILABLE, what.format(name)) from error
    except httpcore.LocalProtocolError as error:
        raise denied("the URL cannot be sent in a request") from error
    except (httpcore.NetworkError, httpcore.ProtocolError) as error:
        raise TransientItemError(Code.FETCH_UNAVAILABLE, f"{name} broke off or did not speak HTTP") from error


def tls_context() -> ssl.SSLContext:
    """Certificates and host names are verified, always.

    Trusted: SSL_CERT_FILE and SSL_CERT_DIR where one is set (a private authority), otherwise the system's store and certifi's.
    """
    return _tls_context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@lru_cache(maxsize=4)
def _tls_context(cert_file: str | None, cert_dir: str | None) -> ssl.SSLContext:
    """Reading a few hundred certificates takes a tenth of a second: once for each answer to where they are."""
    context = ssl.create_default_context()
    if not (cert_file or cert_dir):
        context.load_verify_locations(certifi.where())
    return context
