"""Long runs with a plot of their own: members that come and go, brokers that are gone, and a soak that looks for leaks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from typing import TypeVar

import psutil

from tests.chaos import load
from tests.chaos.books import Disturbance
from tests.chaos.run import Report, Run
from tests.chaos.schedule import Fault

T = TypeVar("T")

LEAD = 3_000
"""So many events stand ready in the topic, so that the workers are the bottleneck."""
SAMPLE_S = 5.0
GROWTH_BYTES = 24 * 2**20
"""Resident bytes may grow so much between the second and the last quarter of a soak: allocators breathe."""


class FullRate:
    """Load without end: always `LEAD` events ahead of what is accounted for."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.over = False
        self.uploader = run.upload(self._plans(), self._wait_s)

    def _plans(self) -> Iterator[load.Planned]:
        number = 0
        while not self.over:
            planned = load.plan(self._run.plan.seed, number, self._run.host.address)
            self._run.books.expect(planned)
            yield planned
            number += 1

    def _wait_s(self, number: int) -> float:
        return 0.02 if number >= self._run.books.accounted + LEAD and not self.over else 0.0


def members(run: Run, seconds: float, every_s: float = 10.0) -> Report:
    """The last worker leaves and joins every `every_s` for `seconds`; before and after it is quiet for a third of that time each.

    Adds a problem where the throughput falls below 0.7 of the quiet one.
    """
    run.start()
    begun = time.monotonic()
    rate = FullRate(run)
    last = run.plan.workers - 1
    _go_on(run, 30)
    quiet = [_go_on(run, seconds / 3)]
    began, since, before = time.time(), time.monotonic(), run.books.accounted
    left = joined = 0
    while time.monotonic() < since + seconds and not run.failures:
        _leave(run, last)
        left += 1
        _go_on(run, every_s)
        run.workers.employ(last)
        joined += _join(run, last, every_s)
    churn_per_s = (run.books.accounted - before) / (time.monotonic() - since)
    run.disturbances.append(Disturbance("members", began, time.time()))
    _go_on(run, 30)
    quiet.append(_go_on(run, seconds / 3))
    rate.over = True
    run.watch(lambda: rate.uploader.done, begun)
    report = run.finish(rate.uploader, begun)
    ratio = churn_per_s / statistics.mean(quiet)
    report.figures = {"quiet_per_s": quiet, "churn_per_s": churn_per_s, "ratio": ratio, "left": left, "joined": joined}
    if ratio < 0.7:
        report.problems.append(f"throughput fell to {ratio:.2f} of the quiet run's")
    if joined < left:
        report.problems.append(f"the member left {left} times and came back {joined} times")
    return report


def _leave(run: Run, number: int) -> None:
    """Tell it to leave, and read on until it has."""
    if code := _reading_on(run, lambda: run.workers.retire(number)):
        run.failures.append(f"a worker that was told to leave ended with {code}")


def _reading_on(run: Run, call: Callable[[], T]) -> T:
    """What `call` returns; meanwhile the books are kept."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call)
        while not future.done():
            run.reader.look()
        return future.result()


def _join(run: Run, number: int, seconds: float) -> bool:
    """Read on for so long, and until it has joined: on a busy machine a process takes longer to start. Whether it has."""
    _go_on(run, seconds)
    deadline = time.monotonic() + 120
    while not (ready := run.workers.ready(number)) and time.monotonic() < deadline:
        run.reader.look()
    return ready


def outage(run: Run, gone_s: float = 60.0) -> Report:
    """Every broker is killed for `gone_s` under load; nobody restarts a worker."""
    run.start()
    begun = time.monotonic()
    rate = FullRate(run)
    _go_on(run, 20)
    _reading_on(run, lambda: run.hurt(Fault(0, "brokers_gone", 0, gone_s)))
    back, before = time.monotonic(), run.books.accounted
    while run.books.accounted < before + LEAD and time.monotonic() < back + run.plan.patience_s:
        run.reader.look()
    recovered_s = next((moment - back for moment, accounted in run.books.samples if accounted > before and moment > back), None)
    _go_on(run, 20)
    rate.over = True
    run.watch(lambda: rate.uploader.done, begun)
    report = run.finish(rate.uploader, begun)
    report.figures = {"recovered_s": recovered_s}
    if recovered_s is None:
        report.problems.append(f"no verdict within {run.plan.patience_s:.0f} s after the brokers were back")
    if run.workers.exits and any(not one.wanted for one in run.workers.exits):
        report.problems.append("a worker had to be started again")
    return report


@dataclass(frozen=True, slots=True)
class Size:
    """What a worker and its decoders hold."""

    at_s: float
    worker: int
    resident_bytes: int
    descriptors: int
    threads: int
    decoder_bytes: int


def soak(run: Run, seconds: float) -> Report:
    """Full rate for `seconds`; memory, descriptors and threads of every worker have to stay flat."""
    run.start()
    begun = time.monotonic()
    rate = FullRate(run)
    sizes: list[Size] = []
    until = begun + seconds
    while time.monotonic() < until and not run.failures:
        _go_on(run, SAMPLE_S)
        sizes += [_size(run, number, time.monotonic() - begun) for number in range(run.plan.workers)]
    rate.over = True
    run.watch(lambda: rate.uploader.done, begun)
    report = run.finish(rate.uploader, begun)
    report.series = [astuple(size) for size in sizes[:: max(1, len(sizes) // 500)]]
    for number in range(run.plan.workers):
        own = [size for size in sizes if size.worker == number]
        for name, allowed in (
            ("resident_bytes", GROWTH_BYTES),
            ("decoder_bytes", GROWTH_BYTES),
            ("descriptors", 4),
            ("threads", 1),
        ):
            early, late = _quarters(own, lambda size, name=name: getattr(size, name))  # type: ignore[misc]
            report.figures[f"worker {number} {name}"] = (early, late)
            if late > early + allowed:
                report.problems.append(f"worker {number}: {name} grew from {early:.0f} to {late:.0f}")
    return report


def _quarters(sizes: list[Size], value: Callable[[Size], int]) -> tuple[float, float]:
    """The medians of the second and of the last quarter: the first one is for warming up."""
    quarter = max(1, len(sizes) // 4)
    values = [value(size) for size in sizes]
    return statistics.median(values[quarter : 2 * quarter] or values), statistics.median(values[-quarter:])


def _size(run: Run, number: int, at_s: float) -> Size:
    process = psutil.Process(run.workers.pid(number))
    decoders = sum(child.memory_info().rss for child in process.children())
    return Size(at_s, number, process.memory_info().rss, process.num_fds(), process.num_threads(), decoders)


def _go_on(run: Run, seconds: float) -> float:
    """Read the books for so long; events a second."""
    began, before = time.monotonic(), run.books.accounted
    while time.monotonic() < began + seconds:
        run.reader.look()
    return (run.books.accounted - before) / (time.monotonic() - began)
