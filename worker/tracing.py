"""OpenTelemetry traces: one span for an event and one for each stage under it. Extra `otel`; off unless TRACING__ENDPOINT is set.

The stages note when they began and ended (`Timings.spans`, only where the event is sampled); spans are made of it when the event
has left, on the thread that saw the broker's receipt. Export is the SDK's own: batches, in the background, dropped when the
collector does not keep up. What the uploader's `traceparent` says about sampling is followed; other events are sampled by
TRACING__SAMPLE_RATIO. Names are those of the semantic conventions for messaging, https://opentelemetry.io/docs/specs/semconv/messaging/.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Protocol

from worker.clock import Clock, Deadline
from worker.errors import ConfigurationError
from worker.items import Event, Record, StageSpan, Timings
from worker.settings import TracingSettings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

Attributes = dict[str, str | int | float | bool]

_SAMPLED_FLAG = 0x01


class Tracer(Protocol):
    """What the pipeline needs of tracing."""

    def sample(self, event: Event) -> list[StageSpan] | None:
        """An empty list for an event that is traced, which its stages fill; None for one that is not."""

    def finish(self, record: Record, event: Event, timings: Timings, attributes: Attributes, error: str | None = None) -> None:
        """The event has left: make and export its spans. Never blocks, never raises. `error`: the code of a failure."""

    def close(self, deadline: Deadline) -> None:
        """Send what waits, until the deadline."""


class NoTraces:
    """Tracing that is off."""

    def sample(self, event: Event) -> list[StageSpan] | None:
        """None."""
        return None

    def finish(self, record: Record, event: Event, timings: Timings, attributes: Attributes, error: str | None = None) -> None:
        """Nothing."""

    def close(self, deadline: Deadline) -> None:
        """Nothing."""


class OpenTelemetry:
    """Spans by OpenTelemetry's SDK."""

    def __init__(self, sample_ratio: float, exporter: SpanExporter, clock: Clock) -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create()  # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
        if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "code-worker"}))
        self._processor = BatchSpanProcessor(exporter)
        self._provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("worker")
        self._propagator = TraceContextTextMapPropagator()
        self._ratio = sample_ratio
        self._clock = clock

    def sample(self, event: Event) -> list[StageSpan] | None:
        """The uploader's decision where there is one."""
        if event.traceparent is not None:
            return [] if int(event.traceparent[53:55], 16) & _SAMPLED_FLAG else None
        return [] if random.random() < self._ratio else None

    def finish(self, record: Record, event: Event, timings: Timings, attributes: Attributes, error: str | None = None) -> None:
        """See `Tracer.finish`. Times of the monotonic clock are laid onto the wall clock of now."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        if timings.spans is None:
            return
        now_s = self._clock.monotonic()
        offset_ns = time.time_ns() - int(now_s * 1e9)
        parent = self._propagator.extract({"traceparent": event.traceparent}) if event.traceparent is not None else None
        topic, partition, offset, _ = record.position
        root = self._tracer.start_span(
            f"process {topic}",
            context=parent,
            kind=SpanKind.CONSUMER,
            start_time=offset_ns + int(timings.started * 1e9),
            attributes={
                "messaging.system": "kafka",
                "messaging.operation.type": "process",
                "messaging.destination.name": topic,
                "messaging.destination.partition.id": str(partition),
                "messaging.kafka.offset": offset,
                "code.event_id": event.event_id,
                **attributes,
            },
        )
        if error is not None:
            root.set_status(Status(StatusCode.ERROR, error))
            root.set_attribute("error.type", error)
        context = set_span_in_context(root)
        for name, started_s, ended_s in timings.spans:
            span = self._tracer.start_span(name, context=context, start_time=offset_ns + int(started_s * 1e9))
            span.end(offset_ns + int(ended_s * 1e9))
        root.end(offset_ns + int(now_s * 1e9))

    def close(self, deadline: Deadline) -> None:
        """The SDK's flush and shutdown, bounded: a collector that is away must not hold up the way out."""
        self._processor.force_flush(int(deadline.remaining() * 1000))
        self._provider.shutdown()


def open_tracer(settings: TracingSettings, clock: Clock) -> Tracer:
    """The tracer that the settings ask for.

    Raises:
        ConfigurationError: an endpoint is set and the extra `otel` is not installed.
    """
    if settings.endpoint is None:
        return NoTraces()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigurationError(
            f"WORKER_TRACING__ENDPOINT needs OpenTelemetry, which is not installed ({error}): pip install '.[otel]'"
        ) from error
    # A short limit: the SDK repeats a batch within it, and the way out waits for the one under way.
    return OpenTelemetry(settings.sample_ratio, OTLPSpanExporter(endpoint=settings.endpoint, timeout=3), clock)
