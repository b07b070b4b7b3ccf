"""A deserialised TensorRT plan: checked against what it must be, executed, refitted. The seam to TensorRT's runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine import graph, tensorrt_api
from engine.backends.base import DeviceError, OutOfDeviceMemory
from engine.heads import EMBEDDING_DIM, HEADS
from engine.preprocess import CROP_PX

_OUT_OF_MEMORY = (
    "out of memory",
    "outofmemory",
    "cudaerrormemoryallocation",
    "cudaerror 2:",
    "unable to allocate",
    "not enough memory",
)

TENSORS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    graph.INPUT: ("INPUT", "UINT8", (CROP_PX, CROP_PX, 3)),
    graph.EMBEDDING: ("OUTPUT", "FLOAT", (EMBEDDING_DIM,)),
    graph.RAW: ("OUTPUT", "FLOAT", (len(HEADS),)),
}
"""Name: mode, dtype, shape behind the batch."""


class PlanRejected(Exception):  # noqa: N818 - the name says what is the case
    """This plan does not load here, or is not the plan it should be; another one has to be built."""


class PlanEngine:
    """An engine and its runtime.

    Args:
        trt: a flavour's module.
        data: the plan.
        sizes: the batch sizes it must have a static profile for, in this order.
        runtime_cache: kernels that TensorRT-RTX compiled in an earlier process; None: none, or another flavour.

    Raises:
        PlanRejected: it does not load, or has other tensors or profiles.
        OutOfDeviceMemory: it does not fit.
    """

    def __init__(self, trt: Any, data: bytes, sizes: tuple[int, ...], runtime_cache: bytes | None = None) -> None:
        self._trt = trt
        self._log = tensorrt_api.make_log(trt)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            self._fail("the plan does not load", PlanRejected)
        self.sizes = sizes
        self._check()
        self._config = self._runtime_config(runtime_cache)

    def _check(self) -> None:
        engine = self._engine
        found = {
            (name := engine.get_tensor_name(i)): (
                engine.get_tensor_mode(name).name,
                engine.get_tensor_dtype(name).name,
                tuple(engine.get_tensor_shape(name))[1:],
            )
            for i in range(engine.num_io_tensors)
        }
        if found != TENSORS:
            raise PlanRejected(f"the plan's tensors are {found}, not {TENSORS}")
        profiles = [
            tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(graph.INPUT, i))
            for i in range(engine.num_optimization_profiles)
        ]
        expected = [((size, CROP_PX, CROP_PX, 3),) * 3 for size in self.sizes]
        if profiles != expected:
            raise PlanRejected(f"the plan's profiles are {profiles}, not {expected}")

    def _runtime_config(self, cached: bytes | None) -> Any:
        """TensorRT-RTX compiles its kernels where it runs: all at once, before the engine counts as warm."""
        if not hasattr(self._trt, "IRuntimeCache"):
            return None
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.DISABLED  # captured by the runner
        config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        cache = config.create_runtime_cache()
        if cached:
            cache.deserialize(cached)
        config.set_runtime_cache(cache)
        return config

    @property
    def runtime_cache(self) -> bytes | None:
        """Kernels compiled so far, for the next process."""
        return None if self._config is None else bytes(self._config.get_runtime_cache().serialize())

    def context(self, size: int, addresses: Mapping[str, int], stream: int) -> Execution:
        """What executes batches of one size on tensors at fixed addresses.

        Raises:
            OutOfDeviceMemory: its scratch memory does not fit.
            PlanRejected: TensorRT refused.
        """
        arguments = () if self._config is None else (self._config,)
        context = self._engine.create_execution_context(*arguments)
        if context is None:
            self._fail(f"no execution context for batches of {size}", PlanRejected)
        done = context.set_optimization_profile_async(self.sizes.index(size), stream)
        done = done and context.set_input_shape(graph.INPUT, (size, CROP_PX, CROP_PX, 3))
        done = done and all(context.set_tensor_address(name, address) for name, address in addresses.items())
        if not done:
            self._fail(f"the execution context for batches of {size} was refused", PlanRejected)
        return Execution(self, context)

    def refit(self, onnx: bytes) -> None:
        """Replace the weights by those of another graph of the same architecture. Nothing may be executing.

        Raises:
            PlanRejected: the plan is not refittable, or does not fit to the graph; it must not be used any more.
        """
        refitter = self._trt.Refitter(self._engine, self._log)
        parser = self._trt.OnnxParserRefitter(refitter, self._log)
        if not parser.refit_from_bytes(onnx) or refitter.get_missing_weights() or not refitter.refit_cuda_engine():
            self._fail("the plan cannot be refitted", PlanRejected)

    def serialize(self) -> bytes:
        """The plan, with the weights of the last refit."""
        return bytes(self._engine.serialize())

    def layers(self) -> str:
        """What the compiler made of the graph, as the JSON text of TensorRT's inspector."""
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def _fail(self, what: str, error: type[Exception]) -> None:
        problem = self._log.problem
        self._log.lines.clear()
        if any(words in problem.lower() for words in _OUT_OF_MEMORY):
            error = OutOfDeviceMemory
        raise error(f"{what}: {problem}")


class Execution:
    """One execution context, bound to its tensors."""

    def __init__(self, engine: PlanEngine, context: Any) -> None:
        self._engine = engine
        self._context = context

    def enqueue(self, stream: int) -> None:
        """Give the stream one batch.

        Raises:
            OutOfDeviceMemory, DeviceError: TensorRT refused.
        """
        if not self._context.execute_async_v3(stream):
            self._engine._fail("a batch was refused", DeviceError)

    def capturable(self, stream: int) -> bool:
        """Whether `enqueue` may be recorded as a CUDA graph."""
        asked = getattr(self._context, "is_stream_capturable", None)
        return True if asked is None else bool(asked(stream))
