"""How `classify` shows its rows: JSON lines, tab-separated columns, or coloured columns and a progress bar on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from engine.classify import Classified
    from engine.detector import Detector

Show = Callable[["Classified"], None]

PROGRESS_FROM_FILES = 50
"""Fewer are done before a bar is of use."""

_HEADER = ("score", "label", "size", "format", "path")
_STYLES = {"ai_generated": "bold red", "authentic": "green", "undetermined": "yellow"}


@contextmanager
def printer(as_json: bool, detector: Detector, count: Callable[[], int]) -> Iterator[Show]:
    """A function that prints one row, while the block lasts.

    Rows go to standard output, the progress bar to standard error (or, where both are the same terminal, below the rows), and
    only where that is a terminal. `count` tells how many rows there will be; it is asked only for a bar.
    """
    from rich.console import Console

    on_terminal = sys.stdout.isatty() and not as_json
    console = Console(soft_wrap=False, highlight=False) if on_terminal else Console(stderr=True)
    if as_json:
        show: Show = lambda row: print(json.dumps(to_json(detector, row)), flush=True)  # noqa: E731
    elif on_terminal:
        _print_columns(console, _HEADER, "bold")
        show = lambda row: _print_columns(console, columns(row), _STYLES[label(row)])  # noqa: E731
    else:
        print("\t".join(_HEADER))
        show = lambda row: print("\t".join(columns(row)), flush=True)  # noqa: E731
    with _progress(console, count) as advance:

        def show_and_advance(row: Classified) -> None:
            show(row)
            advance()

        yield show_and_advance


def label(row: Classified) -> str:
    """The contract's label, by a score of one half: thresholds are the worker's policy."""
    if row.score is None:
        return "undetermined"
    return "ai_generated" if row.score.score >= 0.5 else "authentic"


def to_json(detector: Detector, row: Classified) -> dict[str, Any]:
    """One line of `--json`. `error` is null, or the code and message of an image without a score."""
    return {
        "path": row.name,
        "score": None if row.score is None else row.score.score,
        "label": label(row),
        "heads": {} if row.score is None else row.score.heads,
        "crops": [] if row.score is None else list(row.score.crops),
        "width": row.width or None,
        "height": row.height or None,
        "format": row.format or None,
        "frames": row.frames,
        "error": None if row.failure is None else {"code": row.failure.code, "message": row.failure.message},
        "model": {
            "name": detector.name,
            "version": detector.version,
            "head": detector.head,
            "backend": detector.backend_name,
            "device": detector.device,
        },
    }


def columns(row: Classified) -> tuple[str, ...]:
    """The five columns for eyes: score, label, size, format, path and what went wrong."""
    score = "-" if row.score is None else f"{row.score.score:.4f}"
    size = f"{row.width}x{row.height}" if row.width else "-"
    path = printable(row.name)
    if row.failure is not None:
        path = f"{path}: {row.failure.code}: {printable(row.failure.message)}"
    return score, label(row), size, row.format or "-", path


def printable(text: str) -> str:
    """Without control characters and broken encodings: a file's name must not move the cursor or break a line."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _print_columns(console: Console, values: tuple[str, ...], style: str) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for width in (6, 12, 11, 6):
        table.add_column(width=width, no_wrap=True)
    table.add_column(overflow="fold")
    cells: list[RenderableType] = [Text(value, style=style if i < 2 else "") for i, value in enumerate(values)]
    table.add_row(*cells)
    console.print(table)


@contextmanager
def _progress(console: Console, count: Callable[[], int]) -> Iterator[Callable[[], None]]:
    total = count() if console.is_terminal else 0
    if total < PROGRESS_FROM_FILES:
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(
        BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True, redirect_stdout=False
    ) as bar:
        task = bar.add_task("images", total=total)
        yield lambda: bar.advance(task)
