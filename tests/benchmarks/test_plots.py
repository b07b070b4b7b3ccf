"""Result files become pictures: every committed one that has a plot, figures with ranges, and none where there is no file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import __main__ as suite
from benchmarks import plots, record


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    return tmp_path


def test_every_committed_result_can_be_drawn(results: Path) -> None:
    committed = Path(plots.__file__).parent / "results"
    found = [path for path in committed.glob("*.json") if path.stem in plots.PLOTS]
    assert found
    for path in found:
        shutil.copy(path, results)
        drawn = plots.draw(path.stem)
        assert drawn == results / "plots" / f"{path.stem}.svg"
        assert "<svg" in drawn.read_text("utf-8")


def test_a_range_is_drawn_as_a_line_and_its_median_as_a_number(results: Path) -> None:
    figures = {"512 px": {"times_as_fast_as_pillow": {"median": 1.625, "low": 1.5, "high": 1.75}}, "library": "one"}
    result = {"machine": {"cpu": "a cpu", "cores": 2}, "commit": "abc", "figures": figures}
    (results / "decode.json").write_text(json.dumps(result))
    drawn = plots.draw("decode")
    assert drawn is not None
    text = drawn.read_text("utf-8")
    assert "1.62" in text and "512 px" in text and "a cpu, 2 cores, abc" in text


def test_what_was_not_measured_is_not_drawn(results: Path) -> None:
    assert plots.draw("decode") is None
    assert not list(results.iterdir())


def test_every_part_of_the_suite_has_a_plot() -> None:
    files = {part.file for part in suite.PARTS.values()}
    assert files - {"batcher_simulated"} <= set(plots.PLOTS)
