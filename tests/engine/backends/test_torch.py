"""The torch backend: the contract, an independent forward pass in numpy, and torch's errors made ours."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import numpy as np
import pytest

from engine.backends import create
from engine.backends.base import Backend, BackendUnavailable, DeviceError, OutOfDeviceMemory
from engine.bundle import Bundle
from engine.preprocess import Preprocess
from tests.engine.backends.contract import BackendContract, random_crops
from tests.engine.bundles import random_bundle, random_encoder

torch = pytest.importorskip("torch")


class TestTorchOnCpu(BackendContract):
    @classmethod
    def make(cls) -> Backend:
        return create("torch", device="cpu")


@pytest.mark.gpu
class TestTorchOnCuda(BackendContract):
    precision = "fp32"

    @classmethod
    def make(cls) -> Backend:
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return create("torch", device="cuda", precision=cls.precision)


@pytest.mark.gpu
class TestTorchOnCudaInFloat16(TestTorchOnCuda):
    precision = "fp16"
    batch_tolerance = 0.05


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("torch") / "1", seed=3)


def numpy_embedding(bundle: Bundle, crops: np.ndarray) -> np.ndarray:
    """ViT-Tiny/16 from the formulas, in float64, one crop at a time: the oracle of the module in torch."""
    w = {name: array.astype(np.float64) for name, array in bundle.encoder.items()}
    eps = bundle.manifest.encoder.layer_norm_eps

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def gelu(x: np.ndarray) -> np.ndarray:
        from scipy.special import erf

        return 0.5 * x * (1 + erf(x / np.sqrt(2)))

    rows = []
    for crop in crops:
        image = (crop / 255.0 - np.array(bundle.preprocess.mean)) / np.array(bundle.preprocess.std)
        patches = []
        for y in range(14):
            for x in range(14):
                patch = image[16 * y : 16 * y + 16, 16 * x : 16 * x + 16].transpose(2, 0, 1)
                kernel = w["patch_embed.proj.weight"]
                patches.append((kernel * patch).sum((1, 2, 3)) + w["patch_embed.proj.bias"])
        tokens = np.concatenate([w["cls_token"][0], np.stack(patches)]) + w["pos_embed"][0]
        for block in range(12):
            prefix = f"blocks.{block}."
            q, k, v = np.split(linear(norm(tokens, prefix + "norm1"), prefix + "attn.qkv"), 3, axis=1)
            attended = np.empty_like(tokens)
            for head in range(3):
                part = slice(64 * head, 64 * head + 64)
                weights = q[:, part] @ k[:, part].T / 8.0
                weights = np.exp(weights - weights.max(1, keepdims=True))
                attended[:, part] = weights / weights.sum(1, keepdims=True) @ v[:, part]
            tokens = tokens + linear(attended, prefix + "attn.proj")
            hidden = gelu(linear(norm(tokens, prefix + "norm2"), prefix + "mlp.fc1"))
            tokens = tokens + linear(hidden, prefix + "mlp.fc2")
        rows.append(norm(tokens[0], "norm"))
    return np.stack(rows)


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_the_embedding_is_that_of_the_formulas(tmp_path: Path, eps: float) -> None:
    rng = np.random.default_rng(0)
    encoder = random_encoder(5)
    for name, array in encoder.items():  # biases and norms that a wrong order or a forgotten one would show
        if name.endswith("bias") or "norm" in name:
            encoder[name] = (array + 0.1 * rng.standard_normal(array.shape)).astype(np.float32)
    preprocess = Preprocess(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    bundle = random_bundle(tmp_path / "1", encoder=encoder, preprocess=preprocess, layer_norm_eps=eps)
    crops = random_crops(2)
    backend = create("torch", device="cpu")
    backend.load(bundle)
    np.testing.assert_allclose(backend.infer(crops).embedding, numpy_embedding(bundle, crops), atol=2e-4)


def test_bfloat16_stays_near_float32(bundle: Bundle) -> None:
    crops = random_crops(2)
    exact, rough = create("torch", "cpu"), create("torch", "cpu", precision="bf16")
    exact.load(bundle)
    rough.load(bundle)
    fine, coarse = exact.infer(crops), rough.infer(crops)
    assert coarse.raw.dtype == coarse.embedding.dtype == np.float32
    assert 0 < np.abs(fine.embedding - coarse.embedding).max() < 0.2
    # The heads compute in full precision, whatever the encoder does.
    np.testing.assert_allclose(coarse.raw, bundle.heads.raw_scores(coarse.embedding), rtol=1e-5, atol=1e-5)


def test_one_broken_crop_is_nan_alone(bundle: Bundle) -> None:
    backend = create("torch", "cpu")
    backend.load(bundle)
    scorer = backend._scorer
    encoder = scorer.encoder

    class Breaks(torch.nn.Module):
        def forward(self, images):  # type: ignore[no-untyped-def]
            embedding = encoder(images)
            embedding[1, 7] = float("nan")
            return embedding

    scorer.encoder = Breaks()
    outputs = backend.infer(random_crops(3))
    assert np.isnan(outputs.raw).all(axis=1).tolist() == [False, True, False]
    assert np.isfinite(outputs.raw[[0, 2]]).all()


def test_an_unknown_device_or_precision_is_named() -> None:
    with pytest.raises(ValueError, match="fp64"):
        create("torch", "cpu", precision="fp64")
    with pytest.raises(BackendUnavailable, match="fp16 needs a CUDA device"):
        create("torch", "cpu", precision="fp16")
    with pytest.raises(BackendUnavailable, match="device cuda:99"):
        create("torch", "cuda:99")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), OutOfDeviceMemory),
        (lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), OutOfDeviceMemory),
        (lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), OutOfDeviceMemory),
        (MemoryError, OutOfDeviceMemory),
        (lambda: RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors…"), DeviceError),
    ],
)
def test_errors_of_torch_become_ours(bundle: Bundle, raised, expected) -> None:  # type: ignore[no-untyped-def]
    backend = create("torch", "cpu")
    backend.load(bundle)

    class Fails(torch.nn.Module):
        def forward(self, crops):  # type: ignore[no-untyped-def]
            raise raised()

    backend._scorer, scorer = Fails(), backend._scorer
    with pytest.raises(expected) as caught:
        backend.infer(random_crops(1))
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)
    backend._scorer = scorer
    assert np.isfinite(backend.infer(random_crops(1)).raw).all(), "the backend must be usable by the next, smaller batch"


def test_threads_are_set(bundle: Bundle) -> None:
    before = torch.get_num_threads()
    try:
        backend = create("torch", "cpu", threads=1)
        backend.load(bundle)
        assert torch.get_num_threads() == 1
        default = create("torch", "cpu")
        default.load(bundle)
        assert 1 <= torch.get_num_threads() <= (os.cpu_count() or 1)
    finally:
        torch.set_num_threads(before)


def test_a_failed_batch_lets_go_of_its_memory(bundle: Bundle) -> None:
    """Even while the caller still holds the exception, as it does when it tries again with a smaller batch."""
    backend = create("torch", "cpu")
    backend.load(bundle)
    held = []

    class Fails(torch.nn.Module):
        def forward(self, crops):  # type: ignore[no-untyped-def]
            activations = torch.zeros(4)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")

    backend._scorer = Fails()
    with pytest.raises(OutOfDeviceMemory):
        try:
            backend.infer(random_crops(1))
        except OutOfDeviceMemory:
            assert held[0]() is None
            raise
