"""The gate: stated rules that a candidate must pass before it becomes the model that workers load.

1. It is better than chance on sources it has never seen: the lower end of AUROC's interval is above 0.5, clean and after JPEG 75.
2. No slice's AUROC lies below the champion's interval for that slice, where the champion was evaluated on the same data.
3. At its threshold for FPR 1% the reals of unseen sources are flagged no more often than `max_fpr`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.evaluate import REPORT_FORMAT

MAX_FPR = 0.10


class PromoteError(Exception):
    """A report or bundle cannot be used for promotion; the message names it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule's outcome and the numbers it rests on."""

    name: str
    passed: bool
    detail: str


def read_report(path: Path) -> dict[str, Any]:
    """report.json; raises PromoteError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise PromoteError(f"{path}: no such report; run `train evaluate` first") from exc
    except ValueError as exc:
        raise PromoteError(f"{path}: not JSON ({exc})") from exc
    if not isinstance(content, dict) or content.get("format") != REPORT_FORMAT:
        raise PromoteError(f"{path}: not a {REPORT_FORMAT} report")
    return content


def gate(candidate: dict[str, Any], champion: dict[str, Any] | None, max_fpr: float = MAX_FPR) -> list[Rule]:
    """All rules on the candidate's report; the champion's report is None for a first model."""
    rules = []
    for condition, parts in candidate["conditions"].items():
        part = parts.get("unseen_sources")
        if part is None:
            rules.append(Rule(f"{condition}: unseen sources", False, "the report has none"))
            continue
        auroc = part["heads"]["linear"]["auroc"]
        rules.append(
            Rule(f"{condition}: better than chance", auroc["low"] > 0.5, f"AUROC {auroc['value']:.3f}, from {auroc['low']:.3f}")
        )
        at = part["heads"]["linear"]["at"].get("fpr_0.01")
        if at is None:
            rules.append(Rule(f"{condition}: FPR bound", False, "no threshold fpr_0.01"))
        else:
            rules.append(Rule(f"{condition}: FPR bound", at["fpr"] <= max_fpr, f"FPR {at['fpr']:.3f}, at most {max_fpr:.3f}"))
    if champion is not None:
        rules += _against(candidate, champion)
    return rules


def _against(candidate: dict[str, Any], champion: dict[str, Any]) -> Iterator[Rule]:
    if champion["data_sha256"] != candidate["data_sha256"]:
        yield Rule(
            "no slice worse than the champion", False, "the two reports are on different data: evaluate the champion again"
        )
        return
    theirs = dict(_slices(champion))
    for name, values in _slices(candidate):
        if name in theirs:
            low = theirs[name]["low"]
            yield Rule(f"{name}: no worse", values["value"] >= low, f"AUROC {values['value']:.3f}, champion's from {low:.3f}")


def _slices(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    for condition, parts in report["conditions"].items():
        for part, values in parts.items():
            for row in values["slices"]:
                if "auroc" in row:
                    yield f"{condition}, {part}, {row['label']} {row['slice']} {row['name']}", row["auroc"]
