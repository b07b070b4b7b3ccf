"""`python -m benchmarks`: run the suite (or the parts named), print a table, write JSON and plots under benchmarks/results/.

With `--repeat` every part runs so often, and its file holds the median and the range of each figure: `python -m
benchmarks.compare BEFORE AFTER` then says what changed beyond noise. The peers are a course of their own, `make bench-peers`.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import batcher_simulated, cache, cold_start, compare, decode, exactly_once, pipeline, plots, record, shapes


@dataclass(frozen=True, slots=True)
class Scale:
    """How long the parts run."""

    events: int
    seconds: float
    starts: int
    rounds: int
    training_s: float


FULL = Scale(events=3000, seconds=8, starts=5, rounds=2, training_s=20)
QUICK = Scale(events=800, seconds=2, starts=2, rounds=1, training_s=4)


def _engines(scale: Scale) -> dict[str, Any]:
    from benchmarks import engine_gpu

    return engine_gpu.part(scale.seconds / 2)


def _training(scale: Scale) -> dict[str, Any] | None:
    if importlib.util.find_spec("torch") is None:
        sys.stderr.write("training: skipped, torch is not installed (extra train)\n")
        return None
    from benchmarks import training

    return training.measured(training.arguments(["--seconds", str(scale.training_s)]))[1]


@dataclass(frozen=True, slots=True)
class Part:
    """A benchmark that writes its file and gives its figures, or None where it cannot run here; `hidden` ones are only filed."""

    title: str
    file: str
    run: Callable[[Scale], dict[str, Any] | None]
    hidden: tuple[str, ...] = ()


PARTS = {
    "decode": Part("decode", "decode", lambda _: decode.main()),
    "pipeline": Part("the path and its parts", "pipeline", lambda scale: pipeline.main(scale.events, scale.seconds)),
    "shapes": Part("processes, partitions, cached shares, sizes", "shapes", lambda scale: shapes.main(scale.events)),
    "cache": Part("the score cache by itself", "cache", lambda scale: cache.main(scale.seconds / 4)),
    "engines": Part("backends", "engines", _engines),
    "batcher": Part(
        "batcher, against a simulated device",
        "batcher_simulated",
        lambda scale: batcher_simulated.main(pace=scale.seconds / 16),
        hidden=("loads",),
    ),
    "cold_start": Part("from start to ready", "cold_start", lambda scale: cold_start.main(scale.starts)),
    "exactly_once": Part(
        "exactly once against at least once, on Apache Kafka",
        "exactly_once",
        lambda scale: exactly_once.main(min(scale.events, 2000), rounds=scale.rounds, max_in_flight=256),
        hidden=("runs",),
    ),
    "training": Part("training", "training-cpu", _training, hidden=("settings",)),
}


def _rows(figures: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in figures.items():
        if isinstance(value, dict) and value.keys() == compare.RANGE:
            rows.append((prefix + name, f"{value['median']:.3f} ({value['low']:.3f} to {value['high']:.3f})"))
        elif isinstance(value, dict):
            rows += _rows(value, f"{prefix}{name} · ")
        else:
            rows.append((prefix + name, f"{value:.3f}" if isinstance(value, float) else str(value)))
    return rows


def _show(title: str, figures: dict[str, Any]) -> None:
    table = Table("figure", "value", title=title)
    for name, value in _rows(figures):
        table.add_row(name, value)
    Console(width=110).print(table)


def run(part: Part, scale: Scale, repeat: int) -> dict[str, Any] | None:
    """The part's figures, of several runs their median and range; also in its file."""
    runs = []
    for _ in range(repeat):
        figures = part.run(scale)
        if figures is None:
            return None
        runs.append(figures)
    if repeat > 1:
        record.write(part.file, compare.merge(runs))
    return compare.merge(runs)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=f"{', '.join(PARTS)}; all of them by default"
    )
    parser.add_argument("--quick", action="store_true", help="about a quarter of the time: to see that all works, not to publish")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="runs of each part (default 1)")
    arguments = parser.parse_args()
    if arguments.repeat < 1:
        parser.error("--repeat: at least 1")
    names = arguments.parts or list(PARTS)
    if len(names) > 1:
        sys.exit(_each(names, sys.argv[1:]))
    began = time.monotonic()
    part = PARTS[names[0]]
    figures = run(part, QUICK if arguments.quick else FULL, arguments.repeat)
    if figures is not None:
        _show(part.title, {key: value for key, value in figures.items() if key not in part.hidden})
        if (plot := plots.draw(part.file)) is not None:
            sys.stderr.write(f"{plot}\n")
    sys.stderr.write(f"{names[0]}: {time.monotonic() - began:.0f} s\n")


def _each(names: Sequence[str], given: Sequence[str]) -> int:
    """Every part in a process of its own; returns 1 where one ended badly.

    No library's threads or memory of one part lie in the way of the next, and one that ends badly does not take the others along.
    """
    options = [word for word in given if word not in names]
    failed = [name for name in names if subprocess.run([sys.executable, "-m", "benchmarks", *options, name]).returncode]
    for name in failed:
        sys.stderr.write(f"{name}: failed\n")
    return int(bool(failed))


if __name__ == "__main__":
    main()
