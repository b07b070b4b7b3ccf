"""The three forms of an upload event, and everything that can be wrong with one."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.contracts import EventError, EventLimits, parse
from worker.errors import Code
from worker.items import Event, Headers, Position, Record

LIMITS = EventLimits(max_image_bytes=1000, max_event_bytes=400_000)
IMAGE = bytes(range(256))
POSITION = Position("image.uploads", 3, 42, 1)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def record(value: bytes | None, *headers: tuple[str, str | bytes], key: bytes | None = None) -> Record:
    encoded: Headers = tuple((name, text.encode() if isinstance(text, str) else text) for name, text in headers)
    return Record(POSITION, key, value, encoded, 1_700_000_000_000)


def payload(**changes: Any) -> dict[str, Any]:
    full = {
        "event_id": "e-1",
        "image": {"url": "https://example.org/a.jpg"},
        "tenant": "acme",
        "item": {"type": "post", "id": "7", "creator_id": "9"},
        "content_type": "image/jpeg",
        "sha256": "AB" * 32,
        "priority": 2,
        "uploaded_at": "2024-05-01T10:00:00.5+02:00",
        "attributes": {"any": "string", "": ""},
    }
    return {name: value for name, value in (full | changes).items() if value is not ...}


def encode(value: object) -> bytes:
    return json.dumps(value).encode()


FULL = Event(
    event_id="e-1",
    url="https://example.org/a.jpg",
    inline=None,
    tenant="acme",
    item={"type": "post", "id": "7", "creator_id": "9"},
    attributes={"any": "string", "": ""},
    content_type="image/jpeg",
    sha256="ab" * 32,
    priority=2,
    uploaded_at=1714550400.5,
    traceparent=TRACE,
)


def refused(value: Record, code: Code = Code.EVENT_MALFORMED) -> EventError:
    with pytest.raises(EventError) as caught:
        parse(value, LIMITS)
    assert caught.value.code is code
    assert "\n" not in caught.value.message
    return caught.value


def test_json_form() -> None:
    assert parse(record(encode(payload()), ("traceparent", TRACE)), LIMITS) == FULL


def test_structured_form_takes_the_envelopes_id() -> None:
    envelope = {"specversion": "1.0", "id": "e-1", "type": "t", "source": "/s", "data": payload(event_id="other")}
    for content_type in ("application/cloudevents+json", "Application/CloudEvents+JSON; charset=UTF-8"):
        assert parse(record(encode(envelope), ("content-type", content_type), ("traceparent", TRACE)), LIMITS) == FULL


def test_structured_form_with_its_object_in_base64() -> None:
    data = base64.b64encode(encode(payload(event_id=...))).decode()
    envelope = {"specversion": "1.0", "id": "e-1", "data_base64": data, "traceparent": TRACE}
    assert parse(record(encode(envelope), ("content-type", "application/cloudevents+json")), LIMITS) == FULL


def test_binary_form_takes_the_headers_id() -> None:
    headers = [("ce_specversion", "1.0"), ("ce_id", "e-1"), ("ce_type", "t"), ("ce_source", "/s"), ("traceparent", TRACE)]
    for content_type in ([], [("content-type", "application/json")]):
        assert parse(record(encode(payload(event_id=...)), *headers, *content_type), LIMITS) == FULL
        assert parse(record(encode(payload(event_id="other")), *headers, *content_type), LIMITS) == FULL


def test_raw_form_takes_its_fields_from_headers() -> None:
    headers = [
        ("Content-Type", "image/JPEG; q=1"),
        ("ce_id", "e-1"),
        ("event_id", "other"),
        ("tenant", "acme"),
        ("item", '{"type": "post", "id": "7", "creator_id": "9"}'),
        ("sha256", "AB" * 32),
        ("priority", "2"),
        ("uploaded_at", "2024-05-01T08:00:00.5Z"),
        ("attributes", '{"any": "string", "": ""}'),
        ("traceparent", TRACE),
    ]
    event = parse(record(IMAGE, *headers), LIMITS)
    assert event == Event(
        **{name: getattr(FULL, name) for name in Event.__slots__}
        | {"url": None, "inline": IMAGE, "content_type": "image/JPEG; q=1"}
    )


def test_raw_form_without_an_id_is_named_by_its_place() -> None:
    assert parse(record(IMAGE, ("content-type", "image/png"), ("event_id", "x")), LIMITS).event_id == "x"
    assert parse(record(IMAGE, ("content-type", "image/png")), LIMITS).event_id == "image.uploads/3/42"
    origin = Position("image.uploads", 0, 7, 0)
    assert parse(record(IMAGE, ("content-type", "image/png")), LIMITS, origin).event_id == "image.uploads/0/7"


def test_inline_bytes() -> None:
    event = parse(record(encode({"event_id": "e", "image": {"bytes": base64.b64encode(IMAGE).decode()}})), LIMITS)
    assert (event.inline, event.url, event.tenant, event.priority) == (IMAGE, None, "default", 0)


def test_null_counts_as_absent_and_unknown_fields_are_ignored() -> None:
    nulls = dict.fromkeys(("tenant", "item", "content_type", "sha256", "priority", "uploaded_at", "attributes"))
    value = {"event_id": "e", "image": {"url": "s3://b/k", "bytes": None, "w": 1}, "extra": [1], **nulls}
    assert parse(record(encode(value)), LIMITS) == Event(event_id="e", url="s3://b/k", inline=None)
    item = {"type": None, "id": "1", "more": {"a": 1}}
    assert parse(record(encode(payload(item=item))), LIMITS).item == {"id": "1"}


def test_a_whole_number_may_be_written_with_a_point() -> None:
    assert parse(record(encode(payload(priority=1.0))), LIMITS).priority == 1


def test_a_byte_order_mark_is_no_fault() -> None:
    assert parse(record(b"\xef\xbb\xbf" + encode(payload())), LIMITS).event_id == "e-1"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"image": ...}, "image"),
        ({"image": "https://example.org/a.jpg"}, "image"),
        ({"image": {}}, "image"),
        ({"image": {"url": None}}, "image"),
        ({"image": {"url": "https://a/b", "bytes": "AAAA"}}, "image"),
        ({"image": {"url": "a/b.jpg"}}, "image.url"),
        ({"image": {"url": "//a/b.jpg"}}, "image.url"),
        ({"image": {"url": "data:image/png;base64,AAAA"}}, "image.url"),
        ({"image": {"url": "https://"}}, "image.url"),
        ({"image": {"url": ""}}, "image.url"),
        ({"image": {"url": 5}}, "image.url"),
        ({"image": {"bytes": ""}}, "image.bytes"),
        ({"image": {"bytes": "AAA"}}, "image.bytes"),
        ({"image": {"bytes": "AAAA\n"}}, "image.bytes"),
        ({"image": {"bytes": "AA-_"}}, "image.bytes"),
        ({"image": {"bytes": "AA==AA=="}}, "image.bytes"),
        ({"image": {"bytes": "äääü"}}, "image.bytes"),
        ({"image": {"bytes": [1]}}, "image.bytes"),
        ({"tenant": ""}, "tenant"),
        ({"tenant": 1}, "tenant"),
        ({"tenant": "t" * 201}, "tenant"),
        ({"item": "post"}, "item"),
        ({"item": {"id": 7}}, "item.id"),
        ({"content_type": 1}, "content_type"),
        ({"sha256": "ab"}, "sha256"),
        ({"sha256": "g" * 64}, "sha256"),
        ({"sha256": "a" * 64 + "\n"}, "sha256"),
        ({"priority": -1}, "priority"),
        ({"priority": 1.5}, "priority"),
        ({"priority": float("1e300")}, "priority"),
        ({"priority": True}, "priority"),
        ({"priority": "1"}, "priority"),
        ({"priority": 2**31}, "priority"),
        ({"uploaded_at": "yesterday"}, "uploaded_at"),
        ({"uploaded_at": "2024-05-01"}, "uploaded_at"),
        ({"uploaded_at": "2024-05-01T10:00:00"}, "uploaded_at"),
        ({"uploaded_at": "2024-02-30T10:00:00Z"}, "uploaded_at"),
        ({"uploaded_at": "0000-01-01T00:00:00Z"}, "uploaded_at"),
        ({"uploaded_at": "9999-12-31T23:59:60Z"}, "uploaded_at"),
        ({"uploaded_at": 1714550400}, "uploaded_at"),
        ({"attributes": {"a": 1}}, "attributes"),
        ({"attributes": {"a": None}}, "attributes"),
        ({"attributes": ["a"]}, "attributes"),
    ],
)
def test_a_wrong_field_is_named_and_the_id_kept(changes: dict[str, Any], field: str) -> None:
    error = refused(record(encode(payload(**changes)), ("traceparent", TRACE)))
    assert error.message.startswith(f"{field}:")
    assert error.event is not None
    assert error.event.event_id == "e-1"
    assert error.event.traceparent == TRACE
    assert error.event.tenant == ("default" if field == "tenant" else "acme")
    assert error.event.attributes == ({} if field == "attributes" else {"any": "string", "": ""})


@pytest.mark.parametrize("event_id", [..., None, "", "x" * 201, 5, ["a"]])
def test_no_valid_id_no_verdict(event_id: object) -> None:
    error = refused(record(encode(payload(event_id=event_id))))
    assert error.message.startswith("event_id:")
    assert error.event is None


def test_ids_of_the_longest_and_shortest_length() -> None:
    for event_id in ("x", "ü" * 200, "a/b c\u0000"):
        assert parse(record(encode(payload(event_id=event_id))), LIMITS).event_id == event_id


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b" ",
        b"{",
        b'{"event_id": "e-1", "image": {"url": "https://a',
        b"[]",
        b'"text"',
        b"null",
        b"5",
        b'{"event_id": "e-1", "image": {"url": "https://a/b"}, "x": NaN}',
        b'{"event_id": "e-1", "image": {"url": "https://a/b"}} {}',
        b'{"event_id": "e-1", "image": {"url": "https://a/b"}, "x": "\xff"}',
        b'{"event_id": "\\ud800", "image": {"url": "https://a/b"}}',
        b'{"a":' * 50_000,
        b"[" * 90_000,
        b'{"x": 1' + b"1" * 50_000 + b"}",
        '{"event_id": "e-1"}'.encode("utf-16"),
        IMAGE,
    ],
)
def test_a_broken_body_has_no_id_but_a_headers(value: bytes | None) -> None:
    assert refused(record(value)).event_id is None
    assert refused(record(value, ("event_id", "h-1"))).event_id == "h-1"
    assert refused(record(value, ("ce_id", "h-2"))).event_id == "h-2"
    assert refused(record(value, ("content-type", "application/cloudevents+json"), ("ce_id", "h-2"))).event_id == "h-2"


@pytest.mark.parametrize(
    ("changes", "message", "event_id"),
    [
        ({"id": ...}, "id: required", "inner"),
        ({"id": ""}, "id:", "inner"),
        ({"id": 4}, "id:", "inner"),
        ({"specversion": "0.3"}, "specversion:", "outer"),
        ({"specversion": 1}, "specversion:", "outer"),
        ({"data": ...}, "data: required", "outer"),
        ({"data": "text"}, "data:", "outer"),
        ({"data_base64": "AAAA"}, "data:", "outer"),
        ({"data": ..., "data_base64": "!"}, "data_base64:", "outer"),
        ({"data": ..., "data_base64": "AAAA"}, "value:", "outer"),
    ],
)
def test_a_broken_envelope(changes: dict[str, Any], message: str, event_id: str) -> None:
    envelope = {"specversion": "1.0", "id": "outer", "data": payload(event_id="inner")} | changes
    envelope = {name: value for name, value in envelope.items() if value is not ...}
    error = refused(record(encode(envelope), ("content-type", "application/cloudevents+json")))
    assert error.message.startswith(message)
    assert error.event_id == event_id


def test_other_cloudevents_encodings_are_refused() -> None:
    error = refused(record(encode([payload()]), ("content-type", "application/cloudevents-batch+json")))
    assert "application/cloudevents+json" in error.message


def test_binary_form_needs_its_id_header() -> None:
    assert refused(record(encode(payload()), ("ce_specversion", "1.0"))).event_id == "e-1"
    assert refused(record(encode(payload()), ("ce_specversion", "1.0"), ("ce_id", b"\xff"))).event_id == "e-1"
    assert refused(record(encode(payload(image=...)), ("ce_id", "h-1"))).event_id == "h-1"


def test_other_ce_headers_alone_leave_the_json_form() -> None:
    assert parse(record(encode(payload()), ("ce_type", "t")), LIMITS).event_id == "e-1"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (("priority", "-1"), "priority:"),
        (("priority", "1.0"), "priority:"),
        (("priority", "٣"), "priority:"),
        (("priority", "9" * 400), "priority:"),
        (("item", "post"), "item:"),
        (("item", "[]"), "item:"),
        (("attributes", '{"a": 1}'), "attributes:"),
        (("attributes", b'{"a": "\xff"}'), "attributes:"),
        (("tenant", b"\xff"), "tenant:"),
        (("sha256", "zz"), "sha256:"),
        (("uploaded_at", "now"), "uploaded_at:"),
    ],
)
def test_a_wrong_header_of_the_raw_form(header: tuple[str, str | bytes], message: str) -> None:
    error = refused(record(IMAGE, ("content-type", "image/png"), ("ce_id", "e-9"), header))
    assert error.message.startswith(message)
    assert error.event_id == "e-9"
    assert refused(record(IMAGE, ("content-type", "image/png"), header)).event_id == "image.uploads/3/42"


@pytest.mark.parametrize("header", [("ce_id", ""), ("ce_id", "x" * 201), ("ce_id", b"\xff"), ("event_id", "")])
def test_a_wrong_id_header_of_the_raw_form_is_no_id(header: tuple[str, str | bytes]) -> None:
    assert refused(record(IMAGE, ("content-type", "image/png"), header)).event is None


@pytest.mark.parametrize("value", [None, b""])
def test_a_raw_record_without_an_image(value: bytes | None) -> None:
    assert refused(record(value, ("content-type", "image/png"))).event_id == "image.uploads/3/42"


def test_images_inside_the_event_up_to_the_limit() -> None:
    for size in range(995, 1001):
        data = bytes(size)
        assert parse(record(data, ("content-type", "image/png")), LIMITS).inline == data
        event = {"event_id": "e", "image": {"bytes": base64.b64encode(data).decode()}}
        assert parse(record(encode(event)), LIMITS).inline == data
    for size in range(1001, 1010):
        data = bytes(size)
        event = {"event_id": "e", "image": {"bytes": base64.b64encode(data).decode()}, "tenant": "t"}
        assert refused(record(data, ("content-type", "image/png"), ("ce_id", "r")), Code.EVENT_TOO_LARGE).event_id == "r"
        error = refused(record(encode(event)), Code.EVENT_TOO_LARGE)
        assert error.event == Event(event_id="e", url=None, inline=None, tenant="t")


def test_what_a_verdict_could_not_carry_is_too_large() -> None:
    error = refused(record(encode(payload(attributes={"a": "x" * 300_000}))), Code.EVENT_TOO_LARGE)
    assert error.event == Event(event_id="e-1", url=None, inline=None, tenant="acme")
    error = refused(record(encode(payload(extra="x" * 300_000))), Code.EVENT_TOO_LARGE)
    assert error.event is not None
    assert error.event.attributes == {"any": "string", "": ""}
    headers = [("content-type", "image/png"), ("ce_id", "r"), ("attributes", json.dumps({"a": "x" * 300_000}))]
    assert refused(record(IMAGE, *headers), Code.EVENT_TOO_LARGE).event_id == "r"


def test_the_whole_record_is_limited_and_its_id_still_read() -> None:
    limits = EventLimits(max_image_bytes=1_000_000, max_event_bytes=400_000)
    big = base64.b64encode(bytes(400_000)).decode()
    for form in (
        record(encode({"image": {"bytes": big}, "event_id": "e"})),
        record(encode({"image": {"bytes": big}}), ("ce_id", "e")),
        record(encode({"data": {"image": {"bytes": big}}, "id": "e"}), ("content-type", "application/cloudevents+json")),
        record(bytes(400_001), ("content-type", "image/png"), ("event_id", "e")),
        record(bytes(400_001), ("event_id", "e")),
    ):
        with pytest.raises(EventError) as caught:
            parse(form, limits)
        assert (caught.value.code, caught.value.event_id) == (Code.EVENT_TOO_LARGE, "e")


def test_slashes_escaped_in_base64_are_no_ballast() -> None:
    limits = EventLimits(max_image_bytes=2_000_000, max_event_bytes=8_000_000, max_context_bytes=1000)
    data = b"\xff" * 1_500_000
    value = encode({"event_id": "e", "image": {"bytes": base64.b64encode(data).decode()}}).replace(b"/", b"\\/")
    assert parse(record(value), limits).inline == data


def test_a_bomb_of_small_values_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = b'{"event_id": "e", "tenant": "acme", "x": [' + b"[]," * 1_000_000 + b"1]}"
    limits = EventLimits(max_image_bytes=1000, max_event_bytes=8_000_000)
    parsed: list[int] = []
    from worker.contracts import event as module

    whole = module.from_json
    monkeypatch.setattr(module, "from_json", lambda data, **options: parsed.append(len(data)) or whole(data, **options))
    with pytest.raises(EventError) as caught:
        parse(record(bomb), limits)
    assert caught.value.code is Code.EVENT_TOO_LARGE
    assert caught.value.event == Event(event_id="e", url=None, inline=None, tenant="acme")
    assert max(parsed) <= 65536


@pytest.mark.parametrize(
    ("text", "posix"),
    [
        ("1970-01-01T00:00:00Z", 0.0),
        ("1970-01-01t00:00:01z", 1.0),
        ("1970-01-01 00:00:01.123456789+00:00", 1.123456),
        ("1970-01-01T01:00:00-00:30", 5400.0),
        ("2016-12-31T23:59:60Z", 1483228800.0),
    ],
)
def test_times(text: str, posix: float) -> None:
    assert parse(record(encode(payload(uploaded_at=text))), LIMITS).uploaded_at == posix


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (TRACE, True),
        ("cc" + TRACE[2:] + "-what-the-future-brings", True),
        (TRACE + "-more", False),
        ("ff" + TRACE[2:], False),
        (TRACE.upper(), False),
        ("00-" + "0" * 32 + "-b7ad6b7169203331-01", False),
        ("00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01", False),
        ("", False),
        ("ä", False),
        (TRACE + "\n", False),
    ],
)
def test_trace_context_is_kept_when_valid(value: str, kept: bool) -> None:
    event = parse(record(encode(payload()), ("traceparent", value)), LIMITS)
    assert event.traceparent == (value if kept else None)


def test_header_names_in_any_case_and_the_last_of_several() -> None:
    event = parse(record(IMAGE, ("CONTENT-TYPE", "image/png"), ("event_id", "a"), ("Event_ID", "b")), LIMITS)
    assert event.event_id == "b"


NAMES = st.sampled_from(
    ["content-type", "ce_id", "ce_specversion", "event_id", "tenant", "priority", "item", "attributes", "sha256", "uploaded_at",
     "traceparent", "ce_traceparent"]
)  # fmt: skip
CONTENT_TYPES = st.sampled_from([b"image/png", b"application/cloudevents+json", b"application/json", b"text/plain"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=12,
)
FIELD_NAMES = st.sampled_from([*payload(), "id", "data", "data_base64", "specversion", "traceparent"])
NEARLY = st.recursive(
    st.dictionaries(FIELD_NAMES, JSON | st.sampled_from(list(payload().values()))),
    lambda inner: st.dictionaries(FIELD_NAMES, inner | JSON),
    max_leaves=3,
)
VALUES = st.none() | st.binary(max_size=300) | NEARLY.map(encode) | JSON.map(encode)
HEADERS = st.lists(
    st.tuples(NAMES, st.binary(max_size=80) | CONTENT_TYPES | st.none()) | st.tuples(st.text(max_size=10), st.binary(max_size=9)),
    max_size=6,
)


@given(VALUES, HEADERS)
def test_nothing_but_an_event_error_comes_out(value: bytes | None, headers: list[tuple[str, bytes]]) -> None:
    try:
        event = parse(Record(POSITION, None, value, tuple(headers), 0), LIMITS)
    except EventError as error:
        event_or_none = error.event
        assert error.message
        assert error.code in (Code.EVENT_MALFORMED, Code.EVENT_TOO_LARGE)
        if event_or_none is None:
            return
        event = event_or_none
    else:
        assert (event.url is None) != (event.inline is None)
    assert 1 <= len(event.event_id) <= 200
    assert all(isinstance(text, str) for text in event.attributes.values())


@given(
    event_id=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200),
    attributes=st.dictionaries(st.text(max_size=10), st.text(max_size=30), max_size=5),
    data=st.binary(min_size=1, max_size=1000),
    priority=st.integers(0, 2**31 - 1),
)
def test_all_forms_agree(event_id: str, attributes: dict[str, str], data: bytes, priority: int) -> None:
    value = {"image": {"bytes": base64.b64encode(data).decode()}, "attributes": attributes, "priority": priority}
    plain = parse(record(encode({"event_id": event_id, **value})), LIMITS)
    envelope = {"specversion": "1.0", "id": event_id, "data": value}
    structured = parse(record(encode(envelope), ("content-type", "application/cloudevents+json")), LIMITS)
    binary = parse(record(encode(value), ("ce_id", event_id)), LIMITS)
    raw = parse(
        record(
            data,
            ("content-type", "image/x"),
            ("content_type", ""),
            ("ce_id", event_id),
            ("attributes", json.dumps(attributes)),
            ("priority", str(priority)),
        ),
        LIMITS,
    )
    assert plain == structured == binary
    assert (raw.event_id, raw.inline, raw.attributes, raw.priority) == (event_id, data, attributes, priority)
    assert (plain.event_id, plain.inline, plain.attributes, plain.priority) == (event_id, data, attributes, priority)
