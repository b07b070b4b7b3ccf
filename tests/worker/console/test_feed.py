"""Whatever stands on the verdict topic, the console goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.worker.console.stage import verdict
from tests.worker.fake_clock import FakeClock
from worker.console.desk import Desk
from worker.console.feed import read_verdict
from worker.console.live import Filter, Live, row_of
from worker.console.recent import Recent

GOOD = verdict("one", 0.5, "ab" * 32)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def test_a_verdict_is_read_whole_with_fields_of_later_versions() -> None:
    later = GOOD | {"new": [1], "specversion": "code-verdict/2"}
    assert read_verdict(json.dumps(later).encode()) == later
    assert read_verdict(json.dumps(verdict("two", None, reason="decode.corrupt")).encode()) is not None


@given(st.binary() | st.none())
def test_bytes_that_are_no_verdict(value: bytes | None) -> None:
    assert read_verdict(value) is None


@given(st.sampled_from(sorted(GOOD)), JSON, st.sampled_from(["", "sha256", "total", "heads"]))
def test_a_verdict_with_any_field_replaced_is_passed_over_or_taken(name: str, other: Any, inner: str) -> None:
    changed = GOOD | {name: {**GOOD[name], inner: other} if inner and isinstance(GOOD[name], dict) else other}
    found = read_verdict(json.dumps(changed).encode())
    if found is None:
        return
    clock = FakeClock()
    live, desk = Live(20, 4, clock), Desk(10, clock)
    page = live.subscribe(Filter(low=0.1))
    Recent().add(found)
    live.add(row_of(found, clock.time() - 2))
    desk.verdict(found, clock.time())
    json.dumps([live.summary(page), live.take(page)[0][0].public() if found["score"] else 0, desk.listing("ada", 5)])


@pytest.mark.parametrize(
    "change",
    [
        {"score": 1.5},
        {"score": True},
        {"score": "0.5"},
        {"score": float("nan")},
        {"timings_ms": {"total": 10**400}},
        {"timings_ms": {"total": "fast"}},
        {"image": {"sha256": 5}},
    ],
)
def test_wrong_types_are_passed_over(change: dict[str, Any]) -> None:
    assert read_verdict(json.dumps(GOOD | change).encode()) is None
