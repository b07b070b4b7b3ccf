"""A KafkaProducer whose broker refuses what a test says, and which dies of it as kafka-python's idempotent one does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from kafka import errors as kafka_errors
from kafka.future import Future

Sent = tuple[str, bytes | None, bytes | None, list[tuple[str, bytes]]]
"""(topic, key, value, headers)"""


class FakeBroker:
    """What every producer of a test writes to."""

    def __init__(self, refuse: Callable[[Sent], Exception | None] = lambda sent: None, max_request_size: int = 2**40) -> None:
        self.refuse = refuse
        self.max_request_size = max_request_size
        self.taken: list[Sent] = []
        self.producers: list[FakeProducer] = []
        self.answering = threading.Event()
        self.answering.set()
        self.reachable = True

    def open_producer(self, _settings: Any) -> FakeProducer:
        producer = FakeProducer(self)
        self.producers.append(producer)
        return producer


class FakeProducer:
    """Answers from a thread of its own, in order. After a refusal that is not retriable everything fails with it."""

    def __init__(self, broker: FakeBroker) -> None:
        self._broker = broker
        self._queue: list[tuple[Sent, Future]] = []
        self._condition = threading.Condition()
        self._dead: Exception | None = None
        self._closed = False
        self._sender = self
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def send(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None,
        headers: list[tuple[str, bytes]],
        partition: int | None = None,
    ) -> Future:
        sent = (topic, key, value, list(headers))
        if self._closed:
            raise kafka_errors.IllegalStateError("KafkaProducer already closed!")
        if key is None and value is None:
            raise ValueError("Need at least one: key or value")
        if sum(len(part or b"") for part in (key, value)) > self._broker.max_request_size:
            raise kafka_errors.MessageSizeTooLargeError("larger than max_request_size")
        future = Future()
        with self._condition:
            self._queue.append((sent, future))
            self._condition.notify()
        return future

    def partitions_for(self, _topic: str) -> set[int]:
        return {0, 1, 2}

    def _unregister_cleanup(self) -> None:
        pass

    def force_close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def close(self, timeout: float = 0) -> None:
        self.force_close()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    break
                sent, future = self._queue[0]
            while not self._broker.answering.wait(0.01) and not self._closed:
                pass
            if self._closed:
                break
            with self._condition:
                self._queue.pop(0)
            error = self._dead or self._broker.refuse(sent)
            if error is None:
                self._broker.taken.append(sent)
                future.success(None)
                continue
            if not error.retriable:  # type: ignore[attr-defined]
                self._dead = error
            future.failure(error)
        for _, future in self._queue:
            future.failure(kafka_errors.IllegalStateError("Producer is closed forcefully."))
