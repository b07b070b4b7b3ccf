"""One worker process or two on this machine, a growing share of cached images, partitions and image sizes, with a null engine.

`cached` are 512 x 512 JPEGs inside their events of which a share is one of 64 pictures seen before; `known` are 256-pixel
ones, all of them seen before.
`decode` are pictures that were never seen, with one decoder process a worker and each worker on a core of its own, so that
one worker cannot use the machine that two will; `photographs` the same with files of 12 megapixels named by address, which burden
decoders and not the broker; beside it stands what the machine itself makes of two processes that only decode. `fetch` are small
pictures from a host that takes its time, `sizes` pictures of 256 pixels to 12 megapixels, never seen. The broker shares the
cores: what it takes is missing to the workers.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import decode, pipeline, record
from benchmarks.compare import merge
from benchmarks.kafka_ends import CLIENT_BATCH_BYTES
from benchmarks.uploads import Upload, by_reference, inline, slow_host

SHARES = (0.0, 0.5, 0.9, 1.0)
KNOWN = 64
PARTITIONS = (1, 2, 4, 8)
SIZES = ("256 px baseline", "512 px baseline", "2 MP baseline", "12 MP baseline q85")
NULL = "benchmarks.null_worker"
ONE_DECODER = {"WORKER_DECODE__PROCESSES": "1"}
LATENCY_S = 0.2
"""Of the image host: a far object store's, about; two workers then leave the machine room."""
ROUNDS = 2
"""Of what is said about two workers against one: a second one, backwards."""
FETCHES = 16
"""The setting's default; all of them may go to one host here."""


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
        found[f"{share:.0%}"] = pipeline.path(inline(pictures), NULL, len(pictures) // 4, processes, partitions=4)
    return found


def known(events: int) -> dict[str, Any]:
    """Small pictures that were all seen before, by workers and by how the uploads' producer puts them into record batches."""
    picture = decode.jpeg((256, 256), {"quality": 85})
    choose = random.Random(5)
    numbers = [*range(KNOWN), *(choose.randrange(KNOWN) for _ in range(events))]
    uploads = inline([picture + number.to_bytes(8, "big") for number in numbers])
    return {
        f"{workers} worker{'s' * (workers > 1)}, {what}": pipeline.path(
            uploads, NULL, len(uploads) // 4, workers, partitions=4, batch_bytes=size
        )
        for workers in (1, 2)
        for what, size in (("an image a batch", CLIENT_BATCH_BYTES), ("batches of 1 MB", 1_000_000))
    }


def decoding(events: int) -> dict[str, Any]:
    """By partitions: one worker, two workers where there are two partitions, and how far two are from twice one."""
    pictures = inline(pipeline.jpegs(events))
    return {
        f"{partitions} partitions": _doubled(pictures, f"{NULL} --core", partitions, ONE_DECODER) for partitions in PARTITIONS
    }


def photographs(events: int, kind: str = "12 MP baseline q85") -> dict[str, Any]:
    """12-megapixel files that are named by their address: next to nothing goes through the broker, decoding is all the work."""
    name, size, options, _ = next(found for found in decode.KINDS if found[0] == kind)
    picture = decode.jpeg(size, options)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.jpg") for number in range(events)]
        for number, path in enumerate(paths):
            path.write_bytes(picture + number.to_bytes(8, "big"))
        settings = {**ONE_DECODER, "WORKER_FETCH__FILE_ROOTS": folder}
        before = machine(picture)
        figures = _doubled(by_reference([path.as_uri() for path in paths]), f"{NULL} --core", 2, settings, ROUNDS)
        own = (before["efficiency"] + machine(picture)["efficiency"]) / 2
        return {"picture": name, **figures, "efficiency_of_the_machine": own, "of_what_it_makes": figures["efficiency"] / own}


def machine(picture: bytes, seconds: float = 3.0) -> dict[str, float]:
    """What the machine itself makes of two: bare decoding in one process and in two, each on a core of its own.

    On a shared machine that can be far from twice as much, and another share a minute later.
    """
    context = multiprocessing.get_context("spawn")
    rates = []
    for count in (1, 2):
        with ProcessPoolExecutor(count, context) as processes:
            list(processes.map(_bare, range(count), [picture] * count, [0.5] * count))  # they are all up
            rates.append(sum(processes.map(_bare, range(count), [picture] * count, [seconds] * count)))
    return {"one_per_s": rates[0], "two_per_s": rates[1], "efficiency": rates[1] / rates[0] / 2}


def _bare(number: int, picture: bytes, seconds: float) -> float:
    """Pictures a second of one process that does nothing but decode."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(0, {cores[number % len(cores)]})
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        decode.region(picture)
        done += 1
    return done / (time.perf_counter() - began)


def fetching(events: int) -> dict[str, Any]:
    """256-pixel pictures from a host that takes LATENCY_S: what a worker fetches at a time bounds it, not the processor."""
    settings = {
        "WORKER_FETCH__ALLOW_PRIVATE_ADDRESSES": "true",
        "WORKER_FETCH__CONCURRENCY": str(FETCHES),
        "WORKER_FETCH__CONCURRENCY_PER_HOST": str(FETCHES),
    }
    with slow_host(decode.jpeg((256, 256), {"quality": 85}), LATENCY_S) as host:
        uploads = by_reference([f"{host}/{number}" for number in range(events)])
        bound = {"latency_s": LATENCY_S, "fetches": FETCHES, "one_worker_at_most_per_s": FETCHES / LATENCY_S}
        return bound | _doubled(uploads, NULL, 2, settings, ROUNDS)


def _doubled(
    uploads: Sequence[Upload], module: str, partitions: int, settings: dict[str, str], rounds: int = 1
) -> dict[str, Any]:
    """One worker, two workers, and how far two are from twice one; one alone where there is one partition.

    In turns, every second one backwards: a machine that slows down or speeds up meanwhile favours neither.
    """
    runs: dict[int, list[dict[str, Any]]] = {count: [] for count in range(1, min(partitions, 2) + 1)}
    for turn in range(rounds):
        for count in list(runs)[:: -1 if turn % 2 else 1]:
            runs[count].append(pipeline.path(uploads, module, len(uploads) // 4, count, partitions, settings))
    figures: dict[str, Any] = dict(zip(("one", "two"), map(merge, runs.values()), strict=False))
    if len(runs) > 1:
        rates = [statistics.mean(run["events_per_s"] for run in runs[count]) for count in (1, 2)]
        figures["efficiency"] = rates[1] / rates[0] / 2
    return figures


def sizes(events: int) -> dict[str, Any]:
    """By kind of picture; so many of the large ones that each kind takes about as long."""
    found = {}
    for name, size, options, weight in decode.KINDS:
        if name in SIZES:
            picture = decode.jpeg(size, options)
            count = max(60, events * weight // 300)
            pictures = [picture + number.to_bytes(8, "big") for number in range(count)]
            found[name] = pipeline.path(inline(pictures), NULL, count // 4, partitions=4)
    return found


def main(events: int) -> dict[str, Any]:
    """Run and write the result file."""
    figures: dict[str, Any] = {}
    for name, measure in (
        ("cached, one process", lambda: cached(events * 2, 1)),
        ("cached, two processes", lambda: cached(events * 2, 2)),
        ("known, 256 px", lambda: known(events * 4)),
        ("decode", lambda: decoding(events)),
        ("photographs", lambda: photographs(events // 4)),
        ("photographs, progressive", lambda: photographs(events // 16, "12 MP progressive q85")),
        ("fetch", lambda: fetching(events // 2)),
        ("sizes", lambda: sizes(events)),
    ):
        figures[name] = measure()
        record.write("shapes", figures)
    return figures
