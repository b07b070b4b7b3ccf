"""The CUDA seam: its calls are cuda-python's, its errors ours. The calls themselves run where there is a GPU."""

from __future__ import annotations

import ast
import enum
import inspect
import re
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.backends import cuda_driver
from engine.backends.base import BackendUnavailable, DeviceError, OutOfDeviceMemory
from engine.backends.cuda_driver import CudaDriver
from tests.engine.backends.fake_cuda import FakeDriver


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


def bindings(**answers: Any) -> Any:
    """A driver module of one device on which everything works, but for `answers`: what a call returns, or a function."""
    ok = CUresult.CUDA_SUCCESS
    usual = {
        "cuInit": (ok,),
        "cuDeviceGetCount": (ok, 1),
        "cuDeviceGet": (ok, 0),
        "cuDeviceGetName": (ok, b"NVIDIA L4\0\0"),
        "cuDriverGetVersion": (ok, 13000),
        "cuDevicePrimaryCtxRetain": (ok, "context"),
        "cuGetErrorString": (ok, b"an illegal memory access was encountered"),
        "cuEventQuery": (ok,),
        "cuMemAlloc": (ok, 4096),
    }
    module = SimpleNamespace(
        CUresult=CUresult,
        CUdevice_attribute=SimpleNamespace(
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major", CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor"
        ),
        cuDeviceGetAttribute=lambda attribute, _: (ok, {"major": 8, "minor": 9}[attribute]),
    )
    for name, answer in {**usual, **answers}.items():
        setattr(module, name, answer if callable(answer) else lambda *_, answer=answer: answer)
    return module


def opened(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> CudaDriver:
    monkeypatch.setattr(cuda_driver, "load_bindings", lambda: bindings(**answers))
    return CudaDriver(0)


def test_tells_what_the_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = opened(monkeypatch)
    assert (driver.gpu, driver.capability, driver.version) == ("NVIDIA L4", "sm89", 13000)


def test_a_device_that_is_not_there_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match="device cuda:0: there are 0"):
        opened(monkeypatch, cuDeviceGetCount=(CUresult.CUDA_SUCCESS, 0))
    with pytest.raises(BackendUnavailable, match="no usable NVIDIA GPU or driver: cuInit: CUDA_ERROR_NO_DEVICE"):
        opened(monkeypatch, cuInit=(CUresult.CUDA_ERROR_NO_DEVICE,))


@pytest.mark.parametrize(
    ("status", "expected", "message"),
    [
        (CUresult.CUDA_ERROR_OUT_OF_MEMORY, OutOfDeviceMemory, "cuMemAlloc: out of device memory"),
        (CUresult.CUDA_ERROR_ILLEGAL_ADDRESS, DeviceError, "CUDA_ERROR_ILLEGAL_ADDRESS .an illegal memory access"),
    ],
)
def test_a_status_becomes_an_error(
    monkeypatch: pytest.MonkeyPatch, status: CUresult, expected: type[Exception], message: str
) -> None:
    with pytest.raises(expected, match=message):
        opened(monkeypatch, cuMemAlloc=(status, None)).allocate(1)


def test_waits_for_an_event_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    not_ready = (CUresult.CUDA_ERROR_NOT_READY,)
    answers = iter([not_ready, not_ready, (CUresult.CUDA_SUCCESS,)])
    opened(monkeypatch, cuEventQuery=lambda _: next(answers)).finish("event", 10.0)
    assert next(answers, None) is None
    with pytest.raises(DeviceError, match=r"did not end within 0\.01 s"):
        opened(monkeypatch, cuEventQuery=not_ready).finish("event", 0.01)
    with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
        opened(monkeypatch, cuEventQuery=(CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,)).finish("event", 10.0)


def test_pinned_memory_is_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = np.full(4096, 7, np.uint8)  # stands for what the driver gives
    freed: list[int] = []
    driver = opened(
        monkeypatch,
        cuMemHostAlloc=lambda count, flags: (CUresult.CUDA_SUCCESS, memory.ctypes.data),
        cuMemFreeHost=lambda address: (freed.append(address), (CUresult.CUDA_SUCCESS,))[1],
    )
    array = driver.host_array((2, 3), np.float32)
    assert array.shape == (2, 3) and array.dtype == np.float32 and not array.any()
    array[1, 2] = 1.0
    assert memory[:24].view(np.float32)[5] == 1.0
    driver.free_host(array)
    assert freed == [memory.ctypes.data]


def test_without_cuda_python_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendUnavailable, match="cuda-python cannot be imported"):
        CudaDriver(0)


def test_the_fake_has_the_same_methods() -> None:
    for name, method in inspect.getmembers(CudaDriver, inspect.isfunction):
        if not name.startswith("_"):
            theirs, ours = inspect.signature(method).parameters, inspect.signature(getattr(FakeDriver, name)).parameters
            assert list(theirs) == list(ours), name


def test_every_call_is_one_of_cuda_python_with_as_many_arguments() -> None:
    """cuda-python's functions carry their signature in their docstring."""
    real = pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    source = inspect.getsource(cuda_driver)
    calls = []
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            if call.func.attr == "_call":
                calls.append((ast.literal_eval(call.args[0]), len(call.args) - 1))
            elif call.func.attr.startswith("cu"):
                calls.append((call.func.attr, len(call.args)))
    assert len({name for name, _ in calls}) >= 25
    for name, given in calls:
        signature = re.match(rf"{name}\(([^)]*)\)", (getattr(real, name).__doc__ or "").strip())
        assert signature is not None, name
        parameters = [part for part in signature[1].split(",") if part.strip()]
        assert given == len(parameters), f"{name}({signature[1]}) is called with {given} arguments"
    for name in re.findall(r"\b(CU_[A-Z_]+)\b", source):
        assert any(hasattr(getattr(real, kind), name) for kind in vars(real) if kind.startswith("CU")), name
    for name in cuda_driver._ABSENT | {"CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_NOT_READY"}:
        assert hasattr(real.CUresult, name), name


@pytest.mark.gpu
def test_copies_there_and_back_on_a_device() -> None:
    try:
        driver = CudaDriver(0)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    driver.make_current()
    source, target = driver.host_array((1000,), np.float32), driver.host_array((1000,), np.float32)
    source[:] = np.arange(1000)
    address, stream, event = driver.allocate(source.nbytes), driver.stream(), driver.event()
    driver.copy_in(address, source, stream)
    driver.begin_capture(stream)
    driver.copy_out(target, address, stream)
    graph = driver.end_capture(stream)
    driver.launch(graph, stream)
    driver.record(event, stream)
    driver.finish(event, 10.0)
    np.testing.assert_array_equal(target, source)
    driver.destroy_graph(graph)
    driver.destroy_event(event)
    driver.destroy_stream(stream)
    driver.free(address)
    driver.free_host(source)
    driver.free_host(target)
