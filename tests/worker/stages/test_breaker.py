"""The breaker's three states, and its one probe."""

from __future__ import annotations

from tests.worker.fake_clock import FakeClock
from worker.stages.breaker import Breaker


def test_it_opens_after_failures_in_a_row_and_probes_once() -> None:
    clock = FakeClock()
    breaker = Breaker(failures=3, reset_s=5.0, clock=clock)
    for _ in range(2):
        assert breaker.allow()
        assert not breaker.failed()
    assert breaker.allow()
    assert not breaker.succeeded()
    assert [breaker.failed() for _ in range(3)] == [False, False, True]
    assert breaker.state == "open"
    assert not breaker.allow()
    clock.advance(4.9)
    assert not breaker.allow()
    clock.advance(0.1)
    assert breaker.state == "half_open"
    assert breaker.allow()
    assert not breaker.allow()  # one probe at a time
    assert not breaker.failed()
    assert breaker.state == "open"
    assert not breaker.allow()
    clock.advance(5.0)
    assert breaker.allow()
    assert breaker.succeeded()
    assert breaker.state == "closed"
    assert breaker.allow()
    assert not breaker.failed()  # counted from zero again
