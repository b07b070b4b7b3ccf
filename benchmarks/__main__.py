"""`python -m benchmarks`: run the suite (or the parts named), print a table, write JSON under benchmarks/results/."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import batcher_simulated, pipeline


def _rows(figures: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in figures.items():
        if isinstance(value, dict):
            rows += _rows(value, f"{prefix}{name} · ")
        else:
            rows.append((prefix + name, f"{value:.3f}" if isinstance(value, float) else str(value)))
    return rows


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--events", type=int, default=3000, help="events of the null-engine run (default 3000)")
    parser.add_argument("--seconds", type=float, default=8, help="length of the bare detector's runs")
    arguments = parser.parse_args()
    table = Table("figure", "value", title="pipeline")
    for name, value in _rows(pipeline.main(arguments.events, arguments.seconds)):
        table.add_row(name, value)
    Console(width=110).print(table)
    table = Table("figure", "value", title="batcher, against a simulated device")
    figures = batcher_simulated.main(pace=0.5)
    for name, value in _rows({key: value for key, value in figures.items() if key != "loads"}):
        table.add_row(name, value)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
