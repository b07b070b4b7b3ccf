"""Strict readers of the upload event's fields: a value comes out as the in-process type, or the field is named and refused.

`null` counts as absent for every optional field, because many producers write out their empty fields.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from worker.errors import Code

MAX_ID_CHARACTERS = 200
MAX_TENANT_CHARACTERS = 200
MAX_PRIORITY = 2**31 - 1
ITEM_FIELDS = ("type", "id", "creator_id")

SHA256_PATTERN = "^[0-9A-Fa-f]{64}$"
URL_PATTERN = "^[A-Za-z][A-Za-z0-9+.\\-]*://[\\s\\S]"
RFC3339_PATTERN = "^[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\\.[0-9]+)?(?:[Zz]|[+-][0-9]{2}:[0-9]{2})$"

_sha256 = re.compile(SHA256_PATTERN.strip("^$")).fullmatch
_url = re.compile(URL_PATTERN.strip("^")).match
_rfc3339 = re.compile(RFC3339_PATTERN.strip("^$"), re.ASCII).fullmatch
_digits = re.compile("[0-9]{1,10}", re.ASCII).fullmatch
_traceparent = re.compile("(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{1,200})?").fullmatch


class FieldError(Exception):
    """One field is wrong; `message` starts with its name and never repeats its value."""

    def __init__(self, message: str, code: Code = Code.EVENT_MALFORMED) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


def event_id(value: object, name: str = "event_id") -> str:
    """A string of 1 to 200 characters."""
    if value is None:
        raise FieldError(f"{name}: required")
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_ID_CHARACTERS:
        raise FieldError(f"{name}: must be a string of 1 to {MAX_ID_CHARACTERS} characters")
    return value


def tenant(value: object) -> str:
    """A string of 1 to 200 characters; `default` where absent."""
    if value is None:
        return "default"
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_TENANT_CHARACTERS:
        raise FieldError(f"tenant: must be a string of 1 to {MAX_TENANT_CHARACTERS} characters")
    return value


def content_type(value: object) -> str | None:
    """What the producer says the image is; kept, never trusted."""
    if value is not None and not isinstance(value, str):
        raise FieldError("content_type: must be a string")
    return value


def item(value: object) -> dict[str, str] | None:
    """`type`, `id` and `creator_id` of the platform's item, strings each; other fields are dropped."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise FieldError("item: must be an object")
    kept = {name: value[name] for name in ITEM_FIELDS if value.get(name) is not None}
    for name, text in kept.items():
        if not isinstance(text, str):
            raise FieldError(f"item.{name}: must be a string")
    return kept


def attributes(value: object) -> dict[str, str]:
    """Strings by name, passed through to the verdict untouched."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise FieldError("attributes: must be an object of strings")
    for text in value.values():
        if not isinstance(text, str):
            raise FieldError("attributes: every value must be a string")
    return value


def sha256(value: object) -> str | None:
    """64 hex digits, in lower case."""
    if value is None:
        return None
    if not isinstance(value, str) or not _sha256(value):
        raise FieldError("sha256: must be 64 hex digits")
    return value.lower()


def priority(value: object) -> int:
    """A whole number from 0 (the most urgent) to 2**31 - 1; `1.0` is the same number as `1` in JSON."""
    if value is None:
        return 0
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 <= value <= MAX_PRIORITY:  # a bool is no number here
        raise FieldError(f"priority: must be a whole number from 0 to {MAX_PRIORITY}")
    return value


def priority_text(value: str) -> int:
    """The same, from a header's decimal digits."""
    return priority(int(value) if _digits(value) else value)


def uploaded_at(value: object) -> float | None:
    """POSIX seconds of an RFC 3339 date and time; a leap second counts as the second after."""
    if value is None:
        return None
    if not isinstance(value, str) or not _rfc3339(value):
        raise FieldError("uploaded_at: must be an RFC 3339 date and time with an offset")
    leap = value[17:19] == "60"
    text = f"{value[:17]}59{value[19:]}" if leap else value
    try:
        # Python's parser takes capitals only.
        moment = datetime.fromisoformat(text.upper())
        return (moment + timedelta(seconds=1) if leap else moment).timestamp()
    except (ValueError, OverflowError) as error:
        raise FieldError("uploaded_at: no such date and time") from error


def url(value: object) -> str:
    """Text with a scheme and `://`; which schemes are served is the fetcher's matter."""
    if not isinstance(value, str) or not _url(value):
        raise FieldError("image.url: must be a URL with a scheme, such as https://, s3://, gs:// or file:///")
    return value


def image_bytes(value: object, max_bytes: int, name: str = "image.bytes") -> bytes:
    """Base64 as in RFC 4648, section 4: standard alphabet, padded, no white space; at most `max_bytes` decoded."""
    if not isinstance(value, str):
        raise FieldError(f"{name}: must be a base64 string")
    if len(value) // 4 * 3 - 2 > max_bytes:
        raise FieldError(f"{name}: larger than {max_bytes} bytes", Code.EVENT_TOO_LARGE)
    try:
        data = binascii.a2b_base64(value, strict_mode=True)
    except ValueError as error:  # binascii.Error, or a character beyond ASCII
        raise FieldError(f"{name}: not base64 (standard alphabet, padded, no white space)") from error
    if not data:
        raise FieldError(f"{name}: empty")
    if len(data) > max_bytes:
        raise FieldError(f"{name}: larger than {max_bytes} bytes", Code.EVENT_TOO_LARGE)
    return data


def image(value: object, max_bytes: int) -> tuple[str | None, bytes | None]:
    """URL or bytes, exactly one of them."""
    if not isinstance(value, dict):
        raise FieldError("image: required" if value is None else "image: must be an object")
    link, data = value.get("url"), value.get("bytes")
    if (link is None) == (data is None):
        raise FieldError("image: must hold exactly one of url and bytes")
    return (url(link), None) if data is None else (None, image_bytes(data, max_bytes))


def traceparent(value: object) -> str | None:
    """A W3C trace context; None where it is not one, since tracing never fails an event."""
    match = _traceparent(value) if isinstance(value, str) else None
    if match is None or (match[1] == "00" and match[2]):  # version 00 has nothing after the flags
        return None
    return match[0]


def context(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Tenant, item and attributes as far as they can be read: for the verdict of an event that is otherwise broken."""
    kept: dict[str, Any] = {}
    for name, read in _CONTEXT.items():
        try:
            kept[name] = read(fields.get(name))
        except FieldError:
            continue  # the field's default stands in; a fault is already being reported
    return kept


_CONTEXT: dict[str, Callable[[object], Any]] = {"tenant": tenant, "item": item, "attributes": attributes}
