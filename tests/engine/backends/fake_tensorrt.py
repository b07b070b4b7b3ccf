"""A TensorRT whose plans are JSON: as much of the Python interface as the backend calls, computing on `FakeDriver`'s memory.

The embedding it computes is a fixed function of a crop's mean brightness; the heads are those of the bundle whose graph the plan
was built from (or refitted to), found by the graph's digest.
"""

from __future__ import annotations

import enum
import hashlib
import json
from types import SimpleNamespace
from typing import Any

import numpy as np

from engine.heads import EMBEDDING_DIM, Heads
from tests.engine.backends.fake_cuda import FakeDriver, Op

CROP_BYTES = 224 * 224 * 3


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3


class ILogger:
    Severity = Severity

    def __init__(self) -> None: ...


def plan_bytes(onnx: bytes, sizes: tuple[int, ...], refit: bool = True, **more: Any) -> bytes:
    """What the fake builder makes of a graph."""
    return json.dumps({"graph": hashlib.sha256(onnx).hexdigest(), "sizes": list(sizes), "refit": refit, **more}).encode()


def embedding_of(crops: np.ndarray) -> np.ndarray:
    """uint8 [n, 224, 224, 3] to f32 [n, 192]."""
    mean = crops.reshape(len(crops), -1).mean(axis=1, dtype=np.float64)
    return np.cos(np.outer(mean, np.arange(1, EMBEDDING_DIM + 1)) / 100.0).astype(np.float32)


class FakeTensorRT:
    """Stands in for the module. `heads` by graph digest; `fail_contexts_from`: the batch size from which memory runs out."""

    ILogger = ILogger
    LayerInformationFormat = SimpleNamespace(JSON="json")

    def __init__(self, driver: FakeDriver, version: str = "10.9.1", capturable: bool = True) -> None:
        self.__version__ = version
        self.driver = driver
        self.capturable = capturable
        self.heads: dict[str, Heads] = {}
        self.fail_contexts_from: int | None = None
        self.fail_enqueue = 0
        self.fail_capture = False
        self.refit_fails = False
        self.deserialized = 0
        self.ran_sizes: list[int] = []
        self.IBuilderConfig = object

    def know(self, onnx: bytes, heads: Heads) -> None:
        self.heads[hashlib.sha256(onnx).hexdigest()] = heads

    def Runtime(self, log: Any) -> Any:  # noqa: N802 - TensorRT's name
        return SimpleNamespace(deserialize_cuda_engine=lambda data: self._deserialize(data, log))

    def _deserialize(self, data: bytes, log: Any) -> FakeEngine | None:
        self.deserialized += 1
        try:
            plan = json.loads(data)
        except ValueError:
            log.log(Severity.ERROR, "Serialization assertion magicTag failed. In parsePlan at /_src/runtime/runtime.cpp:780")
            return None
        return FakeEngine(self, plan, log)

    def Refitter(self, engine: FakeEngine, log: Any) -> Any:  # noqa: N802
        return SimpleNamespace(get_missing_weights=list, refit_cuda_engine=lambda: True, engine=engine)

    def OnnxParserRefitter(self, refitter: Any, log: Any) -> Any:  # noqa: N802
        def refit_from_bytes(onnx: bytes) -> bool:
            if self.refit_fails or not refitter.engine.plan["refit"]:
                log.log(Severity.ERROR, "the engine is not refittable")
                return False
            refitter.engine.plan["graph"] = hashlib.sha256(onnx).hexdigest()
            return True

        return SimpleNamespace(refit_from_bytes=refit_from_bytes)


class FakeEngine:
    def __init__(self, trt: FakeTensorRT, plan: dict[str, Any], log: Any) -> None:
        self.trt, self.plan, self.log = trt, plan, log
        self.tensors = plan.get("tensors") or {
            "crops": ["INPUT", "UINT8", [-1, 224, 224, 3]],
            "embedding": ["OUTPUT", "FLOAT", [-1, 192]],
            "raw": ["OUTPUT", "FLOAT", [-1, 3]],
        }
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(plan["sizes"])

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name=self.tensors[name][0])

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.tensors[name][1])

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(self.tensors[name][2])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        return [[self.plan["sizes"][profile], 224, 224, 3]] * 3

    def create_execution_context(self) -> FakeContext | None:
        return FakeContext(self)

    def serialize(self) -> bytes:
        return json.dumps(self.plan).encode()


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.size = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.size = self.engine.plan["sizes"][profile]
        limit = self.engine.trt.fail_contexts_from
        if limit is not None and self.size >= limit:
            self.engine.log.log(Severity.ERROR, "Error Code 2: OutOfMemory (Requested size was 1 bytes.)")
            return False
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return name == "crops" and shape == (self.size, 224, 224, 3)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.tensors

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.trt.capturable

    def execute_async_v3(self, stream: int) -> bool:
        trt, driver = self.engine.trt, self.engine.trt.driver
        if trt.fail_capture and driver.capturing is not None:
            self.engine.log.log(Severity.ERROR, "operation not permitted when stream is capturing")
            return False
        if trt.fail_enqueue:
            trt.fail_enqueue -= 1
            self.engine.log.log(Severity.ERROR, "Error Code 1: Cuda Runtime (out of memory)")
            return False
        driver.give(driver.streams[stream], Op("compute", self._compute))
        return True

    def _compute(self) -> None:
        trt, memory = self.engine.trt, self.engine.trt.driver.memory
        trt.ran_sizes.append(self.size)
        crops = memory[self.addresses["crops"]][: self.size * CROP_BYTES].reshape(self.size, 224, 224, 3)
        embedding = embedding_of(crops)
        raw = trt.heads[self.engine.plan["graph"]].raw_scores(embedding)
        for name, values in (("embedding", embedding), ("raw", raw)):
            data = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
            memory[self.addresses[name]][: len(data)] = data
