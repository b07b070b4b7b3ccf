"""http and https against a real server that misbehaves in every way we could think of."""

from __future__ import annotations

import datetime
import gzip
import itertools
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpcore
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.worker.stages.fetch_servers import Detour, NoNetwork, RawServer, answer, drip, make_fetcher, make_item, reset
from tests.worker.stages.test_fetch_urls import TRICKS
from worker.errors import Code, ItemError, TransientItemError

BODY = b"\x89PNG" + bytes(range(256)) * 40


@pytest.fixture
def server() -> Iterator[RawServer]:
    server = RawServer()
    server.fixed("/ok", answer(200, BODY))
    yield server
    server.close()


def failure(url: str, code: Code, *, within_s: float = 4.0, **options: object) -> ItemError:
    """Fetch what must fail, in time, with one clean line."""
    fetcher = make_fetcher(**options)
    started = time.monotonic()
    try:
        with pytest.raises(ItemError) as error:
            fetcher.fetch(make_item(url))
    finally:
        fetcher.close()
    assert time.monotonic() - started < within_s
    assert error.value.code is code
    assert isinstance(error.value, TransientItemError) == (code in (Code.FETCH_TIMEOUT, Code.FETCH_UNAVAILABLE))
    message = error.value.message
    assert "\n" not in message and "?" not in message and "secret" not in message
    return error.value


def fetch(url: str, **options: object) -> bytes:
    fetcher = make_fetcher(**options)
    try:
        return fetcher.fetch(make_item(url)).data
    finally:
        fetcher.close()


def test_bytes_arrive_and_the_connection_is_kept(server: RawServer) -> None:
    fetcher = make_fetcher()
    for _ in range(3):
        assert fetcher.fetch(make_item(server.url("/ok/a.png?sig=1"))).data == BODY
    fetcher.close()
    assert server.connections == 1
    request = server.requests[0].decode()
    assert request.startswith("GET /ok/a.png?sig=1 HTTP/1.1\r\n")
    assert f"Host: 127.0.0.1:{server.port}\r\n" in request
    assert "Accept-Encoding: identity\r\n" in request
    assert "cookie" not in request.lower() and "authorization" not in request.lower()


def test_a_kept_connection_that_the_server_closed_is_not_a_failure(server: RawServer) -> None:
    url = server.fixed("/once", answer(200, BODY), keep=False)
    fetcher = make_fetcher()
    for _ in range(5):
        assert fetcher.fetch(make_item(url)).data == BODY
    fetcher.close()


def test_a_kept_connection_reset_in_mid_request_is_tried_afresh(server: RawServer) -> None:
    seen = itertools.count()

    @server.route("/flaky")
    def flaky(connection: socket.socket, target: str) -> bool:
        if next(seen) == 1:
            return reset(connection, target)
        connection.sendall(answer(200, BODY))
        return True

    fetcher = make_fetcher()
    assert [fetcher.fetch(make_item(server.url("/flaky"))).data for _ in range(3)] == [BODY] * 3
    fetcher.close()
    assert server.connections == 2


def test_environment_proxies_are_ignored(server: RawServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch(server.url()) == BODY


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n2;x=y\r\nef\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabcdef",
        b"HTTP/1.0 200 OK\r\n\r\nabcdef",
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabcdef",
        b"HTTP/1.1 203 Changed\r\nContent-Length: 6\r\n\r\nabcdef",
    ],
)
def test_framings(server: RawServer, response: bytes) -> None:
    assert fetch(server.fixed("/framed", response, keep=False)) == b"abcdef"


def test_an_empty_body_is_for_the_decoder_to_judge(server: RawServer) -> None:
    assert fetch(server.fixed("/empty", answer(200))) == b""


# --- limits -------------------------------------------------------------------------------------------------------


@pytest.mark.timing
def test_a_declared_length_over_the_limit_is_refused_at_once(server: RawServer) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 100000000000\r\n\r\n"
    server.routes["/big"] = drip(itertools.chain([head], itertools.repeat(b"x" * 10)), 0.05, server.closing)
    failure(server.url("/big"), Code.FETCH_TOO_LARGE, within_s=1.5)


@pytest.mark.parametrize("head", [b"Transfer-Encoding: chunked", b"Connection: close", b"Content-Length: 1000001"])
def test_what_streams_beyond_the_limit_is_cut_off(server: RawServer, head: bytes) -> None:
    sent = 0

    @server.route("/endless")
    def endless(connection: socket.socket, _: str) -> bool:
        nonlocal sent
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n")
        piece = b"x" * 65_536
        part = b"10000\r\n" + piece + b"\r\n" if b"chunked" in head else piece
        for _ in range(2_000):
            connection.sendall(part)
            sent += len(part)
        return False

    failure(server.url("/endless"), Code.FETCH_TOO_LARGE)
    assert sent < 30_000_000  # what the kernel's buffers took, not the 131 MB on offer


def test_exactly_the_limit_is_allowed(server: RawServer) -> None:
    assert len(fetch(server.fixed("/full", answer(200, b"x" * 5_000)), max_bytes=5_000)) == 5_000
    failure(server.fixed("/over", answer(200, b"x" * 5_001)), Code.FETCH_TOO_LARGE, max_bytes=5_000)


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "deflate", "GZip"])
def test_compressed_bodies_are_unpacked(server: RawServer, coding: str) -> None:
    packed = zlib.compress(BODY) if coding == "deflate" else gzip.compress(BODY[:100]) + gzip.compress(BODY[100:])
    assert fetch(server.fixed("/packed", answer(200, packed, f"Content-Encoding: {coding}"))) == BODY


def test_a_gzip_bomb_is_cut_off_without_unpacking_it(server: RawServer) -> None:
    bomb = gzip.compress(bytes(200_000_000), compresslevel=1)[:800_000]
    started = time.process_time()
    failure(server.fixed("/bomb", answer(200, bomb, "Content-Encoding: gzip")), Code.FETCH_TOO_LARGE)
    assert time.process_time() - started < 1.0


def test_a_stream_of_empty_gzip_blocks_ends(server: RawServer) -> None:
    packer = zlib.compressobj(wbits=31)
    empty = packer.compress(b"x") + b"".join(packer.flush(zlib.Z_FULL_FLUSH) for _ in range(1_000))
    flood = [b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n", empty, *[b"\0\0\0\xff\xff" * 10_000] * 40]
    failure(server.fixed("/blocks", *flood, keep=False), Code.FETCH_TOO_LARGE)


@pytest.mark.parametrize(
    ("encoding", "body", "code"),
    [
        ("br", b"abc", Code.FETCH_DENIED),
        ("gzip, gzip", gzip.compress(gzip.compress(BODY)), Code.FETCH_DENIED),
        ("gzip", b"not gzip at all", Code.FETCH_UNAVAILABLE),
        ("gzip", gzip.compress(BODY)[:-20], Code.FETCH_UNAVAILABLE),
        ("gzip", b"", Code.FETCH_UNAVAILABLE),
    ],
)
def test_other_encodings(server: RawServer, encoding: str, body: bytes, code: Code) -> None:
    failure(server.fixed("/encoded", answer(200, body, f"Content-Encoding: {encoding}")), code)


def test_headers_without_end_are_bounded(server: RawServer) -> None:
    lines = [b"HTTP/1.1 200 OK\r\n", *(b"X-%d: " % i + b"x" * 1_000 + b"\r\n" for i in range(5_000))]
    failure(server.fixed("/headers", *lines), Code.FETCH_UNAVAILABLE)


@pytest.mark.timing
def test_informational_responses_without_end_are_bounded(server: RawServer) -> None:
    @server.route("/hints")
    def hints(connection: socket.socket, _: str) -> bool:
        while not server.closing.is_set():
            connection.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1_000)
        return False

    failure(server.url("/hints"), Code.FETCH_TIMEOUT, timeout_s=0.5, within_s=2.0)


@pytest.mark.timing
def test_a_flood_of_tiny_chunks_ends_at_the_deadline(server: RawServer) -> None:
    @server.route("/tiny")
    def tiny(connection: socket.socket, _: str) -> bool:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not server.closing.is_set():
            connection.sendall(b"1\r\nx\r\n" * 10_000)
        return False

    failure(server.url("/tiny"), Code.FETCH_TIMEOUT, timeout_s=0.5, within_s=2.0, max_bytes=10**9)


# --- time ---------------------------------------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"


@pytest.mark.timing
@pytest.mark.parametrize(
    "parts",
    [
        [],
        [b"HTTP/1.1 200 OK\r\n", *([b"x"] * 1_000)],
        [HEAD, *([b"x"] * 1_000)],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *([b"1\r\nx\r\n"] * 1_000)],
    ],
    ids=["silent", "slow headers", "slow body", "slow chunks"],
)
def test_the_deadline_is_for_the_whole_fetch_not_for_one_read(server: RawServer, parts: list[bytes]) -> None:
    server.routes["/slow"] = drip(parts or [b""] * 1_000, 0.05, server.closing)
    failure(server.url("/slow"), Code.FETCH_TIMEOUT, timeout_s=0.6, within_s=1.5)


@pytest.mark.timing
def test_redirects_share_the_deadline(server: RawServer) -> None:
    server.routes["/r"] = drip([b"", b"", b"", answer(302, b"", "Location: /r")], 0.1, server.closing)
    failure(server.url("/r"), Code.FETCH_TIMEOUT, timeout_s=0.8, within_s=1.6)


@pytest.mark.timing
def test_a_resolver_that_hangs_ends_at_the_deadline(server: RawServer) -> None:
    stuck = threading.Event()

    def lookup(host: str, port: int) -> list[str]:
        stuck.wait(10)
        return ["127.0.0.1"]

    failure("http://slow-dns.example/", Code.FETCH_TIMEOUT, lookup=lookup, timeout_s=0.4, within_s=1.5)
    stuck.set()


@pytest.mark.timing
def test_a_tls_server_that_never_shakes_hands_ends_at_the_deadline(server: RawServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"https://127.0.0.1:{mute.getsockname()[1]}/"
        failure(url, Code.FETCH_TIMEOUT, timeout_s=0.4, within_s=1.5)


def test_an_address_that_swallows_packets_leaves_time_for_the_next(server: RawServer) -> None:
    class HalfDead(Detour):
        def connect_tcp(self, host: str, port: int, timeout: float | None = None, **rest: Any) -> httpcore.NetworkStream:
            if host == "2606:4700::1111":
                self.asked.append((host, port))
                assert timeout is not None and timeout < 4.0
                raise httpcore.ConnectTimeout("swallowed")
            return super().connect_tcp(host, port, timeout, **rest)

    network = HalfDead(server.port)
    lookup = lambda host, port: ["2606:4700::1111", "93.184.216.34"]  # noqa: E731
    assert fetch("http://images.example/ok", lookup=lookup, network=network, allow_private_addresses=False) == BODY
    assert [host for host, _ in network.asked] == ["2606:4700::1111", "93.184.216.34"]


# --- answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (204, Code.FETCH_UNAVAILABLE),
        (206, Code.FETCH_UNAVAILABLE),
        (304, Code.FETCH_UNAVAILABLE),
        (400, Code.FETCH_NOT_FOUND),
        (401, Code.FETCH_DENIED),
        (403, Code.FETCH_DENIED),
        (404, Code.FETCH_NOT_FOUND),
        (407, Code.FETCH_DENIED),
        (408, Code.FETCH_TIMEOUT),
        (410, Code.FETCH_NOT_FOUND),
        (416, Code.FETCH_NOT_FOUND),
        (425, Code.FETCH_UNAVAILABLE),
        (429, Code.FETCH_UNAVAILABLE),
        (451, Code.FETCH_DENIED),
        (500, Code.FETCH_UNAVAILABLE),
        (503, Code.FETCH_UNAVAILABLE),
        (599, Code.FETCH_UNAVAILABLE),
    ],
)
def test_statuses(server: RawServer, status: int, code: Code) -> None:
    head = f"HTTP/1.1 {status} X\r\n\r\n".encode() if status in (204, 304) else answer(status, b"no")
    error = failure(server.fixed("/status", head) + "?token=secret", code)
    assert error.message == f"127.0.0.1 answered {status}"


def test_a_refusal_keeps_the_connection_and_its_slow_body_does_not_hide_it(server: RawServer) -> None:
    fetcher = make_fetcher(timeout_s=0.6)
    for _ in range(3):
        with pytest.raises(ItemError):
            fetcher.fetch(make_item(server.url("/missing")))
    assert server.connections == 1
    head = b"HTTP/1.1 404 X\r\nContent-Length: 1000\r\n\r\n"
    server.routes["/slowly"] = drip([head, *([b"x"] * 1_000)], 0.05, server.closing)
    with pytest.raises(ItemError) as error:
        fetcher.fetch(make_item(server.url("/slowly")))
    assert error.value.code is Code.FETCH_NOT_FOUND
    fetcher.close()


def test_retry_after_is_passed_on(server: RawServer) -> None:
    soon = format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90), usegmt=True)
    for value, low, high in (("7", 7, 7), (soon, 80, 91), ("999999", 3_600, 3_600), ("-1", None, None), ("soon", None, None)):
        url = server.fixed("/later", answer(503, b"", f"Retry-After: {value}"))
        error = failure(url, Code.FETCH_UNAVAILABLE)
        assert isinstance(error, TransientItemError) and error.attempted
        if low is None:
            assert error.retry_after_s is None
        else:
            assert error.retry_after_s is not None and low <= error.retry_after_s <= high


@pytest.mark.parametrize(
    "handler",
    [
        reset,
        drip([], 0, threading.Event()),
        drip([b"SSH-2.0-OpenSSH_9.6\r\n"], 0, threading.Event()),
        drip([b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"], 0, threading.Event()),
        drip([b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n"], 0, threading.Event()),
        drip([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef"], 0, threading.Event()),
        drip([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"], 0, threading.Event()),
        drip([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab"], 0, threading.Event()),
        drip([b"\x15\x03\x01\x00\x02\x02\x16"], 0, threading.Event()),
        drip([b"HTTP/1.1 301 Moved\r\nContent-Length: 0\r\n\r\n"], 0, threading.Event()),
    ],
    ids=["reset", "closed", "ssh", "truncated", "negative", "two-lengths", "cut-chunk", "bad-chunk", "tls", "no-location"],
)
def test_what_is_no_whole_http_answer_is_unavailable(server: RawServer, handler: Callable[..., bool]) -> None:
    server.routes["/bad"] = handler
    failure(server.url("/bad"), Code.FETCH_UNAVAILABLE)


PIECES = [
    *[b"HTTP/1.1 ", b"HTTP/1.0 ", b"HTTP/9.9 ", b"200 OK", b"302 Found", b"404 No", b"200", b"-1 x", b"100 Go", b"101 Up"],
    *[b"\r\n", b"\n", b"\r\n\r\n", b"\0", b"abcde", b": x", b" folded", b"\x80\xff", b"999 X", b"Connection: close"],
    *[b"Content-Length: 5", b"Content-Length: " + b"9" * 5_000, b"Content-Length: 5, 5", b"Content-Length: +5"],
    *[b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Content-Encoding: gzip", b"Retry-After: 9e9"],
    *[b"Location: /ok", b"Location: http://[", b"Location: \xff\xfe", b"Location:"],
    *[b"5\r\nabcde\r\n", b"ffffffffffffffff\r\n", b"0\r\n\r\n"],
]


@given(pieces=st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=20)), max_size=12), keep=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_end_in_bytes_or_in_a_code(server: RawServer, pieces: list[bytes], keep: bool) -> None:
    url = server.fixed("/any", b"HTTP/1.1 200 OK\r\n" * keep + b"".join(pieces), keep=False)
    fetcher = make_fetcher(timeout_s=1.0)
    try:
        assert isinstance(fetcher.fetch(make_item(url)).data, bytes)
    except ItemError as error:
        assert error.code.startswith("fetch.")
    finally:
        fetcher.close()


def test_nobody_listens(server: RawServer) -> None:
    server.close()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    failure(f"http://127.0.0.1:{port}/", Code.FETCH_UNAVAILABLE)


def test_unknown_names_are_tried_again(server: RawServer) -> None:
    def lookup(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    failure("http://nowhere.example/", Code.FETCH_UNAVAILABLE, lookup=lookup)
    failure("http://nowhere.example/", Code.FETCH_UNAVAILABLE, lookup=lambda host, port: [])


# --- redirects ----------------------------------------------------------------------------------------------------


def chain(server: RawServer, length: int) -> str:
    for step in range(length):
        target = "/ok" if step == length - 1 else f"/step{step + 1}"
        server.fixed(f"/step{step}", answer([301, 302, 303, 307, 308][step % 5], b"moved", f"Location: {target}"))
    return server.url("/step0")


def test_three_redirects_are_followed_and_no_more(server: RawServer) -> None:
    assert fetch(chain(server, 3)) == BODY
    error = failure(chain(server, 4), Code.FETCH_DENIED)
    assert "more than 3 redirects" in error.message
    failure(server.fixed("/loop", answer(302, b"", "Location: /loop")), Code.FETCH_DENIED)


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "gopher://127.0.0.1:1/", "http://user:secret@127.0.0.1/", "s3://bucket/key", "http://0x7f.0.0.1.2/"],
)
def test_redirects_out_of_http_are_denied(server: RawServer, location: str) -> None:
    failure(server.fixed("/out", answer(302, b"", f"Location: {location}")), Code.FETCH_DENIED)


# --- addresses ----------------------------------------------------------------------------------------------------

PRIVATE_URLS = [
    "http://127.0.0.1:{port}/",
    "http://localhost:{port}/",
    "http://localhost.:{port}/",
    "http://[::1]:{port}/",
    "http://[::]:{port}/",
    "http://[::127.0.0.1]:{port}/",
    "http://[64:ff9b::127.0.0.1]:{port}/",
    "http://[2002:7f00:1::]:{port}/",
    "http://0.0.0.0:{port}/",
    "http://127.127.127.127:{port}/",
    "http://10.0.0.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://[fd00:ec2::254]/",
    "http://100.100.100.200/",
    "http://168.63.129.16/",
    "http://255.255.255.255/",
    "http://224.0.0.1/",
]


@pytest.mark.parametrize("template", PRIVATE_URLS + TRICKS)
def test_internal_addresses_are_refused_without_a_connection(server: RawServer, template: str) -> None:
    network = NoNetwork()
    url = template.replace("{port}", str(server.port))
    failure(url, Code.FETCH_DENIED, network=network, allow_private_addresses=False)
    assert network.asked == []
    failure(url, Code.FETCH_DENIED, allow_private_addresses=False)  # and with the real network
    assert server.connections == 0


@pytest.mark.parametrize("address", ["169.254.169.254", "100.100.100.200", "168.63.129.16", "224.0.0.1", "0.0.0.0"])
def test_metadata_and_multicast_stay_refused_with_the_setting(address: str) -> None:
    network = NoNetwork()
    failure(f"http://{address}/", Code.FETCH_DENIED, network=network)
    failure("http://trick.example/", Code.FETCH_DENIED, network=network, lookup=lambda host, port: [address])
    assert network.asked == []


@pytest.mark.parametrize(
    "answers",
    [["127.0.0.1"], ["10.1.1.1"], ["93.184.216.34", "10.0.0.1"], ["2606:4700::1111", "::1"], ["fe80::1%2"], ["::ffff:8.8.8.8"]],
)
def test_a_name_with_any_internal_address_is_refused(answers: list[str]) -> None:
    network = NoNetwork()
    options = {"network": network, "lookup": lambda host, port: answers, "allow_private_addresses": False}
    error = failure("http://images.example/x?sig=1", Code.FETCH_DENIED, **options)
    assert network.asked == []
    assert error.message == "images.example leads to an address that is not allowed"  # and not which


def test_a_name_that_changes_its_address_gains_nothing(server: RawServer) -> None:
    """DNS rebinding: public when judged, loopback for whoever asks again."""
    answers = iter([["93.184.216.34"], ["127.0.0.1"], ["127.0.0.1"]])
    asked = []

    def lookup(host: str, port: int) -> list[str]:
        asked.append(host)
        return next(answers)

    network = Detour(server.port)
    fetcher = make_fetcher(lookup=lookup, network=network, allow_private_addresses=False)
    url = f"http://rebind.example:{server.port}/ok"
    assert fetcher.fetch(make_item(url)).data == BODY
    assert network.asked == [("93.184.216.34", server.port)] and asked == ["rebind.example"]
    assert f"Host: rebind.example:{server.port}\r\n".encode() in server.requests[0]
    # The kept connection still leads where it was judged to lead, without asking again.
    assert fetcher.fetch(make_item(url)).data == BODY
    assert asked == ["rebind.example"]
    # A new connection is judged anew.
    fetcher._http._pool.close()  # what an idle timeout does
    with pytest.raises(ItemError) as error:
        fetcher.fetch(make_item(url))
    assert error.value.code is Code.FETCH_DENIED
    assert network.asked == [("93.184.216.34", server.port)]
    fetcher.close()


@pytest.mark.parametrize(
    "location", ["http://127.0.0.1:{port}/ok", "http://inside.example:{port}/ok", "//[::1]:{port}/", "http://2130706433:{port}/"]
)
def test_every_redirect_is_judged_anew(server: RawServer, location: str) -> None:
    server.fixed("/away", answer(302, b"", "Location: " + location.replace("{port}", str(server.port))))
    names = {"public.example": ["93.184.216.34"], "inside.example": ["10.9.8.7"]}
    network = Detour(server.port)
    options = {"network": network, "lookup": lambda host, port: names[host], "allow_private_addresses": False}
    error = failure("http://public.example/away", Code.FETCH_DENIED, **options)
    assert network.asked == [("93.184.216.34", 80)]
    assert "10.9.8.7" not in error.message and "inside.example" not in error.message


def test_allowed_hosts_hold_for_redirects_too(server: RawServer) -> None:
    server.fixed("/away", answer(302, b"", f"Location: http://evil.example:{server.port}/ok"))
    server.fixed("/home", answer(302, b"", f"Location: http://b.images.example:{server.port}/ok"))
    options = {"lookup": lambda host, port: ["127.0.0.1"], "allowed_hosts": ("*.images.example",)}
    assert fetch(server.url("/home", host="a.images.example"), **options) == BODY
    before = server.connections
    error = failure(server.url("/ok", host="evil.example"), Code.FETCH_DENIED, **options)
    assert error.message == "host evil.example is not allowed" and server.connections == before
    error = failure(server.url("/away", host="a.images.example"), Code.FETCH_DENIED, **options)
    assert error.message == "redirected to a host that is not allowed"
    assert sum(b"Host: evil" in request for request in server.requests) == 0


def test_the_setting_allows_private_addresses_but_not_their_disguise_as_a_host_name(server: RawServer) -> None:
    assert fetch(f"http://0x7f.1:{server.port}/ok") == BODY
    assert b"Host: 127.0.0.1:" in server.requests[-1]


def test_ipv6_hosts_are_named_in_brackets(server: RawServer) -> None:
    network = Detour(server.port)
    url = f"http://[2606:4700::1111]:{server.port}/ok"
    assert fetch(url, network=network, allow_private_addresses=False) == BODY
    assert network.asked == [("2606:4700::1111", server.port)]
    assert f"Host: [2606:4700::1111]:{server.port}\r\n".encode() in server.requests[0]


# --- TLS ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate authority and a certificate for images.example.org and 127.0.0.1."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    folder = tmp_path_factory.mktemp("authority")
    now = datetime.datetime.now(datetime.UTC)

    def certificate(name: str, key: object, issuer: str, signer: object, names: list[object] | None) -> object:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())  # type: ignore[attr-defined]
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=names is None, path_length=None), critical=True)
        )
        if names is not None:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(signer, hashes.SHA256())

    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    import ipaddress

    root = certificate("Test Root", root_key, "Test Root", root_key, None)
    names = [x509.DNSName("images.example.org"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    leaf = certificate("images.example.org", key, "Test Root", root_key, names)
    pem = serialization.Encoding.PEM
    (folder / "root.pem").write_bytes(root.public_bytes(pem))  # type: ignore[attr-defined]
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "leaf.pem").write_bytes(leaf.public_bytes(pem) + private)  # type: ignore[attr-defined]
    return folder


@pytest.fixture
def tls_server(authority: Path) -> Iterator[RawServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "leaf.pem")
    server = RawServer(context)
    server.server_names = []  # type: ignore[attr-defined]
    context.sni_callback = lambda _socket, name, _context: server.server_names.append(name)  # type: ignore[attr-defined]
    server.fixed("/ok", answer(200, BODY))
    yield server
    server.close()


def test_tls_is_made_for_the_url_s_name_whatever_the_address(
    tls_server: RawServer, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority / "root.pem"))
    lookup = lambda host, port: ["127.0.0.1"]  # noqa: E731
    assert fetch(tls_server.url("/ok", host="images.example.org"), lookup=lookup) == BODY
    assert fetch(tls_server.url("/ok", host="IMAGES.example.org."), lookup=lookup) == BODY
    assert tls_server.server_names == ["images.example.org"] * 2  # type: ignore[attr-defined]
    assert f"Host: images.example.org:{tls_server.port}\r\n".encode() in tls_server.requests[0]
    assert fetch(tls_server.url("/ok")) == BODY  # by the address in the certificate
    error = failure(tls_server.url("/ok", host="other.example.org"), Code.FETCH_UNAVAILABLE, lookup=lookup)
    assert error.message == "TLS with other.example.org failed"
    tls_server.fixed("/down", answer(302, b"", "Location: http://images.example.org/ok"))
    error = failure(tls_server.url("/down", host="images.example.org"), Code.FETCH_DENIED, lookup=lookup)
    assert error.message == "redirected from https to http"


def test_tls_by_an_unknown_authority_fails(tls_server: RawServer) -> None:
    failure(tls_server.url("/ok"), Code.FETCH_UNAVAILABLE)
    assert tls_server.requests == []


# --- company ------------------------------------------------------------------------------------------------------


@pytest.mark.timing
def test_one_slow_host_does_not_hold_the_others(server: RawServer) -> None:
    server.routes["/slow"] = drip([b""] * 100, 0.05, server.closing)
    fetcher = make_fetcher(concurrency=4, timeout_s=2.0, lookup=lambda host, port: ["127.0.0.1"])
    outcomes: list[ItemError] = []

    def slow() -> None:
        try:
            fetcher.fetch(make_item(server.url("/slow", host="slow.example")))
        except ItemError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=slow) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.8)  # the wait for a place is a quarter of the time-out
    turned_away = [error for error in outcomes if isinstance(error, TransientItemError) and not error.attempted]
    assert len(turned_away) == 2 and server.most_active == 2
    assert "limit of 2 fetches" in turned_away[0].message
    started = time.monotonic()
    assert fetcher.fetch(make_item(server.url("/ok", host="fast.example"))).data == BODY
    assert time.monotonic() - started < 0.5
    for thread in threads:
        thread.join()
    fetcher.close()
    assert [error.code for error in outcomes].count(Code.FETCH_TIMEOUT) == 2


def test_a_dead_host_is_left_alone_and_found_again(server: RawServer) -> None:
    url = server.fixed("/health", answer(503))
    fetcher = make_fetcher(breaker_failures=3, breaker_reset_s=0.5)
    errors = []
    for _ in range(6):
        with pytest.raises(TransientItemError) as error:
            fetcher.fetch(make_item(url))
        errors.append(error.value)
    assert [error.attempted for error in errors] == [True] * 3 + [False] * 3
    assert len(server.requests) == 3
    assert {error.code for error in errors} == {Code.FETCH_UNAVAILABLE}
    server.fixed("/health", answer(200, BODY))
    time.sleep(0.6)
    assert fetcher.fetch(make_item(url)).data == BODY
    assert fetcher.fetch(make_item(url)).data == BODY
    fetcher.close()


def test_many_threads_share_one_fetcher(server: RawServer) -> None:
    fetcher = make_fetcher(concurrency=8)
    wrong: list[BaseException | bytes] = []

    def work(number: int) -> None:
        for turn in range(25):
            try:
                if turn % 5 == 4:
                    with pytest.raises(ItemError):
                        fetcher.fetch(make_item(server.url(f"/missing{number}")))
                elif (data := fetcher.fetch(make_item(server.url()))).data != BODY:
                    wrong.append(data.data)
            except ItemError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fetcher.close()
    assert wrong == []
    assert server.connections <= 8


def test_closing_leaves_no_thread_behind(server: RawServer) -> None:
    before = {thread.name for thread in threading.enumerate()}
    assert fetch(server.url(host="localhost")) == BODY
    end = time.monotonic() + 2
    while time.monotonic() < end and any(name.startswith("fetch-") for name in names() - before):
        time.sleep(0.01)
    assert not [name for name in names() - before if name.startswith("fetch-")]


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}
