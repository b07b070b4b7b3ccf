"""The TensorRT backend: the contract on a fake device and on real ones, plans from the cache, refit, memory, what is missing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import build, graph, tensorrt_api
from engine.backends import create
from engine.backends.base import Backend, BackendStateError, BackendUnavailable, DeviceError, OutOfDeviceMemory
from engine.backends.tensorrt_backend import TensorRTBackend
from engine.bundle import Bundle
from engine.heads import Heads
from tests.engine.backends.contract import BackendContract, random_crops
from tests.engine.backends.fake_cuda import FakeDriver
from tests.engine.backends.fake_tensorrt import FakeTensorRT, embedding_of, plan_bytes
from tests.engine.bundles import random_bundle, random_heads

pytest.importorskip("onnx")


class Rig:
    """A fake machine: driver, TensorRT and builder, and how often it built."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.driver = FakeDriver()
        self.trt = FakeTensorRT(self.driver)
        self.folder = folder
        self.recipes: list[build.Recipe] = []
        self.heads: list[Heads] = []
        self.refuse_refit = False
        monkeypatch.setattr(tensorrt_api, "load", lambda _: self.trt)
        monkeypatch.setattr(TensorRTBackend, "_open_driver", staticmethod(lambda _: self.driver))
        monkeypatch.setattr(build, "build_apart", self._build)
        # The fake computes another encoder than the bundle's.
        monkeypatch.setattr(TensorRTBackend, "_reference", staticmethod(lambda _, crops: embedding_of(crops)))

    def _build(self, onnx: bytes, recipe: build.Recipe, timing_cache: Path | None = None) -> tuple[bytes, dict[str, Any]]:
        self.recipes.append(recipe)
        if recipe.refit and self.refuse_refit:
            raise build.BuildError("no refit here")
        return plan_bytes(onnx, recipe.sizes, recipe.refit), {"version": self.trt.__version__}

    def open(self, **options: Any) -> TensorRTBackend:
        return TensorRTBackend(**{"plan_cache": self.folder, "batch_sizes": (1, 4), **options})

    def load(self, bundle: Bundle, **options: Any) -> TensorRTBackend:
        backend = self.open(**options)
        self.know(backend, bundle)
        backend.load(bundle)
        return backend

    def know(self, backend: TensorRTBackend, bundle: Bundle, heads: Heads | None = None) -> bytes:
        onnx = graph.serialize(backend._model(bundle))
        self.trt.know(onnx, heads or bundle.heads)
        return onnx


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rig:
    return Rig(monkeypatch, tmp_path / "plans")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("bundle") / "1")


@pytest.fixture(scope="module")
def refreshed(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("bundle") / "2", seed=7, version="2")


class TestOnAFakeDevice(BackendContract):
    rig: Rig

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def machine(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            cls.rig = Rig(monkeypatch, tmp_path_factory.mktemp("plans"))
            yield

    @classmethod
    def make(cls) -> Backend:
        backend = cls.rig.open()
        load = backend._load

        def knowing(bundle: Bundle) -> None:
            cls.rig.know(backend, bundle)
            load(bundle)

        backend._load = knowing  # type: ignore[method-assign]
        return backend

    def test_two_batches_may_be_under_way(self, loaded: Backend) -> None:
        assert isinstance(loaded, TensorRTBackend) and loaded.depth == 2
        crops = random_crops(9)
        expected = loaded.infer(crops)
        first, second = loaded.submit(crops[:4]), loaded.submit(crops[4:8])
        for ticket, rows in ((first, slice(0, 4)), (second, slice(4, 8))):
            np.testing.assert_array_equal(loaded.collect(ticket).raw, expected.raw[rows])
        np.testing.assert_array_equal(loaded.collect(loaded.submit(crops)).raw, expected.raw)  # more than the largest size
        with pytest.raises(TypeError, match="not a ticket"):
            loaded.collect("something else")


@pytest.mark.gpu
class TestOnADevice(BackendContract):
    flavour = "tensorrt_rtx"
    batch_tolerance = 0.05
    heads_tolerance = 2e-2

    @classmethod
    def make(cls) -> Backend:
        try:
            return create(cls.flavour, batch_sizes=(1, 4))
        except BackendUnavailable as error:
            pytest.skip(str(error))


@pytest.mark.gpu
class TestTensorRTProperOnADevice(TestOnADevice):
    flavour = "tensorrt"


def test_the_second_start_takes_the_plan_of_the_first(rig: Rig, bundle: Bundle) -> None:
    first = rig.load(bundle)
    assert rig.recipes == [build.Recipe("tensorrt", "here", (1, 4), refit=True)]
    crops = random_crops(3)
    expected = first.infer(crops).raw
    first.close()
    assert rig.driver.live == 0
    second = rig.load(bundle)
    assert len(rig.recipes) == 1
    np.testing.assert_array_equal(second.infer(crops).raw, expected)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_sizes": (1, 8)},
        {"precision": "bf16"},
        {"precision": "fp32"},
    ],
    ids=str,
)
def test_another_configuration_has_another_plan(rig: Rig, bundle: Bundle, change: dict[str, Any]) -> None:
    rig.load(bundle).close()
    rig.load(bundle, **change).close()
    assert len(rig.recipes) == 2
    assert len(list(rig.folder.glob("*.plan"))) == 2


def test_another_version_gpu_or_capability_has_another_plan(rig: Rig, bundle: Bundle) -> None:
    rig.load(bundle).close()
    rig.trt.__version__ = "10.9.2"
    rig.load(bundle).close()
    rig.driver.gpu = "Fake L40S"
    rig.load(bundle).close()
    rig.driver.capability = "sm90"
    rig.load(bundle).close()
    assert len(rig.recipes) == 4


@pytest.mark.parametrize("damage", ["flip", "cut", "junk", "foreign", "no json", "old json"])
def test_a_damaged_foreign_or_outdated_plan_is_built_anew(rig: Rig, bundle: Bundle, refreshed: Bundle, damage: str) -> None:
    expected = rig.load(bundle).infer(random_crops(2)).raw
    [file] = rig.folder.glob("*.plan")
    data, sidecar = file.read_bytes(), file.with_name(f"{file.name}.json")
    if damage == "flip":
        file.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    elif damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "junk":
        file.write_bytes(b"junk")
    elif damage == "no json":
        sidecar.unlink()
    else:  # another plan and its JSON, whole, under this one's name
        other = rig.load(refreshed) if damage == "foreign" else rig.load(bundle, precision="bf16")
        other.close()
        [written] = [name for name in rig.folder.glob("*.plan") if name != file]
        file.write_bytes(written.read_bytes())
        sidecar.write_bytes(written.with_name(f"{written.name}.json").read_bytes())
        for name in (written, written.with_name(f"{written.name}.json")):
            name.unlink()
    rig.recipes.clear()
    backend = rig.load(bundle)
    assert len(rig.recipes) == 1
    np.testing.assert_array_equal(backend.infer(random_crops(2)).raw, expected)
    rig.load(bundle).close()
    assert len(rig.recipes) == 1, "the next one finds it"


def test_a_sound_plan_that_does_not_load_is_built_anew(rig: Rig, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.load(bundle).close()
    deserialize = rig.trt._deserialize
    refused = iter([True])
    monkeypatch.setattr(rig.trt, "_deserialize", lambda data, log: deserialize(b"junk" if next(refused, False) else data, log))
    rig.load(bundle).close()
    assert len(rig.recipes) == 2


def test_a_plan_that_never_loads_is_fatal_and_named(rig: Rig, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.trt, "_deserialize", lambda data, log: FakeTensorRT._deserialize(rig.trt, b"junk", log))
    with pytest.raises(DeviceError, match=r"^tensorrt: a plan was built, and is of no use: .*magicTag"):
        rig.load(bundle)


def test_heads_that_are_not_the_bundles_never_reach_a_verdict(rig: Rig, bundle: Bundle) -> None:
    backend = rig.open()
    rig.know(backend, bundle, heads=random_heads(seed=99))
    with pytest.raises(DeviceError, match="not this bundle's: its heads give"):
        backend.load(bundle)
    assert rig.driver.live == 0


def test_an_encoder_that_is_not_the_bundles_never_reaches_a_verdict(
    rig: Rig, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan whose heads are right but whose encoder kept the old weights: what a refit gone wrong would leave."""
    monkeypatch.setattr(TensorRTBackend, "_reference", staticmethod(graph.reference))
    with pytest.raises(DeviceError, match=r"not this bundle's: its encoder's answer to a test pattern is off by"):
        rig.load(bundle)
    assert rig.driver.live == 0


def test_a_refreshed_bundle_is_refitted_without_a_build(rig: Rig, bundle: Bundle, refreshed: Bundle) -> None:
    old = rig.load(bundle)
    crops = random_crops(3)
    before = old.infer(crops).raw
    new = rig.load(refreshed)
    assert len(rig.recipes) == 1, "the second was not built"
    assert np.abs(new.infer(crops).raw - before).max() > 1e-3
    np.testing.assert_array_equal(old.infer(crops).raw, before, "the running engine is left as it is")
    rig.trt.deserialized = 0
    rig.load(refreshed).close()
    assert rig.trt.deserialized == 1 and len(rig.recipes) == 1, "the refitted plan was kept"


def test_what_cannot_be_refitted_is_built(rig: Rig, bundle: Bundle, refreshed: Bundle, tmp_path: Path) -> None:
    rig.load(bundle).close()
    rig.trt.refit_fails = True
    rig.load(refreshed).close()
    assert len(rig.recipes) == 2
    rig.trt.refit_fails = False
    rig.load(random_bundle(tmp_path / "3", heads=random_heads(gallery=10))).close()
    assert len(rig.recipes) == 3, "a gallery of another size is another architecture"


def test_a_plan_without_refit_is_second_best(rig: Rig, bundle: Bundle) -> None:
    rig.refuse_refit = True
    rig.load(bundle).close()
    assert [recipe.refit for recipe in rig.recipes] == [True, False]
    rig.load(bundle).close()
    assert len(rig.recipes) == 2, "it is found again without a build"


def test_too_little_memory_for_the_largest_batch_caps_it(rig: Rig, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    rig.trt.fail_contexts_from = 8
    backend = rig.load(bundle, batch_sizes=(1, 4, 8, 16))
    assert backend.max_batch_size == 4
    assert "engine.batch_capped" in capsys.readouterr().out
    assert backend.infer(random_crops(11)).raw.shape == (11, 3)
    rig.trt.fail_contexts_from = 1
    with pytest.raises(OutOfDeviceMemory):
        rig.load(bundle, batch_sizes=(1, 4, 8, 16))


def test_a_cache_that_cannot_be_written_costs_a_build_each_start_and_nothing_else(
    rig: Rig, bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    rig.folder = tmp_path / "file" / "plans"
    for _ in range(2):
        assert rig.load(bundle).infer(random_crops(1)).raw.shape == (1, 3)
    assert len(rig.recipes) == 2


def test_a_graph_that_cannot_be_built_leaves_the_machine_to_other_backends(
    rig: Rig, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise build.BuildError("tensorrt sm89: node x (Y): unsupported")

    monkeypatch.setattr(build, "build_apart", refuse)
    with pytest.raises(BackendUnavailable, match="no plan can be built for Fake L4: tensorrt sm89: node x"):
        rig.load(bundle)


def test_each_thread_makes_the_context_its_own(rig: Rig, bundle: Bundle) -> None:
    import threading

    backend = rig.load(bundle)
    thread = threading.Thread(target=backend.infer, args=(random_crops(1),))
    thread.start()
    thread.join()
    backend.infer(random_crops(1))
    assert rig.driver.calls["make_current"] == 3


def test_submitting_needs_a_loaded_backend(rig: Rig, bundle: Bundle) -> None:
    backend = rig.open()
    with pytest.raises(BackendStateError, match="this one is new"):
        backend.submit(random_crops(1))
    backend = rig.load(bundle)
    with pytest.raises(ValueError, match="expected crops"):
        backend.submit(np.zeros((1, 3, 224, 224), np.uint8))
    backend.close()
    with pytest.raises(BackendStateError, match="this one is closed"):
        backend.submit(random_crops(1))


def test_what_cannot_run_says_so(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"device": "cpu"}, "NVIDIA GPUs only"),
        ({"precision": "int8"}, "unknown precision 'int8'"),
        ({"batch_sizes": (0, 4)}, "start at 1"),
    ):
        with pytest.raises((BackendUnavailable, ValueError), match=message):
            rig.open(**options)
    rig.driver.capability = "sm75"
    with pytest.raises(BackendUnavailable, match=r"Fake L4 \(sm75\) has no bfloat16"):
        rig.open(precision="bf16")
    monkeypatch.setattr(tensorrt_api, "targets", lambda _: ("sm80", "sm89"))
    with pytest.raises(BackendUnavailable, match=r"has no target for Fake L4 \(sm75\); it knows sm80, sm89"):
        rig.open()


def test_on_sm75_the_heads_multiply_in_half_precision(rig: Rig, bundle: Bundle) -> None:
    rig.driver.capability = "sm75"
    backend = rig.load(bundle)
    [sidecar] = rig.folder.glob("*.json")
    assert '"heads_precision": "fp16"' in sidecar.read_text()
    assert backend.infer(random_crops(2)).raw.shape == (2, 3)


def no_gpu() -> bool:
    from engine.backends.cuda_driver import has_driver

    return not has_driver()


@pytest.mark.skipif(not no_gpu(), reason="this machine has a GPU")
def test_without_a_driver_one_line_says_what_is_missing() -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="tensorrt_rtx_bindings is not installed")
    pytest.importorskip("cuda.bindings", reason="cuda-python is not installed")
    with pytest.raises(BackendUnavailable) as caught:
        create("tensorrt_rtx")
    assert "no NVIDIA driver on this machine" in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_packages_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendUnavailable, match="install the extra 'tensorrt-rtx'"):
        create("tensorrt_rtx")
    with pytest.raises(BackendUnavailable, match="install the extra 'tensorrt'"):
        create("tensorrt")


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx", "openvino"])
def test_needs_no_torch(name: str, tmp_path: Path) -> None:
    """In a process where torch cannot be imported: loads and infers, or says in one line what is missing."""
    random_bundle(tmp_path / "1")
    code = f"""
import subprocess
import sys
sys.modules["torch"] = None
import numpy as np
from engine.backends.base import BackendUnavailable
from engine.detector import Detector
try:
    with Detector.open({str(tmp_path / "1")!r}, {name!r}) as detector:
        print(detector.infer(np.zeros((2, 224, 224, 3), np.uint8)).shape)
except BackendUnavailable as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    assert "torch" not in done.stdout
    assert "(2, 3)" in done.stdout or "does not run here" in done.stdout
