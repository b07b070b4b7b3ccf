"""MODEL_CARD.md and TRAINING.md, written from report.json, the manifest and the run's facts: no number is typed by hand."""

from __future__ import annotations

from typing import Any

from engine.bundle import Bundle
from train.calibrate import certification
from train.metrics import trials_to_certify

_WARNING = (
    "> A small model from a small data set and a short run on a CPU. Read the table before trusting a score: on sources it "
    "has never seen it ranks far from perfectly, and its false-positive bounds rest on few images. It supports a reviewer; "
    "it must not act alone."
)
_IMPORTED_WARNING = (
    "> Published weights, calibrated and measured here on other images than they were made with. Read the table before trusting "
    "a score. It supports a reviewer; it must not act alone."
)


def model_card(bundle: Bundle, report: dict[str, Any], facts: dict[str, Any]) -> str:
    """The card of a bundle from its evaluation; `facts` as `train pretrain` and `train probe` left them."""
    manifest = bundle.manifest
    lines = [
        f"# {manifest.name} {manifest.version}",
        "",
        "CoDE's encoder (ViT-Tiny/16, 224 px centre crop at native resolution; arXiv 2407.20337) with a linear, a "
        "nearest-neighbour and a one-class head. It estimates whether an image was AI-generated.",
        "",
        _IMPORTED_WARNING if "imported" in facts else _WARNING,
        "",
        "## Measured",
        "",
        f"Head `{report['head']}`, {report['crops']} crop, {report['backend']}, {report['created_at']}. AUROC, AP and TPR at a "
        f"false-positive rate (FPR) with 95% bootstrap intervals ({report['bootstrap']['resamples']} resamples within each "
        "class). A source of generated images is ranked against all reals of its table, a source of reals against all generated "
        "images of its table. `jpeg75`: images of both classes re-encoded at quality 75.",
        "",
        "An outsider's evaluation on sources and generators unknown to this project is to be set beside these numbers.",
        "",
    ]
    titles = {
        "unseen_sources": "Sources that neither training nor calibration has seen",
        "calibration_sources": "Sources that training has seen (other images), also used for calibration and thresholds",
    }
    for part, title in titles.items():
        lines += _part(report, part, title)
    lines += _calibration(bundle, report)
    lines += _training(facts)
    return "\n".join(lines) + "\n"


def _part(report: dict[str, Any], part: str, title: str) -> list[str]:
    found = {name: condition[part] for name, condition in report["conditions"].items() if part in condition}
    if not found:
        return []
    counts = next(iter(found.values()))["images"]
    lines = [f"### {title}", "", f"{counts['real']} real, {counts['fake']} generated images.", ""]
    lines += ["| | condition | images | AUROC | AP | TPR at FPR 1% | TPR at FPR 0.1% |", "|---|---|---|---|---|---|---|"]
    for name, values in found.items():
        for head, overall in values["heads"].items():
            lines.append(f"| **all, head {head}** | {name} | {counts['real'] + counts['fake']} | {_ranking(overall)} |")
    for name, row in _rows(found):
        text = _ranking(row) if "auroc" in row else f"{row['note']} | | | "
        lines.append(f"| {row['label']} {row['slice']} {row['name']} | {name} | {row['images']} | {text} |")
    lines += ["", "Macro mean of AUROC over sources (generated / real):", ""]
    for name, values in found.items():
        macro = (values["macro_auroc_over_fake_sources"], values["macro_auroc_over_real_sources"])
        lines.append(f"- {name}: {_number(macro[0])} / {_number(macro[1])}")
    return [*lines, "", *_thresholds(found, report["head"]), *_ladder(report, part)]


def _rows(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(condition, slice) with the conditions of one slice side by side."""
    by_slice: dict[tuple[str, str, str], list[tuple[str, dict[str, Any]]]] = {}
    for name, values in found.items():
        for row in values["slices"]:
            by_slice.setdefault((row["label"], row["slice"], row["name"]), []).append((name, row))
    return [pair for pairs in by_slice.values() for pair in pairs]


def _thresholds(found: dict[str, Any], head: str) -> list[str]:
    lines = [f"At fixed thresholds on the calibrated probability (head {head}; FPR and TPR with Clopper-Pearson intervals):", ""]
    lines += ["| threshold | condition | FPR | TPR | balanced accuracy | ECE |", "|---|---|---|---|---|---|"]
    for name, values in found.items():
        overall = values["heads"][head]
        for threshold, at in overall["at"].items():
            lines.append(
                f"| {threshold} ({_number(at['threshold'])}) | {name} | {_rate(at, 'fpr')} | {_rate(at, 'tpr')} "
                f"| {_interval(at['balanced_accuracy'])} | {_interval(overall['ece'])} |"
            )
    lines += [
        "",
        "By source and generator: its own images that are flagged at a threshold (false positives for reals).",
        "",
    ]
    names = list(next(iter(found.values()))["heads"][head]["at"])
    columns = [f"flagged at {name}" for name in names]
    lines += [f"| | condition | {' | '.join(columns)} | balanced accuracy at 0.5 | ECE |", "|---" * (len(columns) + 4) + "|"]
    for name, row in _rows(found):
        if "flagged" in row:
            flagged = " | ".join(_interval(row["flagged"][threshold]) for threshold in names)
            accuracy = _interval(row["at"]["probability_0.5"]["balanced_accuracy"])
            title = f"{row['label']} {row['slice']} {row['name']}"
            lines.append(f"| {title} | {name} | {flagged} | {accuracy} | {_interval(row['ece'])} |")
    return [*lines, ""]


def _ladder(report: dict[str, Any], part: str) -> list[str]:
    rungs = [(rung["condition"], rung["parts"][part]) for rung in report["ladder"] if part in rung["parts"]]
    if len(rungs) <= len(report["conditions"]):
        return []
    lines = [f"Under degradations of both classes (head {report['head']}):", ""]
    lines += ["| condition | AUROC | TPR at FPR 1% | FPR at fpr_0.01 | TPR at fpr_0.01 |", "|---|---|---|---|---|"]
    for name, row in rungs:
        at = row["at"].get("fpr_0.01", {"fpr": None, "tpr": None})
        ranking = f"{_interval(row['auroc'])} | {_interval(row['tpr_at_fpr_0.01'])}"
        lines.append(f"| {name} | {ranking} | {_number(at['fpr'])} | {_number(at['tpr'])} |")
    return [*lines, ""]


def _calibration(bundle: Bundle, report: dict[str, Any]) -> list[str]:
    manifest = bundle.manifest
    lines = [
        "## Calibration and thresholds",
        "",
        "Fitted on the validation images of the sources named here, which the encoder and the heads were not fitted on, though "
        "they come from sources in the training set: "
        + ", ".join(report["calibrated_on_sources"])
        + ". Clean and degraded copies; both "
        "classes weigh the same, so 0.5 means equal likelihood, and a platform with few generated images must expect most alarms "
        "to be false at that score.",
        "",
        "| head | method | threshold | value | FPR | one-sided 95% bound | reals | TPR | certified |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for head, named in manifest.thresholds.items():
        for name, t in named.items():
            lines.append(
                f"| {head} | {manifest.calibration[head].method} | {name} | {_number(t.threshold)} | {_number(t.fpr)} "
                f"| {_number(t.fpr_upper)} | {t.reals} | {_number(t.tpr)} | {certification(t)} |"
            )
    lines += [
        "",
        "Certified: whether the bound is at or below the rate that the threshold is named after. It takes "
        f"{trials_to_certify(0.01)} reals without an error for 1%, {trials_to_certify(0.001):,} for 0.1%.",
        "",
    ]
    for head, band in manifest.abstain.items():
        lines.append(f"- {head}: scores from {_number(band.low)} to {_number(band.high)} are marked uncertain.")
    return [*lines, ""]


def _training(facts: dict[str, Any]) -> list[str]:
    if "imported" in facts:
        return _imported(facts)
    data = facts["data"]
    lines = [
        "## Training data",
        "",
        f"{data['real']} real and {data['fake']} generated files, SHA-256 of the list {data['sha256']}; none of them ships "
        f"with the model. {data['aligned']} aligned fakes were made from the reals with an autoencoder. Sources:",
        "",
        "| label | source | generator | files | terms as the source states them |",
        "|---|---|---|---|---|",
    ]
    for row in data["sources"]:
        lines.append(f"| {row['label']} | {row['source']} | {row['generator']} | {row['files']} | {row['licence']} |")
    lines += [
        "",
        "Many sources state no licence. The images were used for training and validation only. Reals are mostly photographs of "
        "animals, people and places from older collections; generated images are mostly art, portraits and products: subject and "
        "style differ between the classes, and the model has learned some of that. In training, lossless images get a "
        "photograph's JPEG quantisation first, and both classes go through the same resizes and re-encodings, so that the "
        "container alone decides nothing.",
        "",
        "## Training",
        "",
    ]
    lines += [f"- {name}: {value}" for name, value in facts["summary"].items()]
    lines += [f"- note: {note}" for note in facts["notes"]]
    lines += ["", "How to repeat it: TRAINING.md beside the version's folder.", ""]
    return lines + _LIMITS


_LIMITS = [
    "## Limits",
    "",
    "- Only the centre 224 px are looked at unless the worker is set to `five` crops.",
    "- Edited, upscaled, filtered or AI-retouched photographs are not a class of their own here.",
    "- Newer generators than those listed will look more real to it; refit the probe with labelled samples of them.",
    "- No statement about who made an image or why.",
]


def _imported(facts: dict[str, Any]) -> list[str]:
    lines = [
        "## Origin",
        "",
        "Encoder and heads were imported from published weights; nothing was trained here. What was read:",
        "",
    ]
    lines += [f"- {name}: {value}" for name, value in facts["imported"].items()]
    return [*lines, *(f"- note: {note}" for note in facts["notes"]), "", *_LIMITS]


def training_page(name: str, version: str, facts: dict[str, Any], commands: list[str]) -> str:
    """TRAINING.md: how a version was made and how to make it again."""
    lines = [
        f"# How {name} {version} was trained",
        "",
        "`$CORPUS` holds `manifest.tsv` and the images, `$AUTOENCODER` the tiny autoencoder; `$RUN` is an empty folder"
        + (", `$EARLIER` another." if any("$EARLIER" in command for command in commands) else "."),
        "",
        "```sh",
        *commands,
        "```",
        "",
    ]
    lines += [f"- {key}: {value}" for key, value in facts["summary"].items()]
    if "imported" in facts:
        return "\n".join([*lines, "", "`$WEIGHTS` is the folder of the published weights."]) + "\n"
    lines += [
        f"- training data: {facts['data']['real']} real, {facts['data']['fake']} generated files, "
        f"list SHA-256 {facts['data']['sha256']}",
        f"- recipe SHA-256: {facts['recipe_sha256']}",
        f"- encoder.safetensors SHA-256: {facts['encoder_sha256']}",
        *(f"- note: {note}" for note in facts["notes"]),
        "",
        "Batches depend on the seed and the step alone, so a run that is stopped and resumed ends with the same weights on the "
        "same machine and versions; another processor rounds bf16 sums differently.",
    ]
    return "\n".join(lines) + "\n"


def _ranking(row: dict[str, Any]) -> str:
    return " | ".join(_interval(row[k]) for k in ("auroc", "average_precision", "tpr_at_fpr_0.01", "tpr_at_fpr_0.001"))


def _interval(measured: dict[str, Any]) -> str:
    return f"{_number(measured['value'])} ({_number(measured['low'])}-{_number(measured['high'])})"


def _rate(at: dict[str, Any], name: str) -> str:
    return f"{_number(at[name])} ({_number(at[f'{name}_low'])}-{_number(at[f'{name}_high'])})"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
