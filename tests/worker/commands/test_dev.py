"""The demo goes on without its console."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from worker.commands import dev
from worker.settings import Settings, environment_name


def test_a_console_that_does_not_start_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("starlette")
    for name in ("port", "auth", "metrics_urls"):  # so that they are put back
        monkeypatch.setenv(environment_name("console", name), "0" if name == "port" else "none")
    broken = [sys.executable, "-c", "import sys; print('no place for it', file=sys.stderr); sys.exit(2)"]
    monkeypatch.setattr(dev._Console, "_command", lambda _: broken)
    with contextlib.ExitStack() as stack:
        said = dev._console(stack, tmp_path / "console.log", Settings())
    assert said.startswith("none: embedded console")
