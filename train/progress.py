"""How a pretraining run shows itself: a bar on a terminal, lines in a log, TensorBoard files beside the run."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.pretrain import Progress

BAR_EVERY_S, LINE_EVERY_S = 1.0, 20.0


class Display:
    """Takes progress, probes and damage of a run; `on_a_terminal` chooses bar or lines."""

    def __init__(self, bar: Any, task: Any, board: Any) -> None:
        self._bar, self._task, self._board = bar, task, board

    @property
    def every_s(self) -> float:
        """How often it wants to hear."""
        return LINE_EVERY_S if self._bar is None else BAR_EVERY_S

    def progress(self, progress: Progress) -> None:
        if self._board is not None:
            for name, number in asdict(progress).items():
                if name not in ("step", "steps") and not math.isnan(number):
                    self._board.add_scalar(f"train/{name}", number, progress.step)
        if self._bar is None:
            self.say(line(progress))
            return
        self._bar.update(
            self._task,
            completed=progress.step,
            total=progress.steps,
            told=f"loss {progress.loss:.3f}  accuracy {progress.accuracy:.3f}  {progress.views_per_s:.0f} views/s  "
            f"{progress.waited_share:.0%} waiting for data",
        )

    def probe(self, step: int, accuracy: float) -> None:
        if self._board is not None:
            self._board.add_scalar("probe/balanced_accuracy", accuracy, step)
        self.say(f"step {step}: the probe's balanced accuracy on held-out images is {accuracy:.3f}")

    def skipped(self, name: str, reason: str) -> None:
        self.say(f"skipped {name}: {reason}")

    def say(self, text: str) -> None:
        """One line; above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


@contextmanager
def display(folder: Path, first_step: int, steps: int, on_a_terminal: bool | None = None) -> Iterator[Display]:
    """A display for a run in `folder`; TensorBoard files go to folder/tensorboard, going on after `first_step`."""
    board = _board(folder / "tensorboard", first_step)
    if on_a_terminal is None:
        on_a_terminal = sys.stderr.isatty()
    try:
        if not on_a_terminal:
            yield Display(None, None, board)
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (MofNCompleteColumn(), BarColumn(bar_width=24), TimeRemainingColumn(), TextColumn("{task.fields[told]}"))
        with Bar(*columns, console=Console(stderr=True)) as bar:
            yield Display(bar, bar.add_task("train", total=steps, completed=first_step, told=""), board)
    finally:
        if board is not None:
            board.close()


def line(progress: Progress) -> str:
    """The line of a log."""
    return (
        f"step {progress.step}/{progress.steps}  loss {progress.loss:.4f} (contrastive {progress.contrastive:.4f}, "
        f"cross entropy {progress.cross_entropy:.4f})  accuracy {progress.accuracy:.3f}, aligned {progress.aligned_accuracy:.3f} "
        f"lr {progress.learning_rate:.2e}  {progress.views_per_s:.0f} views/s, {progress.waited_share:.1%} waiting for data"
    )


def _board(folder: Path, first_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        print("tensorboardX is not installed (extra `train`): no TensorBoard files", file=sys.stderr, flush=True)
        return None
    # What an interrupted run wrote beyond its last checkpoint is overwritten.
    return SummaryWriter(str(folder), purge_step=first_step or None, flush_secs=10)
