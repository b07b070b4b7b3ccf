"""The gate's rules on made-up reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine.bundles import random_bundle
from train.promote import PromoteError, champion_report, gate, read_report


def _report(auroc: float = 0.8, low: float = 0.7, fpr: float = 0.02, slice_auroc: float = 0.8, data: str = "d") -> dict[str, Any]:
    part = {
        "heads": {
            "linear": {
                "auroc": {"value": auroc, "low": low, "high": 0.9},
                "at": {"fpr_0.01": {"fpr": fpr, "fpr_high": fpr + 0.03}},
            }
        },
        "slices": [
            {
                "label": "fake",
                "slice": "source",
                "name": "s",
                "auroc": {"value": slice_auroc, "low": slice_auroc - 0.1, "high": 1.0},
            },
            {"label": "fake", "slice": "source", "name": "few", "note": "too few images"},
        ],
    }
    return {
        "format": "code-report/1",
        "data_sha256": data,
        "head": "linear",
        "crops": "center",
        "conditions": {"clean": {"unseen_sources": part}},
        "parity": {"reference": "torch", "crops": 64, "compared": [_compared()], "not_run": []},
    }


def _compared(agrees: bool = True) -> dict[str, Any]:
    return {
        "backend": "openvino",
        "precision": "fp32",
        "tolerance": 1e-4,
        "max_probability": {"linear": 1e-6, "knn": 1e-6, "ocsvm": 1e-6},
        "flipped": {"linear": 0, "knn": 0, "ocsvm": 0},
        "agrees": agrees,
    }


def _failed(candidate: dict[str, Any], champion: dict[str, Any] | None = None) -> list[str]:
    return [rule.name for rule in gate(candidate, champion) if not rule.passed]


def test_a_good_first_model_passes() -> None:
    assert _failed(_report()) == []
    assert [rule.name for rule in gate(_report(), None)] == [
        "clean: better than chance",
        "clean: FPR bound",
        "parity of openvino fp32",
    ]


def test_chance_and_too_many_false_alarms_fail() -> None:
    assert _failed(_report(low=0.5)) == ["clean: better than chance"]
    assert _failed(_report(fpr=0.11)) == ["clean: FPR bound"]


def test_false_alarms_beyond_the_champions_interval_fail_and_inside_it_pass() -> None:
    assert _failed(_report(fpr=0.04), _report(fpr=0.02)) == []
    assert _failed(_report(fpr=0.06), _report(fpr=0.02)) == ["clean: FPR bound"]
    # A champion without a false alarm asks for what the threshold promises, not for less.
    flawless = _report(fpr=0.0)
    flawless["conditions"]["clean"]["unseen_sources"]["heads"]["linear"]["at"]["fpr_0.01"]["fpr_high"] = 0.004
    assert _failed(_report(fpr=0.01), flawless) == [] and _failed(_report(fpr=0.02), flawless) == ["clean: FPR bound"]


def test_a_slice_below_the_champions_interval_fails_and_one_inside_it_passes() -> None:
    assert _failed(_report(slice_auroc=0.71), _report(slice_auroc=0.8)) == []
    assert _failed(_report(slice_auroc=0.69), _report(slice_auroc=0.8)) == ["clean, unseen_sources, fake source s: no worse"]
    assert _failed(_report(auroc=0.69, low=0.6), _report()) == ["clean, unseen_sources, all: no worse"]


def test_a_slice_that_the_candidate_no_longer_has_fails() -> None:
    candidate = _report()
    candidate["conditions"]["clean"]["unseen_sources"]["slices"].clear()
    assert _failed(candidate, _report()) == ["clean, unseen_sources, fake source s: no worse"]


def test_reports_on_other_data_head_or_crops_are_not_compared() -> None:
    assert _failed(_report(), _report(data="other")) == ["no slice worse than the champion"]
    assert _failed(_report() | {"crops": "five"}, _report()) == ["no slice worse than the champion"]
    champion = _report()
    del champion["head"], champion["crops"], champion["parity"]  # an older report
    assert _failed(_report(), champion) == []


def test_backends_that_disagree_or_were_not_looked_at_fail() -> None:
    report = _report()
    report["parity"]["compared"].append(_compared(agrees=False) | {"backend": "tensorrt", "precision": "fp16"})
    assert _failed(report) == ["parity of tensorrt fp16"]
    assert _failed(_report() | {"parity": None}) == ["parity of backends"]
    alone = {"reference": "torch", "crops": 64, "compared": [], "not_run": [["openvino", "not installed"]]}
    assert _failed(_report() | {"parity": alone}) == []


def test_what_was_not_measured_passes_nothing() -> None:
    report = _report()
    linear = report["conditions"]["clean"]["unseen_sources"]["heads"]["linear"]
    linear["auroc"], linear["at"]["fpr_0.01"]["fpr"] = {"value": None, "low": None, "high": None}, None
    assert _failed(report, _report()) == ["clean: better than chance", "clean: FPR bound", "clean, unseen_sources, all: no worse"]
    del linear["at"]["fpr_0.01"]
    assert "clean: FPR bound" in _failed(report)
    assert _failed(_report() | {"conditions": {}}) == ["unseen sources"]


def test_a_report_without_unseen_sources_fails() -> None:
    report = _report()
    report["conditions"]["clean"] = {}
    assert _failed(report) == ["clean: unseen sources"]


def test_the_champions_report_is_its_own_or_a_newer_one_of_the_same_bundle(tmp_path: Path) -> None:
    kept = _report()
    current = random_bundle(tmp_path / "b", metrics={"report": kept})
    assert champion_report(current) == kept
    model = {"encoder_sha256": current.manifest.encoder.sha256, "heads_sha256": current.manifest.heads.sha256}
    newer = _report(data="newer") | {"model": model}
    (tmp_path / "report.json").write_text(json.dumps(newer))
    assert champion_report(current, tmp_path / "report.json") == newer
    (tmp_path / "report.json").write_text(json.dumps(newer | {"model": model | {"heads_sha256": "another"}}))
    with pytest.raises(PromoteError, match=r"report\.json: is not of the published bundle"):
        champion_report(current, tmp_path / "report.json")


def test_a_champion_without_a_report_is_no_first_model(tmp_path: Path) -> None:
    with pytest.raises(PromoteError, match=r"carries no report to compare with.*--champion-report"):
        champion_report(random_bundle(tmp_path / "b"))


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"format": "other"})])
def test_what_is_no_report_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(PromoteError, match=r"report\.json"):
        read_report(tmp_path / "report.json")
