"""The clients of the broker are opened in a thread of their own, while the engine's bundle is read and its libraries are loaded.

Connecting is mostly waiting, for imports' files and for the broker, and so is loading an engine: one after the other they made a
worker join its group half a second (on slow processors a whole one) later.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Generic, TypeVar

from worker import thread_names

Clients = TypeVar("Clients")


class KafkaStart(Generic[Clients]):
    """Clients on their way. Made, waited for and closed by the main thread."""

    def __init__(self, opening: Callable[[ExitStack], Clients]) -> None:
        """`opening` runs at once, in the thread; what it opened, and how that is closed, it leaves in the stack it is given."""
        self._opening = opening
        self._stack = ExitStack()
        self._clients: list[Clients] = []
        self._error: Exception | None = None
        self._given_up = threading.Event()
        self._done = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._open, name="kafka-open", daemon=True).start()

    def opened(self, timeout_s: float) -> Clients | None:
        """The clients, once they are open; None when they are not after so long.

        Raises:
            ConfigurationError, DependencyError: what `opening` raised.
        """
        if not self._done.wait(timeout_s):
            return None
        if self._error is not None:
            raise self._error
        return self._clients[0]

    def close(self) -> None:
        """Close what is open; what is still being opened is closed by the thread that opens it, and nobody waits for it."""
        with self._lock:
            self._given_up.set()
            if self._done.is_set():
                self._stack.close()

    def _open(self) -> None:
        thread_names.set_current("kafka clients")  # which the threads they start inherit
        try:
            self._clients.append(self._opening(self._stack))
        except Exception as error:  # noqa: BLE001 - raised again in the main thread, which knows what each means
            self._error = error
        with self._lock:
            self._done.set()
            if self._given_up.is_set():
                self._stack.close()
