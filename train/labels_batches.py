"""Record batches of a topic that cannot be decoded are passed over and named, instead of stopping the read for ever.

kafka-python 3.0.12 raises once for such a batch (a wrong checksum, a broken or unknown compression, a header name that is not
UTF-8) and then loops inside `poll`. Any producer can write one, so a single batch could end every refresh that is to come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

OnDamage = Callable[[str, str], None]


def skip_damaged(consumer: Any, on_damage: OnDamage) -> None:
    """Makes this KafkaConsumer pass over batches that cannot be decoded. `on_damage` hears of each: topic/partition/offset, why.

    It reaches into the client's fetcher, whose versions constraints.txt pins; a batch is decoded twice, the first time to see.
    """

    class Passing(consumer._fetcher.PartitionRecords):  # type: ignore[misc] # made at run time
        def _unpack_records(self, tp: Any, records: Any, *deserializers: Any) -> Iterator[Any]:
            batches = _Readable(records, tp, self.fetch_offset, on_damage)
            unpacked: Iterator[Any] = super()._unpack_records(tp, batches, *deserializers)
            return unpacked

    consumer._fetcher.PartitionRecords = Passing


class _Readable:
    """The batches of one fetch answer; for one that cannot be decoded, an empty one that ends where it ends."""

    def __init__(self, records: Any, tp: Any, fetch_offset: int, on_damage: OnDamage) -> None:
        self._records, self._tp, self._next, self._on_damage = records, tp, fetch_offset, on_damage

    def next_batch(self) -> Any:
        """The next batch; None at the end."""
        try:
            batch = self._records.next_batch()
        except Exception as exc:  # noqa: BLE001 - whatever the decoder makes of bytes that a stranger wrote
            return self._passed(self._next, self._next + 1, exc)
        if batch is None:
            return None
        first = max(self._next, batch.base_offset)
        after = batch.next_offset if batch.magic >= 2 else batch.base_offset + 1
        # What declares an end before its begin would be read again for ever.
        after = max(after, self._next + 1)
        try:
            if not batch.validate_crc():
                raise ValueError("its checksum is wrong")
            for _ in type(batch)(bytes(batch._buffer)) if batch.magic >= 2 else ():
                pass
        except Exception as exc:  # noqa: BLE001 - as above
            return self._passed(first, after, exc)
        self._next = after
        return batch

    def _passed(self, first: int, after: int, exc: Exception) -> _Passed:
        reason = " ".join(str(exc).split()) or type(exc).__name__
        self._on_damage(f"{self._tp.topic}/{self._tp.partition}/{first}", reason)
        self._next = after
        return _Passed(after)


class _Passed:
    """As much of a batch as the fetcher asks, without a record."""

    magic, leader_epoch, is_control_batch = 2, -1, False

    def __init__(self, next_offset: int) -> None:
        self.next_offset = next_offset
        self.base_offset = self.last_offset = next_offset - 1

    def validate_crc(self) -> bool:
        """Was asked already."""
        return True

    def has_producer_id(self) -> bool:
        """It is of no transaction."""
        return False

    def __iter__(self) -> Iterator[Any]:
        return iter(())
