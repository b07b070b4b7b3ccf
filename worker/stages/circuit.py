"""The circuit on dead letters: when nearly everything fails, the intake stops; the topic is not drained into dead letters.

It looks at failures that a fault of ours or of a producer may cause (a changed event format, lost credentials, an image store
that is away, a device or a decoder that fails). What an uploader alone can cause (a broken or huge file) neither counts nor
speaks for anybody's health: nobody can stop moderation by uploading rubbish.
"""

from __future__ import annotations

import threading
from collections import Counter, deque

import structlog

from worker.clock import Clock
from worker.errors import Code
from worker.settings import CircuitSettings

log = structlog.get_logger()

UPLOADERS_OWN = frozenset(
    {
        Code.EVENT_TOO_LARGE,
        Code.FETCH_TOO_LARGE,
        Code.FETCH_HASH_MISMATCH,
        Code.DECODE_UNSUPPORTED,
        Code.DECODE_CORRUPT,
        Code.DECODE_TOO_MANY_PIXELS,
    }
)
"""Codes that say nothing about us: they are not counted, neither as failures nor as successes."""
UNLIMITED = 2**31
STEPS = 30
"""The window slides in so many steps."""
JUDGED_BY = 10
"""So many outcomes of a half-open circuit decide: it closes when more than half of them are scores."""


class DeadLetterCircuit:
    """Closed, open, or half open. Thread-safe.

    It opens after `FAILURES_IN_A_ROW` failures without one score between, or when `FAILURE_SHARE` of at least `MIN_EVENTS`
    outcomes within `WINDOW_S` are failures. After `RESET_S` it is half open: `probes` events are let in, and their outcomes
    close it or open it again; where nothing comes of them (they wait in the retry topic), the next few follow after `RESET_S`.
    """

    def __init__(self, settings: CircuitSettings, probes: int, clock: Clock) -> None:
        self._settings = settings
        self._probes = probes
        self._clock = clock
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._codes: Counter[str] = Counter()
        self._steps: deque[list[float]] = deque()
        """Of the window: when each step began, its failures, its outcomes."""
        self._opened: float | None = None
        self._half_open: float | None = None
        self._allowed = 0
        self._good = self._bad = 0
        self.times_opened = 0

    @property
    def closed(self) -> bool:
        """Whether the intake is free."""
        return self._opened is None

    def room(self) -> int:
        """How many further events the circuit lets in now."""
        if self.closed:
            return UNLIMITED
        with self._lock:
            now = self._clock.monotonic()
            if self._opened is None:
                return UNLIMITED
            since = self._opened if self._half_open is None else self._half_open
            if now - since >= self._settings.reset_s:
                if self._half_open is None:
                    log.info("circuit.half_open", probes=self._probes)
                    self._good = self._bad = 0
                self._half_open, self._allowed = now, self._probes
            return 0 if self._half_open is None else self._allowed

    def admitted(self) -> None:
        """One event was let in."""
        if self._half_open is not None:
            with self._lock:
                self._allowed = max(0, self._allowed - 1)

    def succeeded(self) -> None:
        """An event was scored."""
        with self._lock:
            self._in_a_row = 0
            self._codes.clear()
            self._count(failures=0)
            self._good += 1
            self._judge_probes()

    def failed(self, code: Code) -> None:
        """An event ended in a dead letter."""
        if code in UPLOADERS_OWN:
            return
        with self._lock:
            self._in_a_row += 1
            self._codes[code.value] += 1
            self._count(failures=1)
            self._bad += 1
            if self._opened is None:
                self._open_if_due()
            else:
                self._judge_probes()

    def _count(self, failures: int) -> None:
        now, window_s = self._clock.monotonic(), self._settings.window_s
        while self._steps and now - self._steps[0][0] >= window_s:
            self._steps.popleft()
        if not self._steps or now - self._steps[-1][0] >= window_s / STEPS:
            self._steps.append([now, 0, 0])
        self._steps[-1][1] += failures
        self._steps[-1][2] += 1

    def _open_if_due(self) -> None:
        settings = self._settings
        failures, outcomes = sum(step[1] for step in self._steps), sum(step[2] for step in self._steps)
        in_a_row = 0 < settings.failures_in_a_row <= self._in_a_row
        share = settings.failure_share > 0 and outcomes >= settings.min_events and failures >= settings.failure_share * outcomes
        if in_a_row or share:
            log.error(
                "circuit.opened",
                in_a_row=self._in_a_row,
                share=round(failures / outcomes, 3),
                code=self._codes.most_common(1)[0][0],
                retry_s=settings.reset_s,
            )
            self.times_opened += 1
            self._opened, self._half_open = self._clock.monotonic(), None

    def _judge_probes(self) -> None:
        if self._opened is None or self._half_open is None or self._good + self._bad < min(JUDGED_BY, self._probes):
            return
        if self._good > self._bad:
            log.info("circuit.closed", after_s=round(self._clock.monotonic() - self._opened, 1))
            self._opened = self._half_open = None
            self._in_a_row = 0
            self._steps.clear()
        else:
            log.warning("circuit.stays_open", code=self._codes.most_common(1)[0][0] if self._codes else None)
            self._opened, self._half_open = self._clock.monotonic(), None
