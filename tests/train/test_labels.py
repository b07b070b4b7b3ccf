"""Label records: the console's rule, what is passed over, and that nothing on the topic can end the job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.train.pictures import corpus
from train.labels import LabelFold, Upload, digest, read_file, read_folder
from train.labels_sample import record
from worker.console import labels as console

SHA = "ab" * 32
OTHER = "cd" * 32


def decision(record_id: str, label: int = 1, previous: str | None = None, by: str = "ada", sha256: str = SHA) -> dict[str, Any]:
    return record(sha256, label, by, 0, record_id=record_id, previous=previous)


def appeal(against: str) -> dict[str, Any]:
    return {"specversion": "code-label/1", "type": "appeal", "record_id": f"appeal-{against}", "entry": f"sha256:{SHA}",
            "by": "bob", "at": "2026-01-01T00:00:00Z", "against": against, "note": "look again"}  # fmt: skip


def fold(*records: object) -> LabelFold:
    folded = LabelFold()
    for number, one in enumerate(records):
        folded.add(one if isinstance(one, bytes) or one is None else json.dumps(one).encode(), f"t/0/{number}")
    return folded


def in_effect(*records: object) -> list[tuple[str, int, str]]:
    return [(label.sha256, label.label, label.record_id) for label in fold(*records).labels()]


def test_the_first_of_two_decisions_counts_and_a_flood_of_one_image_is_one_label() -> None:
    assert in_effect(decision("1", 1), decision("2", 0), decision("3", 0)) == [(SHA, 1, "1")]
    assert in_effect(decision("1"), decision("9", 0, sha256=OTHER)) == [(SHA, 1, "1"), (OTHER, 0, "9")]


def test_a_reversal_needs_an_appeal_and_the_name_of_what_it_reverses() -> None:
    assert in_effect(decision("1"), decision("2", 0, "1")) == [(SHA, 1, "1")]
    assert in_effect(decision("1"), appeal("1"), decision("2", 0, "nothing")) == [(SHA, 1, "1")]
    assert in_effect(decision("1"), appeal("1"), decision("2", 0, "1")) == [(SHA, 0, "2")]
    assert in_effect(decision("1"), appeal("1"), decision("2", 0, "1"), decision("3", 1, "2")) == [(SHA, 0, "2")]
    assert in_effect(decision("1"), appeal("1"), decision("2", 0, "1"), appeal("2"), decision("3", 1, "2")) == [(SHA, 1, "3")]


RECORDS = st.lists(
    st.one_of(
        st.builds(decision, st.sampled_from("123"), st.sampled_from([0, 1]), st.sampled_from([None, "1", "2", "3"])),
        st.builds(appeal, st.sampled_from("12")),
    ),
    max_size=8,
)


@given(RECORDS)
def test_it_is_the_rule_of_the_console(records: list[dict[str, Any]]) -> None:
    course = console.Course()
    for one in records:
        read = console.read(json.dumps(one).encode())
        assert read is not None
        course.fold(read)
    latest = course.latest
    theirs = [] if latest is None else [(SHA, int(latest.content["label"] == "ai_generated"), latest.record_id)]
    assert in_effect(*records) == theirs


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "empty record"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"1", "not code-label/1"),
        (b" " * 300_000, "larger than 256 KiB"),
        (json.dumps(decision("1") | {"label": "maybe"}).encode(), "label:"),
        (json.dumps(decision("1") | {"label": ["ai_generated"]}).encode(), "label:"),
        (json.dumps(decision("1") | {"by": "x" * 201}).encode(), "by:"),
        (json.dumps(decision("1") | {"by": "\ud800"}).encode(), "by:"),
        (json.dumps(decision("1") | {"record_id": 7}).encode(), "record_id:"),
        (json.dumps(decision("1") | {"at": "yesterday"}).encode(), "at:"),
        (json.dumps(decision("1") | {"type": "rumour"}).encode(), "unknown type"),
        (json.dumps(decision("1") | {"image": {"sha256": OTHER}}).encode(), "not the entry's"),
    ],
)
def test_what_is_no_label_is_passed_over_and_named(value: bytes | None, reason: str) -> None:
    folded = fold(value, decision("1"))
    assert [label.record_id for label in folded.labels()] == ["1"]
    (line,) = folded.tally.lines()
    assert reason in line and "t/0/0" in line


def test_a_decision_about_an_event_without_a_picture_is_counted() -> None:
    folded = fold(decision("1") | {"entry": "event:e-1", "image": {"sha256": None}})
    assert folded.labels() == [] and "image is unknown" in folded.tally.lines()[0]


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.sampled_from(["code-label/1", "decision", SHA]),
    lambda inner: st.dictionaries(
        st.sampled_from(["specversion", "type", "entry", "by", "record_id", "at", "label", "image", "reference", "upload", "why",
                         "offset", "topic", "partition", "url", "previous"]), inner), max_leaves=12,
).map(lambda found: json.dumps(found).encode()))  # fmt: skip
def test_no_record_whatever_raises(value: bytes) -> None:
    fold(value).labels()


@given(st.dictionaries(st.sampled_from(["image", "why", "previous", "verdict"]), st.recursive(
    st.none() | st.integers() | st.text(max_size=9), lambda inner: st.dictionaries(
        st.sampled_from(["reference", "upload", "url", "topic", "partition", "offset", "reason"]), inner),
    max_leaves=9)))  # fmt: skip
def test_odd_references_cost_the_reference_not_the_label(changes: dict[str, Any]) -> None:
    for label in fold(decision("1") | changes).labels():
        assert label.sha256 == SHA
        json.dumps([label.url, label.reason]).encode()


def test_references_come_through() -> None:
    reference = {"upload": {"topic": "image.uploads", "partition": 2, "offset": 42}, "url": "s3://b/k"}
    (label,) = fold(decision("1") | {"image": {"sha256": SHA, "reference": reference}}).labels()
    assert label.upload == Upload("image.uploads", 2, 42)
    assert label.url == "s3://b/k"


def test_a_file_is_read_as_the_topic_would_be(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    lines = [json.dumps(decision("1")), "x" * 600_000, "", json.dumps(appeal("1")), json.dumps(decision("2", 0, "1"))]
    file.write_text("\n".join(lines))
    labels, tally = read_file(file)
    assert [(label.label, label.record_id) for label in labels] == [(0, "2")]
    assert tally.records == 4 and sum(tally.skipped.values()) == 1


def test_a_folder_with_a_manifest_gives_labels_too(tmp_path: Path) -> None:
    labels, tally = read_folder(corpus(tmp_path, reals=2, fakes=3))
    assert sorted(label.label for label in labels) == [0, 0, 1, 1, 1] and not tally.skipped
    (tmp_path / "train/fake/1.png").unlink()
    labels, tally = read_folder(tmp_path)
    assert len(labels) == 4 and sum(tally.skipped.values()) == 1
    assert digest(labels) == digest(reversed(labels)) != digest(labels[1:])
