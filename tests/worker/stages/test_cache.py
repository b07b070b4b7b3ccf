"""The score cache on a real server, and on servers that are dead, slow, full, locked, frozen or no Redis at all."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from pydantic import SecretStr

from worker.embedded import EmbeddedCache, free_port
from worker.errors import ConfigurationError, DependencyError
from worker.items import ImageInfo, Scores
from worker.metrics import Metrics
from worker.settings import CacheSettings
from worker.stages.cache import KEY_PREFIX, CachedScore, ScoreCache, key_of, probe

SCORES = Scores(heads={"linear": 0.9, "knn": 0.5, "ocsvm": 0.25}, crops=(0.9,))
TIMEOUT_MS = 100
PATIENCE_S = 3 * TIMEOUT_MS / 1000


def entry(number: int, scope: str = "scope") -> CachedScore:
    return CachedScore.of(scope, ImageInfo(f"{number:064x}", 10, 20, "PNG", 1, {"c2pa": None}), SCORES)


def settings(url: str, **changes: Any) -> CacheSettings:
    return CacheSettings(
        **({"url": SecretStr(url), "timeout_ms": TIMEOUT_MS, "breaker_failures": 2, "breaker_reset_s": 0.3} | changes)
    )


class Counted:
    """A cache and its metrics."""

    def __init__(self, url: str, **changes: Any) -> None:
        self.metrics = Metrics()
        self.cache = ScoreCache(settings(url, **changes), self.metrics)

    def requests(self, result: str) -> float:
        return self._value("code_worker_cache_requests_total", result)

    def writes(self, result: str) -> float:
        return self._value("code_worker_cache_writes_total", result)

    def get(self, *numbers: int) -> list[int]:
        """Which of these are found."""
        found = self.cache.get_many("scope", [f"{number:064x}" for number in numbers])
        assert all(found[digest] == entry(int(digest, 16)) for digest in found)
        return sorted(int(digest, 16) for digest in found)

    def put(self, *numbers: int) -> None:
        self.cache.put_many([entry(number) for number in numbers])

    def _value(self, name: str, result: str) -> float:
        return self.metrics.registry.get_sample_value(name, {"result": result}) or 0.0


@contextmanager
def opened(url: str, **changes: Any) -> Iterator[Counted]:
    counted = Counted(url, **changes)
    try:
        yield counted
    finally:
        counted.cache.close()


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedCache]:
    with EmbeddedCache() as running:
        yield running


@pytest.fixture
def client(server: EmbeddedCache) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as connected:
        connected.flushall()
        yield connected


def eventually(check: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.02)


def test_what_is_put_is_found_at_once_and_only_in_its_scope(server: EmbeddedCache, client: redis.Redis) -> None:
    with opened(server.url, ttl_s=100) as counted:
        assert counted.get(1, 2) == []
        counted.put(1, 3)
        assert counted.get(1, 2, 3, 3) == [1, 3]
        assert counted.cache.get_many("other", [f"{1:064x}"]) == {}
        assert counted.get() == []
        assert (counted.requests("hit"), counted.requests("miss"), counted.requests("error")) == (3, 4, 0)
        assert counted.writes("ok") == 2
        assert counted.cache.state == "closed"
    assert 0 < client.ttl(key_of("scope", f"{1:064x}")) <= 100
    assert {key.split(b":")[0] + b":" + key.split(b":")[1] for key in client.scan_iter()} == {KEY_PREFIX.encode()}


def test_many_at_once_are_one_round_trip(server: EmbeddedCache, client: redis.Redis) -> None:
    with opened(server.url) as counted:
        counted.put(*range(64))
        assert counted.get(*range(128)) == list(range(64))
        before = client.info("commandstats")["cmdstat_mget"]["calls"]
        counted.get(*range(128))
        assert client.info("commandstats")["cmdstat_mget"]["calls"] == before + 1


def test_foreign_values_are_misses_and_are_overwritten(server: EmbeddedCache, client: redis.Redis) -> None:
    keys = [key_of("scope", f"{number:064x}") for number in range(3)]
    client.set(keys[0], b"\x00\xffgarbage")
    client.lpush(keys[1], b"a list")
    client.set(keys[2], b"1:00000000:[]")
    with opened(server.url) as counted:
        assert counted.get(0, 1, 2) == []
        assert (counted.requests("miss"), counted.requests("error")) == (3, 0)
        counted.put(0, 1, 2)
        assert counted.get(0, 1, 2) == [0, 1, 2]


def test_off_means_bypass() -> None:
    with opened("redis://127.0.0.1:1", enabled=False) as counted:
        counted.put(1)
        assert counted.get(1, 2) == []
        assert counted.cache.state == "disabled"
        assert (counted.requests("bypass"), counted.writes("bypass")) == (2, 1)


def test_nobody_listens_then_somebody_does() -> None:
    port = free_port()
    with opened(f"redis://127.0.0.1:{port}") as counted:
        for _ in range(5):
            counted.put(1)
            assert counted.get(1) == []
        assert counted.cache.state == "open"
        assert counted.requests("error") >= 1
        assert counted.requests("bypass") >= 2
        assert counted.metrics.registry.get_sample_value("code_worker_cache_breaker_open") == 1
        with EmbeddedCache(port=port):
            eventually(lambda: counted.get(1) == [] and counted.cache.state == "closed")
            counted.put(1)
            eventually(lambda: counted.get(1) == [1])
            assert counted.metrics.registry.get_sample_value("code_worker_cache_breaker_open") == 0


def test_killed_and_started_again() -> None:
    with EmbeddedCache() as running, opened(running.url) as counted:
        counted.put(1)
        assert counted.get(1) == [1]
        running.kill()
        slowest = _slowest(counted, 20)
        assert slowest < PATIENCE_S + 0.5
        assert counted.cache.state == "open"
        running.restart()
        eventually(lambda: counted.get(1) == [] and counted.cache.state == "closed")
        counted.put(1)
        eventually(lambda: counted.get(1) == [1])


def test_frozen_costs_a_bounded_time_and_then_nothing(server: EmbeddedCache, client: redis.Redis) -> None:
    with opened(server.url, breaker_reset_s=5.0) as counted:
        counted.put(1)
        assert counted.get(1) == [1]
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            for _ in range(200):
                counted.put(2)
                assert counted.get(1) == []
            spent = time.monotonic() - started
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert spent < 2 * PATIENCE_S + 1.0
        assert 1 <= counted.requests("error") <= 2  # as many as open the breaker, failed writes among them
        assert counted.requests("bypass") == 200 - counted.requests("error")
    with opened(server.url) as counted:
        eventually(lambda: counted.get(1) == [1])


def test_full_refuses_writes_and_still_answers(server: EmbeddedCache, client: redis.Redis) -> None:
    with opened(server.url) as counted:
        counted.put(1)
        assert counted.get(1) == [1]
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1")
        try:
            counted.put(2, 3)
            assert counted.get(1, 2) == [1]
            assert counted.writes("error") == 2
            counted.put(4)
            assert counted.writes("bypass") == 1
            assert counted.cache.state == "closed"
        finally:
            client.config_set("maxmemory", "100mb")
            client.config_set("maxmemory-policy", "allkeys-lru")

        def written() -> bool:
            counted.put(2)
            return counted.get(2) == [2]

        eventually(written)


def test_read_only_still_answers(server: EmbeddedCache, client: redis.Redis) -> None:
    with opened(server.url) as counted:
        counted.put(1)
        assert counted.get(1) == [1]
        client.replicaof("127.0.0.1", free_port())
        try:
            counted.put(2)
            assert counted.get(1, 2) == [1]
            assert counted.writes("error") == 1
            assert counted.cache.state == "closed"
        finally:
            client.replicaof("NO", "ONE")


def test_a_wrong_password_is_an_error_and_never_shown(server: EmbeddedCache, client: redis.Redis, capfd: Any) -> None:
    client.config_set("requirepass", "right-secret")
    try:
        with opened(server.url) as without, opened(server.url.replace("://", "://:wrong-secret@")) as wrong:
            for counted in (without, wrong):
                for _ in range(3):
                    counted.put(1)
                    assert counted.get(1) == []
                assert counted.requests("error") >= 1
                assert counted.cache.state == "open"
        with opened(server.url.replace("://", "://:right-secret@")) as right:
            right.put(1)
            assert right.get(1) == [1]
        with pytest.raises(DependencyError) as caught:
            probe(settings(server.url.replace("://", "://:wrong-secret@")), 1.0)
        assert "wrong-secret" not in str(caught.value)
        assert "WRONGPASS" in str(caught.value) or "invalid" in str(caught.value).lower()
    finally:
        client.config_set("requirepass", "")
    written = capfd.readouterr()
    assert "secret" not in written.out + written.err


Answer = Callable[[socket.socket], None]


@contextmanager
def fake_server(answer: Answer) -> Iterator[str]:
    """A listener on loopback that treats every connection with `answer`."""
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=_quietly, args=(answer, connection), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        listener.close()


def _quietly(answer: Answer, connection: socket.socket) -> None:
    with connection:
        try:
            answer(connection)
        except OSError:
            return


def _drips(connection: socket.socket) -> None:
    connection.recv(1 << 16)
    for _ in range(600):
        connection.sendall(b"+")
        time.sleep(TIMEOUT_MS / 2000)


def _says(text: bytes) -> Answer:
    def answer(connection: socket.socket) -> None:
        while connection.recv(1 << 16):
            connection.sendall(text)

    return answer


def _hangs_up(connection: socket.socket) -> None:
    connection.recv(1 << 16)


def _is_silent(connection: socket.socket) -> None:
    time.sleep(30)


ANSWERS: dict[str, Answer] = {
    "drips": _drips,
    "hangs up": _hangs_up,
    "is silent": _is_silent,
    "loads": _says(b"-LOADING Redis is loading the dataset in memory\r\n" * 8),
    "moved": _says(b"+OK\r\n+OK\r\n+OK\r\n-MOVED 3999 127.0.0.1:6381\r\n"),
    "web": _says(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"),
    "wrong numbers": _says(b"+OK\r\n+OK\r\n+OK\r\n$abc\r\n"),
    "wrong shape": _says(b"+OK\r\n+OK\r\n+OK\r\n*1\r\n:5\r\n"),
    "noise": _says(bytes(range(256)) * 4),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_whatever_answers_costs_a_bounded_time(kind: str) -> None:
    with fake_server(ANSWERS[kind]) as url, opened(url, breaker_reset_s=0.05) as counted:
        slowest = _slowest(counted, 12)
        assert slowest < PATIENCE_S + 0.5
        assert counted.requests("hit") == 0
        assert sum(counted.requests(result) for result in ("error", "bypass", "miss")) == 24
        assert counted.requests("error") >= 1


def _slowest(counted: Counted, rounds: int) -> float:
    slowest = 0.0
    for _ in range(rounds):
        started = time.monotonic()
        counted.put(7)
        assert counted.get(8, 9) == []
        slowest = max(slowest, time.monotonic() - started)
        time.sleep(0.01)
    return slowest


def test_a_name_that_is_slow_to_resolve_costs_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def slow(*arguments: Any, **options: Any) -> Any:
        released.wait(20)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    try:
        with opened("redis://cache.invalid:6379") as counted:
            assert _slowest(counted, 6) < PATIENCE_S + 0.5
            assert counted.requests("error") in (2, 4)  # two digests a call
    finally:
        released.set()


def test_writes_behind_a_slow_server_are_dropped_not_piled_up() -> None:
    with fake_server(_is_silent) as url, opened(url, breaker_failures=1000, timeout_ms=5000) as counted:
        for number in range(100):
            counted.put(number)
        assert counted.writes("dropped") == 100 - 16


def test_tls() -> None:
    pytest.importorskip("cryptography", reason="makes the certificate")
    from tests.worker.tls_proxy import tls_proxy

    with EmbeddedCache() as running, tls_proxy(running.port) as (port, ca_file):
        url = f"rediss://localhost:{port}/0"
        with opened(f"{url}?ssl_ca_certs={ca_file}", timeout_ms=2000) as counted:
            counted.put(1)
            assert counted.get(1) == [1]
        with opened(url, timeout_ms=2000) as counted:
            assert counted.get(1) == []
            assert counted.requests("error") == 1
        with pytest.raises(DependencyError, match=r"(?i)certificate"):
            probe(settings(url), 2.0)


@pytest.mark.parametrize("url", ["http://u:secret@host", "secret", "", "redis://:secret@host:port", "redis://h/0?db=secret"])
def test_an_unusable_url_is_named_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ScoreCache(settings(url), Metrics())
    assert "WORKER_CACHE__URL" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_probe_reads_what_it_wrote(server: EmbeddedCache, client: redis.Redis) -> None:
    assert 0 < probe(settings(server.url), 10.0) < 10_000
    assert client.keys() == []
    with pytest.raises(DependencyError):
        probe(settings(f"redis://127.0.0.1:{free_port()}"), 0.2)
