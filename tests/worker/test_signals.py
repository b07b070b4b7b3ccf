"""The first signal asks for an end, the second ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from worker.signals import ending_on_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_asks_and_the_handlers_of_before_come_back(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    stopping = threading.Event()
    with ending_on_signals(stopping.is_set, stopping.set):
        os.kill(os.getpid(), number)
        assert stopping.wait(30)
    assert {each: signal.getsignal(each) for each in before} == before


def test_the_second_ends_the_process_at_once_with_130() -> None:
    code = (
        "import os, signal\nfrom worker.signals import ending_on_signals\nasked = []\n"
        "with ending_on_signals(lambda: bool(asked), lambda: asked.append(1)):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    print('asked', len(asked), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    print('never', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (130, "asked 1\n")
