"""Reads the reports that promotion rests on; the rules are in `train.gate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.bundle import Bundle
from train.evaluate import REPORT_FORMAT
from train.gate import MAX_FPR, Rule, gate

__all__ = ["MAX_FPR", "PromoteError", "Rule", "champion_report", "gate", "read_report"]


class PromoteError(Exception):
    """A report or bundle cannot be used for promotion; the message names it."""


def champion_report(current: Bundle, given: Path | None = None) -> dict[str, Any]:
    """The report that the published bundle is compared by: `given`, or the one it carries.

    Raises:
        PromoteError: it carries none and none is given, or the given one is of another bundle.
    """
    manifest = current.manifest
    if given is not None:
        report = read_report(given)
        measured = (report["model"]["encoder_sha256"], report["model"]["heads_sha256"])
        if measured != (manifest.encoder.sha256, manifest.heads.sha256):
            raise PromoteError(f"{given}: is not of the published bundle {current.path}; evaluate that one with --bundle")
        return report
    kept = manifest.metrics.get("report")
    if not isinstance(kept, dict) or kept.get("format") != REPORT_FORMAT:
        raise PromoteError(
            f"{current.path}: carries no report to compare with; run `train evaluate --bundle {current.path}` and give its "
            "report with --champion-report"
        )
    return kept


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
