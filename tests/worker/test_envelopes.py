"""Original headers come back exactly, whatever they are; forged and ill-formed envelopes are nothing but headers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from worker import envelopes
from worker.items import Delivery, Headers, Position, Record

NAMES = st.one_of(st.sampled_from([*envelopes.RETRY_BLOCK, *envelopes.DEAD_BLOCK, *envelopes.OMITTED]), st.text(max_size=8))
HEADERS = st.lists(st.tuples(NAMES, st.binary(max_size=12)), max_size=20).map(tuple)
ORIGIN = Position("uploads", 3, 42, 0)


def record(headers: Headers) -> Record:
    return Record(Position("retry", 0, 7, 1), b"key", b"value", headers, 0)


@given(HEADERS, st.integers(1, 99), st.floats(0, 4e9), st.floats(0, 4e9))
def test_a_retry_gives_back_headers_attempt_times_and_origin(
    original: Headers, attempt: int, first_seen: float, not_before: float
) -> None:
    delivery = Delivery(attempt, first_seen, None, ORIGIN)
    sent = tuple(envelopes.retry_headers(original, delivery, "fetch.timeout", not_before))
    opened, found = envelopes.open_retry(record(sent))
    assert opened.headers == original
    assert (opened.key, opened.value, opened.position) == (b"key", b"value", Position("retry", 0, 7, 1))
    assert (found.attempt, found.origin) == (attempt, ORIGIN)
    assert found.first_seen is not None
    assert abs(found.first_seen - first_seen) < 0.0011
    assert found.not_before is not None
    assert abs(found.not_before - not_before) < 0.0011


@given(HEADERS, st.text(max_size=40), st.text(max_size=2_000), st.integers(1, 99))
def test_a_dead_letter_gives_back_headers_and_reason(original: Headers, code: str, message: str, attempt: int) -> None:
    code = code.encode("utf-8", "replace").decode()
    message = message.encode("utf-8", "replace").decode()
    sent = tuple(envelopes.dead_headers(original, code, message, ORIGIN, attempt, 1_700_000_000.0))
    letter = envelopes.open_dead(b"k", b"v", sent)
    assert letter is not None
    assert letter.headers == original
    assert (letter.code, letter.topic, letter.partition, letter.offset, letter.attempt) == (code, "uploads", 3, 42, attempt)
    assert letter.first_seen == "2023-11-14T22:13:20.000Z"
    assert "\n" not in letter.message
    assert len(letter.message) <= envelopes.MAX_MESSAGE_CHARS
    assert letter.omitted == {}


def test_what_was_left_out_is_told() -> None:
    sent = (
        ("a", b"b"),
        *envelopes.dead_headers((), "event.too_large", "m", ORIGIN, 1, 0.0),
        ("value_omitted", b"123"),
    )
    letter = envelopes.open_dead(b"k", None, sent)
    assert letter is not None
    assert letter.omitted == {"value": 123}
    assert letter.headers == (("a", b"b"),)


@given(HEADERS)
def test_headers_without_an_envelope_stay_as_they_are(headers: Headers) -> None:
    opened, delivery = envelopes.open_retry(record((*headers, ("last", b""))))
    assert delivery == Delivery()
    assert opened.headers == (*headers, ("last", b""))
    assert envelopes.open_dead(None, b"", (*headers, ("last", b""))) is None


@given(st.sampled_from(range(len(envelopes.RETRY_BLOCK))), st.one_of(st.just(None), st.binary(max_size=30)))
def test_an_ill_formed_envelope_is_no_envelope_and_never_an_error(index: int, content: bytes | None) -> None:
    good = envelopes.retry_headers((), Delivery(2, 1.0, None, ORIGIN), "fetch.timeout", 2.0)
    forged = [*good[:index], (good[index][0], content), *good[index + 1 :]]
    opened, delivery = envelopes.open_retry(record(tuple(forged)))  # type: ignore[arg-type]
    if delivery == Delivery():
        assert opened.headers == tuple(forged)
    else:  # the content happened to be a legal value of this field
        assert opened.headers == ()
        assert delivery.attempt >= 1


def test_numbers_are_bounded() -> None:
    for attempt in (b"-1", b"0", b"9" * 400, "٣".encode(), b"1.0", b"0x2"):
        headers = envelopes.retry_headers((), Delivery(2, 1.0, None, ORIGIN), "fetch.timeout", 2.0)
        headers[0] = ("attempt", attempt)
        assert envelopes.open_retry(record(tuple(headers)))[1] == Delivery()


def test_a_null_header_becomes_an_empty_one() -> None:
    """kafka-python reads them and refuses to send them: the one thing that does not come back exactly."""
    sent = envelopes.dead_headers((("a", None),), "c", "m", ORIGIN, 1, 0.0)  # type: ignore[arg-type]
    assert sent[0] == ("a", b"")


def test_a_verdict_too_large_loses_the_uploaders_own_fields_only() -> None:
    body = b'{"event_id":"e\xc3\xa9","attributes":{"a":"b"},"item":{"type":"post"},"score":0.5}'
    assert envelopes.without_attributes(body) == '{"event_id":"eé","attributes":{},"item":null,"score":0.5}'.encode()
