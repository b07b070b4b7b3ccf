"""Reads the verdict and the label topic with a consumer that joins no group and commits nothing: nobody else notices."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import structlog

from worker.clock import Clock
from worker.console import labels
from worker.console.labels import LabelRecord
from worker.errors import DependencyError
from worker.kafka_clients import describe, open_consumer
from worker.settings import ConsoleSettings, KafkaSettings

if TYPE_CHECKING:
    from kafka import KafkaConsumer, TopicPartition

log = structlog.get_logger(__name__)

POLL_MS = 50
MAX_POLL_RECORDS = 2_000
LOOK_FOR_PARTITIONS_S = 30.0
RECONNECT_S = 2.0
PROBE_S = 3.0
"""After so long without a record the brokers are asked whether they are there: `poll` alone does not tell."""
PROBE_TIMEOUT_MS = 2_000

_LARGEST = 1e15
_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("verdict_id", "event_id", "tenant", "label", "action", "cache", "processed_at"), str),
    **dict.fromkeys(("image", "timings_ms", "model", "policy", "evidence", "source"), dict),
    "score": int | float | None,
    "reason": str | None,
    "uncertain": bool,
}


class Feed:
    """One thread that reads both topics from some way back and goes on for ever.

    Args:
        kafka: the bus.
        console: how far back to read.
        on_verdict: called with each verdict and its record's time (POSIX seconds), in the feed's thread.
        on_label: called with each record of the label topic.
        clock: for how far back.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        console: ConsoleSettings,
        on_verdict: Callable[[dict[str, Any], float], None],
        on_label: Callable[[LabelRecord], None],
        clock: Clock,
    ) -> None:
        self._kafka = kafka
        self._console = console
        self._on_verdict = on_verdict
        self._on_label = on_label
        self._clock = clock
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="console-feed", daemon=True)
        self._next: dict[TopicPartition, int] = {}
        self._goal: dict[TopicPartition, int | None] = {}  # where its end was when it was first fetched; None until then
        self._looked = 0.0
        self._heard = 0.0
        self._connected = False
        self.failure: Exception | None = None
        """What ended the thread: a bug."""

    @property
    def connected(self) -> bool:
        """Whether the broker answered lately."""
        return self._connected and self.failure is None

    @property
    def caught_up(self) -> bool:
        """Whether everything that was there at the start has been read."""
        return self._connected and bool(self._next) and not self._goal

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def close(self) -> None:
        """Stop reading. May be called again."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def _run(self) -> None:
        from kafka.errors import KafkaError

        while not self._stopping.is_set():
            try:
                self._read()
            except (KafkaError, DependencyError) as error:
                log.warning("console.feed_interrupted", error=describe(error))
            except Exception as error:  # the thread's boundary: the console ends with it
                log.error("console.feed_failed", error=f"{type(error).__name__}: {error}", exc_info=True)
                self.failure = error
                return
            self._connected = False
            self._stopping.wait(RECONNECT_S)

    def _read(self) -> None:
        consumer = open_consumer(self._kafka, group=False, max_poll_records=MAX_POLL_RECORDS)
        try:
            self._assign(consumer)
            self._heard, self._connected = time.monotonic(), True
            while not self._stopping.is_set():
                batches = consumer.poll(timeout_ms=POLL_MS)
                for partition, records in batches.items():
                    for record in records:
                        self._take(record)
                    self._next[partition] = records[-1].offset + 1
                if batches:
                    self._heard, self._connected = time.monotonic(), True
                elif time.monotonic() - self._heard > PROBE_S:
                    self._connected = self._answers(consumer)
                    self._heard = time.monotonic()
                if self._goal:
                    self._note_progress(consumer)
                if time.monotonic() - self._looked > LOOK_FOR_PARTITIONS_S:
                    self._assign(consumer)
        finally:
            consumer.close()

    def _answers(self, consumer: KafkaConsumer) -> bool:
        """Whether the leaders of our partitions are there; the client itself goes on trying to reach those that are not."""
        from kafka.errors import KafkaError

        try:
            consumer.end_offsets(list(consumer.assignment()), timeout_ms=PROBE_TIMEOUT_MS)
        except KafkaError as error:
            if self._connected:
                log.warning("console.broker_unreachable", error=describe(error))
            return False
        if not self._connected:
            log.info("console.broker_back")
        return True

    def _assign(self, consumer: KafkaConsumer) -> None:
        """Read every partition there is: where we were, or from some way back where one is new to us."""
        from kafka import TopicPartition

        self._looked = time.monotonic()
        topics = (self._kafka.verdict_topic, self._kafka.label_topic)
        partitions = [TopicPartition(topic, number) for topic in topics for number in consumer.partitions_for_topic(topic) or ()]
        if set(partitions) == set(consumer.assignment()):
            return
        consumer.assign(partitions)
        new = [partition for partition in partitions if partition not in self._next]
        starts = self._starts(consumer, new) if new else {}
        for partition in partitions:
            consumer.seek(partition, self._next.setdefault(partition, starts.get(partition, 0)))

    def _starts(self, consumer: KafkaConsumer, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        """Offsets to begin at: not before HISTORY_S ago, and no more than HISTORY_RECORDS of a topic."""
        since_ms = int((self._clock.time() - self._console.history_s) * 1000)
        first, end = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
        found = consumer.offsets_for_times(dict.fromkeys(partitions, since_ms))
        starts = {}
        for partition in partitions:
            share = self._console.history_records // sum(other.topic == partition.topic for other in partitions)
            by_time = found.get(partition)
            starts[partition] = max(first[partition], end[partition] - share, by_time.offset if by_time else 0)
            self._goal[partition] = None
        return starts

    def _note_progress(self, consumer: KafkaConsumer) -> None:
        """Forget goals that were reached; the position also passes what holds no record (markers of transactions).

        The end is what a fetch tells, not `end_offsets`: the embedded broker's answer to that lags by a batch.
        """
        for partition, goal in list(self._goal.items()):
            end = self._goal[partition] = consumer.highwater(partition) if goal is None else goal
            if end is not None and consumer.position(partition) >= end:
                del self._goal[partition]

    def _take(self, record: Any) -> None:
        if record.topic == self._kafka.label_topic:
            label = labels.read(record.value)
            if label is not None:
                self._on_label(label)
            return
        verdict = read_verdict(record.value)
        if verdict is not None:
            now = self._clock.time()
            at = record.timestamp / 1000 if record.timestamp and record.timestamp > 0 else now
            self._on_verdict(verdict, min(at, now))


def read_verdict(value: bytes | None) -> dict[str, Any] | None:
    """A verdict, with every field that is needed here of its right type; None for anything else on the topic.

    Not by `contracts.Verdict`: a later worker may add fields, and labels of a later version must not stop this console.
    """
    try:
        found = json.loads(value or b"")
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not str(found.get("specversion", "")).startswith("code-verdict/"):
        return None
    if not all(isinstance(found.get(name), kinds) for name, kinds in _FIELDS.items()):
        return None
    numbers = [found["score"], *found["timings_ms"].values()]
    if not all(number is None or _is_number(number) for number in numbers):
        return None
    evidence, sha256 = found["evidence"], found["image"].get("sha256", ...)
    shaped = isinstance(evidence.get("heads"), dict) and isinstance(evidence.get("provenance"), dict)
    if not shaped or not isinstance(evidence.get("crops"), list) or not isinstance(sha256, str | None):
        return None
    return found if found["score"] is None or 0 <= found["score"] <= 1 else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST
