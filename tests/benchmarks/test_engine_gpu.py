"""The hardware table's script: figures, what is missing, the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import engine_gpu
from benchmarks.engine_gpu import Figure, Missing
from engine.backends import create
from engine.backends.base import BackendUnavailable
from tests.engine.bundles import random_bundle


def test_cpu_paths_take_turns_and_missing_ones_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(name: str, device: str, precision: str) -> object:
        if (name, precision) == ("openvino", "bf16"):
            raise BackendUnavailable("this processor has no bfloat16")
        return create("null")

    monkeypatch.setattr(engine_gpu.backends, "create", stand_in)
    rows = list(engine_gpu.cpu(random_bundle(tmp_path / "1"), [1, 3], 0.01))
    assert [row for row in rows if isinstance(row, Missing)] == [Missing("openvino bf16", "this processor has no bfloat16")]
    figures = [row for row in rows if isinstance(row, Figure)]
    assert [(figure.path, figure.batch_size) for figure in figures] == [
        (path, size) for size in (1, 3) for path in ("torch fp32", "torch bf16", "openvino fp32")
    ]
    assert all(figure.images_per_s > 0 and figure.latency_ms > 0 for figure in figures)
    assert set(engine_gpu.ratios(figures)["openvino fp32 / torch fp32"]) == {1, 3}


def test_two_under_way_hands_back_the_batch_before() -> None:
    class Backend:
        depth = 2

        def submit(self, crops: object) -> object:
            return ("ticket", crops)

        def collect(self, ticket: object) -> object:
            return ("outputs", ticket)

    run = engine_gpu._overlapped(Backend())
    assert [run(1), run(2), run(3)] == [None, ("outputs", ("ticket", 1)), ("outputs", ("ticket", 2))]  # type: ignore[arg-type]


def test_the_table() -> None:
    figures = [Figure("a", "cuda:0", 1, 1234.5, 0.81, 0.02), Figure("a", "cuda:0", 32, 9876.0, 3.24, 0.41)]
    table = engine_gpu.markdown("Fake L4", figures, [Missing("b", "no wheel")])
    assert table.splitlines() == [
        "| Fake L4 | batch 1 | batch 32 | best share of peak |",
        "|---|---|---|---|",
        "| a | 1,234 (0.8 ms) | 9,876 (3.2 ms) | 41% |",
        "| b | — | — | |",
    ]


@pytest.mark.slow
def test_a_worker_end_to_end() -> None:
    whole = engine_gpu.worker(240)
    assert whole["backend"] in {"openvino", "torch", "tensorrt", "tensorrt_rtx"}
    assert whole["events_per_s"] > 0
    assert whole["cpu_s_per_1000"] > 0
