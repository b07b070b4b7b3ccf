"""The ONNX graph: agreement with torch and numpy, types, determinism, and what makes two graphs alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import graph
from engine.bundle import Bundle
from engine.graph_writer import Writer, _bfloat16
from engine.heads import EMBEDDING_DIM, Heads, unit_rows
from tests.engine.backends.contract import random_crops
from tests.engine.bundles import random_bundle, random_heads

onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("bundle") / "1")


def run(model: Any, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """By ONNX Runtime, optimised as little as possible: what the graph says, not what a compiler makes of it."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 2
    session = runtime.InferenceSession(graph.serialize(model), options, providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, inputs), strict=True))


@pytest.mark.parametrize(("precision", "embedding_tolerance", "raw_tolerance"), [("fp32", 5e-5, 2e-5), ("fp16", 0.02, 0.01)])
def test_agrees_with_torch(bundle: Bundle, precision: Any, embedding_tolerance: float, raw_tolerance: float) -> None:
    torch = pytest.importorskip("torch")
    from engine.backends.torch_graph import Scorer

    crops = random_crops(3)
    with torch.inference_mode():
        raw, embedding = (tensor.numpy() for tensor in Scorer(bundle)(torch.from_numpy(crops)))
    outputs = run(graph.model(bundle, precision), crops=crops)
    np.testing.assert_allclose(outputs["embedding"], embedding, rtol=0, atol=embedding_tolerance)
    np.testing.assert_allclose(outputs["raw"], raw, rtol=0, atol=raw_tolerance)


def test_the_reference_in_numpy_agrees_with_torch(bundle: Bundle) -> None:
    torch = pytest.importorskip("torch")
    from engine.backends.torch_graph import Scorer

    crops = random_crops(1)
    with torch.inference_mode():
        _, embedding = Scorer(bundle)(torch.from_numpy(crops))
    np.testing.assert_allclose(graph.reference(bundle, crops), embedding.numpy(), rtol=0, atol=5e-5)


@pytest.mark.parametrize("precision", graph.PRECISIONS)
def test_is_valid_and_of_the_agreed_types(bundle: Bundle, precision: graph.Precision) -> None:
    built = graph.model(bundle, precision)
    onnx.checker.check_model(built, full_check=True)
    kinds = {
        value.name: (value.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim])
        for value in (*built.graph.input, *built.graph.output)
    }
    assert kinds == {
        "crops": (onnx.TensorProto.UINT8, ["n", 224, 224, 3]),
        "embedding": (onnx.TensorProto.FLOAT, ["n", 192]),
        "raw": (onnx.TensorProto.FLOAT, ["n", 3]),
    }
    facts = {prop.key: prop.value for prop in built.metadata_props}
    assert facts["bundle.digest"] == bundle.digest and facts["precision"] == precision


@pytest.mark.parametrize(("precision", "name"), [("fp32", "FLOAT"), ("fp16", "FLOAT16"), ("bf16", "BFLOAT16")])
def test_every_product_of_the_encoder_has_the_precision(bundle: Bundle, precision: graph.Precision, name: str) -> None:
    built = graph.model(bundle, precision)
    inferred = onnx.shape_inference.infer_shapes(built, strict_mode=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    products = [node.output[0] for node in built.graph.node if node.op_type == "MatMul"]
    heads = [product for product in products if product.startswith(("knn.", "ocsvm."))]
    assert len(heads) == 3 and {kinds[product] for product in heads} == {onnx.TensorProto.FLOAT}
    assert {kinds[product] for product in set(products) - set(heads)} == {getattr(onnx.TensorProto, name)}


def test_bytes_are_cast_before_anything_else(bundle: Bundle) -> None:
    first = [node for node in graph.model(bundle, "fp16").graph.node if "crops" in node.input]
    assert [node.op_type for node in first] == ["Cast"]


def test_the_same_bundle_gives_the_same_bytes(bundle: Bundle) -> None:
    assert graph.serialize(graph.model(bundle, "fp16")) == graph.serialize(graph.model(bundle, "fp16"))


def test_alike_are_graphs_that_differ_in_weights_only(bundle: Bundle, tmp_path: Path) -> None:
    own = graph.architecture(graph.model(bundle))
    other = random_bundle(tmp_path / "2", seed=5)
    assert other.digest != bundle.digest
    assert graph.architecture(graph.model(other)) == own
    larger = random_bundle(tmp_path / "3", heads=random_heads(gallery=50))
    assert graph.architecture(graph.model(larger)) != own
    assert graph.architecture(graph.model(bundle, "fp16")) != own


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("degree", "coef0", "gamma"), [(3, 0.0, 1 / 192), (1, 0.0, 2.0), (2, 1.5, 1e-4), (4, -0.5, 0.01)])
def test_heads_alone_are_those_of_numpy(
    tmp_path: Path, precision: graph.Precision, degree: int, coef0: float, gamma: float
) -> None:
    plain = random_heads(gallery=9, vectors=7)
    fields = ("linear_weight", "linear_bias", "knn_gallery", "knn_labels", "svm_vectors", "svm_dual", "svm_intercept")
    heads = Heads(**{name: getattr(plain, name) for name in fields}, svm_degree=degree, svm_coef0=coef0, svm_gamma=gamma)
    bundle = random_bundle(tmp_path / "1", heads=heads)
    embedding = np.random.default_rng(3).standard_normal((11, EMBEDDING_DIM)).astype(np.float32)
    raw = run(graph.model(bundle, part="heads", heads_precision=precision), embedding=embedding)["raw"]
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    np.testing.assert_allclose(raw, heads.raw_scores(embedding), rtol=tolerance, atol=tolerance)


def test_neighbours_that_all_lie_close_are_told_apart_in_half_precision(tmp_path: Path) -> None:
    """Cosines of 0.9999 differ by less than fp16 can hold; without their mean they do not."""
    rng = np.random.default_rng(0)
    centre = rng.standard_normal(EMBEDDING_DIM)
    gallery = unit_rows(centre + 0.01 * rng.standard_normal((40, EMBEDDING_DIM)))
    plain = random_heads(gallery=40)
    fields = ("linear_weight", "linear_bias", "knn_labels", "svm_vectors", "svm_dual", "svm_intercept")
    heads = Heads(**{name: getattr(plain, name) for name in fields}, knn_gallery=gallery)
    bundle = random_bundle(tmp_path / "1", heads=heads)
    embedding = (centre + 0.01 * rng.standard_normal((20, EMBEDDING_DIM))).astype(np.float32)
    expected = heads.raw_scores(embedding)[:, 1]
    raw = run(graph.model(bundle, part="heads", heads_precision="fp16"), embedding=embedding)["raw"][:, 1]
    assert np.abs(expected).max() < 1e-4, "the test's premise: margins below fp16's steps near one"
    np.testing.assert_allclose(raw, expected, rtol=0, atol=2e-6)


def test_an_embedding_of_zeros_divides_by_nothing(bundle: Bundle) -> None:
    raw = run(graph.model(bundle, part="heads"), embedding=np.zeros((1, EMBEDDING_DIM), np.float32))["raw"]
    assert np.isfinite(raw).all()


def test_a_weight_beyond_fp16_is_named() -> None:
    with pytest.raises(ValueError, match=r"^blocks\.3\.mlp\.fc1\.weight: a weight of 7e\+04 is beyond fp16"):
        Writer().constant("blocks.3.mlp.fc1.weight", np.array([1.0, -7e4]), "fp16")


def test_unknown_precisions_and_parts_are_refused(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="unknown precision 'int8'"):
        graph.model(bundle, "int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown part 'tail'"):
        graph.model(bundle, part="tail")  # type: ignore[arg-type]


def test_bfloat16_rounds_to_the_nearest_even() -> None:
    values = np.array([0.0, 1.0, -2.5, 1.00390625, 1.01171875, 3.3895314e38, 1e-40], np.float32)
    ml_dtypes = pytest.importorskip("ml_dtypes")
    np.testing.assert_array_equal(_bfloat16(values), values.astype(ml_dtypes.bfloat16).view(np.uint16))
