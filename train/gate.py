"""The gate: stated rules on report.json that a candidate must pass before it becomes the model that workers load.

For each condition that is reported whole (clean, JPEG 75):
1. Better than chance: the lower end of AUROC's interval on sources that the candidate has never seen is above 0.5.
2. FPR bound: at its threshold for FPR 1%, the reals of those sources are flagged no more often than `max_fpr`, nor than the upper
   end of the interval of the champion's FPR there (or 1%, whichever is more).
And over the whole report:
3. No slice worse: neither the AUROC of all images of a part nor that of a source or generator lies below the champion's interval,
   and none that the champion's report has is missing. Both must be on the same data, with the same head and crops.
4. Parity: every backend that could run beside torch gave the same scores within the tolerance of its precision.

A number that a rule needs and the report has not is a failure, never a pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_FPR = 0.10
THRESHOLD = "fpr_0.01"
TARGET_FPR = 0.01


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule's outcome and the numbers it rests on."""

    name: str
    passed: bool
    detail: str


def gate(candidate: dict[str, Any], champion: dict[str, Any] | None, max_fpr: float = MAX_FPR) -> list[Rule]:
    """All rules on the candidate's report; the champion's report is None for a first model."""
    return [*_unseen(candidate, champion, max_fpr), *_against(candidate, champion), *_parity(candidate)]


def _unseen(candidate: dict[str, Any], champion: dict[str, Any] | None, max_fpr: float) -> Iterator[Rule]:
    if not candidate["conditions"]:
        yield Rule("unseen sources", False, "the report has no condition")
    for condition, parts in candidate["conditions"].items():
        part = parts.get("unseen_sources")
        if part is None:
            yield Rule(f"{condition}: unseen sources", False, "the report has none")
            continue
        measured = part["heads"][_head(candidate)]
        low, value = _number(measured["auroc"]["low"]), _number(measured["auroc"]["value"])
        yield Rule(f"{condition}: better than chance", low > 0.5, f"AUROC {value:.3f}, from {low:.3f}")
        at = measured["at"].get(THRESHOLD)
        if at is None:
            yield Rule(f"{condition}: FPR bound", False, f"no threshold {THRESHOLD}")
            continue
        fpr, bound = _number(at["fpr"]), max_fpr
        theirs = _champion_fpr(champion, candidate, condition)
        if theirs is not None:
            bound = min(bound, max(theirs, TARGET_FPR))
        yield Rule(f"{condition}: FPR bound", fpr <= bound, f"FPR {fpr:.3f}, at most {bound:.3f}")


def _champion_fpr(champion: dict[str, Any] | None, candidate: dict[str, Any], condition: str) -> float | None:
    """Upper end of the interval of the champion's FPR on the same reals; None where it cannot be compared."""
    if champion is None or _incomparable(candidate, champion) is not None:
        return None
    part = champion["conditions"].get(condition, {}).get("unseen_sources")
    at = part["heads"][_head(champion)]["at"].get(THRESHOLD, {}) if part else {}
    upper = at.get("fpr_high")
    return None if upper is None else float(upper)


def _against(candidate: dict[str, Any], champion: dict[str, Any] | None) -> Iterator[Rule]:
    if champion is None:
        return
    reason = _incomparable(candidate, champion)
    if reason is not None:
        yield Rule("no slice worse than the champion", False, f"{reason}: evaluate the champion again")
        return
    ours = dict(_slices(candidate))
    for name, theirs in _slices(champion):
        low = _number(theirs["low"])
        if math.isnan(low):
            continue
        if name not in ours:
            yield Rule(f"{name}: no worse", False, "the champion's report has it, this one has not")
            continue
        value = _number(ours[name]["value"])
        yield Rule(f"{name}: no worse", value >= low, f"AUROC {value:.3f}, champion's from {low:.3f}")


def _incomparable(candidate: dict[str, Any], champion: dict[str, Any]) -> str | None:
    """Why the two reports cannot be compared, or None."""
    if champion["data_sha256"] != candidate["data_sha256"]:
        return "the two reports are on different data"
    for key, before in (("head", "linear"), ("crops", "center")):
        # Reports from before a field was written had the one value there was.
        theirs, ours = champion.get(key, before), candidate.get(key, before)
        if theirs != ours:
            return f"the champion was evaluated with {key} {theirs}, the candidate with {ours}"
    return None


def _slices(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    head = _head(report)
    for condition, parts in report["conditions"].items():
        for part, values in parts.items():
            yield f"{condition}, {part}, all", values["heads"][head]["auroc"]
            for row in values["slices"]:
                if "auroc" in row:
                    yield f"{condition}, {part}, {row['label']} {row['slice']} {row['name']}", row["auroc"]


def _parity(candidate: dict[str, Any]) -> Iterator[Rule]:
    found = candidate.get("parity")
    if found is None:
        yield Rule("parity of backends", False, "the report has none; evaluate without --no-parity")
        return
    for row in found["compared"]:
        worst, flipped = max(map(_number, row["max_probability"].values())), max(row["flipped"].values())
        detail = f"a probability is off by at most {worst:.2g}, allowed {row['tolerance']:.0e}; {flipped} decisions flip"
        yield Rule(f"parity of {row['backend']} {row['precision']}", bool(row["agrees"]), f"{detail}; {found['crops']} crops")
    if not found["compared"]:
        reasons = "; ".join(f"{name}: {why}" for name, why in found["not_run"])
        yield Rule("parity of backends", True, f"nothing to compare with {found['reference']} here ({reasons})")


def _head(report: dict[str, Any]) -> str:
    return str(report.get("head", "linear"))


def _number(value: float | None) -> float:
    """NaN for what is not defined: it passes no comparison."""
    return math.nan if value is None else float(value)
