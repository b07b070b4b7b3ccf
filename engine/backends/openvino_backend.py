"""The bundle on OpenVINO, on the CPU, without torch: bfloat16 where the processor has it, float32 elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import BackendUnavailable, CheckedBackend, DeviceError, OutOfDeviceMemory, Outputs, usable_cores
from engine.bundle import Bundle
from engine.heads import EMBEDDING_DIM, HEADS
from engine.preprocess import CROP_PX

T = TypeVar("T")

PRECISIONS = ("auto", "fp32", "bf16")
CHUNK = 4  # crops a stream is given at once: larger ones gain nothing more, smaller ones cost up to 10%
HEADS_CHUNK = 16
_OUT_OF_MEMORY = ("bad_alloc", "bad alloc", "not enough memory", "out of memory", "Cannot allocate")


class OpenVINOBackend(CheckedBackend):
    """Runs the ONNX graph of `engine.graph` on the CPU.

    Every shape is static, so that batches of any size neither recompile nor grow memory: a batch is cut into chunks of `CHUNK`
    crops that as many one-thread streams work off side by side, and what is left over goes one by one through a second
    compiled model that puts all threads on one crop, unless a padded chunk is faster. All ways give the same bits. The heads
    are a model of their own, because OpenVINO's bfloat16 would reach into them: they compute in float32 always.

    Args:
        device: auto or cpu.
        threads: of this backend; 0: one per usable core. They are not pinned, so that pods on one machine do not pile up on
            the same cores.
        precision: of the encoder: auto (bf16 where the processor has it, else fp32), fp32 or bf16.

    Raises:
        BackendUnavailable: OpenVINO or onnx is not installed, the device is not the CPU, or the processor has no bfloat16.
        ValueError: unknown precision.
    """

    name = "openvino"
    loads_in_seconds = True
    OPTIONS = ("precision",)

    def __init__(self, device: str = "auto", threads: int = 0, precision: str = "auto") -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}; known are {', '.join(PRECISIONS)}")
        if device not in ("auto", "cpu"):
            raise BackendUnavailable(f"device {device}: this backend runs on the CPU only")
        try:
            import onnx  # noqa: F401 - the graph is written with it
            import openvino
        except (ImportError, OSError) as error:
            raise BackendUnavailable(f"openvino or onnx cannot be imported ({error}); install the extra 'openvino'") from error
        self._ov = openvino
        self._core = openvino.Core()
        self.device = "cpu"
        self.precision = self._choose(precision)
        self._threads = threads or usable_cores()
        self.singles_at_most = 0
        """Crops beyond whole rounds of chunks that go one by one; measured by `load`."""

    @property
    def streams(self) -> int:
        """Chunks that are computed side by side."""
        return self._chunks.width // self._chunks.size

    def _choose(self, asked: str) -> str:
        has_bf16 = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if asked == "bf16" and not has_bf16:
            raise BackendUnavailable("this processor has no bfloat16 instructions (AVX512_BF16 or AMX); take fp32")
        return "bf16" if has_bf16 and asked != "fp32" else "fp32"

    def _load(self, bundle: Bundle) -> None:
        from engine import graph

        encoder = self._core.read_model(graph.serialize(graph.model(bundle, part="encoder")))
        heads = self._core.read_model(graph.serialize(graph.model(bundle, part="heads")))
        crop = (CROP_PX, CROP_PX, 3)
        hint = {"fp32": "f32", "bf16": "bf16"}[self.precision]
        shaped = (
            (self._shaped(encoder, (CHUNK, *crop)), hint, self._threads),
            (self._shaped(encoder, (1, *crop)), hint, 1),
            (self._shaped(heads, (HEADS_CHUNK, EMBEDDING_DIM)), "f32", 1),
        )
        # Side by side: a compilation keeps one core busy.
        with ThreadPoolExecutor(len(shaped)) as pool:
            compiled = self._guard(lambda: list(pool.map(lambda arguments: self._compile(*arguments), shaped)))
        self._chunks, self._singles, self._heads = (_Lane(model) for model in compiled)
        self._guard(self._choose_ways)

    def warm_up(self, batch_sizes: Iterable[int]) -> None:
        """Nothing to run: `load` ran every shape there is, and no batch size adds another. Raises as of `CheckedBackend`."""
        self._require("loaded", "warm_up")
        self._checked_sizes(batch_sizes)

    @staticmethod
    def _shaped(model: Any, shape: tuple[int, ...]) -> Any:
        copy = model.clone()  # shares the weights
        copy.reshape(list(shape))
        return copy

    def _compile(self, model: Any, precision: str, streams: int) -> Any:
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": self._threads,
            "NUM_STREAMS": streams,
            "ENABLE_CPU_PINNING": False,
        }
        return self._core.compile_model(model, "CPU", options)

    def _choose_ways(self) -> None:
        """Time one round of chunks and one crop alone: up to how many crops one by one are no slower than the round."""
        full = np.full((self._chunks.width, CROP_PX, CROP_PX, 3), 128, np.uint8)
        out = np.empty((len(full), EMBEDDING_DIM), np.float32)
        self._chunks.run(full, out)
        self._singles.run(full[:1], out[:1])
        self._heads.run(out, np.empty((len(out), len(HEADS)), np.float32))
        round_s = min(_seconds(lambda: self._chunks.run(full, out)) for _ in range(2))
        single_s = min(_seconds(lambda: self._singles.run(full[:1], out[:1])) for _ in range(3))
        self.singles_at_most = min(int(round_s / single_s), len(full) - 1)

    def _infer(self, crops: NDArray[np.uint8]) -> Outputs:
        return self._guard(lambda: self._forward(crops))

    def _forward(self, crops: NDArray[np.uint8]) -> Outputs:
        embedding = np.empty((len(crops), EMBEDDING_DIM), np.float32)
        raw = np.empty((len(crops), len(HEADS)), np.float32)
        rest = len(crops) % self._chunks.width
        cut = len(crops) - rest if rest <= self.singles_at_most else len(crops)
        self._chunks.run(crops[:cut], embedding[:cut])
        self._singles.run(crops[cut:], embedding[cut:])
        self._heads.run(embedding, raw)
        return Outputs(raw, embedding)

    def _close(self) -> None:
        del self._chunks, self._singles, self._heads

    def _guard(self, work: Callable[[], T]) -> T:
        """Run in OpenVINO; its errors become ours."""
        try:
            return work()
        except MemoryError as error:
            raise OutOfDeviceMemory("openvino: out of host memory") from error
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            message = lines[-1] if lines else type(error).__name__
            if any(words in str(error) for words in _OUT_OF_MEMORY):
                raise OutOfDeviceMemory(f"openvino: {message}") from error
            raise DeviceError(f"openvino: {message}") from error


class _Lane:
    """The requests of one compiled model of one input, one output and a fixed batch size, all kept busy.

    `size`: rows a request takes; `width`: rows that all requests take together.
    """

    def __init__(self, compiled: Any) -> None:
        self.size = int(compiled.input(0).shape[0])
        self._requests = [compiled.create_infer_request() for _ in range(int(compiled.get_property("NUM_STREAMS")))]
        self._padded = np.zeros(tuple(compiled.input(0).shape), compiled.input(0).element_type.to_dtype())
        self.width = self.size * len(self._requests)

    def run(self, rows: NDArray[Any], out: NDArray[np.float32]) -> None:
        """Compute `out`, row by row of `rows`. Input rows are read where they lie, but for those of an incomplete chunk."""
        free, running = deque(self._requests), deque[tuple[Any, int]]()
        try:
            for start in range(0, len(rows), self.size):
                if not free:
                    free.append(self._collect(*running.popleft(), out))
                request = free.popleft()
                request.start_async({0: self._chunk(rows, start)}, share_inputs=True)
                running.append((request, start))
            while running:
                self._collect(*running.popleft(), out)
        finally:
            # After an error: nothing may still read the rows when the caller has them back.
            for request, _ in running:
                with contextlib.suppress(RuntimeError):
                    request.cancel()
                    request.wait()

    def _chunk(self, rows: NDArray[Any], start: int) -> NDArray[Any]:
        part = rows[start : start + self.size]
        if len(part) == self.size:
            return part
        self._padded[: len(part)] = part
        return self._padded

    def _collect(self, request: Any, start: int, out: NDArray[np.float32]) -> Any:
        request.wait()
        part = out[start : start + self.size]
        part[:] = request.get_output_tensor(0).data[: len(part)]
        return request


def _seconds(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
