"""TensorRT 10 and 11 and TensorRT-RTX behind one import: which is there, its version, what it can build for, what it logs.

The three have one Python interface; what only one of them has is asked for by name here and in `build`, nowhere else.
"""

from __future__ import annotations

import importlib
import re
from typing import Any, Literal, get_args

from engine.backends.base import BackendUnavailable
from engine.graph_writer import Precision

Flavour = Literal["tensorrt", "tensorrt_rtx"]
FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)

_MODULES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
OLDEST = {"tensorrt": 10, "tensorrt_rtx": 1}
_MAX_LINES = 200
_NO_DRIVER = "CUDA driver version is insufficient"


def load(flavour: str) -> Any:
    """The module of a flavour.

    Raises:
        BackendUnavailable: not installed, not loadable, or too old.
    """
    problem = ""
    for name in _MODULES[flavour]:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            # The bindings complain of the driver and libraries at length: one line is enough.
            problem = problem or one_line(str(error))
        except (OSError, RuntimeError) as error:
            problem = one_line(str(error))
        else:
            if int(str(module.__version__).partition(".")[0]) < OLDEST[flavour]:
                raise BackendUnavailable(f"{name} {module.__version__} is too old; it must be {OLDEST[flavour]} or later")
            return module
    raise BackendUnavailable(f"{_MODULES[flavour][0]} cannot be imported ({problem}); install the extra '{_EXTRAS[flavour]}'")


def targets(trt: Any) -> tuple[str, ...]:
    """Compute capabilities that plans can be built for without such a GPU: sm75, …; none for TensorRT proper."""
    known = getattr(trt, "ComputeCapability", None)
    if known is None or not hasattr(trt.IBuilderConfig, "set_compute_capability"):
        return ()
    names = [name for name in dir(known) if re.fullmatch(r"SM\d+", name)]
    return tuple(sorted((name.lower() for name in names), key=lambda name: int(name[2:])))


def heads_precision(capability: str, precision: str) -> Precision:
    """Of the heads' matrix products: float32, but half where there is none in float32 (TensorRT-RTX on SM 75)."""
    return "fp16" if capability == "sm75" and precision != "fp32" else "fp32"


def make_log(trt: Any) -> Any:
    """A TensorRT logger that keeps warnings and errors: `lines` as (severity, text); nothing reaches the terminal."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING and len(self.lines) < _MAX_LINES:
                self.lines.append((severity.name.lower(), one_line(text)))

        @property
        def problem(self) -> str:
            """The first error, or what stands for it."""
            errors = [text for severity, text in self.lines if severity != "warning"]
            # A machine without a driver complains of that on the way; it is not why a build for another one failed.
            errors.sort(key=lambda text: _NO_DRIVER in text)
            return errors[0] if errors else "no reason was given"

    return Log()


def one_line(text: str, limit: int = 400) -> str:
    """A native message on one line, without source paths and asides on a missing driver."""
    text = " ".join(text.split())
    text = re.sub(rf"\s*\[checkMacros\.cpp::catchCudaError[^\[]*{_NO_DRIVER}[^)]*\)\)", "", text)
    text = re.sub(r"\s*In [\w:~]+ at /\S+\)?", "", text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
