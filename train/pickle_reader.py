"""Reads one scikit-learn estimator out of a pickle or joblib file, as arrays; runs in a process of its own (`pickle_process.py`).

Nothing that a pickle names is ever called. The names that a fitted estimator needs are answered with the inert stand-ins below;
any other name, and every opcode that could reach further, refuses the file. Neither scikit-learn nor joblib is imported.

Imports the standard library, numpy and safetensors only, and none of this project: that process runs isolated (`python -I`).
"""

from __future__ import annotations

import bz2
import codecs
import io
import json
import lzma
import pickle
import zlib
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import numpy as np
from safetensors.numpy import save

for _codec in ("latin1", "ascii", "utf-8", "raw-unicode-escape", "unicode-escape"):
    codecs.lookup(_codec)  # found now, because later no file can be opened

MAX_FILE_BYTES = 256 * 2**20
MAX_ARRAY_DIMENSIONS = 4

ESTIMATORS = {
    "LogisticRegression": ("sklearn.linear_model._logistic", "sklearn.linear_model.logistic"),
    "KNeighborsClassifier": ("sklearn.neighbors._classification", "sklearn.neighbors.classification"),
    "OneClassSVM": ("sklearn.svm._classes", "sklearn.svm.classes"),
}
"""The classes that are read, and where scikit-learn has kept them (before and since 0.22)."""


class RefusedError(Exception):
    """The file is not read; the message is one line."""


# What a name in the pickle is answered with. No stand-in has a `__dict__`, calls anything, or can be changed by the pickle but by
# the one state that its original would take.


class Estimator:
    """A fitted estimator: its class and attributes."""

    __slots__ = ("name", "state")
    name: str
    state: dict[str, Any]

    def take(self, state: object) -> None:
        if not isinstance(state, dict) or not all(type(key) is str for key in state):
            raise RefusedError("an estimator's state is not a dictionary of attributes")
        self.state = state


class Dtype:
    """numpy.dtype of plain numbers."""

    __slots__ = ("code", "order")
    code: str
    order: str

    def take(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "="):
            raise RefusedError("a dtype's state is not one of numpy's")
        if any(part is not None for part in state[2:5]):
            raise RefusedError("an array with named or nested fields")
        self.order = str(state[1])

    @property
    def value(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


class Array:
    """numpy.ndarray; `value` is None until its data has been read."""

    __slots__ = ("value",)
    value: Any

    def take(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise RefusedError("an array's state is not one of numpy's")
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran is True else "C")


class JoblibArray(Array):
    """joblib's wrapper: the array's bytes follow in the file."""

    __slots__ = ("header",)
    header: dict[str, Any]

    def take(self, state: object) -> None:
        if not isinstance(state, dict) or state.get("subclass") is not NDARRAY:
            raise RefusedError("joblib's wrapper holds no plain numpy array")
        self.header = state

    def read(self, file: io.BytesIO) -> None:
        dtype, shape = self.header.get("dtype"), self.header.get("shape")
        if self.header.get("numpy_array_alignment_bytes") is not None:
            file.read(file.read(1)[0])
        data = file.read(_size(dtype, shape))
        self.value = _array(data, dtype, shape, str(self.header.get("order")))


NDARRAY, OBJECT = object(), object()
"""Stand for the classes numpy.ndarray and object where they are arguments."""


def _dtype(code: object, align: object = False, copy: object = True) -> Dtype:
    del align, copy
    if not isinstance(code, str) or code not in {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"b1", "f4", "f8"}:
        raise RefusedError(f"an array of type {_shown(code)}; only plain numbers are read")
    found = Dtype()
    found.code, found.order = code, "="
    return found


def _reconstruct(subtype: object, shape: object, code: object) -> Array:
    del shape, code
    if subtype is not NDARRAY:
        raise RefusedError("an array of a class of its own")
    found = Array()
    found.value = None
    return found


def _frombuffer(data: object, dtype: object, shape: object, order: object, axes: object = None) -> Array:
    if axes is not None:
        raise RefusedError("an array with its axes permuted")
    found = Array()
    found.value = _array(data, dtype, shape, str(order))
    return found


def _scalar(dtype: object, data: object = b"") -> object:
    return _array(data, dtype, (), "C").item()


def _encode(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise RefusedError("_codecs.encode of something else than an array's bytes")
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    return b""


def _instance(cls: object, base: object, state: object) -> object:
    """copyreg._reconstructor, as protocols 0 and 1 use it."""
    if base is not OBJECT or state is not None or not isinstance(cls, _Maker):
        raise RefusedError("an object built in an unusual way")
    return cls()


class _Maker:
    """Stands for a class: makes empty stand-ins of it."""

    __slots__ = ("_cls", "_name")

    def __init__(self, cls: type[Estimator] | type[JoblibArray], name: str) -> None:
        self._cls, self._name = cls, name

    def __call__(self) -> object:
        made = self._cls()
        if isinstance(made, Estimator):
            made.name, made.state = self._name, {}
        else:
            made.value = None
        return made


def _names() -> dict[tuple[str, str], object]:
    found: dict[tuple[str, str], object] = {
        (module, name): _Maker(Estimator, name) for name, modules in ESTIMATORS.items() for module in modules
    }
    for package in ("numpy._core", "numpy.core"):
        found[package + ".multiarray", "_reconstruct"] = _reconstruct
        found[package + ".multiarray", "scalar"] = _scalar
        found[package + ".numeric", "_frombuffer"] = _frombuffer
    for package in ("joblib", "sklearn.externals.joblib"):
        found[package + ".numpy_pickle", "NumpyArrayWrapper"] = _Maker(JoblibArray, "NumpyArrayWrapper")
    found |= {("numpy", "dtype"): _dtype, ("numpy", "ndarray"): NDARRAY, ("_codecs", "encode"): _encode}
    for builtins in ("builtins", "__builtin__"):
        found |= {(builtins, "object"): OBJECT, (builtins, "bytes"): _empty_bytes}
    found |= {("copyreg", "_reconstructor"): _instance, ("copy_reg", "_reconstructor"): _instance}
    return found


def _size(dtype: object, shape: object) -> int:
    """Bytes of an array, checked to be sensible."""
    if not isinstance(dtype, Dtype):
        raise RefusedError("an array without a numeric type")
    if not isinstance(shape, tuple) or len(shape) > MAX_ARRAY_DIMENSIONS or any(type(n) is not int or n < 0 for n in shape):
        raise RefusedError("an array's shape is not a few whole numbers")
    size = int(dtype.value.itemsize)
    for n in shape:
        size *= n
    if size > MAX_FILE_BYTES:
        raise RefusedError(f"an array of {_shown(shape)}, larger than any file that is read")
    return size


def _array(data: object, dtype: object, shape: object, order: str) -> Any:
    size = _size(dtype, shape)
    if not isinstance(data, bytes | bytearray) or len(data) != size or order not in ("C", "F"):
        raise RefusedError("an array's data is not the bytes that its shape needs")
    numeric: Any = dtype  # `_size` has looked at it, and at the shape
    return np.frombuffer(bytes(data), numeric.value).reshape(shape, order=order)  # type: ignore[call-overload]


def _shown(value: object) -> str:
    """A value from the file in a message: short, printable."""
    text = repr(value) if isinstance(value, str | int | float | tuple) else type(value).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:80])


_Unpickler: Any = pickle._Unpickler


class Reader(_Unpickler):  # type: ignore[misc]
    """The unpickler in Python, with every opcode that reaches beyond plain values replaced."""

    dispatch: ClassVar[dict[int, Any]] = dict(_Unpickler.dispatch)

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._data = file
        self._names = _names()
        self._callables = {id(value) for value in self._names.values() if callable(value)}

    def find_class(self, module: str, name: str) -> object:
        try:
            return self._names[module, name]
        except KeyError:
            raise RefusedError(f"it names {_shown(f'{module}.{name}')}, which no head that is read here needs") from None

    def persistent_load(self, pid: object) -> NoReturn:
        raise RefusedError("it refers to something outside of the file")

    def get_extension(self, code: int) -> NoReturn:
        raise RefusedError("it uses copyreg's extension registry")

    def _call(self, function: object, arguments: object, keywords: object = None) -> object:
        if id(function) not in self._callables or not isinstance(arguments, tuple) or keywords:
            raise RefusedError("it calls something that is not the making of an array or an estimator")
        called: Callable[..., object] = function  # type: ignore[assignment]
        return called(*arguments)

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        self.stack.append(self._call(self.stack.pop(), arguments))

    def load_newobj_ex(self) -> None:
        keywords, arguments = self.stack.pop(), self.stack.pop()
        self.stack.append(self._call(self.stack.pop(), arguments, keywords))

    def _instantiate(self, klass: object, arguments: list[object]) -> None:
        # What the opcodes INST and OBJ come down to.
        self.append(self._call(klass, tuple(arguments)))

    def load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if not isinstance(made, Estimator | Dtype | Array):
            raise RefusedError("it sets the state of something that has none")
        made.take(state)
        if isinstance(made, JoblibArray):
            made.read(self._data)

    def load_append(self) -> None:
        value = self.stack.pop()
        _exact(self.stack[-1], list).append(value)

    def load_appends(self) -> None:
        values = self.pop_mark()
        _exact(self.stack[-1], list).extend(values)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _exact(self.stack[-1], dict)[key] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _exact(self.stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))

    def load_additems(self) -> None:
        values = self.pop_mark()
        _exact(self.stack[-1], set).update(values)

    def refuse_buffer(self) -> NoReturn:
        raise RefusedError("it wants buffers from outside of the file")

    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.ADDITEMS[0]: load_additems,
        pickle.NEXT_BUFFER[0]: refuse_buffer,
        pickle.READONLY_BUFFER[0]: refuse_buffer,
    }


def _exact(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise RefusedError(f"it adds to something that is no {kind.__name__}")
    return value


def decompressed(data: bytes) -> bytes:
    """joblib's compressions, bounded; anything else as it is."""
    decompressor: Any
    if data.startswith((b"\x1f\x8b", b"\x78")):
        decompressor = zlib.decompressobj(wbits=47)
    elif data.startswith(b"BZ"):
        decompressor = bz2.BZ2Decompressor()
    elif data.startswith((b"\xfd7zXZ", b"\x5d\x00")):
        decompressor = lzma.LZMADecompressor()
    elif data.startswith((b"\x04\x22\x4d\x18", b"ZF")):
        raise RefusedError("compressed with lz4 or by a joblib before 0.10; dump it again without compression")
    else:
        return data
    try:
        found: bytes = decompressor.decompress(data, MAX_FILE_BYTES)
    except (zlib.error, lzma.LZMAError, OSError, EOFError) as exc:
        raise RefusedError(f"its compression is damaged: {exc}") from exc
    if not decompressor.eof:
        # Either there is more than the limit, or the end is missing.
        full = len(found) >= MAX_FILE_BYTES
        raise RefusedError(f"larger than {MAX_FILE_BYTES} bytes when decompressed" if full else "its compressed data ends early")
    return found


def read(data: bytes) -> bytes:
    """A pickle's or joblib file's estimator as a safetensors file.

    Raises:
        RefusedError: not a file that is read here.
    """
    try:
        root = Reader(io.BytesIO(decompressed(data))).load()
    except (RefusedError, MemoryError):
        raise
    except Exception as exc:  # the standard library's unpickler raises whatever a damaged file provokes
        raise RefusedError(f"not a readable pickle: {type(exc).__name__}: {_shown(str(exc))}") from exc
    if not isinstance(root, Estimator):
        raise RefusedError(f"it holds no estimator but {_shown(type(root).__name__)}")
    arrays: dict[str, Any] = {}
    plain: dict[str, object] = {}
    for name, value in root.state.items():
        if isinstance(value, Array) and value.value is not None:
            kind = np.float64 if value.value.dtype.kind == "f" else np.int64
            arrays[name] = np.ascontiguousarray(value.value, dtype=kind)
        elif _is_plain(value):
            plain[name] = value
    facts = {"class": root.name, "plain": plain}
    return save(arrays, metadata={"facts": json.dumps(facts)})


def _is_plain(value: object) -> bool:
    if isinstance(value, int | str):
        return type(value) in (bool, str, int) and (len(value) <= 200 if isinstance(value, str) else abs(value) < 2**63)
    return value is None or type(value) is float
