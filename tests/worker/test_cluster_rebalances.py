"""A member that joins or leaves every ten seconds: nothing lost, nothing twice, and the others hardly slowed down."""

from __future__ import annotations

import time

import pytest

from tests.conftest import KafkaCluster, unique_settings
from tests.worker.kafka_topics import committed, prepare, produce, until
from tests.worker.stages.test_consume import values
from tests.worker.whole_member import WholeMember, visible

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(3600)]

RATE = 150.0
"""Records a second of each member: an engine's limit, not this machine's, so that what is missing was lost to rebalances."""
QUIET_S = 60.0
CHANGING_S = 300.0
INTERVAL_S = 10.0


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_throughput_while_members_come_and_go(three: KafkaCluster, delivery: str) -> None:
    settings = prepare(
        unique_settings(
            "",
            bootstrap_servers=tuple(three.run("env").split(",")),
            session_timeout_ms=10_000,
            max_poll_interval_ms=120_000,
            delivery=delivery,
        )
    )
    total = int(2 * RATE * (QUIET_S + CHANGING_S + 30))
    produce(settings, settings.upload_topics[0], values(total))
    steady = [WholeMember(settings, seed=seed, letters=0, rate=RATE).start() for seed in (1, 2)]
    guests: list[WholeMember] = []

    def rate_over(seconds: float, change: bool) -> float:
        """Of the steady members alone: guests take partitions from them, but there is always more to read than they can do."""

        def done() -> int:
            return sum(len(member.done) for member in steady)

        before, began = done(), time.monotonic()
        guest: WholeMember | None = None
        while (left := began + seconds - time.monotonic()) > 0:
            time.sleep(min(INTERVAL_S, left))
            if change and guest is None:
                guest = WholeMember(settings, seed=9, letters=0, rate=RATE).start()
                guests.append(guest)
            elif change and guest is not None:
                guest.stop()
                guest = None
        rate = (done() - before) / (time.monotonic() - began)
        if guest is not None:
            guest.stop()
        return rate

    until(lambda: all(len(member.done) > 100 for member in steady), lambda: time.sleep(0.1), 60)
    quiet = rate_over(QUIET_S, change=False)
    changing = rate_over(CHANGING_S, change=True)
    print(f"{delivery}: quiet {quiet:.0f}/s, with {len(guests)} guests {changing:.0f}/s, ratio {changing / quiet:.2f}")
    until(lambda: sum(len(member.done) for member in (*steady, *guests)) >= total, lambda: time.sleep(0.2), 1500)
    for member in steady:
        member.stop()
    verdicts = visible(settings, settings.verdict_topic)
    assert sorted(verdicts) == values(total)
    assert sum(committed(settings, settings.upload_topics[0]).values()) == total
    if delivery == "exactly_once":
        assert set(verdicts.values()) == {1}
    else:
        assert sum(verdicts.values()) - total <= sum(member.repeated for member in (*steady, *guests))
    assert changing >= 0.7 * quiet
