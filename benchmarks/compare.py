"""`python -m benchmarks.compare BEFORE.json AFTER.json`: what changed beyond noise between two result files of one benchmark.

A figure measured several times (`--repeat`) stands in the file as its median and range; it has changed where the two ranges do
not meet. One measured once is given `--noise` (15%) in both directions, which a shared machine easily has. Different machines
and versions are named first, since then the comparison says little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

NOISE = 0.15
RANGE = {"median", "low", "high"}


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured number with the range it was seen in."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Change:
    """One figure in both files."""

    name: str
    before: Figure
    after: Figure

    @property
    def beyond_noise(self) -> bool:
        """Whether the ranges do not meet."""
        return self.after.low > self.before.high or self.after.high < self.before.low

    @property
    def ratio(self) -> float:
        """After over before; infinite where there was nothing before."""
        return self.after.value / self.before.value if self.before.value else float("inf") if self.after.value else 1.0


def merge(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of several runs as one: numbers become their median and range, everything else is the first run's."""
    if len(runs) == 1:
        return runs[0]
    merged: dict[str, Any] = {}
    for name, first in runs[0].items():
        values = [run[name] for run in runs if name in run]
        if isinstance(first, dict):
            merged[name] = merge([value for value in values if isinstance(value, dict)])
        elif isinstance(first, float):
            merged[name] = {"median": statistics.median(values), "low": min(values), "high": max(values)}
        else:
            merged[name] = first
    return merged


def number(value: Any) -> float:
    """A figure of a result, measured once or the median of several times."""
    return float(value["median"]) if isinstance(value, dict) else float(value)


def figures(found: dict[str, Any], noise: float = NOISE, prefix: str = "") -> Iterator[tuple[str, Figure]]:
    """Every measured number of a result by its path. Whole numbers are settings or counts, not measurements."""
    for name, value in found.items():
        if isinstance(value, dict) and set(value) == RANGE:
            yield prefix + name, Figure(value["median"], value["low"], value["high"])
        elif isinstance(value, dict):
            yield from figures(value, noise, f"{prefix}{name} · ")
        elif isinstance(value, float):
            spread = abs(value) * noise
            yield prefix + name, Figure(value, value - spread, value + spread)


def changes(before: dict[str, Any], after: dict[str, Any], noise: float = NOISE) -> list[Change]:
    """Figures that both results have."""
    known = dict(figures(before["figures"], noise))
    return [Change(name, known[name], figure) for name, figure in figures(after["figures"], noise) if name in known]


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What else differs: the benchmark, the machine, versions."""
    lines = []
    for part in ("benchmark", "machine", "versions"):
        old, new = before.get(part), after.get(part)
        if old != new:
            named: Iterable[str] = sorted({*old, *new}) if isinstance(old, dict) and isinstance(new, dict) else ()
            lines += [f"{part}: {key}: {old.get(key)} -> {new.get(key)}" for key in named if old.get(key) != new.get(key)]
            lines += [] if named else [f"{part}: {old} -> {new}"]
    return lines


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: cannot be read as a result file: {error}")
    if not isinstance(found, dict) or not isinstance(found.get("figures"), dict):
        sys.exit(f"{path}: not a result of python -m benchmarks: it has no figures")
    return found


def main() -> None:
    """Compare and print; exit code 0 whatever was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--noise", type=float, default=NOISE, help="of figures measured once, as a share (default 0.15)")
    parser.add_argument("--all", action="store_true", help="show what did not change as well")
    given = parser.parse_args()
    before, after = _read(given.before), _read(given.after)
    console = Console(width=120)
    for line in differences(before, after):
        console.print(f"[yellow]differs[/] {line}")
    found = changes(before, after, given.noise)
    table = Table("figure", "before", "after", "ratio", "")
    for change in sorted(found, key=lambda change: change.ratio):
        if change.beyond_noise or given.all:
            row = [f"{change.before.value:.4g}", f"{change.after.value:.4g}", f"{change.ratio:.2f}"]
            table.add_row(change.name, *row, "beyond noise" if change.beyond_noise else "")
    moved = sum(change.beyond_noise for change in found)
    console.print(table)
    console.print(f"{moved} of {len(found)} figures changed beyond noise ({before.get('commit')} -> {after.get('commit')})")


if __name__ == "__main__":
    main()
