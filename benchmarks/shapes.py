"""One worker process or two on this machine, a growing share of cached images, partitions and image sizes, with a null engine.

`cached` are 512 x 512 JPEGs inside their events of which a share is one of 64 pictures seen before.
`decode` are pictures that were never seen, with one decoder process a worker and each worker on a core of its own, so that
one worker cannot use the machine that two will. `sizes` are pictures of 256 pixels to 12 megapixels, never seen. The broker
shares the cores: what it takes is missing to the workers.
"""

from __future__ import annotations

import random
from typing import Any

from benchmarks import decode, pipeline, record

SHARES = (0.0, 0.5, 0.9, 1.0)
KNOWN = 64
PARTITIONS = (1, 2, 4, 8)
SIZES = ("256 px baseline", "512 px baseline", "2 MP baseline", "12 MP baseline q85")
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
    """By partitions: one worker, two workers where there are two partitions, and how far two are from twice one."""
    found: dict[str, Any] = {}
    pictures = pipeline.jpegs(events)
    for partitions in PARTITIONS:
        runs = [
            pipeline.path(pictures, f"{NULL} --core", events // 4, count, partitions, {"WORKER_DECODE__PROCESSES": "1"})
            for count in range(1, min(partitions, 2) + 1)
        ]
        figures = found[f"{partitions} partitions"] = dict(zip(("one", "two"), runs, strict=False))
        if len(runs) > 1:
            figures["efficiency"] = runs[1]["events_per_s"] / runs[0]["events_per_s"] / 2
    return found


def sizes(events: int) -> dict[str, Any]:
    """By kind of picture; so many of the large ones that each kind takes about as long."""
    found = {}
    for name, size, options, weight in decode.KINDS:
        if name in SIZES:
            picture = decode.jpeg(size, options)
            count = max(60, events * weight // 300)
            pictures = [picture + number.to_bytes(8, "big") for number in range(count)]
            found[name] = pipeline.path(pictures, NULL, count // 4, partitions=4)
    return found


def main(events: int) -> dict[str, Any]:
    """Run and write the result file."""
    figures: dict[str, Any] = {}
    for name, measure in (
        ("cached, one process", lambda: cached(events * 2, 1)),
        ("cached, two processes", lambda: cached(events * 2, 2)),
        ("decode", lambda: decoding(events)),
        ("sizes", lambda: sizes(events)),
    ):
        figures[name] = measure()
        record.write("shapes", figures)
    return figures
