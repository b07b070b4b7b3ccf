"""The page about the peers: its tables are those of the committed result, and a peer that is ahead is named."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from PIL import Image

from benchmarks.peers import page
from benchmarks.peers.pictures import mixed

OURS = "this worker"


def course(**peer: float) -> dict[str, Any]:
    own = {"events_per_s": 100.0, "cpu_s_per_1000": 3.0, "memory_mib": 200.0, "others_share": 0.02}
    calm = {"p50_ms": 20.0, "p99_ms": 50.0, "cpu_s_per_1000": 4.0, "rate_per_s": 30.0, "others_share": 0.02}
    made = {"commit": "abc", "at": "2026-01-02T03:04:05+00:00", "load_average": 1.2}
    return {
        "model": "one",
        "picture": "small",
        "throughput": {"made": made, "contestants": {OURS: own, "peer": own | peer}},
        "latency": {"made": made, "contestants": {OURS: calm, "peer": calm | peer}},
        "released": {"made": made, "contestants": {"one": {"images_per_s": 50.0, "cpu_s_per_1000": 9.0, "memory_mib": 300.0}}},
    }


def result(found: dict[str, Any]) -> dict[str, Any]:
    figures = {"packages": {"faststream": "1"}, "openvino": found}
    return {"machine": {"cpu": "a cpu", "cores": 2}, "figures": figures}


@pytest.mark.skipif(not page.RESULT.exists(), reason="no result of python -m benchmarks.peers yet")
def test_the_page_shows_the_committed_result() -> None:
    text = page.PAGE.read_text()
    assert page.rewritten(text, json.loads(page.RESULT.read_text())) == text, "run: python -m benchmarks.peers.page"


def test_a_peer_that_is_ahead_is_named_and_one_behind_is_not() -> None:
    text = page.tables(result(course(events_per_s=125.0, p50_ms=40.0)))
    assert "events/s 0.80 times peer's (**the peer is ahead**)" in text
    assert "p50, ms 0.50 times peer's;" in text
    assert "| peer | 125 |" in text and "one image at a time 50 images/s, 9.00 CPU s per 1,000, 300 MiB." in text


def test_a_busy_machine_shows_what_a_clock_cannot_spoil() -> None:
    found = course(cpu_s_per_1000=1.5)
    found["throughput"]["contestants"]["peer"]["others_share"] = 0.5
    del found["latency"]
    text = page.tables(result(found))
    assert "| | CPU s per 1,000 | memory, MiB |" in text and "was busy" in text
    assert "CPU s per 1,000 2.00 times peer's (**the peer is ahead**)" in text
    assert "one image at a time 9.00 CPU s" in text and "images/s" not in text


def test_what_a_kill_cost_is_shown() -> None:
    found = result(course())
    made = found["figures"]["openvino"]["latency"]["made"]
    row = {"events": 9, "lost": 0, "repeated": 2}
    found["figures"]["simulated"] = {"kills": {"made": made, "contestants": {OURS: row}}}
    assert f"| {OURS} | 9 | 0 | 2 |" in page.tables(found)


def test_a_page_without_its_markers_is_not_written() -> None:
    with pytest.raises(SystemExit, match="markers"):
        page.rewritten("nothing", result(course()))


def test_of_our_two_shapes_the_better_one_is_compared_and_named() -> None:
    found = course()
    for part in (found["throughput"], found["latency"]):
        part["contestants"]["this worker, two processes"] = part["contestants"][OURS] | {"events_per_s": 190.0}
    text = page.tables(result(found))
    assert "events/s 1.90 times peer's (two processes);" in text


def test_the_load_near_the_best_peers_limit_is_shown() -> None:
    found = course()
    rows = found["latency"]["contestants"]
    found["busy"] = found["latency"] | {"contestants": rows | {"peer": rows["peer"] | {"p99_ms": 200.0}}}
    text = page.tables(result(found))
    assert "At 30 uploads/s" in text and "p99, ms 0.25 times peer's" in text


def test_a_mixture_holds_each_size_and_no_picture_twice() -> None:
    found = mixed(6)
    assert len(set(found)) == 6
    sizes = [Image.open(io.BytesIO(data)).size for data in found]
    assert sizes == [(512, 512), (1920, 1080), (4000, 3000)] * 2
