"""`engine export`, `build`, `inspect PLAN` and `parity`: files, tables, exit codes, one line for what cannot be done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from engine import backends, build, plans
from engine.__main__ import main
from engine.backends.base import BackendUnavailable, CheckedBackend, Outputs
from engine.backends.null import NullBackend
from engine.bundle import Bundle
from tests.engine.bundles import random_bundle

onnx = pytest.importorskip("onnx")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("bundle") / "1")


def one_line(capsys: Capture) -> str:
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    return text


def test_export_writes_a_graph_that_names_its_bundle(bundle: Bundle, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "model.onnx"
    assert main(["export", str(bundle.path), "--out", str(file), "--precision", "fp16"]) == 0
    assert capsys.readouterr().out.startswith(f"{file}: random 1, fp16, opset 20, 10.")
    model = onnx.load(str(file))
    facts = {prop.key: prop.value for prop in model.metadata_props}
    assert facts["bundle.digest"] == bundle.digest
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_export_says_what_it_cannot_do(bundle: Bundle, tmp_path: Path, capsys: Capture) -> None:
    assert main(["export", str(bundle.path), "--out", str(tmp_path / "no" / "model.onnx")]) == 2
    assert one_line(capsys).startswith("engine export: ")
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "model.onnx")]) == 2
    assert "no model bundle" in one_line(capsys)
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(bundle.path), "--out", "x", "--precision", "int8"])


class Shifted(NullBackend):
    """Like null, with an error of its own."""

    precision = "fp32"
    shift = 0.0

    def _infer(self, crops: np.ndarray) -> Outputs:
        outputs = super()._infer(crops)
        return Outputs(outputs.raw + np.float32(self.shift), outputs.embedding)


@pytest.fixture
def shift(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the compared backend adds to the raw scores, and its precision."""
    state: dict[str, Any] = {"shift": 0.0, "precision": "fp32"}

    def create(name: str, **options: Any) -> CheckedBackend:
        if name == "missing":
            raise BackendUnavailable("backend missing does not run here")
        backend = Shifted()
        if name == "shifted":
            backend.name, backend.shift, backend.precision = name, state["shift"], state["precision"]
        return backend

    monkeypatch.setattr(backends, "create", create)
    return state


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twenty plain images of all brightnesses, and a file that is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(20):
        PIL.Image.fromarray(np.full((64 + i, 300, 3), 12 * i, np.uint8)).save(folder / f"{i:02}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def parity(bundle: Bundle, *arguments: object) -> int:
    return main(["parity", "--bundle", str(bundle.path), *map(str, arguments)])


def test_parity_of_equals(bundle: Bundle, shift: dict[str, Any], images: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "parity.json"
    assert parity(bundle, "--backends", "null,shifted", "--images", images, "--json", file) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("random 1, 20 images, against null fp32; 1 files unreadable")
    assert captured.err == ""
    document = json.loads(file.read_text())
    assert document["model"]["digest"] == bundle.digest
    [agreement] = document["agreements"]
    assert agreement["candidate"] == "shifted fp32" and agreement["crops"] == 20 and agreement["problems"] == []
    assert agreement["heads"]["linear"] == pytest.approx(
        {"max_raw": 0, "max_probability": 0, "mean_probability": 0, "flipped": 0, "threshold": "fpr_0.01"}
    )


@pytest.mark.parametrize(
    ("precision", "raw", "agrees"), [("fp32", 2e-4, True), ("fp32", 2e-3, False), ("bf16", 2e-3, True), ("fp16", 0.3, False)]
)
def test_parity_allows_what_the_precision_allows(
    bundle: Bundle, shift: dict[str, Any], images: Path, capsys: Capture, precision: str, raw: float, agrees: bool
) -> None:
    shift.update(shift=raw, precision=precision)
    assert parity(bundle, "--backends", "null,shifted", "--images", images) == (0 if agrees else 1)
    captured = capsys.readouterr()
    assert ("linear: a probability is off by" in captured.err) is not agrees
    assert ("NO" in captured.out) is not agrees


def test_parity_counts_flipped_decisions(bundle: Bundle, shift: dict[str, Any], images: Path, capsys: Capture) -> None:
    shift.update(shift=5.0, precision="fp16")
    assert parity(bundle, "--backends", "null,shifted", "--images", images, "--json", "-") == 1
    text = capsys.readouterr().out
    head = json.loads(text[text.index("{") :])["agreements"][0]["heads"]["linear"]
    # Null scores a crop's mean brightness, black padding included; the random bundle's Platt has a slope of one.
    raw = np.array([12 * i * (64 + i) / 224 for i in range(20)]) / 25.5 - 5
    flips = {name: int(((raw + 5 >= cut) != (raw >= cut)).sum()) for name, cut in (("fpr_0.01", 2.197), ("fpr_0.001", 3.476))}
    assert head["flipped"] == max(flips.values()) > 0
    assert flips[head["threshold"]] == head["flipped"]


def test_parity_needs_something_to_compare(bundle: Bundle, shift: dict[str, Any], tmp_path: Path, capsys: Capture) -> None:
    for arguments, message in (
        (("--backends", "null"), "one more backend"),
        (("--backends", "null,shifted", "--images", tmp_path), "no readable image"),
        (("--backends", "null,missing"), "does not run here"),
    ):
        assert parity(bundle, *arguments) == 2
        assert message in one_line(capsys)


def test_parity_of_what_runs_here_on_drawn_patterns(bundle: Bundle, capsys: Capture) -> None:
    """The real backends: OpenVINO's float32 against its reduced precision, or at least against itself."""
    pytest.importorskip("openvino")
    from engine.backends.openvino_backend import OpenVINOBackend

    precision = OpenVINOBackend().precision
    assert parity(bundle, "--backends", f"openvino:fp32,openvino:{precision}", "--limit", 6) == 0
    text = capsys.readouterr().out
    assert "6 drawn patterns, against openvino fp32" in text and f"openvino {precision}" in text


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> list[build.Recipe]:
    """A builder that only remembers what it was asked for."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="tensorrt_rtx_bindings is not installed")
    asked: list[build.Recipe] = []

    def build_apart(model: bytes, recipe: build.Recipe, timing_cache: Path | None = None) -> tuple[bytes, plans.Facts]:
        asked.append(recipe)
        facts = {
            "inputs": [{"name": "crops", "dtype": "uint8", "shape": [-1, 224, 224, 3]}],
            "profiles": [{"crops": [[1, 224, 224, 3]] * 3}],
            "layers": {"count": 2, "kinds": {"softmax": 2}},
        }
        return b"a plan", facts

    monkeypatch.setattr(build, "build_apart", build_apart)
    return asked


def test_build_fills_the_cache_and_inspect_shows_it(
    bundle: Bundle, builder: list[build.Recipe], tmp_path: Path, capsys: Capture
) -> None:
    arguments = ["build", str(bundle.path), "--target", "sm89,sm75", "--sizes", "8,1", "--flavour", "tensorrt_rtx"]
    for _ in range(2):
        assert main([*arguments, "--plan-cache", str(tmp_path)]) == 0
    assert [(recipe.target, recipe.sizes) for recipe in builder] == [("sm89", (1, 8)), ("sm75", (1, 8))], "each built once"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "sm75, fp16, batches of 1,8" in lines[1]
    [file] = tmp_path.glob("sm89-*.plan")
    assert main(["inspect", str(file)]) == 0
    text = capsys.readouterr().out
    for expected in (
        "tensorrt_rtx",
        "sm89",
        "uint8 [n, 224, 224, 3]",
        "min [1, 224, 224, 3]",
        "softmax",
        bundle.digest,
        "verified",
    ):
        assert expected in text
    assert main(["inspect", "--json", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["key"]["capability"] == "sm89"
    file.write_bytes(b"b plan")
    assert main(["inspect", str(file)]) == 2
    assert "its SHA-256 is" in one_line(capsys)


def test_build_writes_one_file(bundle: Bundle, builder: list[build.Recipe], tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "model.plan"
    common = ["build", str(bundle.path), "--flavour", "tensorrt_rtx", "--out", str(file)]
    assert main([*common, "--target", "sm89"]) == 0
    assert plans.read(file).data == b"a plan"
    assert main([*common, "--target", "sm89,sm80"]) == 2
    assert "--out takes one plan" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*common, "--sizes", "0,8"])


def test_build_says_what_it_cannot_do(
    bundle: Bundle, builder: list[build.Recipe], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise build.BuildError("tensorrt_rtx sm89: node x (Y): no")

    monkeypatch.setattr(build, "build_apart", refuse)
    assert main(["build", str(bundle.path), "--target", "sm89", "--plan-cache", str(tmp_path)]) == 2
    assert one_line(capsys) == "engine build: tensorrt_rtx sm89: node x (Y): no\n"
    from engine.backends.cuda_driver import has_driver

    if not has_driver():
        assert main(["build", str(bundle.path), "--flavour", "tensorrt_rtx"]) == 2
        assert "name a --target to build for a GPU elsewhere" in one_line(capsys)
