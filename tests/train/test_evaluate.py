"""report.json: every number against one computed by hand from the same scores, its schema, and the parts it is divided into."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.detector import Detector
from tests.train.reports import detector, scored
from train import evaluate
from train.data import Damage
from train.ladder import BY_NAME
from train.scoring import Scored

LABELS = [0] * 40 + [1] * 30 + [0] * 20 + [1] * 6 + [1] * 3
SOURCES = ["cam"] * 40 + ["gan"] * 30 + ["phone"] * 20 + ["new"] * 6 + ["rare"] * 3
SCHEMA = Path(evaluate.__file__).parent / "report.schema.json"


def _scored(seed: int = 0, spread: float = 0.25) -> Scored:
    rng = np.random.default_rng(seed)
    return scored(LABELS, np.clip(rng.normal(0.35 + 0.35 * np.array(LABELS), spread), 0.01, 0.99), SOURCES)


@pytest.fixture(scope="module", autouse=True)
def _few_resamples() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(evaluate, "RESAMPLES", 60)
    patch.setattr(evaluate, "LADDER_RESAMPLES", 20)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    return detector(tmp_path_factory.mktemp("evaluate") / "bundle")


@pytest.fixture(scope="module")
def report(opened: Detector) -> dict[str, Any]:
    conditions = {"clean": _scored(), "jpeg75": _scored(1), "blur2": _scored(2, 0.6)}
    return evaluate.report(opened, conditions, frozenset({"cam", "gan"}), "d" * 64, Damage([("x.jpg", "corrupt")]))


def _slice(report: dict[str, Any], part: str, kind: str, name: str) -> dict[str, Any]:
    (row,) = [s for s in report["conditions"]["clean"][part]["slices"] if (s["slice"], s["name"]) == (kind, name)]
    return dict(row)


def test_parts_are_divided_by_what_calibration_has_seen(report: dict[str, Any]) -> None:
    clean = report["conditions"]["clean"]
    assert clean["unseen_sources"]["images"] == {"real": 20, "fake": 9}
    assert clean["calibration_sources"]["images"] == {"real": 40, "fake": 30}
    assert {s["name"] for s in clean["unseen_sources"]["slices"]} == {"new", "rare", "g-new", "g-rare", "phone"}
    assert list(report["conditions"]) == ["clean", "jpeg75"]
    assert [r["condition"] for r in report["ladder"]] == ["clean", "jpeg75", "blur2"]


def test_overall_numbers_are_those_computed_by_hand(report: dict[str, Any]) -> None:
    s = _scored()
    rows = [i for i, name in enumerate(SOURCES) if name in ("cam", "gan")]
    p = {i: float(s.probability[i, 0]) for i in rows}
    fakes, reals = [p[i] for i in rows if LABELS[i]], [p[i] for i in rows if not LABELS[i]]
    found = report["conditions"]["clean"]["calibration_sources"]["heads"]["linear"]
    assert found["auroc"]["value"] == pytest.approx(np.mean([(f > r) + (f == r) / 2 for f in fakes for r in reals]))
    assert found["auroc"]["low"] < found["auroc"]["value"] < found["auroc"]["high"]
    # With forty reals no false positive is allowed at 1%: only what lies above the highest real counts.
    assert found["tpr_at_fpr_0.01"]["value"] == pytest.approx(np.mean([f > max(reals) for f in fakes]))
    at = found["at"]["fpr_0.01"]
    assert at["threshold"] == 0.9
    assert at["fpr"] == pytest.approx(np.mean([r >= 0.9 for r in reals])) and at["fpr_low"] <= at["fpr"] <= at["fpr_high"]
    assert at["tpr"] == pytest.approx(np.mean([f >= 0.9 for f in fakes]))
    half = found["at"]["probability_0.5"]
    by_hand = (np.mean([f >= 0.5 for f in fakes]) + np.mean([r < 0.5 for r in reals])) / 2
    assert half["balanced_accuracy"]["value"] == pytest.approx(by_hand)
    band = found["abstain"]
    assert band["uncertain"]["real"] == pytest.approx(np.mean([0.4 <= r < 0.6 for r in reals]))
    sure = [np.mean([f >= 0.6 for f in fakes if not 0.4 <= f < 0.6]), np.mean([r < 0.4 for r in reals if not 0.4 <= r < 0.6])]
    assert band["balanced_accuracy_outside"] == pytest.approx(np.mean(sure))


def test_a_slice_is_one_source_against_the_other_class_of_its_part(report: dict[str, Any]) -> None:
    s = _scored()
    row = _slice(report, "unseen_sources", "source", "new")
    new = [float(s.probability[i, 0]) for i, name in enumerate(SOURCES) if name == "new"]
    phones = [float(s.probability[i, 0]) for i, name in enumerate(SOURCES) if name == "phone"]
    assert row["images"] == 6 and row["label"] == "fake"
    assert row["auroc"]["value"] == pytest.approx(np.mean([(f > r) + (f == r) / 2 for f in new for r in phones]))
    assert row["flagged"]["probability_0.5"]["value"] == pytest.approx(np.mean([f >= 0.5 for f in new]))
    real = _slice(report, "unseen_sources", "source", "phone")
    assert real["flagged"]["fpr_0.01"]["value"] == pytest.approx(np.mean([r >= 0.9 for r in phones]))
    assert _slice(report, "unseen_sources", "source", "rare") == {
        "slice": "source",
        "name": "rare",
        "label": "fake",
        "images": 3,
        "note": "too few images",
    }


def test_ladder_rows_carry_their_sources(report: dict[str, Any]) -> None:
    (rung,) = [r for r in report["ladder"] if r["condition"] == "blur2"]
    assert (rung["family"], rung["level"]) == (BY_NAME["blur2"].family, 2.0)
    unseen = rung["parts"]["unseen_sources"]
    assert {s["name"] for s in unseen["sources"]} == {"new", "phone"}
    clean = report["ladder"][0]["parts"]["unseen_sources"]
    found = {s["name"]: s["auroc"] for s in clean["sources"]}
    assert found["new"] == pytest.approx(_slice(report, "unseen_sources", "source", "new")["auroc"]["value"])


def test_the_report_follows_its_schema_and_says_null_not_nan(report: dict[str, Any], opened: Detector) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    validator.validate(report)
    one_class = scored([1] * 8, np.linspace(0.1, 0.9, 8))
    alone = evaluate.report(opened, {"clean": one_class}, frozenset(), "d" * 64, Damage())
    assert alone["conditions"]["clean"]["unseen_sources"]["heads"]["linear"]["auroc"] == {
        "value": None,
        "low": None,
        "high": None,
    }
    assert "NaN" not in json.dumps(alone)
    validator.validate(alone)
    del alone["conditions"]["clean"]["unseen_sources"]["heads"]["linear"]["auroc"]
    assert list(validator.iter_errors(alone))


def test_several_crops_are_ranked_by_their_mean_probability(opened: Detector) -> None:
    s = _scored()
    shuffled = Scored(-s.raw, s.probability, s.embedding, s.facts, several=True)
    got = evaluate.report(opened, {"clean": shuffled}, frozenset(), "d" * 64, Damage())
    want = evaluate.report(opened, {"clean": s}, frozenset(), "d" * 64, Damage())
    heads = [r["conditions"]["clean"]["unseen_sources"]["heads"]["linear"]["auroc"] for r in (got, want)]
    assert heads[0]["value"] == pytest.approx(heads[1]["value"])


def test_thresholds_for_other_crops_are_known(report: dict[str, Any]) -> None:
    assert evaluate.thresholds_apply(report)
    assert not evaluate.thresholds_apply(report | {"crops": "five"})
