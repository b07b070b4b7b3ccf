"""One worker process or two on this machine, and a growing share of cached images: events a second and CPU for each.

The detector returns at once. `cached` are 512 x 512 JPEGs inside their events of which a share is one of 64 pictures seen before.
`decode` are pictures that were never seen, with one decoder process a worker and each worker on a core of its own, so that
one worker cannot use the machine that two will. The broker shares the cores: what it takes is missing to the workers.
"""

from __future__ import annotations

import random
from typing import Any

from benchmarks import pipeline, record

SHARES = (0.0, 0.5, 0.9, 1.0)
KNOWN = 64
PARTITIONS = (2, 4, 8)
NULL = "benchmarks.null_worker"


def mixed(events: int, share: float, seed: int = 5) -> list[bytes]:
    """Pictures of which `share` are one of `KNOWN`, all of those among the first."""
    pictures = pipeline.jpegs(events)
    choose = random.Random(seed)
    known = pictures[:KNOWN]
    return known + [choose.choice(known) if choose.random() < share else picture for picture in pictures[KNOWN:]]


def cached(events: int, processes: int) -> dict[str, Any]:
    """By share of hits."""
    found = {}
    for share in SHARES:
        pictures = mixed(events if share >= 0.9 else events // 4, share)
        found[f"{share:.0%}"] = pipeline.path(pictures, NULL, len(pictures) // 4, processes, partitions=4)
    return found


def decoding(events: int) -> dict[str, Any]:
    """By partitions: one worker, two workers, and how far two are from twice one."""
    found: dict[str, Any] = {}
    pictures = pipeline.jpegs(events)
    for partitions in PARTITIONS:
        one, two = (
            pipeline.path(pictures, f"{NULL} --core", events // 4, count, partitions, {"WORKER_DECODE__PROCESSES": "1"})
            for count in (1, 2)
        )
        efficiency = two["events_per_s"] / one["events_per_s"] / 2
        found[f"{partitions} partitions"] = {"one": one, "two": two, "efficiency": efficiency}
    return found


def main(events: int) -> dict[str, Any]:
    """Run and write the result file."""
    figures = {
        "cached, one process": cached(events * 2, 1),
        "cached, two processes": cached(events * 2, 2),
        "decode": decoding(events),
    }
    record.write("shapes", figures)
    return figures
