"""The verdict on the wire: its fields in the contract's order, its id, its headers, with and without a score."""

from __future__ import annotations

import json
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.contracts import (
    VERDICT_NAMESPACE,
    Verdict,
    build_verdict,
    publish,
    publish_scored,
    rfc3339,
    verdict_headers,
    verdict_id,
)
from worker.errors import Code
from worker.items import Decision, Event, ImageInfo, ModelRef, Position, Scores, Timings

EVENT = Event(event_id="e-1", url="s3://b/k", inline=None, tenant="acme", item={"type": "post", "id": "7"}, attributes={"a": "b"})
MODEL = ModelRef(name="code-tiny", version="2024.1", head="linear", backend="torch", device="cpu")
SOURCE = Position("image.uploads", 0, 42, 9)
DECISION = Decision(label="ai_generated", action="block", uncertain=False, policy="default", version="abc")
SCORES = Scores(heads={"linear": 0.973, "knn": 0.91, "ocsvm": 0.88}, crops=(0.973,))
IMAGE = ImageInfo(sha256="ab" * 32, width=1024, height=768, format="JPEG", frames=1, provenance={"c2pa": "x"})

SCORED = {
    "specversion": "code-verdict/1",
    "verdict_id": verdict_id("e-1", "2024.1"),
    "event_id": "e-1",
    "tenant": "acme",
    "item": {"type": "post", "id": "7"},
    "attributes": {"a": "b"},
    "label": "ai_generated",
    "score": 0.973,
    "uncertain": False,
    "action": "block",
    "policy": {"name": "default", "version": "abc"},
    "reason": None,
    "model": {"name": "code-tiny", "version": "2024.1", "head": "linear", "backend": "torch", "device": "cpu"},
    "image": {"sha256": "ab" * 32, "width": 1024, "height": 768, "format": "JPEG", "frames": 1},
    "evidence": {
        "heads": {"linear": 0.973, "knn": 0.91, "ocsvm": 0.88},
        "crops": [0.973],
        "provenance": {"c2pa": "x", "digital_source_type": None, "generator_metadata": None},
    },
    "cache": "miss",
    "timings_ms": {"fetch": 1.2, "decode": 3.1, "queue": 2.0, "infer": 9.8, "total": 20.4},
    "source": {"topic": "image.uploads", "partition": 0, "offset": 42},
    "processed_at": "2023-11-14T22:13:20.250Z",
}


def scored(decision: Decision = DECISION) -> Verdict:
    return build_verdict(
        event=EVENT,
        source=SOURCE,
        model=MODEL,
        decision=decision,
        processed_at=1_700_000_000.25,
        scores=SCORES,
        image=IMAGE,
        timings=Timings(started=5.0, fetch=1.20004, decode=3.1, queue=2.0, infer=9.8),
        finished=5.0204,
    )


def test_a_scored_verdict_is_the_contracts_to_the_letter_and_order() -> None:
    text = scored().to_json().decode()
    assert json.loads(text) == SCORED
    assert text == json.dumps(SCORED, separators=(",", ":"))


def test_a_failed_verdict_has_no_score() -> None:
    undetermined = Decision(label="undetermined", action="review", uncertain=False, policy="default", version="abc")
    verdict = build_verdict(
        event=EVENT,
        source=SOURCE,
        model=MODEL,
        decision=undetermined,
        processed_at=0.0,
        sha256="cd" * 32,
        reason=Code.DECODE_CORRUPT,
    )
    read = json.loads(verdict.to_json())
    assert list(read) == list(SCORED)
    assert (read["label"], read["score"], read["action"], read["reason"]) == ("undetermined", None, "review", "decode.corrupt")
    assert read["image"] == {"sha256": "cd" * 32, "width": None, "height": None, "format": None, "frames": None}
    assert read["evidence"]["heads"] == {}
    assert read["evidence"]["crops"] == []
    assert set(read["evidence"]["provenance"].values()) == {None}
    assert set(read["timings_ms"].values()) == {None}
    assert read["model"] == SCORED["model"]


def test_shadow_rules_show_only_where_there_are_some() -> None:
    decision = Decision("authentic", "allow", True, "p", "1", shadow={"strict": "block"})
    assert json.loads(scored(decision).to_json())["policy"] == {"name": "p", "version": "1", "shadow": {"strict": "block"}}
    assert b"shadow" not in scored().to_json()


def test_the_id_is_the_same_for_the_same_event_and_model_only() -> None:
    assert verdict_id("e-1", "1") == str(uuid.uuid5(VERDICT_NAMESPACE, "e-1\0" + "1"))
    assert uuid.uuid5(uuid.NAMESPACE_URL, "code-verdict/1") == VERDICT_NAMESPACE
    ids = {verdict_id(event, version) for event, version in [("a", "b"), ("ab", ""), ("a", "b2"), ("", "ab"), ("ä", "b")]}
    assert len(ids) == 5
    assert uuid.UUID(verdict_id("e-1", "1")).version == 5


def test_headers_are_cloudevents_and_the_trace() -> None:
    verdict = scored()
    assert dict(verdict_headers(verdict, "00-trace")) == {
        "content-type": b"application/json",
        "ce_specversion": b"1.0",
        "ce_id": verdict.verdict_id.encode(),
        "ce_type": b"code.verdict.v1",
        "ce_source": b"/code-worker",
        "ce_subject": b"e-1",
        "ce_time": b"2023-11-14T22:13:20.250Z",
        "traceparent": b"00-trace",
    }
    assert "traceparent" not in dict(verdict_headers(verdict))


def test_a_score_outside_its_range_is_never_published() -> None:
    for score in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="score"):
            build_verdict(
                event=EVENT,
                source=SOURCE,
                model=MODEL,
                decision=DECISION,
                processed_at=0.0,
                scores=Scores(heads={"linear": score}, crops=()),
            )


def test_times_are_utc_with_milliseconds() -> None:
    assert rfc3339(0.0) == "1970-01-01T00:00:00.000Z"
    assert rfc3339(1_700_000_000.9996) in ("2023-11-14T22:13:20.999Z", "2023-11-14T22:13:21.000Z")


def test_a_mark_that_is_no_text_does_not_keep_the_verdict_back() -> None:
    image = ImageInfo("ab" * 32, 1, 1, "PNG", 1, provenance={"generator_metadata": "\ud800"})
    verdict = build_verdict(
        event=EVENT, source=SOURCE, model=MODEL, decision=DECISION, processed_at=0.0, scores=SCORES, image=image
    )
    assert set(json.loads(verdict.to_json())["evidence"]["provenance"].values()) == {None}


@given(st.text(max_size=20), st.text(max_size=20))
def test_the_id_is_the_standard_librarys(event_id: str, version: str) -> None:
    try:
        name = f"{event_id}\0{version}"
        name.encode()
    except UnicodeEncodeError:  # half a surrogate pair: no event has one
        return
    assert verdict_id(event_id, version) == str(uuid.uuid5(VERDICT_NAMESPACE, name))


TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
MAYBE_MS = st.none() | st.floats(0, 1e6)


@given(
    event=st.builds(
        Event,
        event_id=TEXT,
        url=st.none(),
        inline=st.none(),
        tenant=TEXT,
        item=st.none() | st.dictionaries(TEXT, TEXT, max_size=3),
        attributes=st.dictionaries(TEXT, TEXT, max_size=3),
        traceparent=st.none() | st.just("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    ),
    decision=st.builds(
        Decision,
        label=st.sampled_from(["ai_generated", "authentic"]),
        action=st.sampled_from(["allow", "review", "block"]),
        uncertain=st.booleans(),
        policy=TEXT,
        version=TEXT,
        shadow=st.none() | st.dictionaries(TEXT, st.sampled_from(["allow", "block"]), max_size=2),
    ),
    heads=st.fixed_dictionaries({name: st.floats(0, 1) for name in ("linear", "knn", "ocsvm")}),
    provenance=st.dictionaries(st.sampled_from(["c2pa", "generator_metadata"]), st.none() | TEXT | st.just("\ud800"), max_size=2),
    cache_hit=st.booleans(),
    timings=st.builds(Timings, started=st.floats(0, 10), fetch=MAYBE_MS, decode=MAYBE_MS, queue=MAYBE_MS, infer=MAYBE_MS),
)
def test_what_is_published_without_the_model_is_what_it_would_write(
    event: Event, decision: Decision, heads: dict[str, float], provenance: dict[str, str], cache_hit: bool, timings: Timings
) -> None:
    arguments = {
        "event": event,
        "source": SOURCE,
        "model": MODEL,
        "decision": decision,
        "processed_at": 1_700_000_000.25,
        "scores": Scores(heads, (heads["linear"],)),
        "image": ImageInfo("ab" * 32, 1024, 768, "JPEG", 1, provenance),
        "cache_hit": cache_hit,
        "timings": timings,
        "finished": 11.0,
    }
    assert publish_scored(**arguments) == publish(build_verdict(**arguments), event.traceparent)
