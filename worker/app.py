"""Creates, names and joins every thread and process of the worker, and runs the main loop.

The main thread alone touches the Kafka consumer. Every other thread runs under `Crew`, which keeps the first failure:
the main loop sees it, and the process ends without a commit of what the failure left unfinished.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Literal

import structlog

from engine.batcher import BatchConfig, Batcher, BatchReport
from worker import kafka_clients, process_memory, thread_names
from worker.budget import Budget
from worker.clock import Clock, Deadline, SystemClock
from worker.delays import DelayQueue
from worker.engine_start import EngineStart
from worker.engines import EngineLoader
from worker.errors import FatalError
from worker.health import Health, HealthServer
from worker.kafka_start import KafkaStart
from worker.ledger import Ledger, Partition
from worker.metrics import Metrics
from worker.outcomes import Delayed, Engine, Waiting
from worker.pipeline import Pipeline, Stages
from worker.settings import Settings
from worker.signals import ending_on_signals
from worker.stages.cache import ScoreCache
from worker.stages.circuit import DeadLetterCircuit
from worker.stages.consume import Consumer, ConsumerObserver
from worker.stages.decode_gpu import open_decoder
from worker.stages.fetch import Fetcher
from worker.stages.policy import PolicyKeeper
from worker.stages.publish import Publisher
from worker.stages.publish_records import RecordWriter
from worker.stages.transactions import TransactionalPublisher
from worker.tracing import open_tracer

log = structlog.get_logger(__name__)

POLL_TIMEOUT_S = 0.1
"""Longest wait of one poll: bounds how late the main loop sees a signal, a failure or a due retry."""
LOADING_POLL_S = 0.02
STARTING_WAIT_S = 0.1
GAUGE_INTERVAL_S = 1.0
MAX_DELAYED = 10_000
"""Retries that may wait in memory; beyond, the retry topic is not read."""
JOIN_TIMEOUT_S = 5.0
TRACES_FLUSH_S = 2.0
LEAVE_TIMEOUT_S = 3.0
"""Granted to the last commit and the farewell to the group even when the drain took all of its time."""


class _StartEndedError(Exception):
    """A signal came before the worker was ready; nothing was read."""


class Crew:
    """The worker's threads: named, and the first that fails is remembered."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._failed = threading.Event()
        self._failure: Exception | None = None

    def start(self, name: str, target: Callable[[], None]) -> None:
        """Run `target` in a daemon thread."""
        thread = threading.Thread(target=self._guard, args=(name, target), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def check(self) -> None:
        """Raise what ended a thread.

        Raises:
            FatalError: the thread's own, or one made of its unexpected exception.
        """
        if self._failed.is_set() and self._failure is not None:
            if isinstance(self._failure, FatalError):
                raise self._failure
            raise FatalError(f"internal error: {type(self._failure).__name__}: {self._failure}") from self._failure

    def join(self, deadline: Deadline) -> None:
        """Wait for every thread to end."""
        for thread in self._threads:
            thread.join(deadline.remaining())
            if thread.is_alive():
                log.warning("worker.thread_left", thread=thread.name)

    def _guard(self, name: str, target: Callable[[], None]) -> None:
        thread_names.set_current(name)
        try:
            target()
        except Exception as error:
            if not self._failed.is_set():
                self._failure = error
                self._failed.set()
            log.error("worker.thread_failed", thread=name, error=f"{type(error).__name__}: {error}", exc_info=True)


class _Group(ConsumerObserver):
    """Counts what happens to the group, and knows whether this process is a member; called on the client's thread."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.joined = False
        self.forget: Callable[[frozenset[Partition]], None] = lambda partitions: None

    def revoking(self, partitions: frozenset[Partition]) -> None:
        """What only waits for its time is dropped: its next owner reads it again."""
        self.forget(partitions)

    def rebalanced(self, kind: Literal["assigned", "revoked", "lost"], partitions: frozenset[Partition], repeated: int) -> None:
        """A partition that went leaves no lag behind; what was in flight will be read again by its next owner."""
        self._metrics.rebalances.labels(kind).inc()
        self._metrics.events_duplicate.inc(repeated)
        self.joined = kind != "lost"
        if kind == "lost":
            self.forget(partitions)
        if kind != "assigned":
            for topic, partition in partitions:
                self._metrics.forget_partition(topic, partition)

    def committed(self, ok: bool) -> None:
        """Count the commit."""
        self._metrics.commits.labels("ok" if ok else "failed").inc()


class App:
    """One worker process, from settings to exit code."""

    def __init__(self, settings: Settings, clock: Clock | None = None, loader: type[EngineLoader] = EngineLoader) -> None:
        """`loader` opens engines other than the settings' own (benchmarks)."""
        self._settings = settings
        self._clock = clock or SystemClock()
        self._metrics = Metrics()
        self._loader = loader(settings, self._metrics)
        self._crew = Crew()
        self._stopping = threading.Event()
        self._next_gauges = 0.0
        self._group = _Group(self._metrics)

    def run(self) -> int:
        """Work until SIGTERM or SIGINT, then drain.

        Returns:
            0 once drained, or at once while it is still starting.

        Raises:
            FatalError: configuration (2) or a dependency past its budget (3); nothing unfinished was committed.
        """
        process_memory.settle()
        with contextlib.ExitStack() as stack:
            stack.enter_context(ending_on_signals(self._stopping.is_set, self._stopping.set))
            health = Health(self._clock, stale_after_s=self._settings.kafka.max_poll_interval_ms / 1000)
            server = HealthServer(self._settings.http, health, self._metrics)
            server.start()
            stack.callback(server.close)
            try:
                self._build(stack, health)
            except _StartEndedError:
                log.info("worker.stopped", started=False)
                return 0
            log.info(
                "worker.ready", group=self._settings.kafka.group_id, port=server.port, model=self._pipeline.engine.model.version
            )
            process_memory.keep_what_stands()
            self._work(health)
            return self._drain(health)

    def _build(self, stack: contextlib.ExitStack, health: Health) -> None:
        """Make the stages in the order in which each needs the other, and start their threads."""
        settings, clock = self._settings, self._clock
        tracer = open_tracer(settings.tracing, clock)
        stack.callback(lambda: tracer.close(Deadline(TRACES_FLUSH_S, clock)))
        policy = PolicyKeeper(settings.policy, self._metrics)
        start = EngineStart(self._loader, policy, settings.engine.head)
        stack.callback(start.end)
        ledger = Ledger()
        clients = KafkaStart(functools.partial(self._open_clients, ledger))
        stack.callback(clients.close)
        budget = Budget(settings.kafka.max_in_flight, settings.kafka.max_in_flight_bytes, settings.fetch.max_bytes)
        self._publisher, self._consumer = self._clients(start, clients, health)
        self._consumer.keep_alive(0.0)  # asks to join: the broker makes the first member of a group wait
        cache = ScoreCache(settings.cache, self._metrics, clock)
        fetcher = Fetcher(settings.fetch, clock)
        decoder = open_decoder(settings.decode, settings.engine.crops, self._decoder_restarted)
        batcher: Batcher[Waiting] = Batcher(_batch_config(settings), clock.monotonic, observer=self._batch_ran)
        delays: DelayQueue[Delayed] = DelayQueue(
            MAX_DELAYED, settings.kafka.max_in_flight_bytes // 4, settings.fetch.retry_delay_max_s, clock
        )
        engine = self._joined(start, health)
        # The consumer resumes reading from so many on.
        self._circuit = DeadLetterCircuit(settings.circuit, self._consumer.resumes_at, clock)
        stages = Stages(ledger, budget, delays, fetcher, cache, decoder, batcher, policy, self._publisher, self._circuit)
        self._pipeline = Pipeline(settings, stages, engine, self._metrics, clock, on_room=self._room_made, tracer=tracer)
        self._group.forget = self._pipeline.forget
        for part in (cache, fetcher):
            stack.callback(part.close)
        decoder.start()
        stack.callback(lambda: decoder.close(Deadline(JOIN_TIMEOUT_S)))
        self._start_threads(decoder.threads, policy)

    def _clients(
        self, start: EngineStart, clients: KafkaStart[tuple[RecordWriter, Consumer]], health: Health
    ) -> tuple[RecordWriter, Consumer]:
        """Publisher and consumer, once the group may be joined: what refuses this worker comes before what waits for a broker."""
        while not start.may_join(STARTING_WAIT_S):
            self._starting(health)
        while (opened := clients.opened(STARTING_WAIT_S)) is None:
            self._starting(health)
        return opened

    def _starting(self, health: Health) -> None:
        """A turn of the start: whoever asks for an end gets it, though a broker or a library is still being waited for."""
        health.beat()
        if self._stopping.is_set():
            raise _StartEndedError

    def _joined(self, start: EngineStart, health: Health) -> Engine:
        """The engine, once it is loaded; until then the group is joined, and nothing is read."""
        while (engine := start.loaded()) is None:
            self._starting(health)
            self._consumer.keep_alive(LOADING_POLL_S)
            health.set("group", self._group.joined)
        health.set("engine", True)
        return engine

    def _open_clients(self, ledger: Ledger, stack: contextlib.ExitStack) -> tuple[RecordWriter, Consumer]:
        """What writes to Kafka and what reads from it, once its topics are there; in the thread of `KafkaStart`."""
        kafka, clock = self._settings.kafka, self._clock
        kafka_clients.ensure_topics(kafka, Deadline(kafka.startup_timeout_s, clock))
        publisher: RecordWriter
        if kafka.delivery == "exactly_once":
            publisher = TransactionalPublisher(kafka, ledger, clock=clock, observer=self._transaction_ended)
        else:
            publisher = Publisher(kafka, clock=clock)
        stack.callback(lambda: publisher.close(Deadline(0.0)))
        consumer = Consumer(kafka, ledger, self._group, clock=clock)
        # After a failure: nothing is committed on the way out, but the group need not wait for the session to end.
        stack.callback(lambda: consumer.close(Deadline(LEAVE_TIMEOUT_S, clock), commit=False))
        publisher.commit_as(consumer.group_metadata)
        return publisher, consumer

    def _start_threads(self, decoders: int, policy: PolicyKeeper) -> None:
        pipeline = self._pipeline
        for index in range(self._settings.fetch.concurrency):
            self._crew.start(f"fetch-{index}", pipeline.fetch_loop)
        self._crew.start("cache", pipeline.cache_loop)
        for index in range(decoders):
            self._crew.start(f"decode-{index}", functools.partial(pipeline.decode_loop, index))
        self._crew.start("engine", pipeline.engine_loop)
        self._crew.start("publish", pipeline.publish_loop)
        self._crew.start("watch", lambda: self._watch(policy))

    # -- main loop -----------------------------------------------------------------------------------------------

    def _work(self, health: Health) -> None:
        """One turn a poll, until a signal."""
        while not self._stopping.is_set():
            self._turn(health, reading=True)

    def _turn(self, health: Health, *, reading: bool) -> None:
        health.beat()
        self._crew.check()
        self._publisher.check()
        room = self._pipeline.room() if reading else 0
        self._consumer.hold(self._settings.kafka.retry_topic, self._pipeline.retries_full)
        self._pipeline.accept(self._consumer.poll(room, POLL_TIMEOUT_S))
        self._pipeline.release_due()
        self._consumer.commit_if_due()
        health.set("group", self._group.joined)
        health.set("intake", self._circuit.closed)
        self._observe()

    def _room_made(self) -> None:
        """An event has left. From any thread."""
        self._consumer.room_made(self._pipeline.room())

    def _drain(self, health: Health) -> int:
        """Finish what is in flight within SHUTDOWN__DRAIN_S, commit, leave the group; the rest is left to others."""
        deadline = Deadline(self._settings.shutdown.drain_s, self._clock)
        health.set("running", False)
        log.info("worker.draining", in_flight=self._pipeline.active)
        while self._pipeline.active > 0 and not deadline.expired():
            self._turn(health, reading=False)
        left = self._pipeline.active
        self._pipeline.close(drain=left == 0)
        self._publisher.close(deadline)
        self._consumer.close(Deadline(max(deadline.remaining(), LEAVE_TIMEOUT_S), self._clock))
        self._crew.join(Deadline(min(JOIN_TIMEOUT_S, deadline.remaining() + 1.0)))
        if left:
            log.warning("worker.drain_incomplete", left_to_the_group=left)
        log.info("worker.stopped")
        return 0

    def _observe(self) -> None:
        now = self._clock.monotonic()
        if now < self._next_gauges:
            return
        self._next_gauges = now + GAUGE_INTERVAL_S
        self._pipeline.observe()
        self._metrics.paused_partitions.set(self._consumer.paused_partitions)
        for (topic, partition), lag in self._consumer.lag().items():
            self._metrics.consumer_lag.labels(topic, str(partition)).set(lag)

    def _decoder_restarted(self, reason: str) -> None:
        self._metrics.decoder_restarts.labels(reason).inc()

    def _transaction_ended(self, committed: bool, seconds: float) -> None:
        """Count a transaction, which is also the commit of its offsets; called in the transactions' thread."""
        self._metrics.transactions.labels("committed" if committed else "aborted").inc()
        self._metrics.transaction_seconds.observe(seconds)
        self._group.committed(committed)

    def _batch_ran(self, report: BatchReport) -> None:
        """Count a batch; called in the engine thread."""
        self._metrics.batches.labels(report.reason).inc()
        self._metrics.batch_size.observe(report.size)
        self._metrics.inference.observe(report.infer_s)
        for wait_s in report.waits_s:
            self._metrics.queue_wait.observe(wait_s)

    # -- watchers ------------------------------------------------------------------------------------------------

    def _watch(self, policy: PolicyKeeper) -> None:
        """Look for a new policy and a new bundle; both keep the old one when the new is wrong. Beside that, tidy the heap."""
        settings = self._settings
        next_policy = next_bundle = next_give_back = 0.0
        while not self._stopping.wait(0.5):
            now = self._clock.monotonic()
            if now >= next_give_back:
                next_give_back = now + process_memory.GIVE_BACK_INTERVAL_S
                process_memory.give_back()
            if settings.policy.watch_s and now >= next_policy:
                next_policy = now + settings.policy.watch_s
                policy.reload_if_changed()
            if settings.engine.watch_bundle_s and now >= next_bundle:
                next_bundle = now + settings.engine.watch_bundle_s
                self._loader.follow(self._take_over(policy))

    def _take_over(self, policy: PolicyKeeper) -> Callable[[Engine], None]:
        """How a new engine goes into service: the policy first, so that no score meets a policy that does not know it."""

        def take_over(engine: Engine) -> None:
            policy.bind(engine.detector)
            self._pipeline.swap(engine)
            process_memory.let_go()

        return take_over


def _batch_config(settings: Settings) -> BatchConfig:
    batch = settings.batch
    return BatchConfig(
        max_batch_size=batch.max_batch_size,
        preferred_batch_size=batch.preferred_sizes,
        max_queue_delay_microseconds=batch.max_queue_delay_microseconds,
        max_queue_size=batch.max_queue_size,
        priority_levels=batch.priority_levels,
    )
