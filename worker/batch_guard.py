"""Record batches that cannot be read become one unreadable record each, and none can fill the memory.

kafka-python 3.0.12 raises once for a batch it cannot decode (a wrong checksum, a broken or unknown compression, a header
name that is not UTF-8) and then loops for ever inside `poll`; a batch of 30 MB that unpacks to 30 GB it unpacks. Any
producer can write such a batch. Guarded, the partition goes on:

* unpacking stops at a limit, for every codec;
* a record is parsed with bounds on everything it declares; a broken one costs itself, not its batch, where its length can
  be believed;
* what cannot be read comes out as one record without key, value and headers, whose value is `Unreadable`;
* a batch with a wrong checksum is fetched a second time first: the fault may lie in the transfer.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import lz4.frame
import snappy
import zstandard
from kafka.codec import lz4_decode_old_kafka
from kafka.errors import CorruptRecordError
from kafka.record.default_records import DefaultRecord, DefaultRecordBatch
from kafka.record.util import decode_varint

MAX_HEADERS = 10_000
CHUNK_BYTES = 2**20
KEPT_FAULTS = 1_000
XERIAL_MAGIC = b"\x82SNAPPY\x00"
XERIAL_HEADER_BYTES = 16

Retry = Callable[[tuple[str, int], int], bool]


class Unreadable(bytes):
    """Stands for the value of a record that could not be read: empty, with the reason."""

    reason: str
    first_offset: int

    @classmethod
    def because(cls, reason: str, first_offset: int) -> Unreadable:
        """`first_offset`: where the unreadable stretch begins; it ends at the offset of the record with this value."""
        value = cls()
        value.reason, value.first_offset = reason, first_offset
        return value


class _Broken(Exception):  # noqa: N818 - never leaves this file
    """The bytes are not what they should be."""


def guard(consumer: Any, max_batch_bytes: int) -> None:
    """Make this KafkaConsumer read through the guard. `max_batch_bytes`: what one batch may unpack to."""
    faults = _Faults()

    class Guarded(consumer._fetcher.PartitionRecords):  # type: ignore[misc] # made at run time
        def _unpack_records(self, tp: Any, records: Any, *deserializers: Any) -> Iterator[Any]:
            batches = _Batches(records, tp, self.fetch_offset, max_batch_bytes, faults)
            unpacked: Iterator[Any] = super()._unpack_records(tp, batches, *deserializers)
            return unpacked

    consumer._fetcher.PartitionRecords = Guarded


class _Faults:
    """Checksum faults seen once: (partition, offset)."""

    def __init__(self) -> None:
        self._seen: set[tuple[Any, int]] = set()

    def again(self, partition: Any, offset: int) -> bool:
        """Whether this fault was seen before; remembers it if not."""
        fault = (partition, offset)
        if fault in self._seen:
            self._seen.discard(fault)
            return True
        if len(self._seen) >= KEPT_FAULTS:
            self._seen.clear()
        self._seen.add(fault)
        return False


class _Batches:
    """The batches of one fetch answer; as much of kafka-python's MemoryRecords as its fetcher uses."""

    def __init__(self, records: Any, partition: Any, fetch_offset: int, limit: int, faults: _Faults) -> None:
        self._records = records
        self._partition = partition
        self._next = fetch_offset  # where an unreadable record stands whose own offset cannot be believed
        self._limit = limit
        self._faults = faults

    def next_batch(self) -> Any:
        """The next batch; None at the end, or where the rest is to be fetched again."""
        try:
            batch = self._records.next_batch()
        except (CorruptRecordError, struct.error, AssertionError) as error:
            if not self._faults.again(self._partition, self._next):
                return None
            return _Lost(f"the batch has no valid header: {error}", self._next, self._next)
        if batch is None:
            return None
        # The parts that are not under the checksum (base offset, length) were in the broker's hands only.
        last = max(self._next, batch.next_offset - 1 if batch.magic >= 2 else batch.base_offset)
        if not batch.validate_crc():
            if not self._faults.again(self._partition, batch.base_offset):
                return None
            last = max(self._next, _believable_end(batch))
            self._next = last + 1
            return _Lost("the batch's checksum is wrong", batch.base_offset, last)
        self._next = last + 1
        if batch.magic < 2:
            return _LegacyBatch(batch, self._limit, last)
        return batch if batch.is_control_batch else _Batch(batch, self._limit, last)


class _Guard:
    """A batch whose checksum was found right, and what the fetcher asks of one."""

    def __init__(self, batch: Any, limit: int, last_offset: int) -> None:
        self._batch = batch
        self._limit = limit
        self._last_offset = last_offset

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def validate_crc(self) -> bool:
        """Was checked already."""
        return True

    def __iter__(self) -> Iterator[Any]:
        # An old compressed batch bears the offset of its last message.
        position = self._batch.base_offset if self._batch.magic >= 2 else 0
        try:
            for record in self._read():
                if record.offset < position or record.offset > self._last_offset:
                    raise _Broken("an offset out of order")
                position = record.offset + 1
                yield record
        except Exception as error:  # noqa: BLE001 - decoders raise whatever they like (zlib.error, RuntimeError, MemoryError, ...)
            reason = str(error) if isinstance(error, _Broken) else f"{type(error).__name__}: {error}"
            if position <= self._last_offset:
                yield _unreadable(reason, position, self._last_offset)

    def _read(self) -> Iterator[Any]:
        raise NotImplementedError


class _Batch(_Guard):
    """Message format 2 (Kafka 0.11 and later)."""

    def _read(self) -> Iterator[Any]:
        batch = self._batch
        payload: Any = memoryview(batch._buffer)[DefaultRecordBatch.HEADER_STRUCT.size :]
        if batch.compression_type:
            payload = _unpack(batch.compression_type, payload, self._limit)
        position = 0
        following = batch.base_offset
        for index in range(batch.records_count):
            try:
                length, start = decode_varint(payload, position)
                if length < 0 or start + length > len(payload):
                    raise _Broken("a record reaches beyond its batch")
            except (IndexError, ValueError) as error:
                raise _Broken("the batch ends before its records do") from error
            position = start + length
            try:
                record = self._record(payload[start:position], length)
            except (_Broken, IndexError, ValueError) as error:
                # Its own offset cannot be believed; unless the topic is compacted this is it.
                offset = max(following, batch.base_offset + index)
                record = _unreadable(f"the record is malformed: {error}", offset, offset)
            following = record.offset + 1
            yield record

    def _record(self, data: Any, length: int) -> DefaultRecord:
        """Parse one record: attributes, time, offset, key, value, headers."""
        batch = self._batch
        delta, position = decode_varint(data, 1)  # after the attributes, which mean nothing
        timestamp = batch.max_timestamp if batch.timestamp_type else batch.first_timestamp + delta
        offset_delta, position = decode_varint(data, position)
        key, position = _field(data, position)
        value, position = _field(data, position)
        count, position = decode_varint(data, position)
        if not 0 <= count <= MAX_HEADERS:
            raise _Broken(f"{count} headers, more than {MAX_HEADERS}")
        headers = []
        for _ in range(count):
            name, position = _field(data, position)
            if name is None:
                raise _Broken("a header without a name")
            content, position = _field(data, position)
            headers.append((name.decode("utf-8", "replace"), content))
        if position != length:
            raise _Broken("its fields do not fill its length")
        return DefaultRecord(length, batch.base_offset + offset_delta, timestamp, batch.timestamp_type, key, value, headers)


class _LegacyBatch(_Guard):
    """Message formats 0 and 1, which old clients may still write to brokers before Kafka 4."""

    def _read(self) -> Iterator[Any]:
        batch = self._batch
        if batch.compression_type:
            key_offset = batch.KEY_OFFSET_V1 if batch.magic else batch.KEY_OFFSET_V0
            _, packed = batch._read_key_value(key_offset)
            if packed is None:
                raise _Broken("a compressed message without a value")
            if batch.compression_type == batch.CODEC_LZ4 and batch.magic == 0:
                unpacked = lz4_decode_old_kafka(packed)  # unbounded; written by clients of Kafka 0.8 only
            else:
                unpacked = _unpack(batch.compression_type, packed, self._limit)
            _check_message_set(unpacked, batch.LOG_OVERHEAD)
            batch._buffer, batch._decompressed = memoryview(unpacked), True
        for record in batch:
            if not record.validate_crc():
                raise _Broken("a message's checksum is wrong")
            yield record


class _Lost:
    """A batch of which nothing is known but where it stands."""

    magic = 2
    leader_epoch = -1
    is_control_batch = False
    is_transactional = False

    def __init__(self, reason: str, first_offset: int, last_offset: int) -> None:
        self._record = _unreadable(reason, first_offset, last_offset)
        self.base_offset = first_offset
        self.last_offset = last_offset
        self.next_offset = last_offset + 1

    def validate_crc(self) -> bool:
        """Known to be wrong, and dealt with."""
        return True

    def has_producer_id(self) -> bool:
        """Unknown: so it is neither aborted nor a marker."""
        return False

    def __iter__(self) -> Iterator[Any]:
        yield self._record


def _believable_end(batch: Any) -> int:
    """The last offset of a batch with a wrong checksum: as its header says, if what it says is consistent."""
    if batch.magic >= 2 and 0 < batch.records_count == batch.last_offset_delta + 1:
        return int(batch.last_offset)
    return int(batch.base_offset)


def _unreadable(reason: str, first_offset: int, offset: int) -> DefaultRecord:
    return DefaultRecord(0, offset, -1, 0, None, Unreadable.because(" ".join(reason.split())[:300], first_offset), [])


def _field(data: Any, position: int) -> tuple[bytes | None, int]:
    """A length and as many bytes; None for length -1."""
    length, position = decode_varint(data, position)
    if length < 0:
        return None, position
    end = position + length
    if end > len(data):
        raise _Broken("a field reaches beyond its record")
    return bytes(data[position:end]), end


def _check_message_set(data: bytes, overhead: int) -> None:
    """The lengths of an unpacked message set lead from one message to the next, to the end."""
    position = 0
    while position < len(data):
        (length,) = struct.unpack_from(">i", data, position + 8)
        if length < 14 or position + overhead + length > len(data):
            raise _Broken("a message reaches beyond its set")
        position += overhead + length


def _unpack(codec: int, data: bytes | memoryview, limit: int) -> bytes:
    """Decompress at most `limit` bytes."""
    try:
        unpack = {1: _gunzip, 2: _unsnap, 3: _unlz4, 4: _unzstd}[codec]
    except KeyError:
        raise _Broken(f"unknown compression {codec}") from None
    return unpack(data, limit)


class _Output:
    """Collects unpacked chunks up to the limit."""

    def __init__(self, limit: int) -> None:
        self._chunks: list[bytes] = []
        self._left = limit

    def add(self, chunk: bytes) -> None:
        self._left -= len(chunk)
        if self._left < 0:
            raise _Broken("the batch unpacks to more than the limit")
        self._chunks.append(chunk)

    def join(self) -> bytes:
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)


def _gunzip(data: bytes | memoryview, limit: int) -> bytes:
    output = _Output(limit)
    while data:
        member = zlib.decompressobj(wbits=31)
        output.add(member.decompress(data, CHUNK_BYTES))
        while not member.eof:
            chunk = member.decompress(member.unconsumed_tail, CHUNK_BYTES)
            if not chunk and not member.eof:
                raise _Broken("the gzip stream is cut off")
            output.add(chunk)
        data = member.unused_data.lstrip(b"\0")
    return output.join()


def _unlz4(data: bytes | memoryview, limit: int) -> bytes:
    output = _Output(limit)
    while data:
        frame = lz4.frame.LZ4FrameDecompressor()
        output.add(frame.decompress(data, max_length=CHUNK_BYTES))
        while not frame.eof:
            if frame.needs_input:
                raise _Broken("the lz4 frame is cut off")
            output.add(frame.decompress(b"", max_length=CHUNK_BYTES))
        data = frame.unused_data or b""
    return output.join()


def _unzstd(data: bytes | memoryview, limit: int) -> bytes:
    output = _Output(limit)
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True) as reader:
        while chunk := reader.read(CHUNK_BYTES):
            output.add(chunk)
    return output.join()


def _unsnap(packed: bytes | memoryview, limit: int) -> bytes:
    output = _Output(limit)
    data = bytes(packed)
    if not data.startswith(XERIAL_MAGIC):
        output.add(_unsnap_block(data, limit))
        return output.join()
    position = XERIAL_HEADER_BYTES
    while position < len(data):
        (size,) = struct.unpack_from(">i", data, position)
        position += 4
        if size < 0 or position + size > len(data):
            raise _Broken("a snappy block reaches beyond its stream")
        output.add(_unsnap_block(data[position : position + size], limit))
        position += size
    return output.join()


def _unsnap_block(block: bytes, limit: int) -> bytes:
    """A raw block says first how large it unpacks."""
    declared = shift = 0
    for byte in block[:5]:
        declared |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    if declared > limit:
        raise _Broken("the batch unpacks to more than the limit")
    return bytes(snappy.decompress(block))
