"""Comparing results: what counts as a change, how runs are merged, what a wrong file gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.compare import changes, differences, figures, merge


def result(**found: Any) -> dict[str, Any]:
    return {"benchmark": "b", "machine": {"cores": 2}, "versions": {"numpy": "2"}, "commit": "c", "figures": found}


def test_ranges_that_meet_are_noise_and_others_are_not() -> None:
    before = result(rate={"median": 100.0, "low": 90.0, "high": 110.0}, cost={"median": 4.0, "low": 3.9, "high": 4.1})
    after = result(rate={"median": 112.0, "low": 109.0, "high": 120.0}, cost={"median": 3.0, "low": 2.9, "high": 3.2})
    assert {change.name: change.beyond_noise for change in changes(before, after)} == {"rate": False, "cost": True}


def test_what_was_measured_once_has_the_noise_of_a_shared_machine() -> None:
    (change,) = changes(result(rate=100.0), result(rate=125.0))
    assert not change.beyond_noise
    (change,) = changes(result(rate=100.0), result(rate=140.0))
    assert change.beyond_noise and change.ratio == 1.4
    (change,) = changes(result(rate=100.0), result(rate=110.0), noise=0.01)
    assert change.beyond_noise


def test_counts_and_figures_of_one_file_only_are_not_compared() -> None:
    assert changes(result(events=10, a={"x": 1.0}, gone=1.0), result(events=20, a={"x": 1.0}, new=2.0))[0].name == "a · x"
    assert len(changes(result(events=10, gone=1.0), result(events=20, new=2.0))) == 0


@given(st.lists(st.floats(0.1, 1e6), min_size=2, max_size=6))
def test_merged_runs_hold_every_run(values: list[float]) -> None:
    merged = merge([{"part": {"rate": value, "name": "x", "events": 3}} for value in values])
    ((name, figure),) = figures(merged)
    assert name == "part · rate"
    assert figure.low == min(values) <= figure.value <= max(values) == figure.high
    assert merged["part"]["name"] == "x" and merged["part"]["events"] == 3


def test_other_machines_are_named() -> None:
    other = result(rate=1.0) | {"machine": {"cores": 64}, "versions": {"numpy": "2", "torch": "3"}}
    assert differences(result(rate=1.0), other) == ["machine: cores: 2 -> 64", "versions: torch: None -> 3"]


def test_the_command(tmp_path: Path) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps(result(rate=100.0, cost=1.0)))
    after.write_text(json.dumps(result(rate=200.0, cost=1.05)))
    done = subprocess.run([sys.executable, "-m", "benchmarks.compare", str(before), str(after)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 of 2 figures changed beyond noise" in done.stdout and "2.00" in done.stdout
    after.write_text("{}")
    done = subprocess.run([sys.executable, "-m", "benchmarks.compare", str(before), str(after)], capture_output=True, text=True)
    assert done.returncode == 1 and "after.json: not a result" in done.stderr and "Traceback" not in done.stderr
