"""What is fuzzed: a function for each door through which foreign bytes come in; it raises where a promise breaks.

events    a Kafka record: the three event forms, the retry envelope, the dead-letter envelope, the verdict that follows
images    an image: decoder, crops, provenance
scores    a value from the cache
policies  a policy file
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import jsonschema

from engine import images as decoder
from worker import contracts
from worker.contracts.event import MAX_CONTEXT_BYTES, EventLimits
from worker.contracts.schemas import verdict_schema
from worker.envelopes import dead_headers, open_dead, open_retry
from worker.errors import Code, ConfigurationError
from worker.items import Decision, Headers, ModelRef, Position, Record
from worker.stages import cache_entry, policy_file, provenance

LIMITS = EventLimits(max_image_bytes=1 << 16, max_event_bytes=1 << 18)
IMAGE_LIMITS = decoder.Limits(max_pixels=1 << 20, max_frames=3)
MODEL = ModelRef("code", "1", "linear", "null", "cpu")
UNDETERMINED = Decision("undetermined", "review", False, "p", "1")
POSITION = Position("image.uploads", 0, 7, 1)
KEY = b"code:1:key"


def record_of(data: bytes) -> Record:
    """Lines `name: value`, an empty line, the record's value: seeds can be read and written by hand."""
    head, blank, value = data.partition(b"\n\n")
    if not blank:
        head, value = b"", data
    headers: list[tuple[str, bytes]] = []
    for line in head.splitlines():
        name, _, text = line.partition(b": ")
        headers.append((name.decode("utf-8", "replace"), text))
    return Record(POSITION, b"key", value, tuple(headers), 1_700_000_000_000)


@cache
def _verdicts() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(verdict_schema())


def events(data: bytes) -> None:
    """Nothing but an EventError comes out; whatever has an id has a verdict that its schema accepts and the topic can carry."""
    record, delivery = open_retry(record_of(data))
    try:
        event = contracts.parse(record, LIMITS, delivery.origin)
    except contracts.EventError as error:
        _check(error.code in (Code.EVENT_MALFORMED, Code.EVENT_TOO_LARGE), f"code {error.code}")
        _check(0 < len(error.message) <= 1000, "a message that says something, in bounds")
        _check_letter(record.headers, error.code.value, error.message)
        if error.event is None:
            return
        event = error.event
    else:
        _check((event.url is None) != (event.inline is None), "one image")
        _check(len(event.inline or b"") <= LIMITS.max_image_bytes, "the image's size")
    verdict = contracts.build_verdict(
        event=event,
        source=delivery.origin or record.position,
        model=MODEL,
        decision=UNDETERMINED,
        processed_at=1_700_000_000.0,
        reason=Code.EVENT_MALFORMED,
    )
    text = verdict.to_json()
    _verdicts().validate(json.loads(text))
    _check(len(text) <= 8 * MAX_CONTEXT_BYTES, "the verdict's size")
    for name, value in contracts.verdict_headers(verdict, event.traceparent):
        _check(re.fullmatch(r"[a-z_-]+", name) is not None and b"\n" not in value, f"header {name}")


def _check_letter(headers: Headers, code: str, message: str) -> None:
    """A dead letter gives back what was put in."""
    sent = tuple(dead_headers(headers, code, message, POSITION, 1, 1_700_000_000.0))
    letter = open_dead(b"key", b"value", sent)
    _check(letter is not None and letter.code == code, "a dead letter that can be opened")


def images(data: bytes) -> None:
    """An image or an ImageError; crops in their shape; provenance in its bounds."""
    try:
        crops = decoder.read_crops(data, IMAGE_LIMITS, "center")
    except decoder.ImageError as error:
        _check("\n" not in str(error) and len(str(error)) <= 400, "one line")
    else:
        _check(crops.crops.shape[1:] == (224, 224, 3) and crops.crops.dtype.name == "uint8", "crops")
        _check(1 <= len(crops.crops) <= IMAGE_LIMITS.max_frames * crops.crops_per_frame, "frames")
        _check(crops.width >= 1 and crops.height >= 1 and crops.frame_count >= 1, "size")
    for name, value in provenance.read(data).items():
        _check(name in cache_entry.PROVENANCE_FIELDS, name)
        _check(value is None or (0 < len(value) <= 200 and value.isprintable()), f"{name}: {value!r}")


def scores(data: bytes) -> None:
    """A cached score that could have been written, or an EntryError. The checksum is made right, or nothing would pass it."""
    crc = b"%08x" % zlib.crc32(KEY + data)
    try:
        entry = cache_entry.decode(b"1:" + crc + b":" + data, KEY, "scope", "0" * 64)
    except cache_entry.EntryError:
        return
    _check(all(0.0 <= p <= 1.0 for p in (*entry.scores.heads.values(), *entry.scores.crops)), "probabilities")
    again = cache_entry.decode(cache_entry.encode(entry, KEY), KEY, "scope", "0" * 64)
    _check(again == entry, "written and read again")


def policies(data: bytes) -> None:
    """A policy, or faults of one line each that name the source."""
    try:
        policy_file.parse(data, "policy.toml")
    except ConfigurationError as error:
        for problem in error.problems:
            _check(problem.startswith("policy.toml") and "\n" not in problem, problem)


def _check(holds: bool, promise: str) -> None:
    if not holds:
        raise AssertionError(f"broken promise: {promise}")


TARGETS: dict[str, Callable[[bytes], Any]] = {"events": events, "images": images, "scores": scores, "policies": policies}
