"""JSON Schemas (draft 2020-12) of event, verdict and dead letter, for producers and consumers in other languages."""

from __future__ import annotations

from typing import Any

from worker.contracts.fields import (
    ITEM_FIELDS,
    MAX_ID_CHARACTERS,
    MAX_PRIORITY,
    MAX_TENANT_CHARACTERS,
    RFC3339_PATTERN,
    SHA256_PATTERN,
    URL_PATTERN,
)
from worker.contracts.verdict import Verdict
from worker.envelopes import DEAD_BLOCK, OMITTED
from worker.errors import Code

DRAFT = "https://json-schema.org/draft/2020-12/schema"
BASE64_PATTERN = "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{4}|[A-Za-z0-9+/]{3}=|[A-Za-z0-9+/]{2}==)$"

Schema = dict[str, Any]


def all_schemas() -> dict[str, Schema]:
    """Schemas by the name of their file."""
    return {
        "event.schema.json": event_schema(),
        "verdict.schema.json": verdict_schema(),
        "dead_letter.schema.json": dead_letter_schema(),
    }


def event_schema() -> Schema:
    """The upload event's object. Whoever follows it is never refused as `event.malformed`, short of a date that is none."""
    return {
        "$schema": DRAFT,
        "title": "Upload event",
        "description": (
            "Value of a record on the upload topic, or the data of a CloudEvent (structured or binary mode), whose id then takes"
            " the place of event_id. null stands for an absent optional field; unknown fields are ignored. Beside the image"
            " an event may have 256 KiB."
        ),
        "type": "object",
        "required": ["event_id", "image"],
        "properties": {
            "event_id": _text("Key of the verdict; the same id gives the same verdict_id.", maximum=MAX_ID_CHARACTERS),
            "image": {
                "description": "Exactly one of url and bytes.",
                "type": "object",
                "properties": {
                    "url": {
                        "description": "https, http, s3, gs or file, as the worker's settings allow.",
                        "type": ["string", "null"],
                        "pattern": URL_PATTERN,
                    },
                    "bytes": {
                        "description": "Base64 of RFC 4648, section 4, padded, without white space.",
                        "type": ["string", "null"],
                        "contentEncoding": "base64",
                        "minLength": 4,
                        "pattern": BASE64_PATTERN,
                    },
                },
                "oneOf": [_given("url"), _given("bytes")],
            },
            "tenant": _optional_text("Whose policy applies; default where absent.", maximum=MAX_TENANT_CHARACTERS),
            "item": {
                "description": "What the image belongs to on the platform; passed through.",
                "type": ["object", "null"],
                "properties": {name: {"type": ["string", "null"]} for name in ITEM_FIELDS},
            },
            "content_type": {"description": "Never trusted: the bytes decide.", "type": ["string", "null"]},
            "sha256": {
                "description": "Expected digest of the image; another one is fetch.hash_mismatch.",
                "type": ["string", "null"],
                "pattern": SHA256_PATTERN,
            },
            "priority": {
                "description": "0 is the most urgent, and the default.",
                "type": ["integer", "null"],
                "minimum": 0,
                "maximum": MAX_PRIORITY,
            },
            "uploaded_at": {"type": ["string", "null"], "format": "date-time", "pattern": RFC3339_PATTERN},
            "attributes": {
                "description": "Passed through to the verdict untouched.",
                "type": ["object", "null"],
                "additionalProperties": {"type": "string"},
            },
        },
    }


def verdict_schema() -> Schema:
    """The verdict. Fields may be added to it, never taken away: consumers ignore what they do not know."""
    schema = Verdict.model_json_schema(mode="serialization")
    _open(schema)
    schema["$defs"]["Code"]["description"] = "Why there is no score."
    return {"$schema": DRAFT} | schema | {"title": "Verdict"}


def dead_letter_schema() -> Schema:
    """A dead letter, its record written as an object: key and value in base64, headers as pairs of name and text."""
    described: dict[str, Schema] = {
        "__streams.errors.exception": {"description": "The failure's code.", "enum": [code.value for code in Code]},
        "__streams.errors.message": {"description": "What was wrong, in one line."},
        "__streams.errors.topic": {"description": "Where the upload stands."},
        "__streams.errors.partition": {"pattern": "^[0-9]+$"},
        "__streams.errors.offset": {"pattern": "^[0-9]+$"},
        "attempt": {"description": "How often it was tried.", "pattern": "^[1-9][0-9]*$"},
        "first_seen": {"description": "When it was tried first.", "format": "date-time", "pattern": RFC3339_PATTERN},
    }
    omitted = {"description": "Bytes left out because the broker refused the record for its size.", "pattern": "^[0-9]+$"}
    return {
        "$schema": DRAFT,
        "title": "Dead letter",
        "description": (
            "A record of the dead-letter topic: the original key, value and headers, byte by byte, and after them these headers,"
            " as UTF-8 text, in this order. Header values here are text; `headers` holds the added ones by name."
        ),
        "type": "object",
        "required": ["key", "value", "headers"],
        "properties": {
            "key": {"type": ["string", "null"], "contentEncoding": "base64"},
            "value": {"type": ["string", "null"], "contentEncoding": "base64"},
            "headers": {
                "type": "object",
                "required": list(DEAD_BLOCK),
                "properties": {name: {"type": "string", **described[name]} for name in DEAD_BLOCK}
                | {name: {"type": "string", **omitted} for name in OMITTED},
                "additionalProperties": {"type": ["string", "null"]},
            },
        },
    }


def _text(description: str, maximum: int) -> Schema:
    return {"description": description, "type": "string", "minLength": 1, "maxLength": maximum}


def _optional_text(description: str, maximum: int) -> Schema:
    return _text(description, maximum) | {"type": ["string", "null"]}


def _given(name: str) -> Schema:
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


def _open(schema: Any) -> None:
    """The models refuse fields they do not know; consumers of what they write must not."""
    if isinstance(schema, dict):
        if schema.get("additionalProperties") is False:
            del schema["additionalProperties"]
        for part in schema.values():
            _open(part)
    elif isinstance(schema, list):
        for part in schema:
            _open(part)
