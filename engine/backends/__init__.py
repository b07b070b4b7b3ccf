"""The backends by name, and which of them runs here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.backends.base import Backend, BackendUnavailable
from engine.bundle import Bundle

AUTO_ORDER = ("tensorrt", "tensorrt_rtx", "openvino", "torch")
"""What `auto` tries, in this order; but torch on CUDA comes before OpenVINO where there is an NVIDIA device."""

_NVIDIA_DEVICES = ("/dev/nvidiactl", "/dev/dxg")  # on Linux, and in WSL

_FOR_ANY = {"plan_cache", "batch_sizes"}
"""Options that may be given to any backend; those that compile nothing ahead do not look at them."""

_CLASSES = {
    "tensorrt": ("engine.backends.tensorrt_backend", "TensorRTBackend"),
    "tensorrt_rtx": ("engine.backends.tensorrt_backend", "TensorRTRTXBackend"),
    "openvino": ("engine.backends.openvino_backend", "OpenVINOBackend"),
    "torch": ("engine.backends.torch_backend", "TorchBackend"),
    "null": ("engine.backends.null", "NullBackend"),  # tests and benchmarks of the worker; never by auto
}


def create(name: str = "auto", device: str = "auto", threads: int = 0, **options: Any) -> Backend:
    """A backend that can run here, not loaded yet.

    Args:
        name: a backend's name, or auto for the first of `AUTO_ORDER` whose packages and device are there, a GPU before the CPU.
        device: auto, cpu, cuda or cuda:N.
        threads: CPU threads; 0: one per usable core.
        options: further keyword arguments of the backend's class, for callers that name it (`precision`, `plan_cache`);
            with auto, each backend takes those it knows.

    Raises:
        BackendUnavailable: none can; the message says of each why.
        ValueError: unknown name or device.
    """
    refused: list[str] = []
    for backend in _candidates(name, device, threads, options, refused):
        return backend
    raise BackendUnavailable(_none_runs(name, device, refused))


def load_first(
    bundle: Bundle,
    name: str = "auto",
    device: str = "auto",
    threads: int = 0,
    opening: Callable[[Bundle, Backend], None] | None = None,
    **options: Any,
) -> Backend:
    """Like `create`, and loads the bundle; with auto, goes on to the next backend where one cannot run this bundle.

    `opening` is called before each attempt: the bundle is whole and the backend's packages and device are there; what is left
    is to load (compile, upload), which takes some seconds (`Backend.loads_in_seconds`) or many minutes.

    Raises:
        BackendUnavailable, ValueError: as `create`.
        OutOfDeviceMemory, DeviceError: from loading.
    """
    refused: list[str] = []
    for backend in _candidates(name, device, threads, options, refused):
        if opening is not None:
            opening(bundle, backend)
        try:
            backend.load(bundle)
        except BackendUnavailable as error:
            refused.append(f"{backend.name}: {error}")
        else:
            return backend
    raise BackendUnavailable(_none_runs(name, device, refused))


def _candidates(name: str, device: str, threads: int, options: dict[str, Any], refused: list[str]) -> Iterator[Backend]:
    """Each backend of `name` whose constructor accepts this machine; why the others do not goes to `refused`."""
    if name != "auto" and name not in _CLASSES:
        raise ValueError(f"unknown backend {name!r}; known are auto, {', '.join(AUTO_ORDER)}")
    kind, _, index = device.partition(":")
    if device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise ValueError(f"unknown device {device!r}; known are auto, cpu, cuda and cuda:N")
    for candidate, where in _auto_order(device) if name == "auto" else ((name, device),):
        try:
            backend = _construct(candidate, where, threads, options, strict=name != "auto")
        except BackendUnavailable as error:
            refused.append(f"{candidate}: {error}")
        else:
            yield backend


def _auto_order(device: str) -> list[tuple[str, str]]:
    """Backends and the device each is to take: a GPU before the CPU. Without one, torch is not even imported before OpenVINO."""
    order = [(name, device) for name in AUTO_ORDER]
    if device == "auto" and any(Path(file).exists() for file in _NVIDIA_DEVICES):
        order.insert(AUTO_ORDER.index("openvino"), ("torch", "cuda"))
    return order


def _construct(name: str, device: str, threads: int, options: dict[str, Any], strict: bool) -> Backend:
    module_name, class_name = _CLASSES[name]
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise BackendUnavailable(f"its package is not installed ({error})") from error
    known = getattr(cls, "OPTIONS", ())
    unknown = sorted(set(options) - set(known) - _FOR_ANY)
    if unknown and strict:
        raise ValueError(f"backend {name} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    backend: Backend = cls(device, threads, **{key: value for key, value in options.items() if key in known})
    return backend


def _none_runs(name: str, device: str, refused: list[str]) -> str:
    asked = "no backend runs here" if name == "auto" else f"backend {name} does not run here"
    return f"{asked} (device {device}): {'; '.join(refused)}"
