"""Reading through the guard: the same records as kafka-python reads, and one unreadable record for what it cannot."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from typing import Any

import lz4.frame
import pytest
import snappy
import zstandard
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from kafka import TopicPartition
from kafka.codec import snappy_encode
from kafka.consumer.fetcher import Fetcher
from kafka.record.memory_records import MemoryRecords, MemoryRecordsBuilder
from kafka.record.util import calc_crc32c, encode_varint

from worker import batch_guard
from worker.batch_guard import Unreadable

TP = TopicPartition("uploads", 0)
CODECS = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
Raw = tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]


class FakeConsumer:
    """As much of a KafkaConsumer as `guard` touches: the real fetcher's class for the records of a partition."""

    def __init__(self, max_batch_bytes: int) -> None:
        self._fetcher = type("FetcherOfATest", (), {"PartitionRecords": Fetcher.PartitionRecords})()
        batch_guard.guard(self, max_batch_bytes)

    def fetch(self, data: bytes, offset: int = 0) -> tuple[list[Any], int]:
        """One fetch answer, read to its end: its records and where the next fetch begins."""
        records = self._fetcher.PartitionRecords(offset, TP, MemoryRecords(data))
        return records.take(), records.next_fetch_offset


def build(records: list[Raw], codec: str = "none", base_offset: int = 0, magic: int = 2) -> bytes:
    builder = MemoryRecordsBuilder(magic, CODECS[codec], 2**30)
    for index, (key, value, headers) in enumerate(records):
        builder.append(1_700_000_000_000 + index, key, value, headers)
    builder.close()
    data = bytearray(builder.buffer())
    struct.pack_into(">q", data, 0, base_offset + (len(records) - 1 if magic < 2 and codec != "none" else 0))
    return bytes(data)


def resealed(batch: bytearray) -> bytes:
    """The batch with its length and checksum made right again."""
    struct.pack_into(">i", batch, 8, len(batch) - 12)
    struct.pack_into(">I", batch, 17, calc_crc32c(memoryview(batch)[21:]))
    return bytes(batch)


def packed(payload: bytes, codec: int, count: int) -> bytes:
    """A well-formed batch around a payload that was compressed by hand."""
    batch = bytearray(build([(b"k", b"v", [])] * count))[:61]
    struct.pack_into(">h", batch, 21, codec)
    return resealed(batch + payload)


RECORD = st.tuples(
    st.one_of(st.none(), st.binary(max_size=20)),
    st.one_of(st.none(), st.binary(max_size=300)),
    st.lists(st.tuples(st.text(max_size=10), st.one_of(st.none(), st.binary(max_size=20))), max_size=4),
)


@given(st.lists(RECORD, min_size=1, max_size=8), st.sampled_from(sorted(CODECS)), st.integers(0, 2**40))
def test_reads_what_kafka_python_reads(records: list[Raw], codec: str, base_offset: int) -> None:
    data = build(records, codec, base_offset)
    oracle = Fetcher.PartitionRecords(base_offset, TP, MemoryRecords(data))
    found, following = FakeConsumer(2**24).fetch(data, base_offset)
    assert found == oracle.take()
    assert following == base_offset + len(records)


@pytest.mark.parametrize("magic", [0, 1])
@pytest.mark.parametrize("codec", ["none", "gzip", "snappy", "lz4"])
def test_reads_the_message_formats_of_old_clients(magic: int, codec: str) -> None:
    if magic == 0 and codec == "lz4":
        pytest.importorskip("xxhash")
    records: list[Raw] = [(b"key", b"value" * 50, []), (None, b"other", [])] if codec != "none" else [(b"key", b"v", [])]
    data = build(records, codec, magic=magic)
    oracle = Fetcher.PartitionRecords(0, TP, MemoryRecords(data)).take()
    found, _ = FakeConsumer(2**24).fetch(data)
    assert [(r.key, r.value, r.timestamp) for r in found] == [(r.key, r.value, r.timestamp) for r in oracle]
    assert len(found) == len(records)


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
def test_an_undecodable_batch_is_one_unreadable_record_and_the_next_batch_is_read(codec: str) -> None:
    bad = packed(b"this is not compressed data at all", CODECS[codec], 5)
    good = build([(b"k", b"good", [])], base_offset=5)
    found, following = FakeConsumer(2**24).fetch(bad + good)
    assert [(r.offset, r.value) for r in found] == [(4, b""), (5, b"good")]
    assert isinstance(found[0].value, Unreadable)
    assert found[0].value.first_offset == 0
    assert found[0].value.reason
    assert following == 6


def test_an_unknown_compression_is_named() -> None:
    found, following = FakeConsumer(2**24).fetch(packed(b"whatever", 6, 2))
    assert found[0].value.reason == "unknown compression 6"
    assert following == 2


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
def test_a_stream_cut_off_in_the_middle_gives_the_records_before_it(codec: str) -> None:
    whole = bytearray(build([(b"k%d" % index, bytes([index]) * 50_000, []) for index in range(40)], codec))
    found, following = FakeConsumer(2**24).fetch(resealed(whole[: len(whole) - 20]))
    assert isinstance(found[-1].value, Unreadable)
    assert found[-1].offset == 39
    assert following == 40


def test_a_wrong_checksum_is_fetched_again_before_it_is_given_up() -> None:
    consumer = FakeConsumer(2**24)
    before = build([(b"k", b"before", [])])
    good = build([(b"k", b"x", [])] * 3, base_offset=1)
    bad = bytearray(good)
    bad[-1] ^= 0xFF
    found, following = consumer.fetch(before + bytes(bad))
    assert ([r.value for r in found], following) == ([b"before"], 1)
    found, following = consumer.fetch(bytes(bad), 1)
    assert [(r.offset, r.value.reason, r.value.first_offset) for r in found] == [(3, "the batch's checksum is wrong", 1)]
    assert following == 4

    repaired, _ = consumer.fetch(bytes(bad), 1)  # seen anew: once more it is only fetched again,
    assert repaired == []
    repaired, _ = consumer.fetch(good, 1)  # and if the fault lay in the transfer nothing is lost
    assert [r.value for r in repaired] == [b"x"] * 3


def test_a_checksum_fault_whose_header_makes_no_sense_advances_by_one() -> None:
    consumer = FakeConsumer(2**24)
    bad = bytearray(build([(b"k", b"x", [])] * 3))
    struct.pack_into(">i", bad, 23, 2**30)  # last offset delta
    consumer.fetch(bytes(bad))
    found, following = consumer.fetch(bytes(bad))
    assert (found[0].offset, following) == (0, 1)


def with_broken_record(headers: bytes, count: int = 3) -> bytes:
    """Three records, the middle one with the given bytes for its headers."""
    batch = bytearray(build([(b"k", b"v", [])] * count))[:61]
    for index in range(count):
        body = bytearray(b"\0")
        encode_varint(0, body.append)
        encode_varint(index, body.append)
        for part in (b"key", b"value%d" % index):
            encode_varint(len(part), body.append)
            body += part
        body += headers if index == 1 else b"\0"
        encode_varint(len(body), batch.append)
        batch += body
    return resealed(batch)


def test_a_header_name_that_is_not_utf8_costs_nothing() -> None:
    """librdkafka writes any bytes as a name; kafka-python cannot read the record and then loops for ever."""
    found, _ = FakeConsumer(2**24).fetch(with_broken_record(b"\x02" + b"\x04\xff\xfe" + b"\x02v"))
    assert [r.value for r in found] == [b"value0", b"value1", b"value2"]
    assert found[1].headers == [("��", b"v")]


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        (b"\xfe\xff\xff\x0f" + b"\0\0" * 50, "headers, more than"),
        (b"\x02\x01", "without a name"),
        (b"\x02\x04\x61\x61\x80\x80\x80\x02", "beyond its record"),
        (b"\0\0\0", "do not fill"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "malformed"),
    ],
)
def test_a_malformed_record_costs_itself_only(headers: bytes, reason: str) -> None:
    found, following = FakeConsumer(2**24).fetch(with_broken_record(headers))
    assert [r.offset for r in found] == [0, 1, 2]
    assert (found[0].value, found[2].value) == (b"value0", b"value2")
    assert isinstance(found[1].value, Unreadable)
    assert reason in found[1].value.reason
    assert following == 3


def test_offsets_never_go_back_whatever_a_batch_claims() -> None:
    batch = bytearray(build([(b"k", b"v", [])] * 3))
    position = bytes(batch).rindex(b"v") - 4
    assert batch[position] == 4  # the last record's offset delta, 2 as a varint
    batch[position] = 0
    found, following = FakeConsumer(2**24).fetch(resealed(batch))
    assert [r.offset for r in found] == [0, 1, 2]
    assert isinstance(found[2].value, Unreadable)
    assert following == 3


BOMBS = """
import resource, sys
from tests.worker.test_batch_guard import FakeConsumer, bomb
data = bomb(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found, following = FakeConsumer(8 * 2**20).fetch(data)
assert [r.offset for r in found] == [0], found
assert "more than the limit" in found[0].value.reason, found[0].value.reason
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def bomb(codec: str) -> bytes:
    """A batch of one record that unpacks to about 512 MB."""
    block = bytes(2**20)
    if codec == "gzip":
        packer = zlib.compressobj(1, wbits=31)
        return packed(b"".join([*(packer.compress(block) for _ in range(512)), packer.flush()]), 1, 1)
    if codec == "zstd":
        stream = zstandard.ZstdCompressor().compressobj()
        return packed(b"".join([*(stream.compress(block) for _ in range(512)), stream.flush()]), 4, 1)
    if codec == "lz4":
        with lz4.frame.LZ4FrameCompressor() as frame:
            parts = [frame.begin(), *(frame.compress(block) for _ in range(512)), frame.flush()]
        return packed(b"".join(parts), 3, 1)
    if codec == "snappy":
        return packed(snappy_encode(block)[:16] + (struct.pack(">i", len(piece := snappy.compress(block))) + piece) * 512, 2, 1)
    return packed(b"\xff\xff\xff\xff\x01" + b"\0" * 1000, 2, 1)  # raw snappy that only claims to be 500 MB


@pytest.mark.parametrize("codec", ["gzip", "zstd", "lz4", "snappy", "snappy-claim"])
def test_a_bomb_does_not_fill_the_memory(codec: str) -> None:
    result = subprocess.run([sys.executable, "-c", BOMBS, codec], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 64  # MB


@hypothesis_settings(max_examples=150)
@given(
    st.lists(RECORD, min_size=1, max_size=5),
    st.sampled_from(sorted(CODECS)),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
    st.booleans(),
)
def test_no_damage_raises_or_hangs_or_turns_offsets_back(
    records: list[Raw], codec: str, damage: list[tuple[int, int]], seal: bool
) -> None:
    """Any bytes changed; with `seal` the checksum is right, as a hostile producer would make it."""
    batch = bytearray(build(records, codec, base_offset=100))
    for where, byte in damage:
        index = 12 + where % (len(batch) - 12)  # base offset and length are the broker's
        if index != 16:  # so is the format
            batch[index] = byte
    data = resealed(batch) if seal else bytes(batch)
    consumer = FakeConsumer(2**20)
    offsets: list[int] = []
    following = 100
    last = 99 + (struct.unpack_from(">i", data, 23)[0] + 1 if seal else len(records))
    for _ in range(3):
        if following > last:
            break  # a broker gives the batch that holds the wanted offset, again and again, and no other
        found, after = consumer.fetch(data, following)
        assert after >= following
        offsets += [r.offset for r in found]
        following = after
    assert offsets == sorted(set(offsets))
    assert all(offset >= 100 for offset in offsets)
    assert following > 100 or last < 100
