"""The bundle in torch, on the CPU or on CUDA."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import BackendUnavailable, CheckedBackend, DeviceError, OutOfDeviceMemory, Outputs, usable_cores
from engine.bundle import Bundle

if TYPE_CHECKING:
    from engine.backends.torch_graph import Scorer

T = TypeVar("T")

PRECISIONS = ("fp32", "bf16", "fp16")
# How allocation failures of the CPU, cuBLAS and cuDNN are worded; CUDA's own has a class.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")


class TorchBackend(CheckedBackend):
    """Runs `torch_graph.Scorer`.

    Args:
        device: auto (CUDA where there is one), cpu, cuda or cuda:N.
        threads: CPU threads, for the whole process as torch counts them; 0: one per usable core.
        precision: of the encoder: fp32, bf16, or fp16 (CUDA only).

    Raises:
        BackendUnavailable: torch is not installed, or has no such device.
        ValueError: unknown precision.
    """

    name = "torch"
    OPTIONS = ("precision",)

    def __init__(self, device: str = "auto", threads: int = 0, precision: str = "fp32") -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}; known are {', '.join(PRECISIONS)}")
        try:
            import torch
        except (ImportError, OSError) as error:
            raise BackendUnavailable(f"torch cannot be imported ({error}); install the extra 'torch'") from error
        self._torch = torch
        self.device = _device(torch, device)
        if precision == "fp16" and self.device == "cpu":
            raise BackendUnavailable("fp16 needs a CUDA device; on the CPU take bf16")
        self.precision = precision
        self._threads = threads or usable_cores()
        self._scorer: Scorer | None = None

    def _load(self, bundle: Bundle) -> None:
        from engine.backends.torch_graph import Scorer

        torch = self._torch
        if self.device == "cpu":
            torch.set_num_threads(self._threads)
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        self._scorer = self._guard(lambda: Scorer(bundle, dtype).to(self.device))

    def _infer(self, crops: NDArray[np.uint8]) -> Outputs:
        return self._guard(lambda: self._forward(crops))

    def _forward(self, crops: NDArray[np.uint8]) -> Outputs:
        if self._scorer is None:
            raise DeviceError("the model is not on the device")
        torch = self._torch
        # torch warns of arrays it may not write to, though it never does.
        batch = torch.from_numpy(crops if crops.flags.writeable else crops.copy())
        with torch.inference_mode():
            raw, embedding = self._scorer(batch.to(self.device))
            return Outputs(raw.cpu().numpy(), embedding.cpu().numpy())

    def _close(self) -> None:
        self._scorer = None
        if self.device != "cpu":
            self._torch.cuda.empty_cache()

    def _guard(self, work: Callable[[], T]) -> T:
        """Run on the device; torch's errors become ours."""
        try:
            return work()
        except MemoryError as error:
            raise OutOfDeviceMemory("torch: out of host memory") from error
        except RuntimeError as error:  # torch's OutOfMemoryError and AcceleratorError are RuntimeErrors
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
            if isinstance(error, self._torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
                # The frames of the traceback hold the tensors of the failed batch, and the smaller one needs their room.
                traceback.clear_frames(error.__traceback__)
                if self.device != "cpu":
                    self._torch.cuda.empty_cache()
                raise OutOfDeviceMemory(f"torch on {self.device}: {message}") from error
            raise DeviceError(f"torch on {self.device}: {message}") from error


def _device(torch: Any, asked: str) -> str:
    """cpu or cuda:N, that exists."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cpu" or (asked == "auto" and not count):
        return "cpu"
    if not count:
        built = (
            f"torch {torch.__version__} was built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch has no CUDA"
        )
        raise BackendUnavailable(f"device {asked}: no CUDA device is usable ({built})")
    index = int(asked.partition(":")[2] or 0)
    if index >= count:
        raise BackendUnavailable(f"device {asked}: there are {count} CUDA devices, counted from 0")
    return f"cuda:{index}"
