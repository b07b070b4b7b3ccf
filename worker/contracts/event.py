"""The upload event: its three forms on the wire (contract, section 3) become one `Event`, or an `EventError`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from pydantic_core import from_json, to_json

from worker.contracts import fields
from worker.contracts.fields import FieldError
from worker.errors import Code, ItemError
from worker.items import Event, Position, Record

MAX_CONTEXT_BYTES = 256 * 1024
"""Most bytes of an event beside its image: what a verdict may have to carry."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ID_PREFIX_BYTES = 64 * 1024
_SAFE_IN_PART = ("event_id", "id", "tenant", "data")
"""Read from the beginning of an object too large to parse: strings come whole or not at all."""


@dataclass(frozen=True, slots=True)
class EventLimits:
    """Sizes beyond which an event is `event.too_large`."""

    max_image_bytes: int
    """Of an image that comes inside the event, decoded."""
    max_event_bytes: int
    """Of the whole record: key, value and headers."""
    max_context_bytes: int = MAX_CONTEXT_BYTES
    """Of everything beside the image."""


class EventError(ItemError):
    """The record is no usable event (`event.malformed`, `event.too_large`).

    `event`: what could be read of it, for the verdict: id, tenant, item, attributes, traceparent; None where no id can be
    read, and then there is no verdict, only a dead letter.
    """

    def __init__(self, code: Code, message: str, event: Event | None = None) -> None:
        super().__init__(code, message)
        self.event = event

    @property
    def event_id(self) -> str | None:
        """The event's id where one can be read."""
        return self.event.event_id if self.event else None


def parse(record: Record, limits: EventLimits, origin: Position | None = None) -> Event:
    """Read an upload event in any of its three forms.

    Args:
        record: as it came from the topic.
        limits: on sizes.
        origin: where the upload stood first, for a record of the retry topic: the id of a raw image without one.

    Raises:
        EventError: `event.malformed` or `event.too_large`; nothing else, whatever the record holds.
    """
    reader = _Reader(record, limits, origin or record.position)
    try:
        return reader.read()
    except FieldError as error:
        raise EventError(error.code, error.message, reader.readable()) from error


class _Form(Enum):
    JSON = auto()
    STRUCTURED = auto()
    BINARY = auto()
    RAW = auto()


class _Reader:
    """One record on its way to an event; keeps what was already understood for the case that the rest is broken."""

    def __init__(self, record: Record, limits: EventLimits, position: Position) -> None:
        self._record = record
        self._value = record.value
        self._limits = limits
        self._position = position
        # The last of several headers of one name counts, as in Kafka's own lastHeader().
        self._headers = {name.lower(): value for name, value in record.headers if value is not None}
        self._fields: dict[str, Any] = {}
        self._envelope: dict[str, Any] = {}
        self._form = _Form.JSON

    def read(self) -> Event:
        """The form is told by the headers alone."""
        content_type = self._text("content-type") or ""
        media_type = content_type.partition(";")[0].strip().lower()
        if media_type.startswith("image/"):
            self._form = _Form.RAW
            return self._raw(content_type)
        if media_type.startswith("application/cloudevents"):
            self._form = _Form.STRUCTURED
            return self._structured(media_type)
        if "ce_id" in self._headers or "ce_specversion" in self._headers:
            self._form = _Form.BINARY
            self._fields = self._object(self._body())
            return self._event(fields.event_id(self._text("ce_id"), "ce_id"))
        self._fields = self._object(self._body())
        return self._event(fields.event_id(self._fields.get("event_id")))

    def readable(self) -> Event | None:
        """The event as far as it can be understood; None without an id."""
        if self._form is _Form.STRUCTURED and not self._envelope:  # the envelope itself was refused
            data = self._fields.get("data")
            self._envelope, self._fields = self._fields, data if isinstance(data, dict) else {}
        for candidate in self._id_candidates():
            try:
                found = fields.event_id(candidate)
            except FieldError:
                continue
            context = fields.context(self._fields)
            if len(to_json(context)) > self._limits.max_context_bytes:
                context = {"tenant": context.get("tenant", "default")}
            return Event(found, url=None, inline=None, traceparent=self._trace(), **context)
        return None

    # The three forms.

    def _raw(self, content_type: str) -> Event:
        self._within_record_limit()
        self._fields = {name: self._text(name) for name in ("tenant", "sha256", "uploaded_at")}
        self._fields |= {name: self._json_header(name) for name in ("item", "attributes")}
        if (priority := self._text("priority")) is not None:
            self._fields["priority"] = fields.priority_text(priority)
        self._fields["content_type"] = self._text("content_type") or content_type
        if not self._value:
            raise FieldError("value: empty; expected the image's bytes")
        if len(self._value) > self._limits.max_image_bytes:
            raise FieldError(f"value: larger than {self._limits.max_image_bytes} bytes", Code.EVENT_TOO_LARGE)
        self._context_within_limit(self._record.size_bytes - len(self._value))
        return self._build(self._raw_id(), None, self._value)

    def _structured(self, media_type: str) -> Event:
        if media_type != "application/cloudevents+json":
            raise FieldError(f"content-type: {media_type[:80]} is not supported; use application/cloudevents+json")
        self._envelope = envelope = self._object(self._body())
        version = envelope.get("specversion", "1.0")
        if not isinstance(version, str) or not version.startswith("1."):
            raise FieldError("specversion: must be 1.0")
        if envelope.get("data_base64") is not None:
            self._body_of_envelope(envelope)
        else:
            data = envelope.get("data")
            if not isinstance(data, dict):
                raise FieldError("data: required" if data is None else "data: must be an object")
            self._fields = data
        return self._event(fields.event_id(envelope.get("id"), "id"))

    def _body_of_envelope(self, envelope: dict[str, Any]) -> None:
        if envelope.get("data") is not None:
            raise FieldError("data: must not stand beside data_base64")
        encoded, body = envelope["data_base64"], self._body()
        self._context_within_limit(len(body) - (len(encoded) if isinstance(encoded, str) else 0), escaped=body)
        self._value = fields.image_bytes(encoded, self._limits.max_event_bytes, "data_base64")
        self._fields = self._object(self._value)

    # From fields to an event.

    def _event(self, event_id: str) -> Event:
        image = self._fields.get("image")
        data = image.get("bytes") if isinstance(image, dict) else None
        body = self._body()
        self._context_within_limit(len(body) - (len(data) if isinstance(data, str) else 0), escaped=body)
        url, inline = fields.image(image, self._limits.max_image_bytes)
        return self._build(event_id, url, inline)

    def _build(self, event_id: str, url: str | None, inline: bytes | None) -> Event:
        read = self._fields.get
        return Event(
            event_id=event_id,
            url=url,
            inline=inline,
            tenant=fields.tenant(read("tenant")),
            item=fields.item(read("item")),
            attributes=fields.attributes(read("attributes")),
            content_type=fields.content_type(read("content_type")),
            sha256=fields.sha256(read("sha256")),
            priority=fields.priority(read("priority")),
            uploaded_at=fields.uploaded_at(read("uploaded_at")),
            traceparent=self._trace(),
        )

    # The value.

    def _body(self) -> bytes:
        if self._value is None:
            raise FieldError("value: none (a tombstone); expected an upload event")
        return self._value

    def _object(self, data: bytes) -> dict[str, Any]:
        """The JSON object in `data`.

        Every JSON value but the first follows one of `,` `[` `{`, and base64 holds none of them: counting those bounds
        the memory that parsing a hostile event of full size could take (tens of times its own size, otherwise).
        """
        limit = self._limits.max_context_bytes
        if len(data) > limit and data.count(b",") + data.count(b"[") + data.count(b"{") > limit:
            self._fields = self._first_fields(data)
            raise FieldError(f"value: more than {limit} bytes beside the image", Code.EVENT_TOO_LARGE)
        try:
            parsed = from_json(data.removeprefix(_BYTE_ORDER_MARK), allow_inf_nan=False)
        except ValueError as error:
            self._within_record_limit()
            raise FieldError(f"value: not valid JSON: {error}") from error
        if not isinstance(parsed, dict):
            raise FieldError("value: must be a JSON object")
        if self._record.size_bytes > self._limits.max_event_bytes:
            self._fields = parsed
            self._within_record_limit()
        return parsed

    def _first_fields(self, value: bytes) -> dict[str, Any]:
        """What stands whole in the beginning of an object too large to parse: enough for its id."""
        try:
            parsed = from_json(value.removeprefix(_BYTE_ORDER_MARK)[:_ID_PREFIX_BYTES], allow_partial=True)
        except ValueError:
            return {}
        found = {name: parsed[name] for name in _SAFE_IN_PART if name in parsed} if isinstance(parsed, dict) else {}
        if isinstance(data := found.get("data"), dict):
            found["data"] = {name: data[name] for name in _SAFE_IN_PART if name in data}
        return found

    # Limits.

    def _within_record_limit(self) -> None:
        if self._record.size_bytes > self._limits.max_event_bytes:
            raise FieldError(f"record: larger than {self._limits.max_event_bytes} bytes", Code.EVENT_TOO_LARGE)

    def _context_within_limit(self, beside_image_bytes: int, escaped: bytes = b"") -> None:
        """`escaped`: JSON in which every slash of the base64 may be written as `\\/`, as some producers do."""
        limit = self._limits.max_context_bytes
        if beside_image_bytes > limit and beside_image_bytes - escaped.count(b"\\/") > limit:
            raise FieldError(f"value: more than {limit} bytes beside the image", Code.EVENT_TOO_LARGE)

    # Headers.

    def _text(self, name: str) -> str | None:
        value = self._headers.get(name)
        if value is None:
            return None
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise FieldError(f"{name}: header is not UTF-8") from error

    def _json_header(self, name: str) -> Any:
        value = self._headers.get(name)
        if value is None:
            return None
        self._context_within_limit(len(value))
        try:
            return from_json(value, allow_inf_nan=False)
        except ValueError as error:
            raise FieldError(f"{name}: header is not valid JSON: {error}") from error

    def _raw_id(self) -> str:
        for name in ("ce_id", "event_id"):
            if name in self._headers:
                return fields.event_id(self._text(name), name)
        return self._position_id()

    def _position_id(self) -> str:
        return f"{self._position.topic}/{self._position.partition}/{self._position.offset}"

    def _id_candidates(self) -> list[str | None]:
        """Where an id may stand, the form's own place first."""
        in_headers = [self._readable_text(name) for name in ("ce_id", "event_id")]
        in_value = [self._envelope.get("id"), self._fields.get("event_id")]
        if self._form is _Form.RAW:
            return in_headers if any(name in self._headers for name in ("ce_id", "event_id")) else [self._position_id()]
        return [*in_headers[:1], *in_value, *in_headers[1:]] if self._form is _Form.BINARY else [*in_value, *in_headers]

    def _readable_text(self, name: str) -> str | None:
        try:
            return self._text(name)
        except FieldError:
            return None

    def _trace(self) -> str | None:
        for name in ("traceparent", "ce_traceparent"):
            if name in self._headers:
                return fields.traceparent(self._readable_text(name))
        return fields.traceparent(self._envelope.get("traceparent"))
