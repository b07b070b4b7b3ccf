"""The suite's own work: repeated runs become one file, what cannot run here is passed over, the options mean what they say."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as suite
from benchmarks import record, shapes


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    return tmp_path


def part(*values: float | None) -> suite.Part:
    left = list(values)

    def one(_: suite.Scale) -> dict[str, Any] | None:
        value = left.pop(0)
        return None if value is None else {"rate": value, "events": 5}

    return suite.Part("a part", "some_part", one)


def test_repeated_runs_become_median_and_range_in_the_file(results: Path) -> None:
    figures = suite.run(part(10.0, 30.0, 20.0), suite.QUICK, 3)
    assert figures == {"rate": {"median": 20.0, "low": 10.0, "high": 30.0}, "events": 5}
    assert json.loads((results / "some_part.json").read_text())["figures"] == figures
    assert suite._rows(figures) == [("rate", "20.000 (10.000 to 30.000)"), ("events", "5")]


def test_what_cannot_run_here_leaves_no_file(results: Path) -> None:
    assert suite.run(part(None), suite.FULL, 2) is None
    assert not list(results.iterdir())


def test_parts_are_run_at_their_scale_and_a_wrong_one_is_named(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[suite.Scale] = []
    monkeypatch.setattr(suite, "PARTS", {"one": suite.Part("t", "f", lambda scale: seen.append(scale))})
    for arguments in (["one"], ["--quick"], ["--repeat", "2", "--quick", "one"]):
        monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
        suite.main()
    assert seen == [suite.FULL, suite.QUICK, suite.QUICK]
    monkeypatch.setattr("sys.argv", ["benchmarks", "two"])
    with pytest.raises(SystemExit) as ended:
        suite.main()
    assert ended.value.code == 2 and "two" in capsys.readouterr().err


def test_several_parts_have_a_process_each_and_one_that_ends_badly_is_named_after_the_others_have_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def runs(command: list[str]) -> subprocess.CompletedProcess[str]:
        asked.append(command[1:])
        return subprocess.CompletedProcess(command, -11 if command[-1] == "shapes" else 0)

    monkeypatch.setattr(subprocess, "run", runs)
    monkeypatch.setattr("sys.argv", ["benchmarks", "--repeat", "2", "--quick", "decode", "shapes", "cache"])
    with pytest.raises(SystemExit) as ended:
        suite.main()
    assert ended.value.code == 1 and "shapes: failed" in capsys.readouterr().err
    assert asked == [["-m", "benchmarks", "--repeat", "2", "--quick", name] for name in ("decode", "shapes", "cache")]
    asked.clear()
    monkeypatch.setattr("sys.argv", ["benchmarks"])
    with pytest.raises(SystemExit):
        suite.main()
    assert [command[-1] for command in asked] == list(suite.PARTS)


def test_the_share_of_known_pictures_is_as_asked_for() -> None:
    pictures = shapes.mixed(600, 0.5)
    known = set(pictures[: shapes.KNOWN])
    assert len(pictures) == 600 and len(known) == shapes.KNOWN
    assert 0.4 < sum(picture in known for picture in pictures[shapes.KNOWN :]) / (600 - shapes.KNOWN) < 0.6
