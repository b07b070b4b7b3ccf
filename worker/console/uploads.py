"""From a verdict back to its image: the upload is read again where it stands, and fetched by the worker's rules."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from worker.clock import Clock
from worker.contracts.event import EventError, EventLimits, parse
from worker.errors import DependencyError, ItemError
from worker.items import Delivery, Event, Fetched, Item, Position, Record, Timings
from worker.kafka_clients import describe, open_consumer
from worker.settings import Settings
from worker.stages.fetch import Fetcher

if TYPE_CHECKING:
    from kafka import KafkaConsumer

READ_TIMEOUT_S = 3.0


class Unavailable(Exception):  # noqa: N818 - says what it is, and is shown as such
    """The image cannot be shown; the message is for the page."""


class Uploads:
    """Reads uploads and fetches their images. Thread-safe; one at a time reads from the broker."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._limits = EventLimits(settings.fetch.max_bytes, settings.kafka.max_record_bytes)
        self._fetcher = Fetcher(settings.fetch, clock)
        self._lock = threading.Lock()
        self._consumer: KafkaConsumer | None = None

    def event(self, verdict: dict[str, Any]) -> Event:
        """The upload event of a verdict.

        Raises:
            Unavailable: its record is gone, lies on a topic that is none of ours, or is another event's.
        """
        try:
            event = parse(self._record(verdict), self._limits)
        except EventError as error:
            raise Unavailable(f"the upload cannot be read: {error.message}") from error
        if event.event_id != verdict["event_id"]:
            raise Unavailable("the upload's place in the topic holds another event now")
        return event

    def image(self, verdict: dict[str, Any]) -> bytes:
        """The bytes that the verdict is about.

        Raises:
            Unavailable: they cannot be had any more, or are not the ones that were judged.
        """
        position = Position(verdict["source"]["topic"], verdict["source"]["partition"], verdict["source"]["offset"], 0)
        record = Record(position, None, None, (), 0)
        item = Item(record, self.event(verdict), Delivery(), Timings(self._clock.monotonic()))
        try:
            fetched: Fetched = self._fetcher.fetch(item)
        except ItemError as error:
            raise Unavailable(f"{error.code}: {error.message}") from error
        if verdict["image"]["sha256"] not in (None, fetched.sha256):
            raise Unavailable("the address holds another image now than the one that was judged")
        return fetched.data

    def close(self) -> None:
        """Close connections."""
        with self._lock:
            self._forget()
        self._fetcher.close()

    def _record(self, verdict: dict[str, Any]) -> Record:
        from kafka.errors import KafkaError

        source = verdict["source"]
        topic, partition, offset = source.get("topic"), source.get("partition"), source.get("offset")
        if topic not in self._settings.kafka.upload_topics or not isinstance(partition, int) or not isinstance(offset, int):
            raise Unavailable("the verdict's source is none of this console's upload topics")
        with self._lock:
            try:
                found = self._read(topic, partition, offset)
            except (KafkaError, DependencyError, ValueError, AssertionError) as error:
                self._forget()
                raise Unavailable(f"the upload's topic cannot be read: {describe(error)}") from error
        if found is None:
            raise Unavailable("the upload is no longer in its topic")
        return found

    def _read(self, topic: str, partition: int, offset: int) -> Record | None:
        from kafka import TopicPartition
        from kafka.errors import OffsetOutOfRangeError

        if self._consumer is None:
            # Without a reset: an offset that is gone is an error, not a reason to read another one.
            self._consumer = open_consumer(self._settings.kafka, group=False, max_poll_records=1, auto_offset_reset="none")
        consumer, place = self._consumer, TopicPartition(topic, partition)
        if partition not in (consumer.partitions_for_topic(topic) or ()):
            return None
        consumer.assign([place])
        consumer.seek(place, offset)
        deadline = time.monotonic() + READ_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                batches = consumer.poll(timeout_ms=200)
            except OffsetOutOfRangeError:
                return None
            for records in batches.values():
                found = records[0]
                if found.offset != offset:
                    return None  # compacted away, or a transaction that was taken back
                position = Position(topic, partition, offset, 0)
                return Record(position, found.key, found.value, tuple(found.headers), found.timestamp)
        return None

    def _forget(self) -> None:
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None
