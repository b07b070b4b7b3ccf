"""Pickles that would do harm: refused with one line and without effect; and the honest ones of every kind, read the same."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("sklearn")

import joblib

from tests.train import published
from train import pickle_reader
from train.pickle_reader import RefusedError
from train.pickled_heads import Limits, PickleError, read, to_heads

LINEAR = "LogisticRegression"
ROOT = Path(pickle_reader.__file__).parents[1]


@pytest.fixture(scope="module")
def estimators() -> dict[str, Any]:
    return published.heads()


def _joblib(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    joblib.dump(value, file, **options)
    return file.getvalue()


WAYS: dict[str, Callable[[Any], bytes]] = {
    **{f"pickle-{protocol}": lambda value, p=protocol: pickle.dumps(value, p) for protocol in range(6)},  # type: ignore[misc]
    **{
        f"joblib-{name}": lambda value, c=compress: _joblib(value, compress=c)  # type: ignore[misc]
        for name, compress in {"plain": 0, "zlib": 3, "gzip": ("gzip", 3), "bz2": ("bz2", 3), "xz": ("xz", 3)}.items()
    },
    "joblib-lzma": lambda value: _joblib(value, compress=("lzma", 3)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_pickling_gives_the_same_arrays(estimators: dict[str, Any], way: str) -> None:
    from safetensors.numpy import load

    for name, estimator in estimators.items():
        arrays = load(pickle_reader.read(WAYS[way](estimator)))
        wanted = {key: value for key, value in vars(estimator).items() if isinstance(value, np.ndarray)}
        assert set(arrays) == set(wanted)
        assert all(np.array_equal(arrays[key], value) for key, value in wanted.items()), name


def test_old_modules_and_fortran_order_are_read(estimators: dict[str, Any]) -> None:
    from safetensors.numpy import load

    data = pickle.dumps(estimators[LINEAR], 2).replace(b"sklearn.linear_model._logistic", b"sklearn.linear_model.logistic")
    assert set(load(pickle_reader.read(data))) >= {"coef_", "intercept_", "classes_"}
    model = published.heads()[LINEAR]
    model.coef_ = np.asfortranarray(np.arange(12.0).reshape(3, 4)).astype(">f4")
    for data in (pickle.dumps(model), pickle.dumps(model, 2), _joblib(model)):
        assert np.array_equal(load(pickle_reader.read(data))["coef_"], model.coef_)


class _Evil:
    """Leaves a file behind wherever it is unpickled."""

    def __init__(self, path: Path, function: Callable[..., Any] = os.mkdir) -> None:
        self.path, self.function = path, function

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, (str(self.path),)


def _in_attribute(evil: object) -> object:
    model = published.heads()[LINEAR]
    model.extra = evil
    return model


def _in_class_weight(evil: object) -> object:
    model = published.heads()[LINEAR]
    model.class_weight = {0: [(1, {"deep": evil})]}
    return model


def _in_objects(evil: object) -> object:
    model = published.heads()[LINEAR]
    model.coef_ = np.array([evil, None], dtype=object)
    return model


def _in_fields(evil: object) -> object:
    model = published.heads()[LINEAR]
    model.coef_ = np.array([(1.0, evil)], dtype=[("a", "f8"), ("b", "O")])
    return model


@pytest.mark.parametrize("place", [lambda evil: evil, _in_attribute, _in_class_weight, _in_objects, _in_fields])
@pytest.mark.parametrize("way", ["pickle-0", "pickle-2", "pickle-5", "joblib-plain", "joblib-zlib", "joblib-xz"])
def test_hidden_calls_are_refused_without_effect(tmp_path: Path, place: Callable[[object], object], way: str) -> None:
    data = WAYS[way](place(_Evil(tmp_path / "ran")))
    with pytest.raises(RefusedError):
        pickle_reader.read(data)
    assert not (tmp_path / "ran").exists()
    pickle.loads(data) if way.startswith("pickle") else joblib.load(io.BytesIO(data))
    assert (tmp_path / "ran").exists(), "the payload itself must work, or this test shows nothing"


def _text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def _named(module: str, name: str) -> bytes:
    return _text(module) + _text(name) + b"\x93"


RECONSTRUCT = _named("numpy._core.multiarray", "_reconstruct")
ESTIMATOR = _named("sklearn.linear_model._logistic", LINEAR) + b")\x81"
DTYPE = _named("numpy", "dtype") + _text("f8") + b"\x85R"

BY_HAND = {
    "os.system": b"cos\nsystem\n(S'true'\ntR.",
    "builtins.eval": _named("builtins", "eval") + _text("1") + b"\x85R.",
    "getattr": _named("builtins", "getattr") + _named("numpy", "ndarray") + _text("tofile") + b"\x86R.",
    "a dotted name": _named("numpy", "dtype.__class__") + b".",
    "a submodule of numpy": _named("numpy.testing._private.utils", "runstring") + b".",
    "numpy.load": _named("numpy", "load") + b".",
    "joblib.load": _named("joblib", "load") + b".",
    "sklearn's own": _named("sklearn.utils", "deprecated") + b".",
    "INST": b"(ios\nsystem\n.",
    "OBJ": b"(" + _named("subprocess", "Popen") + _text("true") + b"o.",
    "OBJ of a stand-in with arguments": b"(" + _named("sklearn.linear_model._logistic", LINEAR) + _text("x") + b"o.",
    "a call of a string": _text("x") + b")R.",
    "a call of an array": RECONSTRUCT + _named("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R)R.",
    "NEWOBJ of a number": b"K\x01)\x81.",
    "NEWOBJ_EX with keywords": _named("sklearn.svm._classes", "OneClassSVM") + b")}" + _text("kernel") + b"K\x01s\x92.",
    "state of a function": RECONSTRUCT + b"}" + _text("__defaults__") + b")sb.",
    "slots of a function": RECONSTRUCT + b"N}" + _text("__code__") + b"Ns\x86b.",
    "state of a class": _named("numpy", "ndarray") + b"}b.",
    "an estimator's state that is a list": ESTIMATOR + b"]b.",
    "append to an estimator": ESTIMATOR + b"K\x01a.",
    "item of an array": RECONSTRUCT + _named("numpy", "ndarray") + b"K\x00\x85C\x01b\x87RK\x00K\x01s.",
    "PERSID": b"Pexternal\n.",
    "BINPERSID": b"K\x01Q.",
    "EXT1": b"\x82\x01.",
    "NEXT_BUFFER": b"\x97.",
    "an array subclass": RECONSTRUCT + _named("builtins", "object") + b"K\x00\x85C\x01b\x87R.",
    "an array too large": RECONSTRUCT
    + _named("numpy", "ndarray")
    + b"K\x00\x85C\x01b\x87R(K\x01(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ft"
    + DTYPE
    + b"\x89C\x00tb.",
    "an array of too little": RECONSTRUCT
    + _named("numpy", "ndarray")
    + b"K\x00\x85C\x01b\x87R(K\x01K\x02\x85"
    + DTYPE
    + b"\x89C\x01xtb.",
    "a negative length": RECONSTRUCT
    + _named("numpy", "ndarray")
    + b"K\x00\x85C\x01b\x87R(K\x01J\xfe\xff\xff\xff\x85"
    + DTYPE
    + b"\x89C\x00tb.",
    "an object dtype": _named("numpy", "dtype") + _text("O8") + b"\x85R.",
    "a text dtype": _named("numpy", "dtype") + _text("U999999999") + b"\x85R.",
    "an encoding": _named("_codecs", "encode") + _text("x") + _text("zlib_codec") + b"\x86R.",
    "bytes of a size": _named("builtins", "bytes") + b"J\xff\xff\xff\x7f\x85R.",
    "a reconstructor of another base": _named("copyreg", "_reconstructor")
    + _named("sklearn.svm._classes", "OneClassSVM")
    + _named("builtins", "bytes")
    + b"N\x87R.",
    "no estimator": b"]K\x01a.",
    "an array alone": pickle.dumps(np.zeros(3)),
    "nothing": b"",
    "no pickle": b"GIF89a",
    "cut": pickle.dumps({"a": 1})[:-2],
    "a frame that lies": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "joblib's wrapper at the end": _named("joblib.numpy_pickle", "NumpyArrayWrapper")
    + b")\x81}("
    + _text("subclass")
    + _named("numpy", "ndarray")
    + _text("shape")
    + b"J\xff\xff\xff\x7f\x85"
    + _text("order")
    + _text("C")
    + _text("dtype")
    + DTYPE
    + b"ub.",
    "lz4": b"\x04\x22\x4d\x18 and so on",
    "a damaged zlib stream": b"\x78\x9c" + b"\x00" * 20,
    "a cut zlib stream": zlib.compress(pickle.dumps(np.arange(99)))[:-8],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_what_opcodes_could_reach_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(RefusedError) as caught:
        pickle_reader.read(BY_HAND[name])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_reader, "MAX_FILE_BYTES", 2**20)
    for way in (zlib.compress, __import__("bz2").compress, __import__("lzma").compress):
        with pytest.raises(RefusedError, match="larger than 1048576 bytes when decompressed"):
            pickle_reader.read(way(bytes(2**22)))


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    whole = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(RefusedError, MemoryError):
        pickle_reader.read(bytes(whole[: data.draw(st.integers(0, len(whole)))]))


def _small() -> bytes:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression()
    model.coef_, model.classes_ = np.ones((1, 3)), np.array([0, 1])
    return pickle.dumps(model, 4)


SMALL = _small()


# From here on through the process that reads in production.


def _file(folder: Path, data: bytes) -> Path:
    path = folder / "head.sav"
    path.write_bytes(data)
    return path


def test_a_file_through_its_process(tmp_path: Path, estimators: dict[str, Any]) -> None:
    got = read(_file(tmp_path, pickle.dumps(estimators[LINEAR], 0)), LINEAR)
    np.testing.assert_array_equal(got.arrays["coef_"], estimators[LINEAR].coef_)
    assert got.plain["C"] == 0.316 and got.version is not None
    with pytest.raises(PickleError, match=r"head\.sav: holds a LogisticRegression, expected a OneClassSVM"):
        read(tmp_path / "head.sav", "OneClassSVM")


def test_a_payload_through_its_process(tmp_path: Path) -> None:
    path = _file(tmp_path, _joblib(_in_objects(_Evil(tmp_path / "ran")), compress=("gzip", 3)))
    with pytest.raises(PickleError, match=r"head\.sav: refused: ") as caught:
        read(path, LINEAR)
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_what_would_never_end_is_stopped(tmp_path: Path) -> None:
    # A tuple of itself twice, sixty times over, as a key: its hash takes 2**60 steps.
    endless = b"}K\x01" + b"2\x86" * 60 + b"K\x01s."
    with pytest.raises(PickleError, match="processor time"):
        read(_file(tmp_path, endless), LINEAR, Limits(cpu_s=1))


def test_what_would_take_all_memory_is_refused(tmp_path: Path) -> None:
    huge = b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"."
    with pytest.raises(PickleError, match=r"refused: it needs more than 1024 MiB of memory"):
        read(_file(tmp_path, huge), LINEAR, Limits(memory_bytes=2**30))


def test_no_file_a_folder_and_a_pipe_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, says in (("none", "No such file"), (".", "not a regular file"), ("pipe", "not a regular file")):
        with pytest.raises(PickleError, match=says):
            read(tmp_path / name, LINEAR)


SEALED = """
import os, socket, sys
from train import pickle_process
pickle_process.reader()
if not pickle_process.seal():
    print("no filter here"); sys.exit()
for name, attempt in {
    "open": lambda: open("/etc/hostname"),
    "write": lambda: os.open("ran", os.O_CREAT | os.O_WRONLY),
    "socket": lambda: socket.socket(),
    "fork": os.fork,
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "kill": lambda: os.kill(os.getppid(), 0),
}.items():
    try:
        attempt()
    except OSError as error:
        print(name, error.errno)
    else:
        print(name, "went through")
"""


def test_a_sealed_process_opens_sends_and_starts_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", SEALED], cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)
    if done.stdout == "no filter here\n":
        pytest.skip("this kernel or machine has no system call filter")
    assert done.stdout == "open 1\nwrite 1\nsocket 1\nfork 1\nexec 1\nkill 1\n"
    assert not (ROOT / "ran").exists()


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (LINEAR, {"classes_": np.array([1, 2])}, "classes are not 0"),
        (LINEAR, {"coef_": np.zeros((1, 64))}, r"coef_ is of shape \[1, 64\], expected \[1, 192\]"),
        (LINEAR, {"intercept_": np.array([np.inf])}, "intercept_ holds a value that is not finite"),
        ("KNeighborsClassifier", {"_y": np.arange(80) % 3}, "label of its gallery"),
        ("KNeighborsClassifier", {"_y": np.zeros(80, int)}, "both classes"),
        ("KNeighborsClassifier", {"n_neighbors": 5}, "n_neighbors is '5', only 1 is taken"),
        ("KNeighborsClassifier", {"effective_metric_": "euclidean"}, "effective_metric_"),
        ("KNeighborsClassifier", {"_fit_X": None}, "_fit_X is missing"),
        ("OneClassSVM", {"kernel": "rbf"}, "kernel is 'rbf', only 'poly' is taken"),
        ("OneClassSVM", {"_gamma": "auto"}, "_gamma is not a number"),
        ("OneClassSVM", {"degree": 9}, "svm_degree"),
    ],
)
def test_settings_that_the_heads_do_not_have_are_named(
    estimators: dict[str, Any], name: str, change: dict[str, Any], says: str
) -> None:
    from train.pickled_heads import Estimator, _parsed

    found = {}
    for each, model in estimators.items():
        facts, arrays = _parsed(Path(each), pickle_reader.read(pickle.dumps(model)))
        found[each] = Estimator(Path(each), each, arrays, facts["plain"])
    for key, value in change.items():
        target = found[name].arrays if isinstance(value, np.ndarray) or key in found[name].arrays else found[name].plain
        target.pop(key, None)
        if value is not None:
            target[key] = value
    with pytest.raises(PickleError, match=says) as caught:
        to_heads(*found.values())
    assert str(caught.value).startswith(name)
