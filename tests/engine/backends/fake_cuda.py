"""A CUDA driver that only remembers: streams, events, graphs and memory as the real one orders them, run as late as allowed.

Nothing is executed when it is given to a stream. A scheduler runs heads of streams in an order drawn from a seed, bound only by
events, whenever the host waits (and sometimes before): a missing wait, a buffer that is reused too early, or a result that is
read too soon gives wrong numbers for some seed.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.backends.base import DeviceError, OutOfDeviceMemory


@dataclass(eq=False)
class Op:
    what: str
    run: Callable[[], None]
    ready: Callable[[], bool] = lambda: True


@dataclass(eq=False)
class Event:
    recorded: int = 0
    done: int = 0


@dataclass(eq=False)
class Stream:
    handle: int
    ops: deque[Op] = field(default_factory=deque)


class FakeDriver:
    """Stands in for `CudaDriver`. `calls` counts calls by name; `log` is their order; `fail` maps a name to what it raises."""

    def __init__(self, seed: int = 0, capability: str = "sm89", gpu: str = "Fake L4", memory_bytes: int = 2**34) -> None:
        self.capability, self.gpu, self.version = capability, gpu, 13000
        self.random = random.Random(seed)
        self.memory_bytes = memory_bytes
        self.memory: dict[int, np.ndarray] = {}
        self.pinned: list[np.ndarray] = []
        self.streams: dict[int, Stream] = {}
        self.events: set[Event] = set()
        self.graphs: list[list[Op]] = []
        self.capturing: tuple[Stream, list[Op]] | None = None
        self.calls: Counter[str] = Counter()
        self.log: list[str] = []
        self.fail: dict[str, Exception] = {}
        self.hung = False
        self.current_in: set[int] = set()
        self._next = 1000

    @property
    def live(self) -> int:
        """Resources that were not given back."""
        return len(self.memory) + len(self.pinned) + len(self.streams) + len(self.events) + len(self.graphs)

    def _called(self, name: str) -> None:
        self.calls[name] += 1
        self.log.append(name)
        if name in self.fail:
            raise self.fail[name]

    def close(self) -> None:
        self._called("close")

    def make_current(self) -> None:
        import threading

        self.current_in.add(threading.get_ident())
        self._called("make_current")

    def host_array(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        self._called("host_array")
        array = np.zeros(shape, dtype)
        self.pinned.append(array)
        return array

    def free_host(self, array: np.ndarray) -> None:
        self._called("free_host")
        self.pinned = [other for other in self.pinned if other is not array]

    def allocate(self, count_bytes: int) -> int:
        self._called("allocate")
        if sum(block.nbytes for block in self.memory.values()) + count_bytes > self.memory_bytes:
            raise OutOfDeviceMemory("CUDA: cuMemAlloc: out of device memory")
        self._next += 1
        self.memory[self._next] = np.full(count_bytes, 0xA5, np.uint8)
        return self._next

    def free(self, address: int) -> None:
        self._called("free")
        del self.memory[address]

    def stream(self) -> Stream:
        self._called("stream")
        self._next += 1
        self.streams[self._next] = Stream(self._next)
        return self.streams[self._next]

    def destroy_stream(self, stream: Stream) -> None:
        self._called("destroy_stream")
        assert not stream.ops, "a stream was destroyed while work was left on it"
        del self.streams[stream.handle]

    def handle(self, stream: Stream) -> int:
        return stream.handle

    def event(self) -> Event:
        self._called("event")
        event = Event()
        self.events.add(event)
        return event

    def destroy_event(self, event: Event) -> None:
        self._called("destroy_event")
        self.events.remove(event)

    def record(self, event: Event, stream: Stream) -> None:
        self._called("record")
        event.recorded += 1
        version = event.recorded

        def come() -> None:
            event.done = version

        self.give(stream, Op("event", come))

    def wait_on(self, stream: Stream, event: Event) -> None:
        self._called("wait_on")
        version = event.recorded
        self.give(stream, Op("wait", lambda: None, lambda: event.done >= version))

    def finish(self, event: Event, timeout_s: float) -> None:
        self._called("finish")
        version = event.recorded
        while event.done < version:
            if self.hung or not self._step():
                raise DeviceError(f"CUDA: a batch did not end within {timeout_s:g} s")

    def copy_in(self, address: int, source: np.ndarray, stream: Stream) -> None:
        self._called("copy_in")
        assert any(np.shares_memory(source, array) for array in self.pinned), "copied from memory that is not pinned"

        def copy() -> None:
            data = np.ascontiguousarray(source).view(np.uint8).reshape(-1)
            self.memory[address][: len(data)] = data

        self.give(stream, Op("copy_in", copy))

    def copy_out(self, target: np.ndarray, address: int, stream: Stream) -> None:
        self._called("copy_out")
        assert any(np.shares_memory(target, array) for array in self.pinned), "copied into memory that is not pinned"

        def copy() -> None:
            target[...] = self.memory[address][: target.nbytes].view(target.dtype).reshape(target.shape)

        self.give(stream, Op("copy_out", copy))

    def begin_capture(self, stream: Stream) -> None:
        self._called("begin_capture")
        self.capturing = (stream, [])

    def end_capture(self, stream: Stream) -> list[Op]:
        assert self.capturing is not None and self.capturing[0] is stream
        graph, self.capturing = self.capturing[1], None
        self._called("end_capture")
        self.graphs.append(graph)
        return graph

    def abort_capture(self, stream: Stream) -> None:
        self._called("abort_capture")
        self.capturing = None

    def launch(self, graph: list[Op], stream: Stream) -> None:
        self._called("launch")
        assert any(graph is other for other in self.graphs)
        for op in graph:
            self.give(stream, op)

    def destroy_graph(self, graph: list[Op]) -> None:
        self._called("destroy_graph")
        self.graphs = [other for other in self.graphs if other is not graph]

    def give(self, stream: Stream, op: Op) -> None:
        """Put work on a stream, or into the recording; now and then something runs at once."""
        if self.capturing is not None and self.capturing[0] is stream:
            self.capturing[1].append(op)
            return
        stream.ops.append(op)
        while self.random.random() < 0.3 and not self.hung and self._step():
            pass

    def _step(self) -> bool:
        """Run the head of one stream that may go on; False: none may."""
        able = [stream for stream in self.streams.values() if stream.ops and stream.ops[0].ready()]
        if not able:
            return False
        stream = self.random.choice(able)
        op = stream.ops.popleft()
        op.run()
        return True
