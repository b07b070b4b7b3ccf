"""Plans for GPUs that are not here: built by TensorRT-RTX, a process each, and what a graph outside its rules comes to."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine import build, graph, tensorrt_api
from engine.backends.base import BackendUnavailable
from engine.backends.cuda_driver import has_driver
from engine.bundle import Bundle, BundleError, load, packaged
from engine.plans import Facts
from tests.engine.bundles import random_bundle

onnx = pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx_bindings", reason="tensorrt_rtx_bindings is not installed")

TARGETS = {"sm75": 1, "sm80": 2, "sm86": 4, "sm89": 8, "sm120": 16}
"""And the bit that stands for each in the header of a plan."""

SIZES = (1, 4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundled model where there is one: what ships is what is built."""
    try:
        return load(packaged())
    except BundleError:
        return random_bundle(tmp_path_factory.mktemp("bundle") / "1")


@pytest.fixture(scope="module")
def built(bundle: Bundle) -> dict[str, tuple[bytes, Facts]]:
    """A plan for each target, two builds at a time."""

    def make(target: str) -> tuple[bytes, Facts]:
        model = graph.model(bundle, "fp16", heads_precision=tensorrt_api.heads_precision(target, "fp16"))
        return build.build_apart(graph.serialize(model), build.Recipe("tensorrt_rtx", target, SIZES))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(TARGETS, pool.map(make, TARGETS), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_builds_for(built: dict[str, tuple[bytes, Facts]], target: str) -> None:
    plan, facts = built[target]
    assert facts["target"] == target and facts["flavour"] == "tensorrt_rtx" and facts["refit"] is False
    assert facts["inputs"] == [{"name": "crops", "dtype": "uint8", "shape": [-1, 224, 224, 3]}]
    assert facts["outputs"] == [
        {"name": "embedding", "dtype": "float32", "shape": [-1, 192]},
        {"name": "raw", "dtype": "float32", "shape": [-1, 3]},
    ]
    assert facts["profiles"] == [{"crops": [[size, 224, 224, 3]] * 3} for size in SIZES]
    assert facts["layers"]["kinds"]["normalization"] == 25 and facts["layers"]["kinds"]["softmax"] == 12
    # Without a GPU TensorRT does not open a plan; its header tells the size, the version and the target (as seen in 1.7).
    magic, size = plan[:4], struct.unpack_from("<Q", plan, 16)[0]
    assert magic == b"vtrt" and size == len(plan)
    assert ".".join(map(str, plan[24:28])) == facts["version"]
    assert struct.unpack_from("<I", plan, 32)[0] == TARGETS[target]
    for name in (b"crops", b"embedding", b"raw"):
        assert name in plan
    assert len(plan) > 10 * 2**20, "the weights are inside"


def test_float32_products_are_refused_on_sm75_with_one_clear_line(bundle: Bundle) -> None:
    model = graph.serialize(graph.model(bundle, "fp16"))
    with pytest.raises(build.BuildError) as caught:
        build.build_apart(model, build.Recipe("tensorrt_rtx", "sm75", (1,)))
    assert "FP32 GEMM is not supported" in str(caught.value)
    assert "\n" not in str(caught.value) and "/_src/" not in str(caught.value)


def small(*nodes: Any, initializers: tuple[Any, ...] = ()) -> bytes:
    """A graph from crops uint8 [n, 224, 224, 3] to y."""
    helper, kinds = onnx.helper, onnx.TensorProto
    crops = helper.make_tensor_value_info("crops", kinds.UINT8, ["n", 224, 224, 3])
    y = helper.make_tensor_value_info("y", kinds.FLOAT, None)
    model = helper.make_model(
        helper.make_graph(nodes, "g", [crops], [y], initializers), opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    )
    return bytes(model.SerializeToString())


def node(op: str, source: str, target: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(op, [source], [target], name=f"the-{op}", **attributes)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (b"junk", r"sm89: the graph: .*Failed to parse the ONNX model"),
        (lambda: small(node("NoSuchOperator", "crops", "y")), r"node the-NoSuchOperator \(NoSuchOperator\)"),
        (
            # Bytes must be cast before they are transposed.
            lambda: small(node("Transpose", "crops", "t", perm=[0, 3, 1, 2]), node("Cast", "t", "y", to=1)),
            r"node the-Transpose \(Transpose\): .*first input has type UInt8",
        ),
    ],
    ids=["junk", "unknown operator", "transposed bytes"],
)
def test_a_graph_outside_the_rules_fails_with_one_clear_line(model: Any, message: str) -> None:
    data = model if isinstance(model, bytes) else model()
    with pytest.raises(build.BuildError, match=message) as caught:
        build.build_apart(data, build.Recipe("tensorrt_rtx", "sm89", (1,)))
    assert str(caught.value).startswith("tensorrt_rtx sm89: ") and "\n" not in str(caught.value)
    assert "cuda" not in str(caught.value).lower(), "a missing driver is not what is wrong"


def test_unknown_targets_are_named_with_those_that_are_known() -> None:
    with pytest.raises(build.BuildError, match=r"has no target sm90; it knows sm75, sm80, .*sm120"):
        build.build_apart(small(node("Cast", "crops", "y", to=1)), build.Recipe("tensorrt_rtx", "sm90", (1,)))


def test_a_refittable_plan_needs_a_driver() -> None:
    if has_driver():
        pytest.skip("this machine has a GPU")
    with pytest.raises(build.BuildError, match="needs an NVIDIA driver while it is built, and there is none here"):
        build.build_apart(b"", build.Recipe("tensorrt_rtx", "sm89", (1,), refit=True))


@pytest.mark.parametrize("refit", [True, False])
def test_refit_is_asked_of_the_builder(refit: bool) -> None:
    trt = tensorrt_api.load("tensorrt_rtx")
    builder = trt.Builder(tensorrt_api.make_log(trt))
    config = builder.create_builder_config()
    build._configure(trt, builder, config, build.Recipe("tensorrt_rtx", "sm89", (1,), refit))
    assert config.get_flag(trt.BuilderFlag.REFIT) is refit and not config.get_flag(trt.BuilderFlag.TF32)


def test_a_flavour_that_is_not_installed_is_unavailable() -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(BackendUnavailable, match="install the extra 'tensorrt'"):
            build.build_apart(b"", build.Recipe("tensorrt", "here", (1,)))
    else:
        pytest.skip("tensorrt is installed")


def test_a_builder_that_hangs_is_killed() -> None:
    with pytest.raises(build.BuildError, match="took too long and was killed"):
        build.build_apart(b"", build.Recipe("tensorrt_rtx", "sm89", (1,)), timeout_s=0.01)


def test_a_builder_that_crashes_is_told_by_its_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_run_child", lambda folder, timeout_s: -11)
    with pytest.raises(build.BuildError, match="builder process was killed by SIGSEGV"):
        build.build_apart(b"", build.Recipe("tensorrt_rtx", "sm89", (1,)))
    monkeypatch.setattr(build, "_run_child", lambda folder, timeout_s: 1)
    with pytest.raises(build.BuildError, match="ended with code 1 and no answer"):
        build.build_apart(b"", build.Recipe("tensorrt_rtx", "sm89", (1,)))


def test_native_messages_become_one_line() -> None:
    text = "IBuilder::build:\n Error Code 1: Myelin (x.cpp) In compileGraph at /_src/optimizer/codeGenerator.cpp:2012)"
    assert tensorrt_api.one_line(text) == "IBuilder::build: Error Code 1: Myelin (x.cpp)"
    assert len(tensorrt_api.one_line("x" * 1000)) == 400


def test_the_environment_of_the_caller_does_not_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The child finds this code from any folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(build.BuildError, match="has no target sm1"):
        build.build_apart(small(node("Cast", "crops", "y", to=1)), build.Recipe("tensorrt_rtx", "sm1", (1,)))
