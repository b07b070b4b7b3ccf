"""The one file that knows the order of the stages.

    accept -> fetch -> cache? -> decode -> batch -> infer -> decide -> publish -> (receipt) -> ledger
                          \\________ hit: scores _____________/

`Pipeline` owns the queues between the stages and one method a loop; `worker.app` runs each loop in a thread of its
own. Every accepted record ends in exactly one of: a verdict, a dead letter (with a verdict where an id could be read),
a retry record, or, when its partition was taken away, nothing. Only then is its place in the budget given back.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import structlog
from numpy.typing import NDArray

from engine.backends.base import BackendError
from engine.batcher import Batcher, BatcherClosed, BatchTiming, Submission
from worker import contracts
from worker.budget import Budget
from worker.clock import Clock
from worker.delays import DelayQueue
from worker.envelopes import open_retry
from worker.errors import Code, DependencyError, ItemError, StaleItemError
from worker.fetching import Fetching
from worker.items import Decoded, Delivery, Fetched, Item, Record, Scored, Scores, Timings
from worker.lanes import Closed, Lanes
from worker.ledger import Ledger, Partition
from worker.metrics import Metrics
from worker.outcomes import Delayed, Engine, Failed, Flight, Inferred, Outcome, Postponed, Waiting
from worker.outlet import Outlet
from worker.rounds import rounds
from worker.settings import Settings
from worker.stages.cache import CachedScore, ScoreCache
from worker.stages.cache_writes import CacheWrites
from worker.stages.circuit import DeadLetterCircuit
from worker.stages.consume import UnreadableRecord
from worker.stages.decode import Decoder
from worker.stages.decode_memory import IMAGE_BYTES
from worker.stages.fetch import Fetcher
from worker.stages.policy import PolicyKeeper
from worker.stages.publish_records import RecordWriter
from worker.stages.single_flight import SingleFlight
from worker.tracing import NoTraces, Tracer

log = structlog.get_logger(__name__)

CACHE_ROUND = 64
"""Digests asked for in one round trip at most."""
PUBLISH_ROUND = 64
"""Verdicts made between two looks at the queue."""
INLINE_ROUND = 32
"""Images that came inside their events and are handed on together."""
INLINE_BYTES = 1 << 20
"""Larger ones are left to the fetch threads: the thread that polls must not spend its time on their digests."""


@dataclass(frozen=True, slots=True)
class Stages:
    """The parts a pipeline joins; each knows nothing of the others."""

    ledger: Ledger
    budget: Budget
    delays: DelayQueue[Delayed]
    fetcher: Fetcher
    cache: ScoreCache
    decoder: Decoder
    batcher: Batcher[Waiting]
    policy: PolicyKeeper
    publisher: RecordWriter
    circuit: DeadLetterCircuit


class Pipeline:
    """Joins the stages; see the module's first lines."""

    def __init__(
        self,
        settings: Settings,
        stages: Stages,
        engine: Engine,
        metrics: Metrics,
        clock: Clock,
        on_room: Callable[[], None] = lambda: None,
        tracer: Tracer | None = None,
    ) -> None:
        """`on_room` is told, from any thread, when an event has left and another may be read."""
        self._tracer = tracer or NoTraces()
        self._settings = settings
        self._metrics = metrics
        self._stages = stages
        self._engine = engine
        self._clock = clock
        levels = settings.batch.priority_levels
        self._to_fetch: Lanes[Item] = Lanes(levels)
        self._to_cache: queue.SimpleQueue[list[Fetched] | Fetched | CachedScore | None] = queue.SimpleQueue()
        self._to_decode: Lanes[tuple[Fetched, Flight]] = Lanes(levels)
        self._to_publish: queue.SimpleQueue[list[Scored] | list[Inferred] | Outcome | None] = queue.SimpleQueue()
        self._batch: list[Inferred] = []  # of the batch being told, in the engine thread
        self._outlet = Outlet(
            stages.ledger, stages.budget, stages.policy, stages.publisher, stages.circuit, metrics, clock, self._tracer, on_room
        )
        self._flights: SingleFlight[Flight, Item] = SingleFlight()
        self._fetching = Fetching(settings.fetch, stages.budget, stages.fetcher, metrics, clock, self._to_publish.put)
        self._limits = contracts.EventLimits(
            max_image_bytes=settings.fetch.max_bytes, max_event_bytes=settings.kafka.max_record_bytes
        )

    # -- main thread ---------------------------------------------------------------------------------------------

    @property
    def active(self) -> int:
        """Events on their way; those that only wait for the time of their retry are not among them."""
        return self._stages.budget.events

    @property
    def engine(self) -> Engine:
        """The engine in service."""
        return self._engine

    def room(self) -> int:
        """How many records may be read now."""
        return min(self._stages.budget.room(), self._stages.circuit.room())

    def accept(self, records: list[Record]) -> None:
        """Take records that were read: charged to the budget and on their way, retries once their time has come.

        What waits for its time is bounded by the delay queue alone: a host that is down must not close the intake. Images
        that came inside their events need no fetch thread and go to the cache together: waking a thread for each costs more
        than its digest.
        """
        inline: list[Fetched] = []
        if records:
            self._metrics.events_received.inc(len(records))
        for record in records:
            delivery = Delivery()
            if record.position.topic == self._settings.kafka.retry_topic:
                record, delivery = open_retry(record)
            if delivery.not_before is not None and delivery.not_before > self._clock.time():
                partition = (record.position.topic, record.position.partition)
                self._stages.ledger.abandon(record.position)  # a revoke need not wait for what only waits itself
                self._stages.delays.push(Delayed(record, delivery), delivery.not_before, partition, record.size_bytes)
            else:
                self._admit(record, delivery, inline)
            if len(inline) == INLINE_ROUND:
                self._to_cache.put(inline)
                inline = []
        if inline:
            self._to_cache.put(inline)

    def release_due(self) -> None:
        """Let retries go whose time has come, as far as there is room."""
        inline: list[Fetched] = []
        for delayed in self._stages.delays.pop_due(self.room()):
            self._stages.ledger.resume(delayed.record.position)
            self._admit(delayed.record, delayed.delivery, inline)
        if inline:
            self._to_cache.put(inline)

    def forget(self, partitions: frozenset[Partition]) -> None:
        """Drop retries that wait, of partitions that are being taken away: their next owner reads them. From any thread."""
        self._stages.delays.drop(partitions)

    @property
    def retries_full(self) -> bool:
        """Whether no more of the retry topic should be read until some of it is due."""
        return self._stages.delays.full

    def observe(self) -> None:
        """Set the gauges of what is in flight."""
        self._metrics.in_flight_events.set(self._stages.budget.events)
        self._metrics.in_flight_bytes.set(self._stages.budget.bytes)
        self._metrics.dead_letter_circuit_open.set(not self._stages.circuit.closed)

    def swap(self, engine: Engine) -> None:
        """Put another engine in service: it takes over between two batches."""
        self._engine = engine

    def close(self, *, drain: bool) -> None:
        """End every loop; with `drain` once its queue is empty, else what is left stays for the partition's next owner."""
        self._stages.budget.close()
        self._to_fetch.close()
        self._to_cache.put(None)
        self._to_decode.close()
        self._stages.batcher.close(drain=drain)
        self._to_publish.put(None)

    def _admit(self, record: Record, delivery: Delivery, inline: list[Fetched]) -> None:
        """On its way; an image that is here already, and for which there is room at once, is appended to `inline`."""
        self._stages.budget.charge(record.size_bytes)
        self._stages.circuit.admitted()
        timings = Timings(started=self._clock.monotonic())
        if isinstance(record, UnreadableRecord):
            malformed = ItemError(Code.EVENT_MALFORMED, record.reason)
            self._to_publish.put(Failed(record, delivery, malformed, None, timings))
            return
        try:
            event = contracts.parse(record, self._limits, delivery.origin)
        except contracts.EventError as error:
            self._to_publish.put(Failed(record, delivery, error, error.event, timings))
            return
        timings.spans = self._tracer.sample(event)
        item = Item(record, event, delivery, timings)
        size = None if event.inline is None else len(event.inline)
        if size is None or size > INLINE_BYTES or not self._stages.budget.try_reserve(size):
            self._to_fetch.put(item, event.priority)
        elif (fetched := self._fetching.fetch_within(item, size)) is not None:
            inline.append(fetched)

    # -- fetch threads -------------------------------------------------------------------------------------------

    def fetch_loop(self) -> None:
        """Fetch one image at a time; run in FETCH__CONCURRENCY threads."""
        while True:
            try:
                item = self._to_fetch.get()
            except Closed:
                return
            if not self._outlet.drop_if_stale(item.record) and (fetched := self._fetching.fetch(item)) is not None:
                self._to_cache.put(fetched)

    # -- cache thread --------------------------------------------------------------------------------------------

    def cache_loop(self) -> None:
        """Ask and fill the cache, several digests a round trip; send identical images to the one already in flight."""
        writes = CacheWrites(self._stages.cache, self._clock)
        entries: list[Fetched | CachedScore]
        for entries in rounds(self._to_cache, CACHE_ROUND, writes.patience):
            if not entries:
                writes.write()
                continue
            writes.add(entry for entry in entries if isinstance(entry, CachedScore))
            engine = self._engine
            asking: list[Fetched] = []
            released_bytes = 0
            for entry in entries:
                if not isinstance(entry, Fetched):
                    continue
                if self._flights.join(Flight(engine.scope, entry.sha256), entry.item):
                    released_bytes += len(entry.data)
                else:
                    asking.append(entry)
            digests = [fetched.sha256 for fetched in asking]
            writes.before(engine.scope, digests)
            started = self._clock.monotonic()
            found = self._stages.cache.get_many(engine.scope, digests)
            ended = self._clock.monotonic()
            hits: list[Scored] = []
            for fetched in asking:
                fetched.item.timings.span("cache", started, ended)
                cached = found.get(fetched.sha256)
                if cached is not None:
                    hits.append(Scored(fetched.item, cached.info(), cached.scores, engine.model, cache_hit=True))
                    released_bytes += len(fetched.data)
                else:
                    self._take_off(fetched, Flight(engine.scope, fetched.sha256))
            if hits:
                self._to_publish.put(hits)
            if released_bytes:
                self._stages.budget.release(released_bytes)
        writes.write()

    def _take_off(self, fetched: Fetched, flight: Flight) -> None:
        if self._flights.lead(flight, fetched.item):
            self._to_decode.put((fetched, flight), fetched.item.event.priority)
        else:
            self._stages.budget.release(len(fetched.data))

    # -- decode threads ------------------------------------------------------------------------------------------

    def decode_loop(self, index: int) -> None:
        """Decode images in the decoder process `index`, several at a time where they are small and many wait.

        Run in DECODE__PROCESSES threads.
        """
        decoder = self._stages.decoder
        while True:
            try:
                taken = self._to_decode.get_several(decoder.takes(index), decoder.threads, _image_bytes, IMAGE_BYTES)
            except Closed:
                return
            started = self._clock.monotonic()
            try:
                outcomes = decoder.decode_several([fetched for fetched, _ in taken], index)
            except StaleItemError:  # closed in the middle of these images: they are left to the partition's next owner
                self._stages.budget.release(sum(map(_image_bytes, taken)))
                continue
            if left := taken[len(outcomes) :]:
                self._to_decode.put_back(left, left[0][0].item.event.priority)
            self._decoded(taken[: len(outcomes)], outcomes, started)

    def _decoded(self, done: list[tuple[Fetched, Flight]], outcomes: list[Decoded | ItemError], started: float) -> None:
        """Hand images on that were decoded in one turn; each took its share of the turn's time."""
        ended = self._clock.monotonic()
        seconds = (ended - started) / len(done)
        self._stages.budget.release(sum(map(_image_bytes, done)))
        items = []
        for outcome, (fetched, flight) in zip(outcomes, done, strict=True):
            item = fetched.item
            item.timings.span("decode", started, ended)
            item.timings.decode = seconds * 1000
            self._metrics.decode.observe(seconds)
            if isinstance(outcome, ItemError):
                self._land_failed(item, flight, outcome)
            else:
                waiting = Waiting(item, outcome.info, outcome.crops_per_frame, flight)
                items.append(Submission(outcome.crops, item.event.priority, waiting))
        with contextlib.suppress(BatcherClosed):  # the worker is ending, or the engine thread has failed and says why
            self._stages.batcher.submit_several(items)

    # -- engine thread -------------------------------------------------------------------------------------------

    def engine_loop(self) -> None:
        """Run batches until the batcher is closed and empty; this thread and the batcher's own alone touch the device.

        Raises:
            DependencyError: the device failed; no image is blamed for it, nothing in flight is committed.
        """
        try:
            self._stages.batcher.run(lambda: self._engine, self._inferred, self._engine_failed, self._batch_told)
        except BackendError as error:
            raise DependencyError(f"the device failed: {error}") from error

    def _inferred(self, waiting: Waiting, probabilities: NDArray[np.float32], timing: BatchTiming[Engine]) -> None:
        ended = self._clock.monotonic()
        left = ended - timing.infer_s
        waiting.item.timings.span("queue", left - timing.queue_s, left)
        waiting.item.timings.span("infer", left, ended)
        waiting.item.timings.queue = timing.queue_s * 1000
        waiting.item.timings.infer = timing.infer_s * 1000
        self._batch.append(Inferred(waiting, probabilities, timing.engine))

    def _batch_told(self) -> None:
        if self._batch:
            self._to_publish.put(self._batch)
            self._batch = []

    def _engine_failed(self, waiting: Waiting, error: Exception) -> None:
        log.warning("engine.item_failed", event_id=waiting.item.event.event_id, error=str(error))
        failure = ItemError(Code.ENGINE_FAILED, "the engine could not score this image")
        self._land_failed(waiting.item, waiting.flight, failure)

    # -- publish thread ------------------------------------------------------------------------------------------

    def publish_loop(self) -> None:
        """Turn outcomes into records: policy, verdict, dead letter, retry; the broker's receipt ends the event."""
        outcomes: list[Outcome]
        for outcomes in rounds(self._to_publish, PUBLISH_ROUND):
            for outcome in outcomes:
                match outcome:
                    case Inferred():
                        self._land(outcome)
                    case Scored():
                        self._outlet.scored(outcome)
                    case Failed():
                        self._outlet.failed(outcome, self._engine.model)
                    case Postponed():
                        self._outlet.postponed(outcome)

    def _land(self, inferred: Inferred) -> None:
        """The scores of one image go to its event, to the cache, and to every identical image that waited."""
        waiting, engine = inferred.waiting, inferred.engine
        image = engine.detector.combine(inferred.probabilities, waiting.crops_per_frame)
        scores = Scores(heads=image.heads, crops=image.crops)
        self._outlet.scored(Scored(waiting.item, waiting.info, scores, engine.model, cache_hit=False))
        self._to_cache.put(CachedScore.of(engine.scope, waiting.info, scores))
        for item in self._flights.done(waiting.flight):
            self._metrics.shared_inferences.inc()
            self._outlet.scored(Scored(item, waiting.info, scores, engine.model, cache_hit=True))

    def _land_failed(self, leader: Item, flight: Flight, error: ItemError) -> None:
        """The same bytes fail the same way: identical images that waited share the leader's error."""
        for item in (leader, *self._flights.done(flight)):
            self._to_publish.put(Failed.of(item, error, flight.sha256))


def _image_bytes(entry: tuple[Fetched, Flight]) -> int:
    return len(entry[0].data)
