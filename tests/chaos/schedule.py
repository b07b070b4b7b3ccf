"""Which fault hits whom, when and for how long: a pure function of the seed, so that a failure can be repeated."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to hurt. `group` is what it hurts; faults of one target never overlap."""

    name: str
    group: str
    weight: float
    shortest_s: float = 0.0
    longest_s: float = 0.0
    hurts: bool = True
    """A kill or a stop; the others (cuts, leader moves, a full cache, clock steps) come on top of the number asked for."""


KINDS = (
    Kind("worker_kill", "worker", 4),
    Kind("worker_stop", "worker", 4, 1, 20),
    Kind("decoder_kill", "worker", 2),
    Kind("decoder_stop", "worker", 1, 1, 6),
    Kind("broker_kill", "brokers", 3, 1, 12),
    Kind("broker_stop", "brokers", 3, 2, 15),
    Kind("brokers_stop_two", "brokers", 1, 3, 12),
    Kind("leaders_move", "brokers", 2, hurts=False),
    Kind("cache_kill", "cache", 1, 1, 8),
    Kind("cache_stop", "cache", 1, 1, 8),
    Kind("cache_full", "cache", 1, 2, 10, hurts=False),
    Kind("network_cut", "worker", 3, 1, 20, hurts=False),
    Kind("clock_step", "worker", 1, hurts=False),
    Kind("brokers_gone", "brokers", 0),  # all of them; asked for, never drawn
)
BY_NAME = {kind.name: kind for kind in KINDS}
EMBEDDED = frozenset(
    {
        *("worker_kill", "worker_stop", "decoder_kill", "decoder_stop", "broker_stop"),
        *("cache_kill", "cache_stop", "cache_full", "clock_step"),
    }
)
"""What the embedded broker bears: it keeps everything in memory, so it may be stopped but not killed."""
BROKER_REST_S = 6.0
"""Between two faults of the brokers, so that the replicas catch up and one fault is not two."""
CLOCK_STEP_S = 7200.0


@dataclass(frozen=True, slots=True)
class Fault:
    """`kind` hits `target` (a worker's or broker's number from 0) `at_s` after the start, for `duration_s`."""

    at_s: float
    kind: str
    target: int
    duration_s: float
    amount: float = 0.0
    """Seconds of a clock step; the seed of a leader move."""

    @property
    def lane(self) -> str:
        """Faults of one lane come one after another."""
        group = BY_NAME[self.kind].group
        return f"worker-{self.target}" if group == "worker" else group

    def __str__(self) -> str:
        return f"{self.at_s:7.1f} s  {self.kind} {self.target} for {self.duration_s:.1f} s"


def draw(
    seed: int, seconds: float, hurts: int, *, workers: int, nodes: int, allowed: Iterable[str], longest_s: float = 60.0
) -> tuple[Fault, ...]:
    """Faults over `seconds`, `hurts` of them kills and stops, in order of time.

    `allowed` names the kinds that are possible here; `longest_s` bounds every duration.
    """
    rng = random.Random(seed)
    names = set(allowed)
    kinds = [
        kind for kind in KINDS if kind.name in names and not (kind.name in ("brokers_stop_two", "leaders_move") and nodes < 3)
    ]
    chosen: list[Kind] = []
    while sum(kind.hurts for kind in chosen) < hurts:
        chosen += rng.choices(kinds, [kind.weight for kind in kinds])
    free_at: dict[str, float] = {}
    faults = []
    for number, kind in enumerate(chosen):
        at_s = (number + rng.random()) * seconds / len(chosen)
        duration_s = min(rng.uniform(kind.shortest_s, kind.longest_s), longest_s)
        targets = {"worker": workers, "brokers": nodes}.get(kind.group, 1)
        amount = rng.uniform(-CLOCK_STEP_S, CLOCK_STEP_S) if kind.name == "clock_step" else rng.random()
        fault = Fault(at_s, kind.name, rng.randrange(targets), duration_s, amount)
        begin = max(at_s, free_at.get(fault.lane, 0.0))
        rest = BROKER_REST_S if kind.group == "brokers" else 0.5
        free_at[fault.lane] = begin + duration_s + rest
        faults.append(Fault(begin, fault.kind, fault.target, duration_s, amount))
    return tuple(sorted(faults, key=lambda fault: fault.at_s))
