"""Faults of kafka-python 3.0.12's clients that stop a worker for good, and how it lives with them.

Each of the consumer's is held by a test that fails without the workaround (tests/worker/stages/test_consume.py). They reach
into the client's private parts, and do nothing where those have moved. What a broken record batch does is `batch_guard`'s.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from kafka import KafkaConsumer, KafkaProducer
from kafka import errors as kafka_errors
from kafka.future import Future

AWAIT_READY_MS = 1_000


def before_poll(consumer: KafkaConsumer) -> None:
    """To be called before every `poll`, by the thread that polls."""
    _keep_join(consumer)
    _restore_parked(consumer)


def forget_owned(consumer: KafkaConsumer) -> None:
    """To be called when partitions were lost: a member that rejoins must not claim what it does not own any more.

    The cooperative assignor tells the group the last assignment it ever got, also after an expulsion. A leader that believes
    it gives these partitions back to it at once, while their owner of the meantime still works on them and commits: both
    do the same work, and with transactions both publish it.
    """
    coordinator: Any = getattr(consumer, "_coordinator", None)
    for assignor in getattr(coordinator, "_assignors", {}).values():
        assignor.member_assignment = None


class _Join:
    """A group join in flight that counts as unfinished until somebody waits for it. Stands in for a kafka-python Future."""

    is_done = False

    def __init__(self, task: Future) -> None:
        self._task = task
        self.add_callback = task.add_callback
        self.add_errback = task.add_errback

    def __await__(self) -> Any:
        return self._task.__await__()


def _keep_join(consumer: KafkaConsumer) -> None:
    """A join that completes between two polls is forgotten (`join_group_async` starts another where one is done).

    With short polls a member may so join again and again and never own a partition. `poll` waits for a task that is not
    done, so the task is wrapped in one that never says it is; waiting for it then gives its result at once.
    """
    coordinator: Any = getattr(consumer, "_coordinator", None)
    if isinstance(getattr(coordinator, "_join_task", None), Future):
        coordinator._join_task = _Join(coordinator._join_task)


def _restore_parked(consumer: KafkaConsumer) -> None:
    """Records of a partition that was paused while they were handed out are parked, and may never be given back.

    `fetched_records` restores them only where its slot for the current partition is None; the slot of one that is used up
    is not None but merely false, and stays so.
    """
    fetcher: Any = getattr(consumer, "_fetcher", None)
    if getattr(fetcher, "_paused_partition_records", None) and not fetcher._next_partition_records:
        fetcher._next_partition_records = None


def keep_requests(producer: KafkaProducer) -> None:
    """A transactional request to a coordinator that cannot be connected to is forgotten, and its caller waits for ever.

    `Sender._maybe_send_pending_request` means to look the coordinator up and to try again, but does so only where
    `await_ready` says no; it raises instead. Nor may it hold the sender for half a minute: the coordinator may have moved.
    """
    client: Any = getattr(producer._sender, "_client", None)
    original = getattr(client, "await_ready", None)
    if original is None:
        return

    def await_ready(node_id: Any, timeout_ms: float = AWAIT_READY_MS) -> bool:
        try:
            return bool(original(node_id, timeout_ms=min(timeout_ms, AWAIT_READY_MS)))
        except kafka_errors.KafkaConnectionError:
            return False

    client.await_ready = await_ready


def discard(producer: KafkaProducer, seconds: float) -> None:
    """Close without waiting for what cannot be delivered: its futures fail. `close` alone raises before it would."""
    producer._unregister_cleanup()
    sender = producer._sender
    sender.force_close()
    sender.join(seconds)
    with suppress(kafka_errors.KafkaError):
        producer.close(timeout=0)
