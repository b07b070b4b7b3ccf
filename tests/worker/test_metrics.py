"""The contract's metrics are all there, under their names, types and labels."""

from __future__ import annotations

import pytest

from worker.errors import Code
from worker.metrics import Metrics

# Contract, section 7.
CONTRACT = {
    "events_received_total": ("counter", set()),
    "verdicts_total": ("counter", {"label", "action", "source"}),
    "cache_requests_total": ("counter", {"result"}),
    "dead_letters_total": ("counter", {"code"}),
    "retries_total": ("counter", {"code"}),
    "batches_total": ("counter", {"reason"}),
    "rebalances_total": ("counter", {"type"}),
    "commits_total": ("counter", {"status"}),
    "event_age_seconds": ("histogram", set()),
    "fetch_seconds": ("histogram", set()),
    "decode_seconds": ("histogram", set()),
    "queue_wait_seconds": ("histogram", set()),
    "batch_size": ("histogram", set()),
    "inference_seconds": ("histogram", set()),
    "in_flight_events": ("gauge", set()),
    "in_flight_bytes": ("gauge", set()),
    "paused_partitions": ("gauge", set()),
    "consumer_lag": ("gauge", {"topic", "partition"}),
    "engine_info": ("gauge", {"model", "backend", "device"}),
}


@pytest.mark.parametrize("name", CONTRACT)
def test_each_metric_of_the_contract(name: str) -> None:
    metrics = Metrics()
    metrics.verdicts.labels(label="authentic", action="allow", source="engine").inc()
    metrics.consumer_lag.labels(topic="t", partition="0").set(5)
    metrics.set_engine("m", "torch", "cpu")
    kind, labels = CONTRACT[name]
    page = metrics.page().decode().splitlines()
    full = f"code_worker_{name}"
    assert f"# TYPE {full} {kind}" in page
    sample = full + ("_count" if kind == "histogram" else "")
    lines = [line for line in page if line.partition(" ")[0].partition("{")[0] == sample]
    assert lines
    for line in lines:
        assert {
            part.partition("=")[0] for part in line[len(sample) :].partition("}")[0].strip("{").split(",") if "=" in part
        } == labels


def test_series_begin_at_zero() -> None:
    value = Metrics().registry.get_sample_value
    for code in Code:
        assert value("code_worker_dead_letters_total", {"code": code.value}) == 0
    for result in ("hit", "miss", "error", "bypass"):
        assert value("code_worker_cache_requests_total", {"result": result}) == 0
    for reason in ("full", "timeout", "drain"):
        assert value("code_worker_batches_total", {"reason": reason}) == 0
    assert value("code_worker_events_received_total") == 0


def test_one_engine_and_one_policy_at_a_time() -> None:
    metrics = Metrics()
    metrics.set_engine("a", "torch", "cpu")
    metrics.set_engine("b", "tensorrt", "cuda:0")
    metrics.set_policy("p", "1")
    metrics.set_policy("p", "2")
    page = metrics.page().decode()
    assert [line for line in page.splitlines() if line.startswith("code_worker_engine_info{")] == [
        'code_worker_engine_info{backend="tensorrt",device="cuda:0",model="b"} 1.0'
    ]
    assert [line for line in page.splitlines() if line.startswith("code_worker_policy_info{")] == [
        'code_worker_policy_info{name="p",version="2"} 1.0'
    ]


def test_a_partition_that_left_leaves_no_lag() -> None:
    metrics = Metrics()
    metrics.forget_partition("t", 0)
    metrics.consumer_lag.labels("t", "0").set(9)
    metrics.consumer_lag.labels("t", "1").set(9)
    metrics.forget_partition("t", 0)
    assert metrics.registry.get_sample_value("code_worker_consumer_lag", {"topic": "t", "partition": "0"}) is None
    assert metrics.registry.get_sample_value("code_worker_consumer_lag", {"topic": "t", "partition": "1"}) == 9


def test_two_workers_in_a_process_do_not_meet() -> None:
    first, second = Metrics(), Metrics()
    first.events_received.inc()
    assert second.registry.get_sample_value("code_worker_events_received_total") == 0
    assert b"_created" not in first.page()
