"""One run: brokers, cache, workers, load, faults by schedule, and the balance at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from engine import bundle, images
from engine.backends import create
from engine.detector import Detector
from tests.chaos import load
from tests.chaos.books import Balance, Books, Disturbance, Offsets, Reader
from tests.chaos.brokers import Brokers
from tests.chaos.run_settings import kafka_settings, worker_settings
from tests.chaos.schedule import Fault, draw
from tests.chaos.workers import Workers
from worker.embedded import EmbeddedCache
from worker.errors import DependencyError

CACHE_USED_FROM = 10_000
"""From so many events on some must have been found in the cache; else the run proves nothing about it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of a run."""

    seed: int
    seconds: float
    events: int
    workers: int = 3
    hurts: int = 0
    delivery: str = "at_least_once"
    partitions: int = 12
    longest_s: float = 60.0
    namespaces: bool = False
    patience_s: float = 120.0
    """Without any progress for so long after the last fault the run is stuck."""
    worker_settings: dict[str, object] = field(default_factory=dict)

    def faults(self, brokers: Brokers) -> tuple[Fault, ...]:
        """The schedule."""
        bears = brokers.bears if self.namespaces else brokers.bears - {"network_cut"}
        return draw(
            self.seed,
            self.seconds,
            self.hurts,
            workers=self.workers,
            nodes=brokers.nodes,
            allowed=sorted(bears),
            longest_s=self.longest_s,
        )


@dataclass
class Report:
    """What came of it."""

    plan: Plan
    balance: Balance
    seconds: float
    events_per_s: float
    longest_stall_s: float
    faults: dict[str, int]
    disturbances: list[Disturbance]
    exits: list[str]
    behind: dict[str, int]
    metrics: dict[str, float]
    problems: list[str]
    figures: dict[str, Any] = field(default_factory=dict)
    series: list[tuple[Any, ...]] = field(default_factory=list)
    """Of a soak: seconds, worker, resident bytes, descriptors, threads, decoders' resident bytes."""

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return dataclasses.asdict(self)


class Run:
    """Everything of one run. A context manager: nothing is left behind however it ends."""

    def __init__(
        self,
        plan: Plan,
        brokers: Brokers,
        folder: Path,
        say: Callable[[str], None] = lambda line: None,
        bundles: Sequence[Path] = (),
        prefix: Sequence[str] = (),
    ) -> None:
        """`bundles`: models that may sign verdicts, the packaged one where none are named; `prefix` as for `Workers`."""
        self.plan, self.brokers, self.folder, self._say = plan, brokers, folder, say
        self._bundles = bundles or [bundle.resolve(bundle.packaged())]
        self._prefix = prefix
        self.stopping = threading.Event()
        self.disturbances: list[Disturbance] = []
        self.failures: list[str] = []
        self.happened: Counter[str] = Counter()

    def __enter__(self) -> Run:
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            plan = self.plan
            self.settings = kafka_settings(self.brokers.bootstrap, plan.delivery)
            self.brokers.prepare(self.settings, plan.partitions)
            self.cache = stack.enter_context(EmbeddedCache(max_memory_bytes=32 * 2**20))
            self._open_cache()
            self.host = load.Host()
            stack.callback(self.host.close)
            self.plans = [load.plan(plan.seed, number, self.host.address) for number in range(plan.events)]
            settings = worker_settings(self.settings, self.cache.url) | plan.worker_settings
            self.workers = Workers(plan.workers, self.folder, settings, plan.namespaces, self._prefix)
            stack.callback(self.workers.close)
            self.books = Books(self.plans, dict(map(_scores, self._bundles)))
            self.reader = Reader(self.settings, self.books)
            stack.callback(self.reader.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._stack.close()

    # -- the run
    def go(self) -> Report:
        """Load and faults until every event is accounted for, or nothing moves any more."""
        faults = self.plan.faults(self.brokers)
        for fault in faults:
            self._say(str(fault))
        self.start()
        begun = time.monotonic()
        uploader = self.upload(self.plans, load.steadily(len(self.plans), self.plan.seconds))
        with self._lanes(faults) as lanes:
            self.watch(lambda: uploader.done and not any(lane.is_alive() for lane in lanes), begun)
        uploader.close()
        self.failures += uploader.failures[:3]
        return self.finish(uploader, begun)

    def start(self) -> None:
        """Start the workers and wait until all are ready."""
        self.workers.start()
        self.wait(lambda: all(self.workers.ready(number) for number in range(self.plan.workers)), 300, "workers ready")

    def upload(self, plans: Iterable[load.Planned], wait_s: Callable[[int], float]) -> load.Uploader:
        """Begin to produce."""
        uploader = load.Uploader(self.brokers.bootstrap, self.settings.upload_topics[0], plans, wait_s)
        self._stack.callback(uploader.close)
        return uploader

    def finish(self, uploader: load.Uploader, begun: float) -> Report:
        """Wait for the last commits, end the workers kindly, close the books."""
        ended = next((moment for moment, accounted in self.books.samples if accounted == self.books.accounted), begun)
        offsets = Offsets(self.settings, lambda: uploader.offsets)
        behind = offsets.settled(self.plan.patience_s)
        metrics = self._metrics()
        codes = [self.workers.retire(number) for number in range(self.plan.workers)]
        while self.reader.look(2.0):
            pass
        behind = behind or offsets.settled(5)
        offsets.close()
        sources: dict[int, set[tuple[int, int]]] = {number: {place} for number, place in uploader.offsets.items()}
        if self.books.misplaced(uploader.offsets):
            sources = self.books.places(self.settings)
        balance = self.books.balance(sources, self.disturbances, exactly_once=self.plan.delivery == "exactly_once")
        problems = [*balance.problems, *self._exit_problems(codes), *self._log_problems()]
        if self.failures:  # the run was cut short: what is missing in the books says nothing
            problems, behind = [f"the run itself failed: {failure}" for failure in self.failures], {}
        if self.books.accounted >= CACHE_USED_FROM and not metrics.get('cache_requests_total{result="hit"}'):
            problems.append("the cache was never hit")
        if behind:
            problems.append(f"offsets are not where they belong: {behind}")
        return Report(
            plan=self.plan,
            balance=balance,
            seconds=round(ended - begun, 1),
            events_per_s=round(self.books.accounted / max(0.1, ended - begun), 1),
            longest_stall_s=round(_longest_stall(self.books.samples, begun), 1),
            faults=dict(self.happened),
            disturbances=self.disturbances,
            exits=[f"worker {one.worker}: {one.code}" for one in self.workers.exits],
            behind=behind,
            metrics=metrics,
            problems=problems,
            figures={"uploads that stand twice": sum(len(places) > 1 for places in sources.values())},
        )

    def wait(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        """Until `done`; the logs' ends are in the error."""
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                ends = "\n".join(self.workers.log(slot.number)[-1500:] for slot in self.workers.slots if slot.log.exists())
                raise TimeoutError(f"no {what} within {seconds:.0f} s\n{ends}")
            time.sleep(0.1)

    def watch(self, over: Callable[[], bool], begun: float) -> None:
        """Read the books until all is over and accounted for, or nothing moves for the plan's patience."""
        moved, before, told = time.monotonic(), -1, time.monotonic()
        while not (self.books.complete and over()):
            self.reader.look()
            now = time.monotonic()
            if self.books.accounted != before or not over():
                moved, before = now, self.books.accounted
            if now - told > 15:
                told = now
                self._say(f"{now - begun:7.1f} s  {self.books.accounted} of {self.books.expected} events accounted for")
            if now - moved > self.plan.patience_s or self.failures:
                return

    # -- faults
    @contextlib.contextmanager
    def _lanes(self, faults: tuple[Fault, ...]) -> Iterator[list[threading.Thread]]:
        """One thread a lane; faults of a lane come one after another. On the way out every fault is healed."""
        begun = time.monotonic()
        lanes = []
        for name in sorted({fault.lane for fault in faults}):
            own = [fault for fault in faults if fault.lane == name]
            lane = threading.Thread(target=self._lane, args=(own, begun), name=f"lane {name}", daemon=True)
            lane.start()
            lanes.append(lane)
        try:
            yield lanes
        finally:
            self.stopping.set()
            for lane in lanes:
                lane.join()

    def _lane(self, faults: list[Fault], begun: float) -> None:
        for fault in faults:
            if self.stopping.wait(max(0.0, begun + fault.at_s - time.monotonic())):
                return
            try:
                self.hurt(fault)
            except Exception as error:  # noqa: BLE001 - told as a problem of the run
                self.failures.append(f"{fault}: {type(error).__name__}: {error}")
                return

    def hurt(self, fault: Fault) -> None:
        """Do it, wait for its time, undo it."""
        began = time.time()
        undo = self._begin(fault)
        try:
            self.stopping.wait(fault.duration_s)
        finally:
            undo()
            self.happened[fault.kind] += 1
            self.disturbances.append(Disturbance(fault.kind, began, time.time()))

    def _begin(self, fault: Fault) -> Callable[[], object]:
        """Hurt; returns what heals."""
        kind, target, brokers, workers = fault.kind, fault.target, self.brokers, self.workers
        match kind:
            case "worker_kill":
                workers.kill(target)
            case "worker_stop":
                workers.signal(target, signal.SIGSTOP)
                return lambda: workers.signal(target, signal.SIGCONT)
            case "decoder_kill":
                workers.signal_decoder(target, signal.SIGKILL, fault.amount)
            case "decoder_stop":
                pid = workers.signal_decoder(target, signal.SIGSTOP, fault.amount)
                return lambda: _resume(pid)
            case "broker_kill":
                brokers.kill(target)
                return lambda: brokers.restart(target)
            case "broker_stop":
                brokers.stop(target)
                return lambda: brokers.resume(target)
            case "brokers_stop_two":
                others = [node for node in range(brokers.nodes) if node != target][:2]
                for node in others:
                    brokers.stop(node)
                return lambda: [brokers.resume(node) for node in others]
            case "brokers_gone":
                for node in range(brokers.nodes):
                    brokers.kill(node)
                return brokers.restart_all
            case "leaders_move":
                brokers.move_leaders(self.settings, fault.amount)
            case "cache_kill":
                self.cache.kill()
                return self._restart_cache
            case "cache_stop":
                os.kill(self.cache.pid or 0, signal.SIGSTOP)
                return lambda: _resume(self.cache.pid)
            case "cache_full":
                _configure(self.cache, {"maxmemory-policy": "noeviction", "maxmemory": 1})
                return lambda: _configure(self.cache, {"maxmemory-policy": "allkeys-lru", "maxmemory": 32 * 2**20})
            case "network_cut":
                cable = workers.slots[target].namespace
                if cable is None:
                    raise ValueError("a network cut needs namespaces")
                cable.cut()
                return cable.heal
            case "clock_step":
                workers.step_clock(target, fault.amount)
        return lambda: None

    def _restart_cache(self) -> None:
        deadline = time.monotonic() + 600
        while True:
            try:
                self.cache.restart()
                return self._open_cache()
            except DependencyError:  # the machine is busy
                if time.monotonic() > deadline:
                    raise

    def _open_cache(self) -> None:
        """Let workers in other namespaces in: they come from another address than 127.0.0.1, which it refuses otherwise."""
        if self.plan.namespaces:
            _configure(self.cache, {"protected-mode": "no"})

    # -- looks
    def _metrics(self) -> dict[str, float]:
        """Counters that tell a story, summed over the workers that run now."""
        wanted = (
            *("events_duplicate", "events_stale", "rebalances", "commits", "decoder_restarts", "retries_total", "shared_inf"),
            "cache_requests",
        )
        found: Counter[str] = Counter()
        for number in range(self.plan.workers):
            for name, value in self.workers.metrics(number).items():
                if any(part in name for part in wanted):
                    found[name.removeprefix("code_worker_")] += value
        return dict(found)

    def _exit_problems(self, codes: list[int]) -> list[str]:
        """Workers end when told to, with 0, and die when killed; one that is fenced in a transaction may leave with 3."""
        problems = [f"worker {number} ended with {code} after SIGTERM" for number, code in enumerate(codes) if code]
        for one in self.workers.exits:
            fenced = self.plan.delivery == "exactly_once" and one.code == 3
            early = one.code == 3 and not one.was_ready  # no broker within its start's budget
            if not (one.wanted or fenced or early):
                problems.append(f"worker {one.worker} ended by itself with {one.code}: {one.last_line[:300]}")
        return problems

    def _log_problems(self) -> list[str]:
        problems = []
        for slot in self.workers.slots:
            for line in self.workers.log(slot.number).splitlines():
                if line.startswith("Traceback") or "worker.thread_failed" in line:
                    problems.append(f"worker {slot.number} logged: {line[:300]}")
        return problems[:10]


def _resume(pid: int | None) -> None:
    with contextlib.suppress(ProcessLookupError):
        if pid is not None:
            os.kill(pid, signal.SIGCONT)


def _configure(cache: EmbeddedCache, options: dict[str, str | int]) -> None:
    with contextlib.closing(redis.Redis.from_url(cache.url, socket_timeout=30)) as client:
        for name, value in options.items():
            client.config_set(name, value)


def _scores(folder: Path) -> tuple[str, dict[int, float]]:
    """A model's version, and by grey the score that the cheap engine gives with it."""
    opened = bundle.load(folder)
    detector = Detector.from_parts(opened, create("null", "cpu"), head="linear", crops="center")
    limits = images.Limits(max_pixels=1_000_000, max_frames=1)
    found = {}
    for grey in range(load.GREYS):
        crops = images.read_crops(load.picture(grey), limits, "center").crops
        found[grey] = float(detector.combine(detector.infer(crops), 1).score)
    detector.close()
    return opened.manifest.version, found


def _longest_stall(samples: list[tuple[float, int]], begun: float) -> float:
    longest, since, before = 0.0, begun, 0
    for moment, accounted in samples:
        if accounted != before:
            longest, since, before = max(longest, moment - since), moment, accounted
    return longest
