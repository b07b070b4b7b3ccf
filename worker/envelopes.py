"""What the worker adds around an event's original headers: the envelope of a retry record and that of a dead letter.

An envelope is a block of headers in a fixed order at the end; everything before it is the uploader's and comes back
exactly, even a header of the same name. Only records of the retry and the dead-letter topic carry one: a forged block
on an upload topic is nothing but headers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from worker.contracts import rfc3339
from worker.items import Delivery, Headers, Position, Record

RETRY_BLOCK = ("attempt", "first_seen", "not_before", "origin_topic", "origin_partition", "origin_offset", "retry_code")
DEAD_BLOCK = (
    "__streams.errors.exception",
    "__streams.errors.message",
    "__streams.errors.topic",
    "__streams.errors.partition",
    "__streams.errors.offset",
    "attempt",
    "first_seen",
)
OMITTED = ("value_omitted", "key_omitted", "headers_omitted")
"""After the block of a dead letter: what had to be left out because the broker refused the record for its size, in bytes."""
MAX_MESSAGE_CHARS = 1_000

Headers_ = list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A dead letter, read back."""

    code: str
    message: str
    topic: str
    partition: int
    offset: int
    attempt: int
    first_seen: str
    key: bytes | None
    value: bytes | None
    headers: Headers
    """The original ones, without the envelope."""
    omitted: dict[str, int]
    """What was left out for its size, with its size in bytes; such a letter cannot be published again."""


def retry_headers(original: Headers, delivery: Delivery, code: str, not_before: float) -> Headers_:
    """`original` and the envelope of the next try. `delivery` counts that one; its origin is the upload."""
    origin = delivery.origin
    if origin is None or delivery.first_seen is None:
        raise ValueError("a retry needs its origin and the time of the first try")
    values = (
        str(delivery.attempt),
        rfc3339(delivery.first_seen),
        rfc3339(not_before),
        origin.topic,
        str(origin.partition),
        str(origin.offset),
        code,
    )
    return [*_sendable(original), *_block(RETRY_BLOCK, values)]


def open_retry(record: Record) -> tuple[Record, Delivery]:
    """The record as it was uploaded, and how often it was tried. For records of the retry topic only.

    One without an envelope (somebody else wrote it there) counts as an upload of its own.
    """
    fields = _fields(record.headers, RETRY_BLOCK)
    if fields is None:
        return record, Delivery()
    try:
        delivery = Delivery(
            attempt=_number(fields["attempt"], 1),
            first_seen=_moment(fields["first_seen"]),
            not_before=_moment(fields["not_before"]),
            origin=Position(fields["origin_topic"], _number(fields["origin_partition"]), _number(fields["origin_offset"]), 0),
        )
    except ValueError:
        return record, Delivery()
    return replace(record, headers=record.headers[: -len(RETRY_BLOCK)]), delivery


def dead_headers(original: Headers, code: str, message: str, origin: Position, attempt: int, first_seen: float) -> Headers_:
    """`original` and the envelope of a dead letter (contract, section 5)."""
    line = " ".join(message.split())[:MAX_MESSAGE_CHARS]
    values = (code, line, origin.topic, str(origin.partition), str(origin.offset), str(attempt), rfc3339(first_seen))
    return [*_sendable(original), *_block(DEAD_BLOCK, values)]


def open_dead(key: bytes | None, value: bytes | None, headers: Headers) -> DeadLetter | None:
    """Read a record of the dead-letter topic; None where it is not one of ours."""
    end = len(headers)
    omitted: dict[str, int] = {}
    while end and headers[end - 1][0] in OMITTED:
        name, size = headers[end - 1]
        omitted[name.removesuffix("_omitted")] = int(size) if size and size.isdigit() else 0
        end -= 1
    fields = _fields(headers[:end], DEAD_BLOCK)
    if fields is None:
        return None
    try:
        return DeadLetter(
            code=fields["__streams.errors.exception"],
            message=fields["__streams.errors.message"],
            topic=fields["__streams.errors.topic"],
            partition=_number(fields["__streams.errors.partition"]),
            offset=_number(fields["__streams.errors.offset"]),
            attempt=_number(fields["attempt"]),
            first_seen=fields["first_seen"],
            key=key,
            value=value,
            headers=headers[: end - len(DEAD_BLOCK)],
            omitted=omitted,
        )
    except ValueError:
        return None


def without_attributes(verdict: bytes) -> bytes:
    """A verdict whose uploader's own fields made it too large for the broker, without them."""
    body: dict[str, Any] = json.loads(verdict)
    body["attributes"], body["item"] = {}, None
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()


def _block(names: tuple[str, ...], values: tuple[str, ...]) -> Headers_:
    return [(name, value.encode()) for name, value in zip(names, values, strict=True)]


def _fields(headers: Headers, names: tuple[str, ...]) -> dict[str, str] | None:
    """The block's values if `headers` end with exactly these names."""
    block = headers[-len(names) :]
    if tuple(name for name, _ in block) != names:
        return None
    try:
        return {name: value.decode() for name, value in block}
    except (UnicodeDecodeError, AttributeError):  # not ours: not text, or null
        return None


def _sendable(headers: Headers) -> Headers_:
    """kafka-python refuses to send a header whose value is null, though it reads them: it becomes empty."""
    return [(name, b"" if value is None else value) for name, value in headers]


def _number(text: str, least: int = 0) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) >= least):
        raise ValueError(f"not a number from {least}: {text[:20]!r}")
    return int(text)


def _moment(text: str) -> float:
    if len(text) > 40:
        raise ValueError("not a time")
    return datetime.fromisoformat(text).timestamp()
