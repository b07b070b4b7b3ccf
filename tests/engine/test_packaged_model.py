"""The model that comes with the project: complete, published, and able to score on whatever runs here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.backends import create
from engine.backends.base import BackendUnavailable
from engine.bundle import Bundle, load, packaged
from engine.detector import Detector
from engine.heads import HEADS
from engine.preprocess import Preprocess

MODELS = Path(__file__).resolve().parents[2] / "models"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    if not (MODELS / "CURRENT").exists():
        pytest.skip("models/CURRENT is not there: no model has been published yet")
    assert packaged() == MODELS
    return load(packaged())


def test_it_is_published_under_its_version(bundle: Bundle) -> None:
    assert bundle.path == MODELS / bundle.manifest.version
    assert bundle.preprocess == Preprocess()


def test_it_says_what_was_measured(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest.metrics and manifest.reference is not None
    for head in HEADS:
        assert {"fpr_0.01", "fpr_0.001"} <= set(manifest.thresholds[head])
        for cut in manifest.thresholds[head].values():
            assert cut.fpr <= cut.fpr_upper
    assert len((bundle.path / manifest.model_card.file).read_text("utf-8")) > 500


def test_nothing_in_it_is_executable(bundle: Bundle) -> None:
    files = [path for path in bundle.path.parent.rglob("*") if path.is_file()]
    strange = [path.name for path in files if path.suffix not in (".json", ".safetensors", ".md") and path.name != "CURRENT"]
    assert strange == [] and not any(path.stat().st_mode & 0o111 for path in files)


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_it_scores(bundle: Bundle, backend: str) -> None:
    try:
        detector = Detector.from_parts(bundle, create(backend, "cpu"))
    except BackendUnavailable as error:
        pytest.skip(str(error))
    crops = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8)
    with detector:
        probabilities = detector.infer(crops)
    assert np.isfinite(probabilities).all() and ((probabilities >= 0) & (probabilities <= 1)).all()
