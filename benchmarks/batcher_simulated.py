"""What the batcher costs and gives: threads, copies and sleeps measured against a simulated device, and against the real one.

* saturated: images a second through the batcher over a bare loop on full batches, in turns within one run;
* lone: what the batcher adds to an event when one comes a second;
* bursts: the urgent class's p99 while bulk comes in bursts, over its p99 when it is alone;
* loads: p50, p99 and batch size from a tenth of the device's capacity to all of it.

    python -m benchmarks.batcher_simulated [--detector] [--docs docs]     # --docs: the plot, and the tables of docs/batching.md
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import batcher_page, record
from benchmarks.simulated_device import OverlappedDevice, SimulatedDevice, in_virtual_time, poisson
from engine.batcher import Batcher, BatchReport, QueueFull
from engine.batching_policy import BatchConfig

CONFIG = BatchConfig(max_batch_size=32, max_queue_delay_microseconds=5_000, max_queue_size=256)
A_S, B_S = 0.004, 0.00015
"""Chosen, not measured: a device whose calls cost much and whose crops little, as a GPU's. 32 crops in 8.8 ms, one in 4.2."""
CPU_B_S = 0.012
"""One whose crops cost much, as a CPU's: 32 crops in 388 ms."""
BURST_ROUNDS = 5
LOADS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95)


def _crops(count: int) -> list[NDArray[np.uint8]]:
    """Single crops, more than a processor's cache holds: a batch is put together from memory, as in the worker."""
    pool = np.random.default_rng(1).integers(0, 255, (count, 1, 224, 224, 3), dtype=np.uint8)
    return list(pool)


class Run:
    """A batcher and its device thread; remembers when each context came and what its batch was."""

    def __init__(self, device: Any, config: BatchConfig = CONFIG) -> None:
        self.latencies: dict[Any, list[float]] = {}
        self.reports: list[BatchReport] = []
        self.done = 0
        self.batcher: Batcher[tuple[Any, float]] = Batcher(config, observer=self.reports.append)
        self._thread = threading.Thread(target=self.batcher.run, args=(lambda: device, self._on_done, self._on_error))
        self._thread.start()

    def _on_done(self, context: tuple[Any, float], scores: NDArray[np.float32], timing: object) -> None:
        self.latencies.setdefault(context[0], []).append(time.monotonic() - context[1])
        self.done += 1

    @staticmethod
    def _on_error(context: object, error: Exception) -> None:
        raise error

    def close(self) -> None:
        """Drain and end."""
        self.batcher.close()
        self._thread.join()


@contextmanager
def running(device: Any, config: BatchConfig = CONFIG) -> Iterator[Run]:
    """A run that is closed at the end."""
    run = Run(device, config)
    try:
        yield run
    finally:
        run.close()


def saturated(device: Any, pool: list[NDArray[np.uint8]], seconds: float, rounds: int) -> dict[str, Any]:
    """Bare loop and batcher in turns; the median of the rounds' ratios."""
    size = CONFIG.max_batch_size
    batch = np.concatenate(pool[:size])
    bare, batched, sizes, busy = [], [], [], []
    for _ in range(rounds):
        bare.append(_bare(device, batch, seconds))
        rate, mean_size, busy_share = _through_batcher(device, pool, seconds)
        batched.append(rate)
        sizes.append(mean_size)
        busy.append(busy_share)
    ratios = [mine / theirs for mine, theirs in zip(batched, bare, strict=True)]
    return {
        "bare_images_per_s": statistics.median(bare),
        "batcher_images_per_s": statistics.median(batched),
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "device_busy": None if isinstance(device, OverlappedDevice) else statistics.median(busy),
        "mean_batch": statistics.fmean(sizes),
    }


def _bare(device: Any, batch: NDArray[np.uint8], seconds: float) -> float:
    """Images a second of full batches that are ready in memory, as many under way as the device takes."""
    started, done = time.perf_counter(), 0
    if isinstance(device, OverlappedDevice):
        tickets = [device.submit(batch) for _ in range(device.depth)]
        while time.perf_counter() - started < seconds:
            device.collect(tickets.pop(0))
            tickets.append(device.submit(batch))
            done += len(batch)
        elapsed = time.perf_counter() - started
        for ticket in tickets:
            device.collect(ticket)
        return done / elapsed
    while time.perf_counter() - started < seconds:
        device.infer(batch)
        done += len(batch)
    return done / (time.perf_counter() - started)


def _through_batcher(device: Any, pool: list[NDArray[np.uint8]], seconds: float) -> tuple[float, float, float]:
    """With a queue that is never empty, from full batch to full batch: images a second, mean batch, share of time on the device.

    The last is what a bare loop is 1.0 of by definition: a ratio that another process on the same cores does not blur.
    """
    stop = threading.Event()
    with running(device) as run:

        def produce() -> None:
            number = 0
            while not stop.is_set():
                try:
                    run.batcher.submit(pool[number % len(pool)], 0, ("item", 0.0), timeout=0.1)
                except QueueFull:
                    continue
                number += 1

        producer = threading.Thread(target=produce)
        producer.start()
        while len(run.reports) < 3:
            time.sleep(0.001)
        begun, first, seen = time.perf_counter(), run.done, len(run.reports)
        _wait_for_batch(run, seen)
        begun, first, seen = time.perf_counter(), run.done, len(run.reports)
        time.sleep(seconds)
        _wait_for_batch(run, len(run.reports))
        elapsed, done, reports = time.perf_counter() - begun, run.done - first, run.reports[seen:]
        stop.set()
        producer.join()
    return (
        done / elapsed,
        statistics.fmean(report.size for report in reports),
        sum(report.infer_s for report in reports) / elapsed,
    )


def _wait_for_batch(run: Run, seen: int) -> None:
    while len(run.reports) == seen:
        time.sleep(0.0002)


def _play(run: Run, schedule: list[tuple[float, str, int]], pool: list[NDArray[np.uint8]]) -> float:
    """Submit (moment, name, priority) on time; an item's latency counts from its moment. Returns the seconds it took."""
    started = time.monotonic()
    for number, (moment, name, priority) in enumerate(schedule):
        wait = started + moment - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        run.batcher.submit(pool[number % len(pool)], priority, (name, started + moment))
    return time.monotonic() - started


def lone(pool: list[NDArray[np.uint8]], events: int) -> dict[str, Any]:
    """One event a second: what is added to the device's own time, in milliseconds."""
    device = SimulatedDevice(A_S, B_S)
    own = []
    for _ in range(20):
        started = time.perf_counter()
        device.infer(pool[0])
        own.append(time.perf_counter() - started)
    with running(device) as run:
        _play(run, [(0.2 + second, "lone", 0) for second in range(events)], pool)
    added_ms = [(latency - statistics.median(own)) * 1000 for latency in run.latencies["lone"]]
    return {
        "events": events,
        "max_queue_delay_ms": CONFIG.max_queue_delay_microseconds / 1000,
        "added_ms_median": statistics.median(added_ms),
        "added_ms_p90": float(np.percentile(added_ms, 90)),
        "added_ms_max": max(added_ms),
    }


def bursts(device: SimulatedDevice, config: BatchConfig, pool: list[NDArray[np.uint8]], seconds: float) -> dict[str, Any]:
    """Urgent items at 50 a second, alone and while bulk comes 200 at once, every half second; medians of the rounds' p99."""

    def schedules(length_s: float, seed: int) -> tuple[list[tuple[float, str, int]], list[tuple[float, str, int]]]:
        urgent = [(moment, "urgent", 0) for moment in poisson(50, length_s, seed)]
        bulk = [(0.25 + 0.5 * number, "bulk", 1) for number in range(int(length_s / 0.5)) for _ in range(200)]
        return urgent, sorted(urgent + bulk)

    rounds: list[tuple[float, float]] = []
    bulk_ms = []
    for number in range(BURST_ROUNDS):
        urgent, both = schedules(seconds, 5 + number)
        with running(device, config) as quiet:
            _play(quiet, urgent, pool)
        with running(device, config) as busy:
            _play(busy, both, pool)
        rounds.append((_p99_ms(quiet.latencies["urgent"]), _p99_ms(busy.latencies["urgent"])))
        bulk_ms.append(_p99_ms(busy.latencies["bulk"]))
    measured = [statistics.median(values) for values in zip(*rounds, strict=True)]
    exact = []
    for schedule in schedules(300, 13):
        ran = in_virtual_time(config, device, schedule)
        exact.append(_p99_ms([end - start for name, start, end, _ in ran if name == "urgent"]))
    return {
        "urgent_items_a_round": len(urgent),
        "bulk_items_a_round": len(both) - len(urgent),
        "measured": {"quiet_p99_ms": measured[0], "bursts_p99_ms": measured[1], "ratio": measured[1] / measured[0]},
        "measured_ratios": [round(loud / quiet, 3) for quiet, loud in rounds],
        "virtual": {"quiet_p99_ms": exact[0], "bursts_p99_ms": exact[1], "ratio": exact[1] / exact[0]},
        "bulk_p99_bursts_ms": statistics.median(bulk_ms),
    }


def _p99_ms(latencies_s: list[float]) -> float:
    return float(np.percentile(latencies_s, 99)) * 1000


def loads(pool: list[NDArray[np.uint8]], seconds: float) -> list[dict[str, Any]]:
    """Poisson arrivals at a share of what the device can do with full batches: measured, and in virtual time."""
    capacity = CONFIG.max_batch_size / SimulatedDevice(A_S, B_S).seconds(CONFIG.max_batch_size)
    found = []
    for share in LOADS:
        arrivals = poisson(share * capacity, seconds, 7)
        with running(OverlappedDevice(A_S, B_S)) as run:
            took = _play(run, [(moment, "item", 0) for moment in arrivals], pool)
        long = [(moment, "item", 0) for moment in poisson(share * capacity, 60, 11)]
        exact = list(in_virtual_time(CONFIG, SimulatedDevice(A_S, B_S), long))
        found.append(
            {
                "load": share,
                "offered_per_s": share * capacity,
                "late_generator": took > seconds * 1.02,
                "measured": _shape(run.latencies["item"], [report.size for report in run.reports]),
                "reasons": dict(Counter(report.reason for report in run.reports)),
                "virtual": _shape([end - start for _, start, end, _ in exact], _batch_sizes(exact)),
            }
        )
    return found


def _batch_sizes(exact: list[tuple[str, float, float, int]]) -> list[int]:
    """One size a batch: items of a batch end at the same moment."""
    return list({end: size for _, _, end, size in exact}.values())


def _shape(latencies_s: list[float], sizes: list[int]) -> dict[str, float]:
    p50, p99 = np.percentile(latencies_s, (50, 99)) * 1000
    return {"items": len(latencies_s), "p50_ms": float(p50), "p99_ms": float(p99), "mean_batch": statistics.fmean(sizes)}


def detector_saturated(bundle: Path | None, pool: list[NDArray[np.uint8]], seconds: float) -> dict[str, dict[str, Any]]:
    """The same ratio on a bundle (None: the packaged one), on each CPU backend that is installed."""
    from engine.backends.base import BackendUnavailable
    from engine.detector import Detector

    found = {}
    for backend in ("torch", "openvino"):
        try:
            with Detector.open(bundle, backend=backend, device="cpu") as detector:
                detector.warm_up((CONFIG.max_batch_size,))
                found[f"saturated_{backend}_cpu"] = saturated(detector, pool, seconds, rounds=5)
        except BackendUnavailable:
            continue
    return found


def main(docs: Path | None = None, detector: bool = False, bundle: Path | None = None, pace: float = 1.0) -> dict[str, Any]:
    """Measure everything and write benchmarks/results/batcher_simulated.json; `pace` stretches the runs."""
    pool = _crops(512)
    figures: dict[str, Any] = {
        "device_ms": {"a": A_S * 1000, "b": B_S * 1000},
        "saturated_blocking": saturated(SimulatedDevice(A_S, B_S), pool, 2 * pace, rounds=9),
        "saturated_overlapping": saturated(OverlappedDevice(A_S, B_S), pool, 2 * pace, rounds=9),
        "saturated_blocking_cpu_like": saturated(SimulatedDevice(A_S, CPU_B_S), pool, 3 * pace, rounds=3),
        "lone": lone(pool, int(20 * pace)),
        "bursts": bursts(OverlappedDevice(A_S, B_S), CONFIG, pool, 8 * pace),
        "loads": loads(pool, 4 * pace),
        "load_average": os.getloadavg()[0],
    }
    if detector:
        figures |= detector_saturated(bundle, pool, 8 * pace)
    record.write("batcher_simulated", figures)
    if docs is not None:
        batcher_page.write(figures, docs)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", action="store_true", help="also the real model on the CPU backends")
    parser.add_argument("--bundle", type=Path, help="its bundle (default: the packaged one)")
    parser.add_argument("--docs", type=Path, help="write the plot and the tables into this folder's batching.svg and batching.md")
    parser.add_argument("--pace", type=float, default=1.0, help="stretch or shorten every run by this factor")
    arguments = parser.parse_args()
    for name, value in main(arguments.docs, arguments.detector, arguments.bundle, arguments.pace).items():
        print(f"{name}: {value}")
