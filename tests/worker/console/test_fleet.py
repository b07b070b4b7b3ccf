"""Lag and batch sizes from workers' /metrics pages, summed, with workers that do not answer."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from worker.console import fleet as fleet_module
from worker.console.fleet import Fleet
from worker.embedded import free_port
from worker.errors import ConfigurationError
from worker.health import Health, HealthServer
from worker.metrics import Metrics
from worker.settings import HttpSettings


def until(fleet: Fleet, good: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        summary = fleet.summary()
        if summary is not None and good(summary):
            return summary
        time.sleep(0.05)
    raise AssertionError(fleet.summary())


def test_sums_over_the_workers_that_answer() -> None:
    pages = [Metrics(), Metrics()]
    servers = [HealthServer(HttpSettings(port=0), Health(stale_after_s=60), page) for page in pages]
    for server in servers:
        server.start()
    pages[0].batch_size.observe(8)  # before the console looked: not of the last minute
    addresses = [f"http://127.0.0.1:{server.port}/metrics" for server in servers]
    fleet = Fleet((*addresses, f"http://127.0.0.1:{free_port()}/metrics"))
    fleet.start()
    try:
        until(fleet, lambda summary: summary["answering"] == 2)
        for page in pages:
            page.consumer_lag.labels("image.uploads", "0").set(5)
            page.consumer_lag.labels("image.uploads", "1").set(2)
            page.in_flight_events.set(3)
            page.batch_size.observe(1)
            page.batch_size.observe(30)
            page.batches.labels("full").inc()
        summary = until(fleet, lambda summary: summary["batch_reasons"].get("full") == 2)
        assert summary["workers"] == 3
        assert summary["lag"] == 14
        assert summary["in_flight"] == 6
        assert {size["most"]: size["batches"] for size in summary["batch_sizes"] if size["batches"]} == {1: 2, 32: 2}
    finally:
        fleet.close()
        for server in servers:
            server.close()


@pytest.mark.parametrize(
    ("found", "asked"),
    [
        (["10.0.0.7", "10.0.0.5", "10.0.0.7"], ["http://10.0.0.5:8080/metrics", "http://10.0.0.7:8080/metrics"]),
        (["fd00::1", "fd00::2"], ["http://[fd00::1]:8080/metrics", "http://[fd00::2]:8080/metrics"]),
        (["10.0.0.5", "10.0.0.7", "fd00::1", "fd00::2"], ["http://10.0.0.5:8080/metrics", "http://10.0.0.7:8080/metrics"]),
        (["10.0.0.5"], ["http://workers:8080/metrics"]),
        ([], ["http://workers:8080/metrics"]),
    ],
)
def test_a_name_with_several_addresses_is_several_workers(
    found: list[str], asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Service of the workers has no address of its own: its name stands for every pod's."""

    def resolved(host: str, port: int, **_: object) -> list[Any]:
        if not found:
            raise socket.gaierror(host)
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in found]
        return [(kind, socket.SOCK_STREAM, 6, "", (address, port)) for kind, address in zip(families, found, strict=True)]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    assert fleet_module._addresses("http://workers:8080/metrics") == asked
    assert fleet_module._addresses("https://workers:8080/metrics") == ["https://workers:8080/metrics"]


def test_without_addresses_nothing_is_known() -> None:
    fleet = Fleet(())
    fleet.start()
    assert fleet.summary() is None


def test_other_schemes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="WORKER_CONSOLE__METRICS_URLS"):
        Fleet(("file:///etc/passwd",))
