"""The probes over real HTTP: what they say, and that nobody can keep them from saying it."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.worker.fake_clock import FakeClock
from worker import health as module
from worker.errors import ConfigurationError
from worker.health import Health, HealthServer
from worker.metrics import Metrics
from worker.settings import HttpSettings


class Served:
    """A server, its health, its clock, and a way to ask it."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.health = Health(self.clock, stale_after_s=60, starting_s=600)
        self.metrics = Metrics()
        self.server = HealthServer(HttpSettings(port=0), self.health, self.metrics)
        self.server.start()

    def ask(self, path: str, method: str = "GET") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=10)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def json(self, path: str) -> tuple[int, dict[str, Any]]:
        status, body = self.ask(path)
        return status, json.loads(body)


@pytest.fixture
def served() -> Iterator[Served]:
    running = Served()
    yield running
    running.server.close()


def test_live_while_the_loop_turns(served: Served) -> None:
    assert served.json("/livez") == (200, {"status": "ok", "starting_s": 0.0})
    served.clock.advance(599)
    assert served.json("/livez")[0] == 200
    served.clock.advance(2)
    assert served.json("/livez")[0] == 503  # never began
    served.health.beat()
    served.clock.advance(60)
    assert served.json("/livez") == (200, {"status": "ok", "heartbeat_age_s": 60.0})
    served.clock.advance(0.5)
    assert served.json("/livez") == (503, {"status": "unavailable", "heartbeat_age_s": 60.5})


def test_ready_when_every_condition_holds(served: Served) -> None:
    assert served.json("/readyz") == (
        503,
        {"status": "unavailable", "live": True, "engine": False, "group": False, "intake": True, "running": True},
    )
    served.health.beat()
    served.health.set("engine", True)
    assert served.json("/readyz")[0] == 503
    served.health.set("group", True)
    ready = {"status": "ok", "live": True, "engine": True, "group": True, "intake": True, "running": True}
    assert served.json("/readyz") == (200, ready)
    served.clock.advance(61)
    assert served.json("/readyz")[0] == 503
    served.health.beat()
    assert served.json("/readyz")[0] == 200
    served.health.set("running", False)
    assert served.json("/readyz")[0] == 503
    assert served.json("/livez")[0] == 200  # draining, not dead


def test_metrics_page(served: Served) -> None:
    served.metrics.events_received.inc(3)
    status, body = served.ask("/metrics")
    assert status == 200
    assert b"\ncode_worker_events_received_total 3.0\n" in body
    assert b"\ncode_worker_ready 0.0\n" in body
    for condition in ("engine", "group"):
        served.health.set(condition, True)
    assert b"\ncode_worker_ready 1.0\n" in served.ask("/metrics")[1]


def test_other_paths_methods_and_queries(served: Served) -> None:
    assert served.ask("/")[0] == 404
    assert served.ask("/metrics?name=x")[0] == 200
    assert served.ask("/livez/")[0] == 200
    assert served.ask("/livez", "HEAD") == (200, b"")
    for method in ("POST", "PUT", "DELETE", "TRACE"):
        assert served.ask("/livez", method)[0] == 501


@pytest.mark.parametrize(
    "noise", [b"\x00\xff\x00\r\n\r\n", b"GET /livez\r\n\r\n", b"G" * 100_000 + b"\r\n", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200]
)
def test_noise_is_survived_in_silence(served: Served, noise: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=5) as connection:
        connection.sendall(noise)
        connection.close()
    assert served.ask("/livez")[0] == 200
    written = capfd.readouterr()
    assert "Traceback" not in written.out + written.err


@pytest.mark.timing
def test_a_slow_caller_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUEST_TIMEOUT_S", 0.4)
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=10) as connection:
        try:
            for letter in b"GET /livez HTTP/1.0\r\nname: " + b"x" * 400:
                connection.sendall(bytes([letter]))
                time.sleep(0.05)
        except OSError:
            pass
    assert time.monotonic() - started < 5


def test_idle_callers_take_all_places_only_for_a_while(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUEST_TIMEOUT_S", 0.5)
    idle = [socket.create_connection(("127.0.0.1", served.server.port), timeout=5) for _ in range(module.MAX_CONNECTIONS + 8)]
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                assert served.ask("/livez")[0] == 200
                break
            except (OSError, http.client.HTTPException):
                assert time.monotonic() < deadline
                time.sleep(0.1)
    finally:
        for connection in idle:
            connection.close()


def test_a_taken_port_is_a_setting_to_change(served: Served) -> None:
    with pytest.raises(ConfigurationError) as caught:
        HealthServer(HttpSettings(port=served.server.port), served.health, served.metrics)
    assert "WORKER_HTTP__PORT" in str(caught.value)
    assert str(served.server.port) in str(caught.value)
    with pytest.raises(ConfigurationError, match="cannot listen on no"):
        HealthServer(HttpSettings(host="no.such.host.invalid", port=0), served.health, served.metrics)


def test_closing_frees_the_port_and_may_be_repeated() -> None:
    running = Served()
    port = running.server.port
    running.server.close()
    running.server.close()
    again = HealthServer(HttpSettings(port=port), running.health, running.metrics)
    again.close()  # never started
