"""Writes the nodes and constants of an ONNX graph: typed constants, nodes named after what they compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Array = NDArray[Any]


class Writer:
    """Collects nodes and constants; a node's one output carries its name."""

    def __init__(self) -> None:
        from onnx import TensorProto

        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.dtypes: dict[str, int] = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}

    def node(self, op: str, *inputs: str, name: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def cast(self, value: str, to: Precision, name: str) -> str:
        return self.node("Cast", value, name=name, to=self.dtypes[to])

    def constant(self, name: str, array: Array, precision: Precision = "fp32") -> str:
        """A weight: converted to the precision; fp16 that overflows is an error, not an infinity."""
        from onnx import helper

        values = np.asarray(array, np.float32)
        stored: Array = values
        if precision == "fp16":
            with np.errstate(over="ignore"):
                stored = values.astype(np.float16)
        elif precision == "bf16":
            stored = _bfloat16(values)
        if precision == "fp16" and not np.isfinite(stored).all():
            raise ValueError(f"{name}: a weight of {np.abs(values).max():.3g} is beyond fp16; take bf16 or fp32")
        self.constants[name] = helper.make_tensor(name, self.dtypes[precision], values.shape, stored.tobytes(), raw=True)
        return name

    def integers(self, name: str, *values: int) -> str:
        from onnx import TensorProto, helper

        if name not in self.constants:
            data = np.array(values, np.int64)
            self.constants[name] = helper.make_tensor(name, TensorProto.INT64, data.shape, data.tobytes(), raw=True)
        return name

    def reshape(self, value: str, *shape: int, name: str) -> str:
        """0 keeps a dimension."""
        return self.node("Reshape", value, self.integers("shape." + ".".join(map(str, shape)), *shape), name=name)


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 to bfloat16's bits, rounded to the nearest, ties to even; finite values only."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
