"""The CUDA driver as far as the TensorRT backend needs it: memory, streams, events, graphs. The seam its tests replace.

Handles are what cuda-python gives; nothing outside looks into them but `handle`, which makes the integer TensorRT wants. Every
call's status is looked at, and becomes one of our errors here and nowhere else.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import BackendUnavailable, DeviceError, OutOfDeviceMemory

_ABSENT = {"CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_INVALID_DEVICE", "CUDA_ERROR_NOT_INITIALIZED", "CUDA_ERROR_STUB_LIBRARY"}
_ABSENT |= {"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE", "CUDA_ERROR_SYSTEM_NOT_READY"}

SHORTEST_SLEEP_S, LONGEST_SLEEP_S = 50e-6, 1e-3


class CudaDriver:
    """One device through cuda-python's driver interface, on the device's primary context, which TensorRT uses as well.

    Raises:
        BackendUnavailable: cuda-python, the driver or the device is missing.
    """

    def __init__(self, index: int = 0) -> None:
        self._cuda = load_bindings()
        self._call("cuInit", 0)
        count = int(self._call("cuDeviceGetCount"))
        if index >= count:
            raise BackendUnavailable(f"device cuda:{index}: there are {count} CUDA devices, counted from 0")
        self._device = self._call("cuDeviceGet", index)
        attribute = self._cuda.CUdevice_attribute
        major = self._call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, self._device)
        minor = self._call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, self._device)
        self.capability = f"sm{major}{minor}"
        self.gpu = bytes(self._call("cuDeviceGetName", 256, self._device)).split(b"\0")[0].decode("utf-8", "replace")
        self.version = int(self._call("cuDriverGetVersion"))
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)

    def close(self) -> None:
        """Release the context."""
        self._call("cuDevicePrimaryCtxRelease", self._device)

    def make_current(self) -> None:
        """Make the context the calling thread's: needed once in every thread that uses the device."""
        self._call("cuCtxSetCurrent", self._context)

    def host_array(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """A zeroed array in pinned memory, which the device copies without a stop in between. `free_host` gives it back."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pointer = int(self._call("cuMemHostAlloc", count, 0))
        memory = memoryview((ctypes.c_uint8 * count).from_address(pointer))
        array: NDArray[Any] = np.frombuffer(memory, np.dtype(dtype)).reshape(shape)
        array[...] = 0
        return array

    def free_host(self, array: NDArray[Any]) -> None:
        """Give back an array of `host_array`; it must not be touched again."""
        self._call("cuMemFreeHost", array.ctypes.data)

    def allocate(self, count_bytes: int) -> int:
        """Device memory; its address."""
        return int(self._call("cuMemAlloc", count_bytes))

    def free(self, address: int) -> None:
        """Give back device memory."""
        self._call("cuMemFree", address)

    def stream(self) -> Any:
        """A stream that does not wait for the default one."""
        return self._call("cuStreamCreate", self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING.value)

    def destroy_stream(self, stream: Any) -> None:
        """Give back a stream."""
        self._call("cuStreamDestroy", stream)

    def handle(self, stream: Any) -> int:
        """A stream as the integer that TensorRT takes."""
        return int(stream)

    def event(self) -> Any:
        """An event without timing, not recorded yet."""
        return self._call("cuEventCreate", self._cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING.value)

    def destroy_event(self, event: Any) -> None:
        """Give back an event."""
        self._call("cuEventDestroy", event)

    def record(self, event: Any, stream: Any) -> None:
        """Mark what the stream has been given so far."""
        self._call("cuEventRecord", event, stream)

    def wait_on(self, stream: Any, event: Any) -> None:
        """The stream goes on when the event has come; the host does not wait."""
        self._call("cuStreamWaitEvent", stream, event, 0)

    def finish(self, event: Any, timeout_s: float) -> None:
        """The host waits for an event, but not for ever: a hung device must end the process, not the queue.

        Raises:
            DeviceError: it has not come in time.
        """
        deadline, sleep_s = time.monotonic() + timeout_s, SHORTEST_SLEEP_S
        not_ready = self._cuda.CUresult.CUDA_ERROR_NOT_READY
        while (status := self._cuda.cuEventQuery(event)[0]) == not_ready:
            if time.monotonic() >= deadline:
                raise DeviceError(f"CUDA: a batch did not end within {timeout_s:g} s")
            time.sleep(sleep_s)
            sleep_s = min(sleep_s * 1.5, LONGEST_SLEEP_S)
        self._check("cuEventQuery", status)

    def copy_in(self, address: int, source: NDArray[Any], stream: Any) -> None:
        """Host to device, asynchronously; the source must be pinned and stay as it is."""
        self._call("cuMemcpyHtoDAsync", address, source.ctypes.data, source.nbytes, stream)

    def copy_out(self, target: NDArray[Any], address: int, stream: Any) -> None:
        """Device to host, asynchronously; the target must be pinned."""
        self._call("cuMemcpyDtoHAsync", target.ctypes.data, address, target.nbytes, stream)

    def begin_capture(self, stream: Any) -> None:
        """What this thread gives the stream from now on is recorded, not run."""
        self._call("cuStreamBeginCapture", stream, self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)

    def end_capture(self, stream: Any) -> Any:
        """The recording as an executable graph."""
        graph = self._call("cuStreamEndCapture", stream)
        try:
            return self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)

    def abort_capture(self, stream: Any) -> None:
        """Leave recording after an error in it; what was recorded is dropped."""
        status, graph = self._cuda.cuStreamEndCapture(stream)
        if status == self._cuda.CUresult.CUDA_SUCCESS and int(graph):
            self._call("cuGraphDestroy", graph)

    def launch(self, graph: Any, stream: Any) -> None:
        """Run an executable graph."""
        self._call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        """Give back an executable graph."""
        self._call("cuGraphExecDestroy", graph)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a driver function; its one result, or None."""
        try:
            status, *results = getattr(self._cuda, name)(*arguments)
        except (RuntimeError, ImportError, OSError) as error:
            # cuda-python looks for the driver's library at the first call.
            raise BackendUnavailable(f"no NVIDIA driver on this machine ({' '.join(str(error).split())})") from error
        self._check(name, status)
        return results[0] if results else None

    def _check(self, name: str, status: Any) -> None:
        if status == self._cuda.CUresult.CUDA_SUCCESS:
            return
        code = status.name
        if code == "CUDA_ERROR_OUT_OF_MEMORY":
            raise OutOfDeviceMemory(f"CUDA: {name}: out of device memory")
        if code in _ABSENT:
            raise BackendUnavailable(f"no usable NVIDIA GPU or driver: {name}: {code}")
        text = self._cuda.cuGetErrorString(status)[1] or b""
        raise DeviceError(f"CUDA: {name}: {code} ({text.decode('utf-8', 'replace')})")


def load_bindings() -> Any:
    """cuda-python's driver module.

    Raises:
        BackendUnavailable: not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendUnavailable(f"cuda-python cannot be imported ({error}); install it with the TensorRT extra") from error
    return driver


def has_driver() -> bool:
    """Whether this machine has an NVIDIA driver with a device."""
    try:
        CudaDriver(0).close()
    except (BackendUnavailable, DeviceError, OutOfDeviceMemory):
        return False
    return True
