"""report.html: an evaluation as one page that loads nothing; numbers from report.json, plots from the scores."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.heads import HEADS
from train import metrics, plots
from train.evaluate import PARTS, parts_of, thresholds_apply
from train.plots import Axis, Series
from train.report_style import STYLE
from train.scoring import Scored
from train.thumbnails import SIDE_PX, Extremes, Shown

TITLES = {"unseen_sources": "Unseen sources", "calibration_sources": "Calibration sources"}
EXPLAINED = {
    "unseen_sources": "Neither training nor calibration has seen these sources. This is what to believe.",
    "calibration_sources": "Other images of sources that are in training; calibration and thresholds rest on them.",
}
BINS = 20
MAX_POINTS = 1500
ROC_POINTS = 250
RATE = Axis("False-positive rate")
FOUND = Axis("True-positive rate")
LOG_RATE = Axis("False-positive rate (logarithmic)", 1e-3, 1.0, True, (0.001, 0.01, 0.1, 1.0))
PROBABILITY = Axis("Calibrated probability")


def page(report: dict[str, Any], scored: Mapping[str, Scored], shown: Extremes, pictures: Mapping[str, bytes]) -> str:
    """The whole document. `scored`: the conditions that were scored, clean among them; `pictures`: JPEGs by key."""
    model = report["model"]
    title = f"{model['name']} {model.get('version', '')}: evaluation"
    sections = [
        _summary(report),
        *(_part(report, scored, part) for part in PARTS if part in report["conditions"]["clean"]),
        _ladder(report),
        _map(scored["clean"]),
        _images(shown, pictures),
        _facts(report),
    ]
    links = "".join(f'<li><a href="#{anchor}">{text}</a></li>' for anchor, text, _ in sections)
    body = "".join(f'<section id="{anchor}"><h2>{text}</h2>{content}</section>' for anchor, text, content in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        '<a class="skip" href="#summary">Skip to the summary</a>'
        f"<header><h1>{escape(title)}</h1><p>{_made(report)}</p>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header><main>{body}</main></body></html>\n'
    )


def _made(report: dict[str, Any]) -> str:
    crops = "centre crop" if report["crops"] == "center" else "five crops, averaged"
    return escape(f"Head {report['head']}, {crops}, {report['backend']}, {report['created_at']}")


def _summary(report: dict[str, Any]) -> tuple[str, str, str]:
    tiles, notes = [], []
    for condition, parts in report["conditions"].items():
        part = parts.get("unseen_sources")
        if part is None:
            continue
        overall = part["heads"][report["head"]]
        tiles.append(_tile(f"AUROC, unseen sources, {condition}", overall["auroc"]))
        tiles.append(_tile(f"TPR at FPR 1%, unseen sources, {condition}", overall["tpr_at_fpr_0.01"]))
        at = overall["at"].get("fpr_0.01")
        if at is not None:
            fpr = {"value": at["fpr"], "low": at["fpr_low"], "high": at["fpr_high"]}
            tiles.append(_tile(f"FPR at the shipped 1% threshold, {condition}", fpr))
        if condition == "clean" and part["images"]["real"] < 300:
            count = part["images"]["real"]
            notes.append(f"{count} reals of unseen sources: too few to certify an FPR of 1% (299 without an error).")
    if not tiles:
        notes.append("No image of a source that calibration has not seen: this report says nothing about new sources.")
    if not thresholds_apply(report):
        notes.append("The shipped thresholds were chosen for other crops: FPR and TPR at them were not promised.")
    if report["skipped"]:
        notes.append(f"{len(report['skipped'])} images were skipped; they are listed at the end.")
    said = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return "summary", "Summary", f'<dl class="tiles">{"".join(tiles)}</dl>' + (f'<ul class="notes">{said}</ul>' if said else "")


def _tile(name: str, measured: dict[str, Any]) -> str:
    low, high = _number(measured["low"]), _number(measured["high"])
    return f"<div><dt>{escape(name)}</dt><dd>{_number(measured['value'])} <small>{low} to {high}</small></dd></div>"


def _part(report: dict[str, Any], scored: Mapping[str, Scored], part: str) -> tuple[str, str, str]:
    calibrated = frozenset(report["calibrated_on_sources"])
    views = {name: dict(parts_of(one, calibrated))[part] for name, one in scored.items() if name in report["conditions"]}
    values = report["conditions"]["clean"][part]
    counts = values["images"]
    figures = [
        *_rocs(part, views, report["head"]),
        _scores(part, views["clean"], values["heads"][report["head"]], report["head"]),
        _calibration(part, views["clean"], report["head"]),
    ]
    content = (
        f"<p>{EXPLAINED[part]} {counts['real']} real, {counts['fake']} generated images.</p>"
        + _overall(report, part)
        + f'<div class="figures">{"".join(figures)}</div>'
        + _slices(report, part)
    )
    return part.replace("_", "-"), TITLES[part], content


def _overall(report: dict[str, Any], part: str) -> str:
    rows = []
    for condition, parts in report["conditions"].items():
        for head, found in parts[part]["heads"].items():
            at = found["at"].get("fpr_0.01", {"fpr": None, "tpr": None})
            cells = [_measured(found[k]) for k in ("auroc", "average_precision", "tpr_at_fpr_0.01", "tpr_at_fpr_0.001", "ece")]
            cells += [_number(at["fpr"]), _number(at["tpr"])]
            rows.append([f"{head}, {condition}", *cells])
    head = ["Head", "AUROC", "AP", "TPR at FPR 1%", "TPR at FPR 0.1%", "ECE", "FPR at fpr_0.01", "TPR at fpr_0.01"]
    return _table(f"{TITLES[part]}: every head, with 95% intervals", head, rows)


def _slices(report: dict[str, Any], part: str) -> str:
    rows = []
    for condition, parts in report["conditions"].items():
        for row in parts[part]["slices"]:
            name = f"{escape(row['label'])} {escape(row['slice'])} {escape(row['name'])}"
            if "auroc" not in row:
                rows.append((name, [f"{name}, {condition}", str(row["images"]), "", row["note"], "", "", ""]))
                continue
            auroc, flagged = row["auroc"], row["flagged"].get("fpr_0.01", {"value": None, "low": None, "high": None})
            bar = plots.interval(auroc["low"], auroc["value"], auroc["high"])
            cells = [bar, _measured(auroc), _measured(row["tpr_at_fpr_0.01"]), _measured(flagged), _measured(row["ece"])]
            rows.append((name, [f"{name}, {condition}", str(row["images"]), *cells]))
    # The conditions of one slice stand below each other.
    order = {name: i for i, name in reversed(list(enumerate(name for name, _ in rows)))}
    rows.sort(key=lambda pair: order[pair[0]])
    head = ["Slice", "Images", "AUROC from 0 to 1", "AUROC", "TPR at FPR 1%", "Flagged at fpr_0.01", "ECE"]
    return _table(f"{TITLES[part]}: by source and generator, each against the other class", head, [cells for _, cells in rows])


def _rocs(part: str, views: Mapping[str, Scored], head: str) -> list[str]:
    series = []
    for name, view in views.items():
        series.append(_roc(f"{head}, {name}", view, HEADS.index(head), "one", dash=name != "clean"))
    others = [other for other in HEADS if other != head]
    for other, style in zip(others, ("two", "three"), strict=True):
        series.append(_roc(f"{other}, clean", views["clean"], HEADS.index(other), style))
    what = f"ROC, {TITLES[part].lower()}"
    told = "True-positive rate against false-positive rate; the numbers are in the table above."
    key = plots.legend(series)
    found = []
    for name, axis, suffix in (("roc", RATE, ""), ("roclog", LOG_RATE, ", low false-positive rates")):
        body = plots.lines(series, axis, FOUND, diagonal=True)
        found.append(_figure(what + suffix, plots.figure(f"{name}-{part}", what + suffix, told, body), key))
    return found


def _roc(name: str, view: Scored, column: int, style: str, dash: bool = False) -> Series:
    fpr, tpr = metrics.roc(view.labels, view.ranking(column))
    if len(fpr) > ROC_POINTS:
        kept = np.unique(np.linspace(0, len(fpr) - 1, ROC_POINTS).astype(int))
        fpr, tpr = fpr[kept], tpr[kept]
    return Series(name, fpr.tolist(), tpr.tolist(), style, dash)


def _scores(part: str, view: Scored, overall: dict[str, Any], head: str) -> str:
    probability, labels = view.probability[:, HEADS.index(head)].astype(np.float64), view.labels
    series, tallest = [], 0.0
    for name, style, label in (("real", "real", 0), ("generated", "fake", 1)):
        counts = np.histogram(probability[labels == label], bins=BINS, range=(0, 1))[0]
        shares = counts / max(1, int(counts.sum()))
        tallest = max(tallest, float(shares.max()))
        series.append(Series(f"{name} ({int(counts.sum())})", [], shares.tolist(), style, dash=bool(label)))
    top = max(0.1, np.ceil(tallest * 10) / 10)
    axis = Axis("Share of the class", 0.0, float(top), ticks=tuple(float(top * i / 4) for i in range(5)))
    abstain = overall["abstain"]
    band = None if abstain is None else (abstain["low"], abstain["high"])
    cuts = [at["threshold"] for name, at in overall["at"].items() if name.startswith("fpr_") and at["threshold"] <= 1]
    body = plots.histogram(series, PROBABILITY, axis, band, cuts)
    title = f"Scores of head {head}, {TITLES[part].lower()}"
    told = f"Histogram of calibrated probabilities in {BINS} bins by class; upright lines are thresholds."
    note = "Shaded: uncertain. Upright lines: thresholds for FPR 1% and 0.1%."
    return _figure(title, plots.figure(f"scores-{part}", title, told, body), plots.legend(series) + f"<p>{note}</p>")


def _calibration(part: str, view: Scored, head: str) -> str:
    probability = view.probability[:, HEADS.index(head)].astype(np.float64)
    confidence, frequency, counts = metrics.reliability(view.labels, probability)
    line = Series("share of generated images", confidence.tolist(), frequency.tolist(), "one")
    share = Axis("Share of generated images")
    body = plots.lines([line], PROBABILITY, share, diagonal=True) + plots.marks([line], PROBABILITY, share)
    title = f"Reliability of head {head}, {TITLES[part].lower()}"
    bins = ", ".join(f"{c:.2f}: {f:.2f} of {n}" for c, f, n in zip(confidence, frequency, counts, strict=True))
    fakes = int(view.labels.sum())
    note = f"On the dotted line a probability is right as often as it says. {fakes} of {len(view.labels)} images are generated."
    return _figure(
        title, plots.figure(f"reliability-{part}", title, f"Mean probability and share by bin. {bins}", body), f"<p>{note}</p>"
    )


def _ladder(report: dict[str, Any]) -> tuple[str, str, str]:
    rows = []
    for rung in report["ladder"]:
        for part, found in rung["parts"].items():
            auroc = found["auroc"]
            at = found["at"].get("fpr_0.01", {"fpr": None, "tpr": None})
            bar = plots.interval(auroc["low"], auroc["value"], auroc["high"], least=0.5)
            cells = [bar, _measured(auroc), _measured(found["tpr_at_fpr_0.01"]), _number(at["fpr"]), _number(at["tpr"])]
            rows.append((part, [f"{escape(rung['condition'])}", *cells]))
    head = ["Condition", "AUROC from 0.5 to 1", "AUROC", "TPR at FPR 1%", "FPR at fpr_0.01", "TPR at fpr_0.01"]
    tables = [
        _table(f"{TITLES[part]} under degradations", head, [cells for own, cells in rows if own == part])
        for part in PARTS
        if any(own == part for own, _ in rows)
    ]
    told = "<p>The same images after what happens to uploads; both classes go through it.</p>"
    return "ladder", "Ladder of degradations", told + _rungs(report) + "".join(tables)


def _rungs(report: dict[str, Any]) -> str:
    """AUROC over the rungs, as steps from left to right in the ladder's order."""
    names = [rung["condition"] for rung in report["ladder"]]
    if len(names) < 3:
        return ""
    styles = {"unseen_sources": ("one", False), "calibration_sources": ("two", True)}
    series = []
    for part, (style, dash) in styles.items():
        found = [(i, rung["parts"][part]["auroc"]["value"]) for i, rung in enumerate(report["ladder"]) if part in rung["parts"]]
        kept = [(i, value) for i, value in found if value is not None]
        series.append(Series(TITLES[part], [i for i, _ in kept], [value for _, value in kept], style, dash))
    x = Axis("", 0, len(names) - 1, ticks=())
    least = min([0.5, *(value for one in series for value in one.y)])
    low = float(np.floor(least * 10) / 10)
    y = Axis("AUROC", low, 1.0, ticks=tuple(float(low + (1 - low) * i / 5) for i in range(6)))
    texts = "".join(_rung_name(i / (len(names) - 1), name) for i, name in enumerate(names))
    body = plots.lines(series, x, y) + plots.marks(series, x, y, 2.5) + texts
    title = "AUROC by condition"
    drawn = plots.figure("rungs", title, "The numbers are in the tables below.", body, height=plots.HEIGHT + 84)
    return f'<div class="figures">{_figure(title, drawn, plots.legend(series))}</div>'


def _rung_name(share: float, name: str) -> str:
    x = plots.LEFT + share * (plots.WIDTH - plots.LEFT - plots.RIGHT) + 4
    y = plots.HEIGHT - plots.BOTTOM + 12
    return f'<text transform="translate({x:.1f} {y}) rotate(-60)" text-anchor="end">{escape(name)}</text>'


def _map(clean: Scored) -> tuple[str, str, str]:
    kept = np.unique(np.linspace(0, len(clean.facts) - 1, min(MAX_POINTS, len(clean.facts))).astype(int))
    place, shares = principal_components(clean.embedding[kept])
    labels = clean.labels[kept]
    series = [
        Series(name, place[labels == label, 0].tolist(), place[labels == label, 1].tolist(), style)
        for name, style, label in (("real", "real", 0), ("generated", "fake", 1))
    ]
    x, y = (_span(f"Component {i + 1} ({shares[i]:.0%} of the variance)", place[:, i]) for i in range(2))
    title = "Embeddings, first two principal components"
    told = f"{len(kept)} images as points; circles are real, squares generated."
    drawn = plots.figure("map", title, told, plots.frame(x, y) + plots.marks(series, x, y, 2.2))
    return "map", "Embedding map", f'<div class="figures">{_figure(title, drawn, plots.legend(series, shapes=True))}</div>'


def principal_components(embedding: NDArray[np.float32]) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """Places float64[n, 2] along the two directions of largest variance, and their shares of it; zeros where there is none."""
    centred = embedding.astype(np.float64) - embedding.astype(np.float64).mean(axis=0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    directions = np.pad(directions, ((0, max(0, 2 - len(directions))), (0, 0)))
    variance = np.pad(sizes**2, (0, max(0, 2 - len(sizes))))
    total = float(variance.sum()) or 1.0
    return centred @ directions[:2].T, (float(variance[0]) / total, float(variance[1]) / total)


def _span(label: str, values: NDArray[np.float64]) -> Axis:
    low, high = float(values.min()), float(values.max())
    room = 0.03 * (high - low) or 1.0
    return Axis(label, low - room, high + room, ticks=())


def _images(shown: Extremes, pictures: Mapping[str, bytes]) -> tuple[str, str, str]:
    groups = {
        "Reals taken for generated": shown.reals_taken_for_generated,
        "Generated images taken for real": shown.generated_taken_for_real,
        "Surest reals": shown.surest_reals,
        "Surest generated images": shown.surest_generated,
    }
    parts = [f'<h3>{name}</h3><ul class="images">{_pictures(group, pictures)}</ul>' for name, group in groups.items() if group]
    told = f"<p>Clean condition, by the serving head, the most extreme first; at most {SIDE_PX} pixels a side.</p>"
    return "images", "Best and worst images", told + "".join(parts)


def _pictures(group: Sequence[Shown], pictures: Mapping[str, bytes]) -> str:
    items = []
    for one in group:
        what = f"{one.generator}, {one.source}" if one.label else f"real, {one.source}"
        drawn = "<span>no picture</span>"
        if one.key in pictures:
            data = base64.b64encode(pictures[one.key]).decode()
            drawn = f'<img src="data:image/jpeg;base64,{data}" alt="{escape(what)}, scored {one.score:.3f}">'
        items.append(f"<li><figure>{drawn}<figcaption><b>{one.score:.3f}</b> {escape(what)}</figcaption></figure></li>")
    return "".join(items)


def _facts(report: dict[str, Any]) -> tuple[str, str, str]:
    model, bootstrap = report["model"], report["bootstrap"]
    rows = [
        ["Encoder, SHA-256", escape(model["encoder_sha256"])],
        ["Heads, SHA-256", escape(model["heads_sha256"])],
        ["Evaluated images, SHA-256 of the list", escape(report["data_sha256"])],
        ["Machine", escape(report["machine"])],
        ["Calibrated on", escape(", ".join(report["calibrated_on_sources"]) or "nothing that is here")],
        [
            "Bootstrap",
            f"{bootstrap['resamples']} resamples within each class, {bootstrap['confidence']:.0%} percentile intervals",
        ],
    ]
    parity = report["parity"]
    for row in parity["compared"] if parity else ():
        worst = max(value for value in row["max_probability"].values() if value is not None)
        verdict = "agrees" if row["agrees"] else "does not agree"
        said = f"{verdict} with {parity['reference']} on {parity['crops']} crops: off by at most {worst:.2g}"
        rows.append([f"Backend {escape(row['backend'])}, {escape(row['precision'])}", escape(said)])
    rows += [[f"Backend {escape(name)}", "not compared: " + escape(why)] for name, why in (parity["not_run"] if parity else ())]
    if parity is None:
        rows.append(["Backends", "not compared"])
    rows += [["Skipped", f"{escape(name)}: {escape(why)}"] for name, why in report["skipped"]]
    return "facts", "Facts", _table("What was evaluated, on what", ["Fact", "Value"], rows)


def _figure(title: str, drawn: str, note: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawn}{note}</figure>"


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls within itself on a narrow screen. Cells are HTML."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    named = escape(caption)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{named}"><table><caption>{named}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _measured(measured: dict[str, Any]) -> str:
    if measured["value"] is None:
        return "n/a"
    return f"{_number(measured['value'])} <small>{_number(measured['low'])} to {_number(measured['high'])}</small>"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
