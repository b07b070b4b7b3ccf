"""The facade: calibrated scores, their combination over crops and frames, and what a broken output does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.backends import create
from engine.backends.base import CheckedBackend, Outputs
from engine.bundle import Bundle, BundleError
from engine.detector import Detector, ScoreError
from engine.heads import EMBEDDING_DIM, HEADS
from tests.engine.bundles import random_bundle


class Scripted(CheckedBackend):
    """Gives out raw scores it was given."""

    name, device = "scripted", "cpu"

    def __init__(self, raw: np.ndarray) -> None:
        super().__init__()
        self.raw = raw.astype(np.float32)

    def _load(self, bundle: Bundle) -> None: ...

    def _infer(self, crops: np.ndarray) -> Outputs:
        return Outputs(self.raw[: len(crops)].copy(), np.zeros((len(crops), EMBEDDING_DIM), np.float32))

    def _close(self) -> None: ...


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("detector") / "1")


def crops(count: int) -> np.ndarray:
    return np.zeros((count, 224, 224, 3), np.uint8)


def test_scores_are_calibrated_by_head(bundle: Bundle) -> None:
    detector = Detector.from_parts(bundle, Scripted(np.array([[0.0, 0.0, 0.0], [2.0, 0.5, 5.0], [-2.0, -0.5, -9.0]])))
    probabilities = detector.infer(crops(3))
    assert probabilities.dtype == np.float32 and probabilities.shape == (3, 3)
    platt, temperature = 1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(-1.0))
    expected = [[0.5, 0.5, 0.5], [platt, temperature, 0.95], [1 - platt, 1 - temperature, 0.05]]
    np.testing.assert_allclose(probabilities, expected, rtol=1e-6)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_score_that_is_not_finite_is_a_row_of_nan_and_no_verdict(bundle: Bundle, broken: float, column: int) -> None:
    raw = np.zeros((3, 3))
    raw[1, column] = broken
    detector = Detector.from_parts(bundle, Scripted(raw))
    probabilities = detector.infer(crops(3))
    assert np.isnan(probabilities).tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert detector.combine(probabilities[:1], 1).score == 0.5
    with pytest.raises(ScoreError):
        detector.combine(probabilities[1:2], 1)
    with pytest.raises(ScoreError):
        detector.combine(probabilities, 3)


def test_combining_takes_the_mean_over_crops_and_the_worst_frame(bundle: Bundle) -> None:
    detector = Detector.from_parts(bundle, create("null"), head="linear", crops="five")
    frames = np.array(
        [
            [[0.1, 0.9, 0.2], [0.2, 0.9, 0.2]],  # the kNN head alone is sure of this frame
            [[0.4, 0.1, 0.3], [0.8, 0.3, 0.5]],
            [[0.5, 0.0, 0.0], [0.6, 0.0, 0.0]],
        ],
        np.float32,
    )
    score = detector.combine(frames.reshape(6, 3), crops_per_frame=2)
    assert score.frame == 1
    assert score.score == score.heads["linear"] == pytest.approx(0.6)
    assert score.heads == pytest.approx({"linear": 0.6, "knn": 0.2, "ocsvm": 0.4})
    assert score.crops == pytest.approx((0.4, 0.8))
    assert detector_with(bundle, "knn").combine(frames.reshape(6, 3), 2).frame == 0


def detector_with(bundle: Bundle, head: str, crops: str = "center") -> Detector:
    return Detector.from_parts(bundle, create("null"), head, crops)


@given(
    frames=st.integers(1, 4),
    per_frame=st.sampled_from([1, 5]),
    head=st.sampled_from(HEADS),
    data=st.data(),
)
def test_combining_by_a_slow_oracle(frames: int, per_frame: int, head: str, data: st.DataObject) -> None:
    rows = data.draw(
        st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 3), min_size=frames * per_frame, max_size=frames * per_frame)
    )
    detector = Detector(None, None, head, "center")  # type: ignore[arg-type] # combining needs neither
    score = detector.combine(np.array(rows, np.float32), per_frame)
    best, best_mean = -1, -1.0
    for frame in range(frames):
        own = [row[HEADS.index(head)] for row in rows[frame * per_frame : (frame + 1) * per_frame]]
        if sum(own) / per_frame > best_mean + 1e-12:
            best, best_mean = frame, sum(own) / per_frame
    assert score.score == pytest.approx(best_mean, abs=1e-9)
    assert score.crops == tuple(row[HEADS.index(head)] for row in rows[score.frame * per_frame :][:per_frame])
    assert 0 <= score.score <= 1 and score.heads[head] == score.score
    assert best >= 0


@pytest.mark.parametrize(("shape", "per_frame"), [((0, 3), 1), ((5, 3), 2), ((5, 2), 1), ((5,), 1), ((4, 3), 0)])
def test_combining_refuses_what_is_no_image(bundle: Bundle, shape: tuple[int, ...], per_frame: int) -> None:
    with pytest.raises(ValueError, match="crops"):
        detector_with(bundle, "linear").combine(np.zeros(shape, np.float32), per_frame)


def test_what_the_model_says_about_itself(bundle: Bundle) -> None:
    detector = detector_with(bundle, "linear")
    assert (detector.name, detector.version, detector.head) == ("random", "1", "linear")
    assert (detector.backend_name, detector.device) == ("null", "cpu")
    assert detector.threshold("fpr_0.01") == 0.9
    assert detector.thresholds["fpr_0.001"].reals == 4000
    assert detector.abstain is not None and detector.abstain.low == 0.4
    assert detector_with(bundle, "knn").abstain is None
    with pytest.raises(ValueError, match=r"no threshold 'fpr_1' for head linear; it has: fpr_0.001, fpr_0.01"):
        detector.threshold("fpr_1")


def test_the_cache_scope_changes_with_whatever_changes_a_score(bundle: Bundle, tmp_path: Path) -> None:
    same_name = random_bundle(tmp_path / "a", seed=1)
    scopes = {
        detector_with(bundle, "linear").cache_scope,
        detector_with(bundle, "linear", "five").cache_scope,
        detector_with(bundle, "knn").cache_scope,
        detector_with(same_name, "linear").cache_scope,
        detector_with(random_bundle(tmp_path / "b", version="2"), "linear").cache_scope,
    }
    assert len(scopes) == 5
    assert detector_with(bundle, "linear").cache_scope == detector_with(bundle, "linear").cache_scope
    scope = detector_with(bundle, "linear").cache_scope
    assert "random" in scope and bundle.manifest.preprocess.id in scope and "center" in scope


def test_open_reads_a_published_bundle_and_refuses_unknown_names(bundle: Bundle, tmp_path: Path) -> None:
    with Detector.open(bundle.path, backend="null") as detector:
        assert detector.infer(crops(2)).shape == (2, 3)
    for arguments in ({"head": "svm"}, {"crops": "ten"}, {"backend": "tf"}, {"device": "gpu"}, {"device": "cuda:x"}):
        with pytest.raises(ValueError, match="known are"):
            Detector.open(bundle.path, **{"backend": "null", **arguments})
    with pytest.raises(BundleError, match="no such folder"):
        Detector.open(tmp_path / "none", backend="null")


def test_importing_the_detector_needs_no_torch() -> None:
    code = """
import sys
for name in ("torch", "openvino", "tensorrt", "tensorrt_rtx_bindings", "onnx", "sklearn", "scipy"):
    sys.modules[name] = None
import engine.detector, engine.classify, engine.bundle, engine.backends
from engine.backends.base import BackendUnavailable
try:
    engine.backends.create("torch")
except BackendUnavailable as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout and "\n" not in done.stdout.strip()
