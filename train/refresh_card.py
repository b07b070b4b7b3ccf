"""MODEL_CARD.md of a refreshed bundle: what the refresh changed, then the card of the model it began with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.bundle import Bundle
from train.gate import Rule

BASE_MARK = "<!-- the card of the model that refreshes began with -->"


def refreshed_card(champion: Bundle, version: str, reports: dict[str, Any], facts: dict[str, Any], rules: Sequence[Rule]) -> str:
    """The card; the numbers are the reports', none is typed by hand."""
    manifest = champion.manifest
    counts = facts["labels"]
    lines = [
        f"# {manifest.name} {version}",
        "",
        f"The heads of {manifest.version} refitted on its replay and {counts['learned']} human decisions, {counts['new']} of "
        "them new; the encoder is unchanged. Calibrated, compared and promoted by `train refresh` (docs/training.md).",
        "",
        "## Before and after, on the same images",
        "",
        "| images | | before | after |",
        "|---|---|---|---|",
    ]
    for condition, parts in reports["candidate"]["conditions"].items():
        for part, values in parts.items():
            old = reports["champion"]["conditions"][condition][part]
            name = f"{condition}, {part.replace('_', ' ')}"
            head = reports["candidate"]["head"]
            lines += [
                _row(name, "AUROC", old["heads"][head]["auroc"], values["heads"][head]["auroc"]),
                _row(name, "TPR at FPR 1%", old["heads"][head]["tpr_at_fpr_0.01"], values["heads"][head]["tpr_at_fpr_0.01"]),
                f"| {name} | FPR at the threshold for 1% | {_at(old, head)} | {_at(values, head)} |",
            ]
    for name, row in facts["held_out"].items():
        lines.append(
            f"| {row['images']} labelled {name.replace('_', ' ')}, held out in turn | AUROC | {row['champion']:.3f} | "
            f"{row['candidate']:.3f} |"
        )
    lines += [
        "",
        "## The gate",
        "",
        *(f"- {'pass' if rule.passed else 'FAIL'}: {rule.name}: {rule.detail}" for rule in rules),
        "",
    ]
    shifted = {head: by for head, by in facts["shift"].items() if by}
    if shifted:
        text = ", ".join(f"{head} {by:+.2f}" for head, by in sorted(shifted.items()))
        lines += [f"Logits are shifted by an unlabelled sample of the platform's uploads: {text}.", ""]
    return "\n".join([*lines, BASE_MARK, "", _base_card(champion)])


def _base_card(champion: Bundle) -> str:
    text = (champion.path / champion.manifest.model_card.file).read_text("utf-8", "replace")
    return text.partition(BASE_MARK)[2].lstrip("\n") or text


def _row(name: str, measure: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    return f"| {name} | {measure} | {_interval(before)} | {_interval(after)} |"


def _interval(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "n/a"
    return f"{row['value']:.3f}" + (f" ({row['low']:.3f}-{row['high']:.3f})" if row["low"] is not None else "")


def _at(part: dict[str, Any], head: str) -> str:
    fpr = part["heads"][head]["at"].get("fpr_0.01", {}).get("fpr")
    return "n/a" if fpr is None else f"{fpr:.3f}"
