"""The page about the peers: its tables are those of the committed result, and a peer that is ahead is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.peers import page


def course(**peer: float) -> dict[str, Any]:
    own = {"events_per_s": 100.0, "cpu_s_per_1000": 3.0, "memory_mib": 200.0, "others_share": 0.02}
    calm = {"p50_ms": 20.0, "p99_ms": 50.0, "cpu_s_per_1000": 4.0, "rate_per_s": 30.0, "others_share": 0.02}
    made = {"commit": "abc", "at": "2026-01-02T03:04:05+00:00", "load_average": 1.2}
    return {
        "model": "one",
        "throughput": {"made": made, "contestants": {page.OURS: own, "peer": own | peer}},
        "latency": {"made": made, "contestants": {page.OURS: calm, "peer": calm | peer}},
        "released": {"made": made, "contestants": {"one": {"images_per_s": 50.0, "cpu_s_per_1000": 9.0}}},
    }


def result(found: dict[str, Any]) -> dict[str, Any]:
    figures = {"picture": "small", "packages": {"faststream": "1"}, "openvino": found}
    return {"machine": {"cpu": "a cpu", "cores": 2}, "figures": figures}


@pytest.mark.skipif(not page.RESULT.exists(), reason="no result of python -m benchmarks.peers yet")
def test_the_page_shows_the_committed_result() -> None:
    text = page.PAGE.read_text()
    assert page.rewritten(text, json.loads(page.RESULT.read_text())) == text, "run: python -m benchmarks.peers.page"


def test_a_peer_that_is_ahead_is_named_and_one_behind_is_not() -> None:
    text = page.tables(result(course(events_per_s=125.0, p50_ms=40.0)))
    assert "events/s 0.80 times peer's (**the peer is ahead**)" in text
    assert "p50, ms 0.50 times peer's;" in text
    assert "| peer | 125 |" in text and "one 9.00" in text


def test_a_busy_machine_shows_what_a_clock_cannot_spoil() -> None:
    found = course(cpu_s_per_1000=1.5)
    found["throughput"]["contestants"]["peer"]["others_share"] = 0.5
    del found["latency"]
    text = page.tables(result(found))
    assert "| | CPU s per 1,000 | memory, MiB |" in text and "was busy" in text
    assert "CPU s per 1,000 2.00 times peer's (**the peer is ahead**)" in text


def test_what_a_kill_cost_is_shown() -> None:
    found = result(course())
    made = found["figures"]["openvino"]["latency"]["made"]
    row = {"events": 9, "lost": 0, "repeated": 2}
    found["figures"]["simulated"] = {"kills": {"made": made, "contestants": {page.OURS: row}}}
    assert f"| {page.OURS} | 9 | 0 | 2 |" in page.tables(found)


def test_a_page_without_its_markers_is_not_written() -> None:
    with pytest.raises(SystemExit, match="markers"):
        page.rewritten("nothing", result(course()))
