"""Reads the reports that promotion rests on; the rules are in `train.gate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.evaluate import REPORT_FORMAT
from train.gate import MAX_FPR, Rule, gate

__all__ = ["MAX_FPR", "PromoteError", "Rule", "gate", "read_report"]


class PromoteError(Exception):
    """A report or bundle cannot be used for promotion; the message names it."""


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
