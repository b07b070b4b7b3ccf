"""What a run shows: a line in a log, a bar on a terminal, TensorBoard's files that go on after a resume."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("tensorboardX")

from train.progress import Display, display, line

torch = pytest.importorskip("torch")

from train.pretrain import Progress  # noqa: E402

SEEN = Progress(40, 100, 1.25, 1.0, 0.25, 0.75, math.nan, 1e-3, 123.4, 0.05)


def test_a_log_gets_lines_and_tensorboard_its_scalars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for first in (0, 40):
        with display(tmp_path, first, 100, on_a_terminal=False) as shown:
            shown.progress(SEEN)
            shown.probe(40, 0.8)
            shown.skipped("s.tar:k.real", "truncated")
    said = capsys.readouterr().err
    assert line(SEEN) in said and "123 views/s, 5.0% waiting for data" in said
    assert (
        "step 40: the probe's balanced accuracy on held-out images is 0.800" in said and "skipped s.tar:k.real: truncated" in said
    )
    written = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"train/loss" in written and b"probe/balanced_accuracy" in written
    assert b"train/aligned_accuracy" not in written  # it was not a number


def test_a_terminal_gets_a_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's word for "this is a terminal"
    monkeypatch.setenv("COLUMNS", "160")
    with display(tmp_path, 0, 100, on_a_terminal=True) as shown:
        shown.progress(SEEN)
        assert shown.every_s < Display(None, None, None).every_s
    said = capsys.readouterr().err
    assert "40" in said and "100" in said and "123 views/s" in said
