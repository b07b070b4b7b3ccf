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
    lines = [
        f"# {manifest.name} {version}",
        "",
        _what(manifest.version, facts),
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


def _what(before: str, facts: dict[str, Any]) -> str:
    counts, encoder = facts["labels"], facts.get("encoder")
    if encoder is None:
        return (
            f"The heads of {before} refitted on its replay and {counts['learned']} human decisions, {counts['new']} of them new; "
            "the encoder is unchanged. Calibrated, compared and promoted by `train refresh` (docs/refresh.md)."
        )
    return (
        f"The encoder of {before} trained on: {encoder['steps']} steps, {encoder['views']} views of its corpus and of "
        f"{encoder['labelled']} labelled images (recipe {encoder['recipe']}); {encoder['held_out']} more were held out of it. "
        f"Heads fitted anew on the corpus and {counts['learned']} human decisions, {counts['new']} of them new to the encoder. "
        "Calibrated, compared and promoted by `train refresh --encoder` (docs/refresh.md). What the card below says of the "
        "encoder's training is how it began."
    )


def training_page(name: str, version: str, facts: dict[str, Any], before: str) -> str:
    """TRAINING.md of a version whose encoder a refresh trained on, above the page of the one before; the same when repeated."""
    title = f"# How {name} {version} was trained"
    if before.startswith(title):
        return before
    encoder = facts["encoder"]
    lines = [
        title,
        "",
        "```sh",
        "python -m train refresh --encoder --models $MODELS --work $WORK --data $CORPUS",
        "```",
        "",
        f"- recipe: {encoder['recipe']}, SHA-256 {encoder['recipe_sha256']}",
        f"- steps: {encoder['steps']}, {encoder['views']} views, {encoder['seconds']} s",
        f"- began with the encoder SHA-256: {encoder['start_sha256']}",
        f"- encoder SHA-256: {encoder['encoder_sha256']}",
        f"- training data: {encoder['corpus']['real']} real, {encoder['corpus']['fake']} generated files, list SHA-256 "
        f"{encoder['corpus']['sha256']}; beside them {encoder['labelled']} labelled images, mixture {encoder['data']}",
        f"- held out of the encoder: {encoder['held_out']} labelled images",
        "",
        "The version before:",
        "",
    ]
    return "\n".join(lines) + "\n" + before


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
