"""Batches on a CUDA device, two under way: while one is computed, the next is copied in and the last one copied out.

Three streams (in, compute, out) and two slots of buffers. A slot's life, in order:

    submit   crops -> pinned memory          host
             pinned -> device                in stream
             wait for the copy; compute      compute stream, one CUDA graph for each batch size and slot
             wait for that; device -> pinned out stream
    collect  wait for the copy out; pinned -> the caller's own arrays; the slot is free

A slot is written again only after it was collected, so its buffers need no further guard. A batch is padded to the next size that
has a graph: the padding is what lay there before, and its results are not copied out.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from engine import graph
from engine.backends.base import BackendError, BackendStateError, DeviceError, OutOfDeviceMemory, Outputs
from engine.backends.plan_engine import TENSORS, Execution, PlanEngine, PlanRejected

log = structlog.get_logger()

DEPTH = 2
BATCH_TIMEOUT_S = 30.0

_ABANDONED: list[Any] = []
"""Runners on failed devices, kept so that nothing is freed before the process ends."""

_DTYPES: dict[str, type[np.generic]] = {"UINT8": np.uint8, "FLOAT": np.float32}


@dataclass(slots=True, eq=False)
class _Program:
    """How batches of one size run in one slot: a CUDA graph, or call by call where that cannot be recorded."""

    execution: Execution
    graph: Any = None


@dataclass(slots=True, eq=False)
class _Slot:
    host: dict[str, NDArray[Any]]
    device: dict[str, int]
    copied_in: Any
    computed: Any
    copied_out: Any
    programs: dict[int, _Program] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """A batch under way."""

    slot: Any
    count: int


class _Resources:
    """Streams and what was allocated, given back in reverse order: by `close`, or when the runner is garbage."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.failed = False
        self.streams: list[Any] = []
        self._idle: Any = None
        self._stack = ExitStack()

    def own(self, resource: Any, release: Callable[[Any], None]) -> Any:
        self._stack.callback(self._quietly, release, resource)
        return resource

    def open_streams(self) -> None:
        for _ in range(3):
            self.streams.append(self.own(self.driver.stream(), self.driver.destroy_stream))
        self._idle = self.own(self.driver.event(), self.driver.destroy_event)

    def settle(self) -> None:
        """Wait until the streams are idle."""
        if self._idle is not None:
            for stream in self.streams:
                self.driver.record(self._idle, stream)
                self.driver.finish(self._idle, BATCH_TIMEOUT_S)

    def close(self) -> None:
        """Give everything back; on a device that failed or hangs, nothing: freeing there may wait for ever."""
        try:
            if not self.failed:
                self.driver.make_current()  # any thread may drop the last reference
                self.settle()
        except DeviceError:
            self.failed = True
        if self.failed:
            log.warning("engine.not_released", reason="the device failed")
            return
        self._stack.close()
        self.streams.clear()

    @staticmethod
    def _quietly(release: Callable[[Any], None], resource: Any) -> None:
        try:
            release(resource)
        except BackendError as error:
            log.debug("engine.release_failed", reason=str(error))


class Runner:
    """Runs an engine. All calls from one thread at a time, in whose CUDA context the driver is current.

    Args:
        driver: a `CudaDriver`, or what tests put in its place.
        engine: the plan.
        sizes: batch sizes to run, each of which the engine has a profile for; ascending.

    Raises:
        OutOfDeviceMemory: not all sizes fit; nothing is kept.
        PlanRejected: the engine refuses a size.
        DeviceError: the device failed.
    """

    def __init__(self, driver: Any, engine: PlanEngine, sizes: tuple[int, ...]) -> None:
        self._driver = driver
        self._engine = engine
        self.sizes = sizes
        self._resources = _Resources(driver)
        self._free: deque[_Slot] = deque()
        self._running: deque[_Slot] = deque()
        # An engine that is replaced is not closed: it goes when the last batch that holds it has landed.
        self._finalizer = weakref.finalize(self, self._resources.close)
        self._finalizer.atexit = False
        try:
            self._resources.open_streams()
            self._in, self._compute, self._out = self._resources.streams
            for _ in range(DEPTH):
                self._free.append(self._slot())
            for size in sizes:
                for slot in self._free:
                    slot.programs[size] = self._program(slot, size)
        except (BackendError, PlanRejected):
            self.close()
            raise

    @property
    def graphs(self) -> int:
        """How many CUDA graphs were recorded; sizes x slots if all could be."""
        slots = (*self._free, *self._running)
        return sum(program.graph is not None for slot in slots for program in slot.programs.values())

    def submit(self, crops: NDArray[np.uint8]) -> Ticket:
        """Start a batch of 1 to the largest size. The array may change as soon as this returns.

        Raises:
            BackendStateError: two batches are under way already.
            OutOfDeviceMemory, DeviceError: from the device.
        """
        if not self._free:
            raise BackendStateError(f"{DEPTH} batches are under way: collect one first")
        count = len(crops)
        size = next(size for size in self.sizes if size >= count)
        slot = self._free.popleft()
        try:
            slot.host[graph.INPUT][:count] = crops
            self._start(slot, size, count)
        except OutOfDeviceMemory:
            # The slot goes on: nothing of this batch may touch its buffers any more.
            self._resources.settle()
            self._free.appendleft(slot)
            raise
        except DeviceError:
            self._resources.failed = True
            raise
        self._running.append(slot)
        return Ticket(slot, count)

    def _start(self, slot: _Slot, size: int, count: int) -> None:
        driver = self._driver
        driver.copy_in(slot.device[graph.INPUT], slot.host[graph.INPUT][:count], self._in)
        driver.record(slot.copied_in, self._in)
        driver.wait_on(self._compute, slot.copied_in)
        self._run(slot.programs[size])
        driver.record(slot.computed, self._compute)
        driver.wait_on(self._out, slot.computed)
        for name in (graph.EMBEDDING, graph.RAW):
            driver.copy_out(slot.host[name][:count], slot.device[name], self._out)
        driver.record(slot.copied_out, self._out)

    def collect(self, ticket: Ticket) -> Outputs:
        """Wait for the oldest batch under way.

        Raises:
            BackendStateError: the ticket is not of the oldest batch.
            DeviceError: the device failed, or did not answer in time.
        """
        if not self._running or self._running[0] is not ticket.slot:
            raise BackendStateError("tickets are collected once, in the order of their batches")
        slot: _Slot = ticket.slot
        try:
            self._driver.finish(slot.copied_out, BATCH_TIMEOUT_S)
        except DeviceError:
            self._resources.failed = True
            raise
        raw, embedding = (slot.host[name][: ticket.count].copy() for name in (graph.RAW, graph.EMBEDDING))
        self._running.popleft()
        self._free.append(slot)
        return Outputs(raw, embedding)

    def close(self) -> None:
        """Give everything back."""
        self._finalizer()
        if self._resources.failed:
            _ABANDONED.append(self)
            return
        self._free.clear()
        self._running.clear()

    def _run(self, program: _Program) -> None:
        if program.graph is not None:
            self._driver.launch(program.graph, self._compute)
        else:
            program.execution.enqueue(self._driver.handle(self._compute))

    def _slot(self) -> _Slot:
        host, device = {}, {}
        for name, (_, dtype, shape) in TENSORS.items():
            array = self._driver.host_array((self.sizes[-1], *shape), _DTYPES[dtype])
            host[name] = self._resources.own(array, self._driver.free_host)
            device[name] = self._resources.own(self._driver.allocate(array.nbytes), self._driver.free)
        return _Slot(host, device, *(self._resources.own(self._driver.event(), self._driver.destroy_event) for _ in range(3)))

    def _program(self, slot: _Slot, size: int) -> _Program:
        """Run a size once as it is, for what happens on the first call only; then record it and run the recording."""
        handle = self._driver.handle(self._compute)
        program = _Program(self._engine.context(size, slot.device, handle))
        self._run(program)
        self._resources.settle()
        if not program.execution.capturable(handle):
            log.warning("engine.graph_unavailable", batch_size=size, reason="TensorRT says it cannot be captured")
            return program
        self._driver.begin_capture(self._compute)
        try:
            program.execution.enqueue(handle)
            recorded = self._driver.end_capture(self._compute)
        except BackendError as error:
            self._driver.abort_capture(self._compute)
            if not isinstance(error, DeviceError):
                raise
            log.warning("engine.graph_unavailable", batch_size=size, reason=str(error))
        else:
            program.graph = self._resources.own(recorded, self._driver.destroy_graph)
        self._run(program)
        self._resources.settle()
        return program
