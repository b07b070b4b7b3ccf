"""Calls in order, from one thread, errors kept for who collects."""

from __future__ import annotations

import threading
import time

import numpy as np
from numpy.typing import NDArray

from engine.device_thread import DeviceThread


def crops(value: int) -> NDArray[np.uint8]:
    return np.full((1, 2, 2, 3), value, np.uint8)


def test_calls_come_in_order_from_one_thread_and_an_error_is_a_result() -> None:
    threads = set()

    def infer(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        threads.add(threading.get_ident())
        if batch[0, 0, 0, 0] == 1:
            raise ValueError("the second")
        return batch[:, 0, 0].astype(np.float32)

    device = DeviceThread(time.monotonic)
    for value in range(3):
        device.submit(infer, crops(value))
    first, second, third = (device.collect() for _ in range(3))
    device.close()
    assert isinstance(second.result, ValueError)
    assert [float(call.result[0, 0]) for call in (first, third) if not isinstance(call.result, Exception)] == [0.0, 2.0]
    assert first.ended <= second.ended <= third.ended <= time.monotonic()
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_closing_waits_for_the_call_under_way() -> None:
    entered, gate = threading.Event(), threading.Event()

    def infer(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        entered.set()
        assert gate.wait(30)
        return np.zeros((1, 3), np.float32)

    device = DeviceThread(time.monotonic)
    device.submit(infer, crops(0))
    assert entered.wait(30)
    closer = threading.Thread(target=device.close, daemon=True)
    closer.start()
    assert closer.is_alive()
    gate.set()
    closer.join(30)
    assert not closer.is_alive() and not device._thread.is_alive()
