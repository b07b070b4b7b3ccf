"""`python -m benchmarks.plots`: the result files as pictures, benchmarks/results/plots/NAME.svg; `make bench` draws its own.

A bar or a dot is a figure of the file, measured once or the median of several runs; a thin line is their range.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.compare import number
from benchmarks.peers.page import quiet

Figures = Mapping[str, Any]


def _decode(axes: Any, figures: Figures) -> None:
    kinds = {name: row for name, row in figures.items() if isinstance(row, dict)}
    _bars(axes, {name: row["times_as_fast_as_pillow"] for name, row in kinds.items()}, "times as fast as Pillow's whole decode")
    axes.axvline(1, color="0.3", linewidth=0.8)


def _pipeline(axes: Any, figures: Figures) -> None:
    """What the path costs, stacked by stage, over what decoding alone costs."""
    stages = figures["null_engine"]["cpu_s_per_1000_by_stage"]
    left = 0.0
    for stage, cost in stages.items():
        axes.barh("path, null engine", number(cost), left=left, label=stage)
        left += number(cost)
    for name, key in (("decoding alone, here", "bare_decode"), ("decoding alone, Pillow", "bare_pillow")):
        axes.barh(name, number(figures[key]["cpu_s_per_1000"]), color="0.6")
    axes.set_xlabel("CPU seconds per 1,000 events")
    axes.legend(fontsize=7)


def _shapes(axes: Any, figures: Figures) -> None:
    courses = {key: rows for key, rows in figures.items() if key.startswith("cached")}
    if not courses:  # the run was cut short
        _bars(axes, {name: row["events_per_s"] for name, row in figures.get("known, 256 px", {}).items()}, "cached events/s")
        return
    for key, rows in courses.items():
        if rows:
            shares = [float(share.rstrip("%")) for share in rows]
            axes.plot(shares, [number(row["events_per_s"]) for row in rows.values()], "o-", label=key.partition(", ")[2])
    axes.set_xlabel("share of cached images, %")
    axes.set_ylabel("events/s")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _cache(axes: Any, figures: Figures) -> None:
    for key in ("hit", "miss"):
        rows = figures[key]
        axes.plot([int(name.split()[0]) for name in rows], [number(r["us_an_event"]) for r in rows.values()], "o-", label=key)
    axes.set(xlabel="events in a round trip", ylabel="µs an event", xscale="log", ylim=(0, None))
    axes.legend(fontsize=8)


def _engines(axes: Any, figures: Figures) -> None:
    for path, rows in figures.items():
        if isinstance(rows, dict):
            sizes = [int(name.split()[1]) for name in rows]
            axes.plot(sizes, [number(row["images_per_s"]) for row in rows.values()], "o-", label=path)
    axes.set(xlabel="batch size", ylabel="images/s", xscale="log", ylim=(0, None))
    axes.legend(fontsize=8)


def _cold_start(axes: Any, figures: Figures) -> None:
    found = figures["median"]
    names = {"answers_s": "/readyz answers", "engine_s": "engine warm", "ready_s": "ready"}
    _bars(axes, {name: found[key] for key, name in names.items()}, "seconds from start")


def _exactly_once(axes: Any, figures: Figures) -> None:
    modes = {name: row for name, row in figures.items() if isinstance(row, dict) and "events_per_s" in row}
    _bars(axes, {name.replace("_", " "): row["events_per_s"] for name, row in modes.items()}, "verdicts/s")


def _training(axes: Any, figures: Figures) -> None:
    rows = {
        f"{name}: {what}": row[what]["views_per_s"]
        for name, row in figures["inputs"].items()
        for what in ("bare", "loader", "whole")
    }
    _bars(axes, rows, "views/s")


def _peers(axes: Any, figures: Figures) -> None:
    """Throughput of the courses during which nothing else used the machine."""
    rows = {
        f"{who} · {course}": row["events_per_s"]
        for course, found in figures.items()
        if isinstance(found, dict) and "throughput" in found and quiet(found["throughput"])
        for who, row in found["throughput"]["contestants"].items()
    }
    axes.figure.set_figheight(max(3.6, 0.25 * len(rows)))
    _bars(axes, rows, "events/s")


PLOTS: dict[str, tuple[str, Callable[[Any, Figures], None]]] = {
    "decode": ("JPEG to the centre crop", _decode),
    "pipeline": ("the path and its parts", _pipeline),
    "shapes": ("cached share, null engine", _shapes),
    "cache": ("the score cache by itself", _cache),
    "engines": ("backends", _engines),
    "cold_start": ("from start to ready", _cold_start),
    "exactly_once": ("delivery", _exactly_once),
    "training-cpu": ("training", _training),
    "peers": ("beside others", _peers),
}
"""By result file; the batcher's is docs/batching.svg."""


def _bars(axes: Any, rows: Mapping[str, Any], what: str) -> None:
    names: Sequence[str] = list(rows)[::-1]
    for name in names:
        figure = rows[name]
        value = number(figure)
        spread = [[value - figure["low"]], [figure["high"] - value]] if isinstance(figure, dict) else None
        axes.barh(name, value, xerr=spread, color="tab:blue", height=0.6, error_kw={"linewidth": 1})
        axes.annotate(f" {value:.3g}", (value, name), va="center", fontsize=8)
    axes.set_xlabel(what)
    axes.margins(x=0.12)


def draw(name: str) -> Path | None:
    """Draw the result file of this name; None where there is no file or no plot of it."""
    source = record.RESULTS / f"{name}.json"
    if name not in PLOTS or not source.exists():
        return None
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": name, "svg.fonttype": "none"}  # the same bytes each time; text that is text
    from matplotlib import pyplot

    result = json.loads(source.read_text("utf-8"))
    title, plot = PLOTS[name]
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    try:
        plot(axes, result["figures"])
        axes.grid(alpha=0.3)
        machine = result["machine"]
        axes.set_title(f"{title} ({machine['cpu']}, {machine['cores']} cores, {result['commit']})", fontsize=9)
        path = record.RESULTS / "plots" / f"{name}.svg"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
    finally:
        pyplot.close(figure)
    return path


def main() -> None:
    """Draw every result file."""
    for name in PLOTS:
        if (path := draw(name)) is not None:
            sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
