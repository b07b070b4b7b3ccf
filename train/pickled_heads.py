"""The published heads out of their pickles: read by a process without rights (`train/pickle_process.py`), checked, as arrays."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.heads import EMBEDDING_DIM, Heads, HeadsError, unit_rows

PROCESS = Path(__file__).with_name("pickle_process.py")
MAX_ANSWER_BYTES = 512 * 2**20
_REFUSED = 3


class PickleError(Exception):
    """A pickled head is not taken; the message names the file and why, in one line."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the reading process may use."""

    memory_bytes: int = 2 * 2**30
    cpu_s: int = 60
    wall_s: float = 600.0


@dataclass(frozen=True, slots=True, eq=False)
class Estimator:
    """A fitted estimator's attributes: numeric arrays (float64 or int64), and plain values. `path`: where it was read."""

    path: Path
    name: str
    arrays: dict[str, NDArray[Any]]
    plain: dict[str, Any]

    @property
    def version(self) -> str | None:
        """Version of scikit-learn that fitted it, where it says."""
        found = self.plain.get("_sklearn_version")
        return found if isinstance(found, str) else None

    def floats(self, name: str, *shape: int | None) -> NDArray[np.float32]:
        """An array as float32, of a given shape (None: any length). Raises PickleError."""
        array = self.arrays.get(name)
        fits = (
            array is not None
            and array.ndim == len(shape)
            and all(w in (None, n) for n, w in zip(array.shape, shape, strict=True))
        )
        if array is None or not fits:
            wanted = [n if n is not None else "n" for n in shape]
            found = "missing" if array is None else f"of shape {list(array.shape)}"
            raise PickleError(f"{self.path}: {self.name}.{name} is {found}, expected {wanted}")
        if not np.isfinite(array).all():
            raise PickleError(f"{self.path}: {self.name}.{name} holds a value that is not finite")
        return array.astype(np.float32)

    def require(self, name: str, *allowed: object) -> Any:
        """A plain attribute that must have one of these values. Raises PickleError."""
        found = self.plain.get(name)
        if found not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise PickleError(f"{self.path}: {self.name}.{name} is {str(found)[:40]!r}, only {wanted} is taken")
        return found

    def number(self, name: str) -> float:
        """A plain number. Raises PickleError."""
        found = self.plain.get(name)
        if isinstance(found, bool) or not isinstance(found, int | float) or not np.isfinite(found):
            raise PickleError(f"{self.path}: {self.name}.{name} is not a number")
        return found


def read(path: Path, expected: str, limits: Limits | None = None) -> Estimator:
    """The estimator of class `expected` in a pickle or joblib file, without running anything that the file names.

    Raises:
        PickleError: the file is missing, names anything but a fitted estimator and its arrays, needs more than `limits`, or
            holds another class.
    """
    facts, arrays = _parsed(path, _answer(path, limits or Limits()))
    if facts["class"] != expected:
        raise PickleError(f"{path}: holds a {facts['class']}, expected a {expected}")
    return Estimator(path, expected, arrays, facts["plain"])


def _answer(path: Path, limits: Limits) -> bytes:
    # Isolated: no PYTHON* variables, no user site, nothing of the folder it is started in. The answer goes to a file, whose size
    # the kernel limits, because a pipe would fill this process's memory with whatever is written.
    if path.exists() and not path.is_file():
        raise PickleError(f"{path}: not a regular file")
    command = [sys.executable, "-I", str(PROCESS), str(limits.memory_bytes), str(limits.cpu_s)]
    try:
        with path.open("rb") as source, tempfile.TemporaryFile() as answer, tempfile.TemporaryDirectory() as empty:
            done = subprocess.run(
                command,
                stdin=source,
                stdout=answer,
                stderr=subprocess.DEVNULL,
                cwd=empty,
                env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                timeout=limits.wall_s,
                check=False,
            )
            answer.seek(0)
            data = answer.read(MAX_ANSWER_BYTES + 1)
    except subprocess.TimeoutExpired:
        raise PickleError(f"{path}: refused: reading it took more than {limits.wall_s:g} s") from None
    except OSError as exc:
        raise PickleError(f"{path}: cannot be read: {exc.strerror}") from exc
    if done.returncode == _REFUSED:
        raise PickleError(f"{path}: refused: {_line(data)}")
    if done.returncode < 0:
        raise PickleError(f"{path}: refused: its reader was stopped ({_signal(-done.returncode, limits)})")
    if done.returncode or len(data) > MAX_ANSWER_BYTES:
        raise PickleError(f"{path}: refused: its reader failed with exit code {done.returncode}")
    return data


def _signal(number: int, limits: Limits) -> str:
    import signal

    if number in (signal.SIGXCPU, signal.SIGKILL):
        return f"more than {limits.cpu_s} s of processor time, or killed"
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _line(data: bytes) -> str:
    text = data[:400].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else " " for c in text)


def _parsed(path: Path, data: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The reader's answer, which is not trusted either."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        facts = json.loads(header["__metadata__"]["facts"])
        arrays = dict(load(data))
    except (SafetensorError, ValueError, KeyError, TypeError) as exc:
        raise PickleError(f"{path}: its reader's answer cannot be read ({type(exc).__name__})") from exc
    return facts, arrays


def to_heads(linear: Estimator, knn: Estimator, ocsvm: Estimator) -> tuple[Heads, NDArray[np.float32]]:
    """The bundle's heads from the three estimators, and the gallery's raw embeddings float32[n, 192].

    Labels must be 0 (real) and 1 (AI-generated), as in the release. Signs follow `engine.heads`: larger is generated, so the
    one-class decision, positive for reals in scikit-learn, is turned there.

    Raises:
        PickleError: settings or shapes that these heads do not have; the message names the file.
    """
    for classifier in (linear, knn):
        if not np.array_equal(classifier.floats("classes_", 2), (0, 1)):
            raise PickleError(f"{classifier.path}: its classes are not 0 (real) and 1 (AI-generated)")
    knn.require("n_neighbors", 1)
    knn.require("effective_metric_", "cosine")
    ocsvm.require("kernel", "poly")
    ocsvm.require("_sparse", False)
    gallery = knn.floats("_fit_X", None, EMBEDDING_DIM)
    labels = knn.floats("_y", len(gallery))
    if not np.isin(labels, (0, 1)).all():
        raise PickleError(f"{knn.path}: a label of its gallery is neither 0 nor 1")
    try:
        heads = Heads(
            linear_weight=linear.floats("coef_", 1, EMBEDDING_DIM)[0],
            linear_bias=linear.floats("intercept_", 1)[0],
            knn_gallery=unit_rows(gallery),
            knn_labels=labels.astype(np.uint8),
            svm_vectors=(vectors := ocsvm.floats("support_vectors_", None, EMBEDDING_DIM)),
            svm_dual=ocsvm.floats("dual_coef_", 1, len(vectors))[0],
            svm_intercept=ocsvm.floats("intercept_", 1)[0],
            svm_gamma=ocsvm.number("_gamma"),
            svm_degree=int(ocsvm.number("degree")),
            svm_coef0=ocsvm.number("coef0"),
            knn_ids=tuple(f"published-{row}" for row in range(len(gallery))),
        )
    except HeadsError as exc:
        path = {"linear": linear, "knn": knn, "svm": ocsvm}[exc.tensor.split("_")[0]].path
        raise PickleError(f"{path}: {exc}") from exc
    return heads, gallery
