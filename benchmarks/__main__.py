"""`python -m benchmarks`: run the suite (or the parts named), print a table, write JSON under benchmarks/results/."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import batcher_simulated, cold_start, decode, exactly_once, pipeline, shapes

PARTS = ("decode", "pipeline", "shapes", "batcher", "cold_start", "exactly_once")


def _rows(figures: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in figures.items():
        if isinstance(value, dict):
            rows += _rows(value, f"{prefix}{name} · ")
        else:
            rows.append((prefix + name, f"{value:.3f}" if isinstance(value, float) else str(value)))
    return rows


def _show(title: str, figures: dict[str, Any]) -> None:
    table = Table("figure", "value", title=title)
    for name, value in _rows(figures):
        table.add_row(name, value)
    Console(width=110).print(table)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=f"{', '.join(PARTS)}; all of them by default"
    )
    parser.add_argument("--events", type=int, default=3000, help="events of the null-engine run (default 3000)")
    parser.add_argument("--seconds", type=float, default=8, help="length of the bare detector's runs")
    arguments = parser.parse_args()
    parts = arguments.parts or PARTS
    if "decode" in parts:
        _show("decode", decode.main())
    if "pipeline" in parts:
        _show("pipeline", pipeline.main(arguments.events, arguments.seconds))
    if "shapes" in parts:
        _show("shapes", shapes.main(arguments.events))
    if "batcher" in parts:
        figures = batcher_simulated.main(pace=0.5)
        _show("batcher, against a simulated device", {key: value for key, value in figures.items() if key != "loads"})
    if "cold_start" in parts:
        _show("from start to ready", cold_start.main())
    if "exactly_once" in parts:
        costs = exactly_once.main(min(arguments.events, 2000), rounds=2, max_in_flight=256)
        if costs is not None:
            _show("exactly once against at least once, on Apache Kafka", {key: costs[key] for key in costs if key != "runs"})


if __name__ == "__main__":
    main()
