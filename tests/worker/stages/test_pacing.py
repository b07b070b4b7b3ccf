"""When to read and when to commit."""

from __future__ import annotations

import pytest

from worker.stages.pacing import COMMIT_RECORDS, FEW_BYTES, FEW_RECORDS, READ_INTERVAL_S, Pacing


@pytest.mark.parametrize(
    ("records", "size_bytes", "more", "rest_s"),
    [
        (0, 0, False, 0),
        (1, 100, False, READ_INTERVAL_S),
        (FEW_RECORDS - 1, FEW_BYTES - 1, False, READ_INTERVAL_S),
        (FEW_RECORDS, 100, False, 0),
        (4, FEW_BYTES, False, 0),
        (1, 100, True, 0),
    ],
)
def test_reads_that_found_a_few_records_are_a_little_apart(records: int, size_bytes: int, more: bool, rest_s: float) -> None:
    pacing = Pacing(0.2)
    pacing.has_read(5.0, records, size_bytes, more=more)
    assert pacing.rest_s(5.0) == pytest.approx(rest_s)
    assert pacing.rest_s(5.0 + READ_INTERVAL_S / 2) == pytest.approx(rest_s / 2)
    assert pacing.rest_s(6.0) == 0


def test_commits_come_in_their_interval_and_sooner_where_much_is_finished() -> None:
    pacing = Pacing(0.2)
    assert pacing.commits(1.0, 0)
    assert not pacing.commits(1.1, COMMIT_RECORDS - 1)
    assert pacing.commits(1.21, COMMIT_RECORDS - 1), "the interval is over"
    assert not pacing.commits(1.27, 2 * COMMIT_RECORDS - 2)
    assert pacing.commits(1.28, 2 * COMMIT_RECORDS - 1), "many are finished"
    assert not pacing.commits(1.31, 20 * COMMIT_RECORDS), "the last was a moment ago"
    assert pacing.commits(1.34, 20 * COMMIT_RECORDS)
