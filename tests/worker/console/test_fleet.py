"""Lag and batch sizes from workers' /metrics pages, summed, with workers that do not answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

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


def test_without_addresses_nothing_is_known() -> None:
    fleet = Fleet(())
    fleet.start()
    assert fleet.summary() is None


def test_other_schemes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="WORKER_CONSOLE__METRICS_URLS"):
        Fleet(("file:///etc/passwd",))
