"""What SIGTERM and SIGINT do to a long-running command."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ending_on_signals(asked: Callable[[], bool], ask: Callable[[], None]) -> Iterator[None]:
    """The first SIGTERM or SIGINT asks for an end (`ask`), the second ends the process at once with 130.

    asked: whether an end was asked for already. The handlers of before are back afterwards. For the main thread.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        if asked():
            os._exit(130)
        ask()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
