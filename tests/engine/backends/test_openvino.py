"""The OpenVINO backend: the contract in both precisions, agreement with torch, ways through it, errors made ours."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from engine.backends import create
from engine.backends.base import Backend, BackendUnavailable, DeviceError, OutOfDeviceMemory
from engine.bundle import Bundle
from tests.engine.backends.contract import BackendContract, random_crops
from tests.engine.bundles import random_bundle

pytest.importorskip("openvino")

from engine.backends.openvino_backend import CHUNK, OpenVINOBackend


def has_bf16() -> bool:
    return OpenVINOBackend().precision == "bf16"


class TestFloat32(BackendContract):
    @classmethod
    def make(cls) -> Backend:
        return create("openvino", precision="fp32")

    def test_agrees_with_torch(self, loaded: Backend, bundle: Bundle) -> None:
        pytest.importorskip("torch")
        reference = create("torch", device="cpu")
        reference.load(bundle)
        crops = random_crops(6)
        ours, theirs = loaded.infer(crops), reference.infer(crops)
        np.testing.assert_allclose(ours.embedding, theirs.embedding, rtol=0, atol=1e-4)
        np.testing.assert_allclose(ours.raw, theirs.raw, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("singles_at_most", [0, 2, 1000])
    @pytest.mark.parametrize("count", [1, CHUNK, 2 * CHUNK + 3])
    def test_every_way_gives_the_same_bits(self, loaded: Backend, count: int, singles_at_most: int) -> None:
        assert isinstance(loaded, OpenVINOBackend)
        crops = random_crops(count)
        expected = loaded.infer(crops)
        before, loaded.singles_at_most = loaded.singles_at_most, singles_at_most
        try:
            got = loaded.infer(crops)
        finally:
            loaded.singles_at_most = before
        np.testing.assert_array_equal(got.embedding, expected.embedding)
        np.testing.assert_array_equal(got.raw, expected.raw)


class TestBfloat16(BackendContract):
    @classmethod
    def make(cls) -> Backend:
        if not has_bf16():
            pytest.skip("this processor has no bfloat16")
        return create("openvino", precision="bf16")

    def test_is_near_float32_and_not_the_same(self, loaded: Backend, bundle: Bundle) -> None:
        exact = create("openvino", precision="fp32")
        exact.load(bundle)
        crops = random_crops(6)
        ours, theirs = loaded.infer(crops), exact.infer(crops)
        np.testing.assert_allclose(ours.embedding, theirs.embedding, rtol=0, atol=0.1)
        assert np.abs(ours.embedding - theirs.embedding).max() > 1e-4, "bfloat16 was asked for and is not there"


def test_auto_takes_bfloat16_where_the_processor_has_it() -> None:
    assert create("openvino").precision == ("bf16" if has_bf16() else "fp32")  # type: ignore[attr-defined]


def test_bfloat16_cannot_be_forced_on_a_processor_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"])
    assert create("openvino").precision == "fp32"  # type: ignore[attr-defined]
    with pytest.raises(BackendUnavailable, match="no bfloat16"):
        create("openvino", precision="bf16")


def test_is_refused_on_other_devices_and_precisions() -> None:
    with pytest.raises(BackendUnavailable, match="device cuda: this backend runs on the CPU only"):
        create("openvino", device="cuda")
    with pytest.raises(ValueError, match="unknown precision 'fp8'; known are auto, fp32, bf16"):
        create("openvino", precision="fp8")


@pytest.mark.parametrize("package", ["openvino", "onnx"])
def test_names_the_missing_package(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendUnavailable, match="install the extra 'openvino'"):
        create("openvino")


def test_threads_are_as_asked(tmp_path: Path) -> None:
    backend = OpenVINOBackend(threads=1, precision="fp32")
    backend.load(random_bundle(tmp_path / "1"))
    assert backend.infer(random_crops(3)).raw.shape == (3, 3)
    assert backend.streams == 1


def test_many_batch_sizes_do_not_grow_memory(tmp_path: Path) -> None:
    import psutil

    backend = OpenVINOBackend()
    backend.load(random_bundle(tmp_path / "1"))
    crops = random_crops(18)
    backend.infer(crops)
    before_bytes = psutil.Process().memory_info().rss
    for count in (1, 2, 3, 5, 7, 11, 14, 17):
        backend.infer(crops[:count])
    assert psutil.Process().memory_info().rss - before_bytes < 16 * 2**20


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (RuntimeError("Exception from x.cpp:1:\nstd::bad_alloc\n"), OutOfDeviceMemory, "openvino: std::bad_alloc"),
        (MemoryError(), OutOfDeviceMemory, "out of host memory"),
        (
            RuntimeError("Exception from a.cpp:1:\nException from b.cpp:2:\nprimitive failed\n\n"),
            DeviceError,
            "primitive failed$",
        ),
        (RuntimeError(), DeviceError, "RuntimeError"),
    ],
)
def test_errors_of_openvino_become_ours(raised: Exception, expected: type[Exception], message: str) -> None:
    def fail() -> None:
        raise raised

    with pytest.raises(expected, match=message):
        OpenVINOBackend()._guard(fail)


def test_a_failing_request_lets_the_others_end_first(tmp_path: Path) -> None:
    backend = OpenVINOBackend(threads=2, precision="fp32")
    backend.load(random_bundle(tmp_path / "1"))
    crops = random_crops(2 * CHUNK)
    expected = backend.infer(crops)
    first, second = backend._chunks._requests
    backend._chunks._requests = [first, Broken(second)]
    with pytest.raises(DeviceError, match="lost"):
        backend.infer(crops)
    backend._chunks._requests = [first, second]
    np.testing.assert_array_equal(backend.infer(crops).raw, expected.raw)


class Broken:
    """A request that cannot start."""

    def __init__(self, request: object) -> None:
        self.request = request

    def start_async(self, *_: object, **__: object) -> None:
        raise RuntimeError("device lost")
