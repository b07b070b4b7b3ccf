"""The checked base of the backends, and which of them is taken."""

from __future__ import annotations

import os
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest

from engine import backends
from engine.backends import create, load_first
from engine.backends.base import (
    BackendError,
    BackendStateError,
    BackendUnavailable,
    CheckedBackend,
    DeviceError,
    OutOfDeviceMemory,
    Outputs,
    usable_cores,
)
from engine.bundle import Bundle
from engine.heads import EMBEDDING_DIM, HEADS
from tests.engine.bundles import random_bundle


class Recorder(CheckedBackend):
    """Notes the sizes it is given; scores each crop by its first byte."""

    name, device = "recorder", "cpu"
    OPTIONS = ("precision",)

    def __init__(self, device: str = "auto", threads: int = 0, precision: str = "fp32") -> None:
        super().__init__()
        self.device = device
        self.precision = precision
        self.sizes: list[int] = []
        self.closed = 0

    def _load(self, bundle: Bundle) -> None: ...

    def _infer(self, crops: np.ndarray) -> Outputs:
        self.sizes.append(len(crops))
        first = crops[:, 0, 0, 0].astype(np.float32)
        return Outputs(np.repeat(first[:, None], len(HEADS), 1), np.repeat(first[:, None], EMBEDDING_DIM, 1))

    def _close(self) -> None:
        self.closed += 1


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("base") / "1")


def numbered(count: int) -> np.ndarray:
    crops = np.zeros((count, 224, 224, 3), np.uint8)
    crops[:, 0, 0, 0] = np.arange(count)
    return crops


def test_batches_over_the_limit_are_split_and_joined_in_order(bundle: Bundle) -> None:
    backend = Recorder()
    backend.max_batch_size = 4
    backend.load(bundle)
    outputs = backend.infer(numbered(11))
    assert backend.sizes == [4, 4, 3]
    assert outputs.raw[:, 0].tolist() == list(range(11)) and outputs.embedding[:, 5].tolist() == list(range(11))


def test_a_nan_in_the_embedding_is_a_nan_in_every_score(bundle: Bundle) -> None:
    class Forgets(Recorder):
        def _infer(self, crops: np.ndarray) -> Outputs:
            outputs = super()._infer(crops)
            outputs.embedding[1, 3] = np.inf
            return outputs

    backend = Forgets()
    backend.load(bundle)
    assert np.isnan(backend.infer(numbered(3)).raw).tolist() == [[False] * 3, [True] * 3, [False] * 3]


def test_a_second_thread_is_refused_not_queued(bundle: Bundle) -> None:
    inside, leave = threading.Event(), threading.Event()

    class Slow(Recorder):
        def _infer(self, crops: np.ndarray) -> Outputs:
            inside.set()
            leave.wait(10)
            return super()._infer(crops)

    backend = Slow()
    backend.load(bundle)
    thread = threading.Thread(target=backend.infer, args=(numbered(1),))
    thread.start()
    assert inside.wait(10)
    for misuse in (lambda: backend.infer(numbered(1)), backend.close):
        with pytest.raises(BackendStateError, match="another thread"):
            misuse()
    leave.set()
    thread.join()
    assert len(backend.infer(numbered(1)).raw) == 1


def test_a_failed_batch_leaves_the_backend_usable(bundle: Bundle) -> None:
    class Limited(Recorder):
        def _infer(self, crops: np.ndarray) -> Outputs:
            if len(crops) > 2:
                raise OutOfDeviceMemory("too much")
            return super()._infer(crops)

    backend = Limited()
    backend.load(bundle)
    with pytest.raises(OutOfDeviceMemory):
        backend.infer(numbered(3))
    assert len(backend.infer(numbered(2)).raw) == 2


def test_a_load_that_failed_may_be_closed_but_not_used(bundle: Bundle) -> None:
    class Fails(Recorder):
        def _load(self, bundle: Bundle) -> None:
            raise DeviceError("gone")

    backend = Fails()
    with pytest.raises(DeviceError):
        backend.load(bundle)
    with pytest.raises(BackendStateError):
        backend.infer(numbered(1))
    backend.close()


def test_closing_happens_once(bundle: Bundle) -> None:
    backend = Recorder()
    backend.load(bundle)
    backend.close()
    backend.close()
    assert backend.closed == 1


def test_memory_is_no_device_error() -> None:
    """Who catches DeviceError to stop the worker must not stop it for a batch that is too large."""
    assert not issubclass(OutOfDeviceMemory, DeviceError)
    assert issubclass(OutOfDeviceMemory, BackendError) and issubclass(DeviceError, BackendError)


# --- which one is taken ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[CheckedBackend] | None]:
    """Stand-ins for the four backends: a class, or None for a package that is not installed."""
    chosen: dict[str, type[CheckedBackend] | None] = {}
    classes = {}
    for name in backends.AUTO_ORDER:
        module = types.ModuleType(f"fake_{name}")

        def make(device: str, threads: int, *, _name: str = name, **options: object) -> CheckedBackend:
            cls = chosen.get(_name)
            if cls is None:
                raise BackendUnavailable(f"no {_name} here")
            backend = cls(device, threads, **options)  # type: ignore[call-arg]
            backend.name = _name
            return backend

        make.OPTIONS = ("precision",)  # type: ignore[attr-defined]
        module.Fake = make  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"fake_{name}", module)
        classes[name] = (f"fake_{name}", "Fake")
    monkeypatch.setattr(backends, "_CLASSES", classes)
    return chosen


def test_auto_takes_the_first_that_runs(fakes: dict[str, type[CheckedBackend] | None]) -> None:
    fakes.update(torch=Recorder, openvino=Recorder)
    assert create("auto").name == "openvino"
    fakes["openvino"] = None
    assert create().name == "torch"
    fakes["tensorrt_rtx"] = Recorder
    assert create().name == "tensorrt_rtx"
    fakes["tensorrt"] = Recorder
    assert create().name == "tensorrt"


def test_auto_takes_a_gpu_before_the_cpu(
    fakes: dict[str, type[CheckedBackend] | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Torch(Recorder):
        def __init__(self, device: str, threads: int) -> None:
            super().__init__()
            self.device = "cuda:0" if device == "cuda" else "cpu"

    class TorchWithoutCuda(Torch):
        def __init__(self, device: str, threads: int) -> None:
            if device == "cuda":
                raise BackendUnavailable("torch has no CUDA")
            super().__init__(device, threads)

    fakes.update(torch=Torch, openvino=Recorder)
    monkeypatch.setattr(backends, "_NVIDIA_DEVICES", (str(tmp_path / "none"),))
    assert create().name == "openvino"
    monkeypatch.setattr(backends, "_NVIDIA_DEVICES", (str(tmp_path),))
    assert (create().name, create().device) == ("torch", "cuda:0")
    assert create("auto", "cpu").name == "openvino"
    fakes["torch"] = TorchWithoutCuda
    assert create().name == "openvino"


def test_when_none_runs_one_line_says_why_of_each(fakes: dict[str, type[CheckedBackend] | None], bundle: Bundle) -> None:
    for make in (lambda: create("auto", "cuda"), lambda: load_first(bundle, device="cuda")):
        with pytest.raises(BackendUnavailable) as caught:
            make()
        message = str(caught.value)
        assert message.startswith("no backend runs here (device cuda): tensorrt: no tensorrt here; ")
        assert all(f"{name}: no {name} here" in message for name in backends.AUTO_ORDER) and "\n" not in message
    with pytest.raises(BackendUnavailable, match=r"backend torch does not run here .*no torch here"):
        create("torch")


def test_auto_goes_on_where_a_bundle_cannot_be_loaded(fakes: dict[str, type[CheckedBackend] | None], bundle: Bundle) -> None:
    class NoPlan(Recorder):
        def _load(self, bundle: Bundle) -> None:
            raise BackendUnavailable("no plan for this GPU")

    fakes.update(tensorrt=NoPlan, torch=Recorder)
    assert load_first(bundle).name == "torch"
    fakes["torch"] = NoPlan
    with pytest.raises(BackendUnavailable, match=r"tensorrt: no plan for this GPU; .*torch: no plan for this GPU"):
        load_first(bundle)

    class Broken(Recorder):
        def _load(self, bundle: Bundle) -> None:
            raise DeviceError("the device fell off the bus")

    fakes["tensorrt"] = Broken
    with pytest.raises(DeviceError):
        load_first(bundle)


def test_options_reach_the_backends_that_know_them(fakes: dict[str, type[CheckedBackend] | None]) -> None:
    fakes["torch"] = Recorder
    assert create("torch", precision="bf16").precision == "bf16"  # type: ignore[attr-defined]
    assert create("auto", precision="bf16", plan_cache="x").precision == "bf16"  # type: ignore[attr-defined]
    assert create("torch", plan_cache="x").name == "torch", "the worker names a plan cache whatever the backend"
    with pytest.raises(ValueError, match="backend torch has no option colour; it has precision"):
        create("torch", colour="red")


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._CLASSES, "torch", ("no_such_module", "TorchBackend"))
    with pytest.raises(BackendUnavailable, match="no_such_module"):
        create("torch")


# --- cores ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1), ("1600000 100000", 8), ("junk", 8)],
)
def test_a_container_s_quota_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "cpu.max").write_text(text)
    assert usable_cores(tmp_path / "cpu.max") == expected


def test_without_cgroups_the_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert usable_cores(tmp_path / "none") == 1
