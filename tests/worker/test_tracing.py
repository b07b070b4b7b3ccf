"""Traces: the spans of an event, its parent, what is sampled; a real worker and a collector over HTTP."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaProducer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.blackbox.worker_process import WorkerProcess
from tests.worker.test_pipeline import House
from worker.clock import Deadline, SystemClock
from worker.errors import ConfigurationError
from worker.items import Event
from worker.settings import KafkaSettings, TracingSettings
from worker.tracing import NoTraces, OpenTelemetry, open_tracer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Traced:
    """A pipeline whose spans are looked at."""

    def __init__(self, folder: Path, ratio: float = 0.0) -> None:
        self._exporter = InMemorySpanExporter()
        self._tracer = OpenTelemetry(ratio, self._exporter, SystemClock())
        self.house = House(folder, self._tracer)

    def send(self, event_id: str, traceparent: str | None = None) -> None:
        headers = () if traceparent is None else (("traceparent", traceparent.encode()),)
        self.house.send(event_id, headers=headers)

    def spans(self) -> list[ReadableSpan]:
        self.house.settle()
        self._tracer.close(Deadline(10))
        return list(self._exporter.get_finished_spans())


@pytest.fixture
def traced(tmp_path: Path) -> Iterator[Traced]:
    traced = Traced(tmp_path)
    yield traced
    traced.house.close()


def test_an_event_is_a_span_and_its_stages_are_its_children(traced: Traced) -> None:
    before = time.time_ns()
    traced.send("one", f"00-{TRACE}-{PARENT}-01")
    spans = traced.spans()
    (root,) = [span for span in spans if span.name.startswith("process ")]
    stages = [span for span in spans if span is not root]
    assert [span.name for span in sorted(stages, key=lambda span: span.end_time or 0)] == [
        "fetch", "cache", "decode", "queue", "infer", "publish",
    ]  # fmt: skip
    assert root.context is not None and root.parent is not None
    assert (f"{root.context.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE, PARENT)
    assert all(span.parent is not None and span.parent.span_id == root.context.span_id for span in stages)
    assert root.start_time is not None and root.end_time is not None
    assert before <= root.start_time + 1_000_000_000 and root.end_time <= time.time_ns() + 1_000_000_000
    for span in stages:
        assert span.start_time is not None and span.end_time is not None
        assert root.start_time <= span.start_time <= span.end_time <= root.end_time
    told = dict(root.attributes or {})
    assert (told["code.event_id"], told["code.outcome"], told["messaging.kafka.offset"]) == ("one", "engine", 0)
    assert not any("a.example" in str(value) for value in told.values())


def test_the_uploaders_sampling_is_followed(traced: Traced) -> None:
    traced.send("unsampled", f"00-{TRACE}-{PARENT}-00")
    traced.send("without")
    assert traced.spans() == []


def test_other_events_are_sampled_by_the_ratio(tmp_path: Path) -> None:
    traced = Traced(tmp_path, ratio=1.0)
    traced.send("without")
    traced.send("unsampled", f"00-{TRACE}-{PARENT}-00")
    (root,) = [span for span in traced.spans() if span.name.startswith("process ")]
    assert root.parent is None
    traced.house.close()


def test_a_retry_and_a_failure_say_their_code(traced: Traced) -> None:
    from worker.errors import Code, ItemError, TransientItemError

    traced.house.fetcher.errors["slow"] = [TransientItemError(Code.FETCH_TIMEOUT, "slow")]
    traced.house.fetcher.errors["gone"] = [ItemError(Code.FETCH_NOT_FOUND, "gone")]
    traced.send("slow", f"00-{TRACE}-{PARENT}-01")
    traced.send("gone", f"00-{TRACE}-{PARENT}-01")
    roots = {(span.attributes or {})["code.event_id"]: span for span in traced.spans() if span.name.startswith("process ")}
    assert {name: (span.attributes or {})["error.type"] for name, span in roots.items()} == {
        "slow": "fetch.timeout",
        "gone": "fetch.not_found",
    }
    assert not any(span.status.is_ok for span in roots.values())
    assert (roots["slow"].attributes or {})["code.outcome"] == "retry"


def test_without_the_extra_one_line_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigurationError, match=r"TRACING__ENDPOINT needs OpenTelemetry.*\[otel\]"):
        open_tracer(TracingSettings(endpoint="http://127.0.0.1:1/v1/traces"), SystemClock())


def test_off_by_default() -> None:
    tracer = open_tracer(TracingSettings(), SystemClock())
    assert isinstance(tracer, NoTraces)
    assert tracer.sample(Event("e", url=None, inline=b"", traceparent=f"00-{TRACE}-{PARENT}-01")) is None


class Collector:
    """An OTLP collector over HTTP that keeps what it is sent."""

    def __init__(self) -> None:
        received: list[ExportTraceServiceRequest] = []
        self.received = received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.mark.slow
def test_a_worker_sends_its_spans_and_ends_with_a_collector_gone(
    kafka_settings: Callable[..., KafkaSettings], tmp_path: Path
) -> None:
    kafka, collector = kafka_settings(), Collector()
    worker = WorkerProcess(
        tmp_path / "log",
        KAFKA__BOOTSTRAP_SERVERS=",".join(kafka.bootstrap_servers),
        KAFKA__GROUP_ID=kafka.group_id,
        KAFKA__UPLOAD_TOPICS=kafka.upload_topics[0],
        KAFKA__VERDICT_TOPIC=kafka.verdict_topic,
        KAFKA__RETRY_TOPIC=kafka.retry_topic,
        KAFKA__DEAD_LETTER_TOPIC=kafka.dead_letter_topic,
        CACHE__ENABLED="false",
        TRACING__ENDPOINT=collector.url,
    )
    with worker:
        producer = KafkaProducer(bootstrap_servers=list(kafka.bootstrap_servers))
        event = json.dumps({"event_id": "traced", "image": {"bytes": "AAAA"}}).encode()
        producer.send(kafka.upload_topics[0], event, headers=[("traceparent", f"00-{TRACE}-{PARENT}-01".encode())])
        producer.flush(30)
        deadline = time.monotonic() + 60
        while not collector.received:
            assert time.monotonic() < deadline, worker.log()
            time.sleep(0.1)
        collector.close()
        producer.send(kafka.upload_topics[0], event, headers=[("traceparent", f"00-{TRACE}-{PARENT}-01".encode())])
        producer.flush(30)
        producer.close()
        while worker.metrics()["code_worker_events_received_total"] < 2:
            assert time.monotonic() < deadline, worker.log()
            time.sleep(0.1)
        assert worker.stop() == 0
    (resource,) = collector.received[0].resource_spans
    names = {span.name for scope in resource.scope_spans for span in scope.spans}
    assert {"fetch", "decode", "publish", f"process {kafka.upload_topics[0]}"} <= names
    assert ("service.name", "code-worker") in {(a.key, a.value.string_value) for a in resource.resource.attributes}
