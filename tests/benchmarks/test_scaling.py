"""The scaling page: its tables are those of the committed measurement, and the arithmetic is the page's."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import scaling
from benchmarks.record import RESULTS


def test_the_page_shows_the_committed_result() -> None:
    result = json.loads((RESULTS / "pipeline.json").read_text())
    text = scaling.PAGE.read_text()
    assert scaling.rewritten(text, result) == text, "run: python -m benchmarks.scaling"


def test_the_arithmetic() -> None:
    costs = scaling.Costs(main=1.4, decoders=0.7)
    assert costs.events_per_s == pytest.approx(500)
    table = dict(scaling.rows(costs, hits=0.5))
    assert table["worker processes, and partitions at least"] == ["2", "20", "200"]
    assert table["CPU cores (path and decoders)"][0] == str(math.ceil((1.4 + 0.35) / 0.7))
    assert table["GPUs by arithmetic"] == [f"{math.ceil(n / 2 / (0.7 * 10_232))}" for n in (1_000, 10_000, 100_000)]


def test_figures_of_several_runs_are_taken_by_their_median() -> None:
    stage = {"median": 1.0, "low": 0.9, "high": 1.2}
    result = {"figures": {"null_engine": {"cpu_s_per_1000_by_stage": {"python": stage, "decoder processes": 2.0}}}}
    assert scaling.Costs.of(result) == scaling.Costs(1.0, 2.0)


def test_a_million_images_take_what_the_formula_says() -> None:
    """docs/operations.md, sizing: device hours and core hours."""
    path, gpu, cpu = (hours for _, _, hours in scaling.million(scaling.Costs(main=1.8, decoders=0.72), inference=12.6))
    assert path == pytest.approx(1.0)
    assert gpu == pytest.approx(1_000_000 / (0.7 * 10_232) / 3600)
    assert cpu == pytest.approx(5.0)
