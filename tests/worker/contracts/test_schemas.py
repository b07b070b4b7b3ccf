"""The published schemas say what the parser and the verdicts do, no less and no more."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.contracts.test_event import FIELD_NAMES, JSON, encode, payload, record
from tests.worker.contracts.test_verdict import SCORED, scored
from worker.contracts import EventError, EventLimits, build_verdict, parse
from worker.contracts.schemas import all_schemas, dead_letter_schema, event_schema, verdict_schema
from worker.envelopes import dead_headers
from worker.errors import Code
from worker.items import Decision, Event, ModelRef, Position

LIMITS = EventLimits(10**6, 10**7)


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    """As in ECMA 262: `$` is the end, while Python's also stands before a last line feed."""
    if isinstance(value, str) and not re.search(pattern.replace("$", r"\Z"), value):
        yield jsonschema.ValidationError("pattern")


EVENT = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"pattern": _pattern})(event_schema())
VERDICT = jsonschema.Draft202012Validator(verdict_schema())
DEAD_LETTER = jsonschema.Draft202012Validator(dead_letter_schema())


@pytest.mark.parametrize("name", all_schemas())
def test_each_is_a_valid_schema(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(all_schemas()[name])


ODD = st.sampled_from(
    ["", "x", "x" * 201, "https://a/b", "nonsense", "AAAA", "AAA=", "AA==", "A===", "AAAAA", "AA-_", "ab" * 32, "g" * 64,
     "2024-05-01T10:00:00Z", "2024-05-01", "2024-05-01t10:00:00.5+02:00", "AAAA\n", "ab" * 32 + "\n", "https://\n", "٣",
     0, 1, 1.0, 1.5, -1, 2**31 - 1, 2**31, True, None, [], {}, {"a": "b"}, {"a": 1}, {"id": "1"}, {"id": 1}, {"type": None}]
)  # fmt: skip
IMAGES = st.dictionaries(st.sampled_from(["url", "bytes", "more"]), ODD, max_size=3)
OBJECTS = st.builds(
    lambda base, changes, image: base | changes | image,
    st.sampled_from([payload(), {"event_id": "e", "image": {"url": "s3://b/k"}}, {}]),
    st.dictionaries(FIELD_NAMES.filter(lambda name: name != "image"), ODD | JSON, max_size=2),
    st.one_of(st.just({}), IMAGES.map(lambda image: {"image": image}), ODD.map(lambda image: {"image": image})),
)


@settings(max_examples=300)
@given(OBJECTS)
def test_the_event_schema_accepts_what_the_parser_accepts(value: dict[str, Any]) -> None:
    try:
        text = json.dumps(value, allow_nan=False).encode()
    except ValueError:
        return  # a NaN is no JSON at all
    try:
        parse(record(text), LIMITS)
    except EventError as error:
        if "\\ud" not in text.decode():  # half of a surrogate pair is JSON's text and nobody's character
            assert not EVENT.is_valid(json.loads(text)), error.message
    else:
        assert EVENT.is_valid(json.loads(text))


def test_verdicts_are_valid() -> None:
    VERDICT.validate(json.loads(scored().to_json()))
    with_shadow = scored(Decision("authentic", "allow", True, "p", "1", shadow={"strict": "block"}))
    VERDICT.validate(json.loads(with_shadow.to_json()))
    failed = build_verdict(
        event=Event("e", None, None),
        source=Position("t", 0, 0, 0),
        model=ModelRef("m", "1", "linear", "torch", "cpu"),
        decision=Decision("undetermined", "review", False, "p", "1"),
        processed_at=0.0,
        reason=Code.EVENT_MALFORMED,
    )
    VERDICT.validate(json.loads(failed.to_json()))


@pytest.mark.parametrize("name", SCORED)
def test_every_field_of_a_verdict_is_required_and_typed(name: str) -> None:
    assert not VERDICT.is_valid({key: value for key, value in SCORED.items() if key != name})
    assert not VERDICT.is_valid(SCORED | {name: [["wrong"]]})


def test_consumers_are_told_that_fields_may_be_added() -> None:
    assert VERDICT.is_valid(SCORED | {"added": 1})
    assert VERDICT.is_valid(SCORED | {"policy": {"name": "p", "version": "1", "added": 1}})


def test_dead_letters_are_valid() -> None:
    def letter(headers: list[tuple[str, bytes]]) -> dict[str, Any]:
        return {"key": None, "value": "e25vcGU=", "headers": {name: value.decode() for name, value in headers}}

    headers = dead_headers((("mine", b"x"),), "fetch.timeout", "no answer", Position("image.uploads", 1, 7, 0), 5, 0.0)
    DEAD_LETTER.validate(letter(headers))
    DEAD_LETTER.validate(letter([*headers, ("value_omitted", b"20000000")]))
    for name, _ in headers[1:]:
        assert not DEAD_LETTER.is_valid(letter([header for header in headers if header[0] != name]))
    assert not DEAD_LETTER.is_valid(letter([*headers, ("attempt", b"0")]))


def test_the_documented_example_is_an_event() -> None:
    EVENT.validate(payload())
    assert parse(record(encode(payload())), LIMITS).event_id == "e-1"
