"""The gate's rules on made-up reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.promote import PromoteError, gate, read_report


def _report(auroc: float = 0.8, low: float = 0.7, fpr: float = 0.02, slice_auroc: float = 0.8, data: str = "d") -> dict[str, Any]:
    part = {
        "heads": {"linear": {"auroc": {"value": auroc, "low": low, "high": 0.9}, "at": {"fpr_0.01": {"fpr": fpr}}}},
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
    return {"format": "code-report/1", "data_sha256": data, "conditions": {"clean": {"unseen_sources": part}}}


def _failed(candidate: dict[str, Any], champion: dict[str, Any] | None = None) -> list[str]:
    return [rule.name for rule in gate(candidate, champion) if not rule.passed]


def test_a_good_first_model_passes() -> None:
    assert _failed(_report()) == []


def test_chance_and_too_many_false_alarms_fail() -> None:
    assert _failed(_report(low=0.5)) == ["clean: better than chance"]
    assert _failed(_report(fpr=0.11)) == ["clean: FPR bound"]


def test_a_slice_below_the_champions_interval_fails_and_one_inside_it_passes() -> None:
    assert _failed(_report(slice_auroc=0.71), _report(slice_auroc=0.8)) == []
    assert _failed(_report(slice_auroc=0.69), _report(slice_auroc=0.8)) == ["clean, unseen_sources, fake source s: no worse"]


def test_reports_on_other_data_are_not_compared() -> None:
    assert _failed(_report(), _report(data="other")) == ["no slice worse than the champion"]


def test_a_report_without_unseen_sources_fails() -> None:
    report = _report()
    report["conditions"]["clean"] = {}
    assert _failed(report) == ["clean: unseen sources"]


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"format": "other"})])
def test_what_is_no_report_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(PromoteError, match=r"report\.json"):
        read_report(tmp_path / "report.json")
