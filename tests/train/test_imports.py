"""The published layout into a bundle: weights, eps, heads that score as scikit-learn's, and what is not taken."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")

from engine import bundle
from tests.train import published
from train import imports
from train.__main__ import main
from train.data import DataError
from train.imports import HEAD_FILES
from train.pickled_heads import PickleError

LINEAR, KNN, OCSVM = (Path("sklearn") / file for file in HEAD_FILES.values())


@pytest.fixture(scope="module")
def estimators() -> dict[str, Any]:
    return published.heads()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, estimators: dict[str, Any]) -> Path:
    path = tmp_path_factory.mktemp("imports") / "CoDE"
    published.write(path, estimators, layer_norm_eps=1e-9)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A folder of links that a test may replace."""
    for path in folder.rglob("*"):
        if path.is_file():
            target = tmp_path / "copy" / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    return tmp_path / "copy"


def _replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def test_the_command_writes_a_bundle_with_the_weights_and_their_eps(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", "--from", str(folder), "--out", str(tmp_path), "--version", "1"]) == 0
    assert "imported, not calibrated" in capsys.readouterr().err
    read = bundle.load(tmp_path / "bundles" / "1-probe")
    expected = published.random_encoder()
    assert all(np.array_equal(read.encoder[name], array) for name, array in expected.items())
    assert read.manifest.encoder.layer_norm_eps == 1e-9 and read.manifest.name == "code-published"
    assert read.manifest.heads.ocsvm.nu == 0.1 and read.manifest.heads.linear.c == 0.316
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert set(facts["imported"]) == {"layer_norm_eps", "model.safetensors", *HEAD_FILES.values()}
    # A second time replaces the step's own bundle.
    assert main(["import", "--from", str(folder), "--out", str(tmp_path), "--version", "1", "--name", "again"]) == 0
    assert bundle.load(tmp_path / "bundles" / "1-probe").manifest.name == "again"


def test_scores_are_scikit_learns_within_a_ten_thousandth(folder: Path, estimators: dict[str, Any]) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    x, _ = published.embeddings(60, seed=5)
    raw = imports.load(folder).heads.raw_scores(x)
    linear, knn, ocsvm = (estimators[name] for name in HEAD_FILES)
    np.testing.assert_allclose(raw[:, 0], linear.decision_function(x), atol=1e-4)
    # The distance to the nearest of each class, by scikit-learn itself; the sign is its answer.
    gallery, labels = published.embeddings(80)
    near = [KNeighborsClassifier(1, metric="cosine").fit(gallery[labels == y], labels[labels == y]) for y in (0, 1)]
    to_real, to_fake = (model.kneighbors(x)[0][:, 0] for model in near)
    np.testing.assert_allclose(raw[:, 1], to_real - to_fake, atol=1e-4)
    assert np.array_equal(raw[:, 1] > 0, knn.predict(x) == 1)
    decision = ocsvm.decision_function(x.astype(np.float64))
    np.testing.assert_allclose(raw[:, 2], -decision, atol=1e-4)
    # scikit-learn's -1 is an outlier, so generated, whatever the release's docstring says.
    assert np.array_equal(raw[:, 2] > 0, ocsvm.predict(x) == -1)


def test_weights_only_bin_and_a_prefix_and_a_pooler_are_read_like_safetensors(copy: Path) -> None:
    torch = pytest.importorskip("torch")
    encoder = published.random_encoder(3)
    tensors = {f"vit.{name}": torch.from_numpy(array) for name, array in published.to_transformers(encoder).items()}
    tensors |= {"vit.pooler.dense.weight": torch.zeros(192, 192), "classifier.weight": torch.zeros(2, 192)}
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    got = imports.load(copy).encoder
    assert all(np.array_equal(got[name], array) for name, array in encoder.items())


class _Evil:
    """Unpickled anywhere, it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_bin_that_would_run_code_is_refused_in_one_line(copy: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    marker = tmp_path / "ran"
    (copy / "model.safetensors").unlink()
    torch.save({"weight": _Evil(marker)}, copy / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"pytorch_model\.bin: refused") as caught:
        imports.load(copy)
    assert "\n" not in str(caught.value) and not marker.exists()
    for content in (b"", b"no zip", pickle.dumps(_Evil(marker))):
        (copy / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(DataError, match=r"pytorch_model\.bin"):
            imports.load(copy)
    assert not marker.exists()


def test_a_head_that_would_run_code_ends_the_command_with_one_line(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "ran"
    _replace(copy / LINEAR, pickle.dumps(_Evil(marker)))
    assert main(["import", "--from", str(copy), "--out", str(tmp_path / "out"), "--version", "1"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(copy / LINEAR) in err and "refused: it names" in err
    assert not marker.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"hidden_size": 384}, "hidden_size is 384, CoDE's encoder has 192"),
        ({"model_type": "clip"}, "model_type"),
        ({"qkv_bias": False}, "qkv_bias"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps"),
        ({"layer_norm_eps": 0}, "layer_norm_eps"),
    ],
)
def test_another_architecture_is_named(copy: Path, changed: dict[str, Any], says: str) -> None:
    _replace(copy / "config.json", json.dumps(published.CONFIG | changed).encode())
    with pytest.raises(DataError, match=rf"config\.json: {says}"):
        imports.load(copy)


def test_an_eps_left_out_is_transformers_default(copy: Path) -> None:
    _replace(copy / "config.json", json.dumps({k: v for k, v in published.CONFIG.items() if k != "layer_norm_eps"}).encode())
    assert imports.load(copy).layer_norm_eps == 1e-12


@pytest.mark.parametrize(
    ("name", "array", "says"),
    [
        ("layernorm.bias", None, "tensor layernorm.bias is missing"),
        ("encoder.layer.12.output.dense.bias", np.zeros(192, np.float32), "unexpected tensor encoder.layer.12"),
        ("embeddings.position_embeddings", np.zeros((1, 577, 192), np.float32), "pos_embed: expected finite floats"),
        ("layernorm.weight", np.full(192, np.nan, np.float32), "norm.weight: expected finite floats"),
        ("encoder.layer.3.attention.attention.key.bias", np.zeros(64, np.float32), "differ in shape"),
    ],
)
def test_wrong_tensors_are_named(name: str, array: np.ndarray | None, says: str) -> None:
    weights = published.to_transformers(published.random_encoder())
    if array is None:
        del weights[name]
    else:
        weights[name] = array
    with pytest.raises(DataError, match=says):
        imports.to_timm(weights, Path("model.safetensors"))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", str(LINEAR), str(KNN), str(OCSVM)])
def test_a_missing_file_is_named(copy: Path, missing: str) -> None:
    (copy / missing).unlink()
    with pytest.raises((DataError, PickleError), match=Path(missing).name):
        imports.load(copy)


def test_heads_fitted_by_another_scikit_learn_are_taken_with_a_warning(
    copy: Path, estimators: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sklearn.base

    monkeypatch.setattr(sklearn.base, "__version__", "0.24.2")
    _replace(copy / LINEAR, pickle.dumps(estimators["LogisticRegression"]))
    found = imports.load(copy)
    assert "fitted by scikit-learn 0.24.2" in found.facts[LINEAR.name]
    (line,) = imports.warnings(found)
    assert "scikit-learn 0.24.2" in line and "no scikit-learn code was run" in line


@pytest.mark.slow
@pytest.mark.timeout(900)  # importing transformers alone takes a busy machine a minute
@pytest.mark.parametrize("eps", [1e-12, 1e-3])
def test_features_are_those_of_transformers(tmp_path: Path, estimators: dict[str, Any], eps: float) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from engine.detector import Detector
    from engine.preprocess import Preprocess

    torch.manual_seed(0)
    published.write(tmp_path / "CoDE", estimators)
    (tmp_path / "CoDE" / "config.json").unlink()
    config = transformers.ViTConfig(
        hidden_size=192, num_attention_heads=3, intermediate_size=768, layer_norm_eps=eps, initializer_range=0.1
    )
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path / "CoDE")
    assert main(["import", "--from", str(tmp_path / "CoDE"), "--out", str(tmp_path), "--version", "1"]) == 0
    crops = np.random.default_rng(1).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    contract = Preprocess()
    pixels = (crops.astype(np.float32) / 255 - np.float32(contract.mean)) / np.float32(contract.std)
    with torch.inference_mode():
        expected = model(pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).last_hidden_state[:, 0].numpy()
    with Detector.open(tmp_path / "bundles" / "1-probe", backend="torch", threads=1) as detector:
        outputs = detector.outputs(crops)
    np.testing.assert_allclose(outputs.embedding, expected, atol=1e-5)
    # And on to the heads, each by scikit-learn on transformers' own features.
    linear, _, ocsvm = (estimators[name] for name in HEAD_FILES)
    np.testing.assert_allclose(outputs.raw[:, 0], linear.decision_function(expected), atol=1e-4)
    decision = ocsvm.decision_function(expected.astype(np.float64))
    np.testing.assert_allclose(outputs.raw[:, 2], -decision, atol=1e-4 * max(1.0, np.abs(decision).max()))
