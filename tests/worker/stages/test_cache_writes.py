"""Scores are written together, late by a little, and nobody who asks can tell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from tests.worker.fake_clock import FakeClock
from worker.items import Scores
from worker.stages.cache import CachedScore, ScoreCache
from worker.stages.cache_writes import MOST, WAIT_S, CacheWrites


class _Cache:
    def __init__(self) -> None:
        self.written: list[list[str]] = []

    def put_many(self, entries: Iterable[CachedScore]) -> None:
        self.written.append([entry.sha256 for entry in entries])


def _entry(digest: str) -> CachedScore:
    return CachedScore("scope", digest, Scores({}, ()), 1, 1, "JPEG", 1, {})


def _writes() -> tuple[CacheWrites, _Cache, FakeClock]:
    cache, clock = _Cache(), FakeClock(0.0)
    return CacheWrites(cast(ScoreCache, cache), clock), cache, clock


def test_a_score_waits_no_longer_than_it_may_whatever_else_comes() -> None:
    writes, cache, clock = _writes()
    assert writes.patience() is None
    writes.add([_entry("a")])
    assert not cache.written and writes.patience() == WAIT_S
    clock.advance(WAIT_S / 2)
    writes.add([_entry("b")])
    assert not cache.written
    clock.advance(WAIT_S / 2)
    writes.add([])
    assert cache.written == [["a", "b"]] and writes.patience() is None


def test_many_do_not_wait() -> None:
    writes, cache, _ = _writes()
    writes.add(_entry(str(number)) for number in range(MOST))
    assert [len(round_) for round_ in cache.written] == [MOST]


def test_what_is_asked_for_is_written_before() -> None:
    writes, cache, _ = _writes()
    writes.add([_entry("a"), _entry("b")])
    writes.before("scope", ["c"])
    writes.before("another", ["a"])
    assert not cache.written
    writes.before("scope", ["c", "a"])
    assert cache.written == [["a", "b"]]
    writes.write()
    assert len(cache.written) == 1, "nothing waits any more"
