"""One slow or dead host must not hold the fetch threads: a limit and a breaker for each host.

Closed -> (N transient failures in a row) -> open for `reset_s` -> one fetch tries -> closed, or open again.
What is turned away here was never tried: the error says so (`attempted=False`), so that a healthy event in bad
company does not use up its attempts.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from worker.clock import Clock, Deadline
from worker.errors import Code, ItemError, TransientItemError

MAX_HOSTS = 2_048
BUSY_RETRY_S = 1.0


@dataclass(slots=True)
class _Host:
    changed: threading.Condition
    active: int = 0
    waiting: deque[object] = field(default_factory=deque)
    """Tickets, first come first served: a thread that comes back at once must not overtake one that is about to give up."""
    failures: int = 0
    open_until: float | None = None
    """Monotonic seconds; None while closed."""
    probing: bool = False


class HostGate:
    """Lets fetches pass to their host, or turns them away. Thread-safe; memory bounded by forgetting idle hosts."""

    def __init__(
        self, *, limit: int, wait_s: float, failures: int, reset_s: float, clock: Clock, max_hosts: int = MAX_HOSTS
    ) -> None:
        """Begin with every host closed.

        limit: fetches at a time to one host.
        wait_s: how long a fetch waits for its turn before it is turned away.
        failures: transient failures in a row that open the breaker.
        reset_s: how long it stays open before one fetch may try.
        """
        self._limit = limit
        self._wait_s = wait_s
        self._failures = failures
        self._reset_s = reset_s
        self._clock = clock
        self._max_hosts = max_hosts
        self._lock = threading.Lock()
        self._hosts: OrderedDict[str, _Host] = OrderedDict()

    @contextmanager
    def visit(self, host: str, name: str, deadline: Deadline) -> Iterator[None]:
        """Hold one of the host's places; how the body ends decides what the breaker learns. `name` is for messages.

        Raises:
            TransientItemError: fetch.unavailable with attempted=False: the breaker is open, or no place came free.
        """
        state, probe = self._enter(host, name, deadline)
        works: bool | None = None
        try:
            yield
            works = True
        except TransientItemError:
            works = False
            raise
        except ItemError:
            works = True  # the host answered: it is the event that is wrong
            raise
        finally:
            self._leave(state, probe=probe, works=works)

    def _enter(self, host: str, name: str, deadline: Deadline) -> tuple[_Host, bool]:
        with self._lock:
            state = self._state(host)
            self._refuse_while_open(state, name)
            ticket = object()
            state.waiting.append(ticket)
            try:
                state.changed.wait_for(
                    lambda: state.open_until is not None or self._has_place(state, ticket),
                    timeout=min(self._wait_s, deadline.remaining()),
                )
                self._refuse_while_open(state, name)
                if not self._has_place(state, ticket):
                    raise _turned_away(f"{name} is at its limit of {self._limit} fetches at a time", BUSY_RETRY_S)
                state.active += 1
            finally:
                state.waiting.remove(ticket)
                state.changed.notify_all()  # for whoever is first in line now
            probe = state.open_until is not None
            state.probing = state.probing or probe
            return state, probe

    def _has_place(self, state: _Host, ticket: object) -> bool:
        return state.active < self._limit and state.waiting[0] is ticket

    def _leave(self, state: _Host, *, probe: bool, works: bool | None) -> None:
        with self._lock:
            state.active -= 1
            if probe:
                state.probing = False
            if works:
                state.failures = 0
                state.open_until = None
            elif works is False:
                state.failures += 1
                if probe or (state.open_until is None and state.failures >= self._failures):
                    state.open_until = self._clock.monotonic() + self._reset_s
            state.changed.notify_all()

    def _refuse_while_open(self, state: _Host, name: str) -> None:
        if state.open_until is None:
            return
        left = state.open_until - self._clock.monotonic()
        if left > 0 or state.probing:
            raise _turned_away(f"{name} failed {state.failures} times in a row and is left alone", max(left, BUSY_RETRY_S))

    def _state(self, host: str) -> _Host:
        state = self._hosts.get(host)
        if state is None:
            state = self._hosts[host] = _Host(threading.Condition(self._lock))
            self._forget_idle()
        self._hosts.move_to_end(host)
        return state

    def _forget_idle(self) -> None:
        """Drop the host that was idle longest. At most `concurrency` hosts are busy, so one is found within as many steps."""
        if len(self._hosts) <= self._max_hosts:
            return
        newest = next(reversed(self._hosts))
        for name, state in self._hosts.items():
            if not state.active and not state.waiting and name != newest:
                del self._hosts[name]
                return


def _turned_away(message: str, retry_after_s: float) -> TransientItemError:
    return TransientItemError(Code.FETCH_UNAVAILABLE, message, retry_after_s, attempted=False)
