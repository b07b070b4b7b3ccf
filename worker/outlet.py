"""From outcomes to records: policy, verdict, dead letter, retry; and the books, which the broker's receipt closes.

Every record that was accepted ends here, once: published and acknowledged, or dropped, where its partition was taken away.
"""

from __future__ import annotations

from collections.abc import Callable

from worker import contracts
from worker.budget import Budget
from worker.clock import Clock
from worker.items import Event, ModelRef, Record, Scored, Timings
from worker.ledger import Ledger
from worker.metrics import Metrics
from worker.outcomes import Failed, Postponed, Receipts
from worker.stages.circuit import DeadLetterCircuit
from worker.stages.policy import PolicyKeeper
from worker.stages.publish_records import RecordWriter
from worker.tracing import Attributes, Tracer


class Outlet:
    """Called by the publish thread; receipts come on the publisher's."""

    def __init__(
        self,
        ledger: Ledger,
        budget: Budget,
        policy: PolicyKeeper,
        publisher: RecordWriter,
        circuit: DeadLetterCircuit,
        metrics: Metrics,
        clock: Clock,
        tracer: Tracer,
        on_room: Callable[[], None],
    ) -> None:
        """`on_room` is told, from any thread, when an event has left and another may be read."""
        self._ledger = ledger
        self._budget = budget
        self._policy = policy
        self._publisher = publisher
        self._circuit = circuit
        self._metrics = metrics
        self._clock = clock
        self._tracer = tracer
        self._on_room = on_room

    def scored(self, scored: Scored) -> None:
        """The verdict of an image with scores."""
        item = scored.item
        if self.drop_if_stale(item.record):
            return
        self._circuit.succeeded()
        verdict = contracts.publish_scored(
            event=item.event,
            source=item.delivery.origin or item.record.position,
            model=scored.model,
            decision=self._policy.decide(scored.scores, item.event.tenant, scored.model),
            processed_at=self._clock.time(),
            scores=scored.scores,
            image=scored.info,
            cache_hit=scored.cache_hit,
            timings=item.timings,
            finished=self._clock.monotonic(),
        )
        source = "cache" if scored.cache_hit else "engine"
        self._send_verdict(verdict, item.record, item.event, source, self._receipts(item.record, 1), item.timings)

    def failed(self, failed: Failed, model: ModelRef) -> None:
        """The dead letter, and the verdict where the event has an id: finished when the broker has both."""
        record, event = failed.record, failed.event
        if self.drop_if_stale(record):
            return
        receipts = self._receipts(record, 1 if event is None else 2)
        code = failed.error.code
        self._circuit.failed(code)

        def buried() -> None:
            self._metrics.dead_letters.labels(code.value).inc()
            receipts()

        self._publisher.dead_letter(record, code, failed.error.message, failed.delivery, buried, receipts)
        if event is None:
            return
        verdict = contracts.build_verdict(
            event=event,
            source=failed.delivery.origin or record.position,
            model=model,
            decision=self._policy.undetermined(event.tenant),
            processed_at=self._clock.time(),
            sha256=failed.sha256,
            reason=code,
            timings=failed.timings,
            finished=self._clock.monotonic(),
        )
        published = contracts.publish(verdict, event.traceparent)
        self._send_verdict(published, record, event, "failure", receipts, failed.timings)

    def postponed(self, postponed: Postponed) -> None:
        """The retry record, to be tried again after its delay."""
        record = postponed.item.record
        if self.drop_if_stale(record):
            return
        receipts = self._receipts(record, 1)
        item, code = postponed.item, postponed.error.code
        sent = self._clock.monotonic()

        def acknowledged() -> None:
            self._trace(record, item.event, item.timings, sent, {"code.outcome": "retry"}, code.value)
            receipts()

        self._publisher.retry(record, item.delivery, postponed.delay_s, code, acknowledged, receipts)

    def _send_verdict(
        self, verdict: contracts.Published, record: Record, event: Event, source: str, receipts: Receipts, timings: Timings | None
    ) -> None:
        sent = self._clock.monotonic()
        outcome: Attributes = {
            "code.outcome": source,
            "code.label": verdict.label,
            "code.action": verdict.action,
            "code.model.version": verdict.model_version,
        }
        uploaded_at = event.uploaded_at if event.uploaded_at is not None else record.timestamp_ms / 1000

        def acknowledged() -> None:
            self._metrics.verdicts.labels(verdict.label, verdict.action, source).inc()
            self._metrics.event_age.observe(max(0.0, self._clock.time() - uploaded_at))
            self._trace(record, event, timings, sent, outcome, verdict.reason)
            receipts()

        self._publisher.verdict(verdict.body, event.event_id, verdict.headers, acknowledged, receipts)

    def _trace(
        self, record: Record, event: Event, timings: Timings | None, sent: float, outcome: Attributes, error: str | None
    ) -> None:
        if timings is not None and timings.spans is not None:
            timings.span("publish", sent, self._clock.monotonic())
            self._tracer.finish(record, event, timings, outcome, error)

    # -- the end of an event -------------------------------------------------------------------------------------

    def _receipts(self, record: Record, outputs: int) -> Receipts:
        return Receipts(outputs, lambda: self._settle(record), record.position, lambda: self._drop(record))

    def drop_if_stale(self, record: Record) -> bool:
        """Whether the record's partition was taken away: then it is out of the books now. From any thread."""
        if self._ledger.current(record.position):
            return False
        self._drop(record)
        return True

    def _drop(self, record: Record) -> None:
        self._metrics.events_stale.inc()
        self._settle(record, counted=False)

    def _settle(self, record: Record, *, counted: bool = True) -> None:
        """Take a record out of the books; called once for each, from the thread that saw its end."""
        if counted:
            self._ledger.finish(record.position)
        self._budget.refund(record.size_bytes)
        self._on_room()
