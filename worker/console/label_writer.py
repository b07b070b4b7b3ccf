"""Writes to the label topic and waits until the console has read the record back: only then is it known whether it counts."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from worker.console.desk import Desk
from worker.console.labels import LabelRecord
from worker.errors import DependencyError
from worker.kafka_clients import describe, open_producer
from worker.settings import KafkaSettings

if TYPE_CHECKING:
    from kafka import KafkaProducer

SEND_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_MS = 4_000
DELIVERY_TIMEOUT_MS = 8_000
"""Unlike the worker's producer this one gives up: a decision must not appear long after its reviewer was told that it failed."""
READ_BACK_TIMEOUT_S = 10.0


class NotWritten(Exception):  # noqa: N818 - says what it is, and is shown as such
    """The record may or may not be in the topic; the page says so and shows what is read back."""


class LabelWriter:
    """The console's only producer. Thread-safe."""

    def __init__(self, settings: KafkaSettings, desk: Desk) -> None:
        self._settings = settings
        self._desk = desk
        self._lock = threading.Lock()
        self._producer: KafkaProducer | None = None

    def write(self, record: LabelRecord) -> bool:
        """Publish, and tell whether the record had an effect where it came to stand.

        Raises:
            NotWritten: the broker did not take it in time, or it was not read back in time.
        """
        from kafka.errors import KafkaError

        try:
            future = self._open().send(self._settings.label_topic, key=record.entry.encode(), value=record.to_json())
            future.get(timeout=SEND_TIMEOUT_S)
        except (KafkaError, DependencyError) as error:
            raise NotWritten(f"the label topic did not take it: {describe(error)}") from error
        effect = self._desk.effect(record.record_id, READ_BACK_TIMEOUT_S)
        if effect is None:
            raise NotWritten("written, but not read back yet: look at the item's history")
        return effect

    def close(self) -> None:
        """Close the producer."""
        with self._lock:
            if self._producer is not None:
                self._producer.close(timeout=2.0)
                self._producer = None

    def _open(self) -> KafkaProducer:
        with self._lock:
            if self._producer is None:
                self._producer = open_producer(
                    self._settings, linger_ms=0, request_timeout_ms=REQUEST_TIMEOUT_MS, delivery_timeout_ms=DELIVERY_TIMEOUT_MS
                )
            return self._producer
