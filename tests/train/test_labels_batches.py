"""Batches that cannot be decoded cost themselves: the fetcher's own class reads what stands before and behind them."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from kafka import TopicPartition
from kafka.consumer.fetcher import Fetcher
from kafka.record.memory_records import MemoryRecords, MemoryRecordsBuilder
from kafka.record.util import calc_crc32c

from train.labels_batches import skip_damaged

TP = TopicPartition("labels", 2)


class FakeConsumer:
    """As much of a KafkaConsumer as `skip_damaged` touches."""

    def __init__(self) -> None:
        self._fetcher = type("FetcherOfATest", (), {"PartitionRecords": Fetcher.PartitionRecords})()
        self.damage: list[tuple[str, str]] = []
        skip_damaged(self, lambda place, reason: self.damage.append((place, reason)))

    def fetch(self, data: bytes, offset: int = 0) -> tuple[list[Any], int]:
        records = self._fetcher.PartitionRecords(offset, TP, MemoryRecords(data))
        return [(r.offset, r.value) for r in records.take()], records.next_fetch_offset


def batch(values: list[bytes], base: int, codec: int = 0) -> bytearray:
    builder = MemoryRecordsBuilder(2, codec, 2**20)
    for value in values:
        builder.append(1_700_000_000_000, None, value, [])
    builder.close()
    data = bytearray(builder.buffer())
    struct.pack_into(">q", data, 0, base)
    return data


def resealed(data: bytearray) -> bytearray:
    struct.pack_into(">I", data, 17, calc_crc32c(memoryview(data)[21:]))
    return data


def wrong_checksum(data: bytearray) -> bytearray:
    data[-2] ^= 0xFF
    return data


def broken_compression(data: bytearray) -> bytearray:
    data[61:] = b"\x00" * (len(data) - 61)
    return resealed(data)


def unknown_compression(data: bytearray) -> bytearray:
    data[22] = (data[22] & ~7) | 7
    return resealed(data)


def broken_records(data: bytearray) -> bytearray:
    data[61] = 0xFE  # a record that is longer than its batch
    return resealed(data)


@pytest.mark.parametrize(
    ("codec", "damage"), [(0, wrong_checksum), (1, broken_compression), (0, unknown_compression), (0, broken_records)]
)
def test_what_stands_around_a_damaged_batch_is_read(codec: int, damage: Any) -> None:
    first, last = batch([b"a", b"b"], 0), batch([b"z"], 5)
    middle = damage(batch([b"x" * 50, b"y" * 50, b"w"], 2, codec))
    consumer = FakeConsumer()
    found, following = consumer.fetch(bytes(first + middle + last))
    assert found == [(0, b"a"), (1, b"b"), (5, b"z")] and following == 6
    assert [place for place, _ in consumer.damage] == ["labels/2/2"] and consumer.damage[0][1]
    # At the end of the topic the reader gets past it too.
    consumer = FakeConsumer()
    assert consumer.fetch(bytes(middle), 2) == ([], 5)


def test_sound_batches_are_untouched() -> None:
    consumer = FakeConsumer()
    data = bytes(batch([b"a"], 0, 1) + batch([b"b", b"c"], 1))
    assert consumer.fetch(data) == ([(0, b"a"), (1, b"b"), (2, b"c")], 3) and not consumer.damage
