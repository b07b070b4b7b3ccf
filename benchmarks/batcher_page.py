"""The batcher's results as they stand in docs/batching.md: a plot, and tables between two markers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

MARKERS = ("<!-- results: benchmarks/results/batcher_simulated.json -->", "<!-- end of results -->")


def plot(found: list[dict[str, Any]], device: dict[str, float], path: Path) -> None:
    """p50, p99 and batch size over the load: lines in virtual time, dots as measured."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "batching"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    load = [row["load"] * 100 for row in found]
    for axes, names in ((left, ("p50_ms", "p99_ms")), (right, ("mean_batch",))):
        for name, colour in zip(names, ("tab:blue", "tab:red"), strict=False):
            label = name.removesuffix("_ms").replace("_", " ")
            axes.plot(load, [row["virtual"][name] for row in found], color=colour, label=f"{label}, virtual time")
            axes.plot(load, [row["measured"][name] for row in found], "o", color=colour, markersize=4, label=f"{label}, measured")
        axes.set_xlabel("load, % of full-batch capacity")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    left.set_ylabel("submit to scores, ms")
    right.set_ylabel("crops in a batch")
    figure.suptitle(f"a batch of n takes {device['a']:g} + {device['b']:g} n ms; 32 at most, 5 ms delay", fontsize=10)
    figure.savefig(path, metadata={"Date": None})


def tables(figures: dict[str, Any]) -> str:
    """The results as the Markdown tables of docs/batching.md."""
    lines = [
        "| saturated | bare loop, images/s | through the batcher | ratio | of the time on the device |",
        "|---|---|---|---|---|",
    ]
    for name, row in figures.items():
        if name.startswith("saturated_"):
            busy = "" if row["device_busy"] is None else f"{row['device_busy']:.3f}"
            rates = f"{row['bare_images_per_s']:.0f} | {row['batcher_images_per_s']:.0f} | {row['ratio']:.3f}"
            lines.append(f"| {name.removeprefix('saturated_').replace('_', ' ')} | {rates} | {busy} |")
    lone, bursts = figures["lone"], figures["bursts"]
    lines += [
        "",
        f"One event a second: {lone['added_ms_median']:.1f} ms added at the median, {lone['added_ms_p90']:.1f} ms at the 90th "
        f"percentile, of which {lone['max_queue_delay_ms']:.0f} ms are the window.",
        "",
        "| urgent p99 | alone, ms | under bursts of 200 bulk items, ms | ratio |",
        "|---|---|---|---|",
        *(
            f"| {how} | {row['quiet_p99_ms']:.1f} | {row['bursts_p99_ms']:.1f} | {row['ratio']:.2f} |"
            for how, row in ((how, bursts[how]) for how in ("virtual", "measured"))
        ),
        "",
        "| load | p50 ms: virtual, measured | p99 ms: virtual, measured | crops in a batch: virtual, measured | full, timeout |",
        "|---|---|---|---|---|",
    ]
    for row in figures["loads"]:
        cells = [
            f"{row['virtual'][name]:.1f}, {row['measured'][name]:.1f}{' (late)' if row['late_generator'] else ''}"
            for name in ("p50_ms", "p99_ms", "mean_batch")
        ]
        reasons = f"{row['reasons'].get('full', 0)}, {row['reasons'].get('timeout', 0)}"
        lines.append(f"| {row['load'] * 100:.0f}% | {' | '.join(cells)} | {reasons} |")
    lines += ["", f"Machine: {os.cpu_count()} cores, load average {figures['load_average']:.1f} during the run."]
    return "\n".join(lines)


def write(figures: dict[str, Any], folder: Path) -> None:
    """Write batching.svg, and the tables between their markers in batching.md."""
    plot(figures["loads"], figures["device_ms"], folder / "batching.svg")
    page = folder / "batching.md"
    before, _, rest = page.read_text().partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    page.write_text(f"{before}{MARKERS[0]}\n{tables(figures)}\n{MARKERS[1]}{after}")
