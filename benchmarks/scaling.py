"""`python -m benchmarks.scaling`: writes the tables of docs/scaling.md from the measured results of the pipeline benchmark.

What a rate takes is arithmetic on measured costs; what was not measured here (a GPU's rate) is named with its source.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compare import number
from benchmarks.record import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- begin: python -m benchmarks.scaling -->", "<!-- end -->"

RATES = (1_000, 10_000, 100_000)
USE = 0.7
"""Share of a process, core or device that is planned for; the rest is for peaks and rebalances."""
GPU_IMAGES_PER_S = 10_232
"""ViT-Tiny 224, RTX 3090, AMP: timm's published table, not measured here."""
VERDICT_BYTES = 1_300
REFERENCE_BYTES = 400
"""Of an event that names its image by URL."""
IMAGE_BYTES = 300_000
"""Of an upload, as it is fetched."""
ENTRY_BYTES = 350
"""Of a cached score in Redis, its key and overhead included."""
CORE_HOUR, GPU_HOUR = 0.04, 1.00
"""Prices to show the sum with, in any currency: nobody's offer. Put in your own."""


@dataclass(frozen=True, slots=True)
class Costs:
    """CPU seconds per 1,000 events of the path, without the engine's arithmetic."""

    main: float
    """Of the main process: one core at most, since its stages are threads of one interpreter."""
    decoders: float

    @classmethod
    def of(cls, result: dict[str, Any]) -> Costs:
        """From benchmarks/results/pipeline.json."""
        stages = {name: number(value) for name, value in result["figures"]["null_engine"]["cpu_s_per_1000_by_stage"].items()}
        decoders = stages.pop("decoder processes")
        return cls(sum(stages.values()), decoders)

    @property
    def events_per_s(self) -> float:
        """What one main process carries at the planned use."""
        return USE * 1000 / self.main


def rows(costs: Costs, hits: float) -> list[tuple[str, list[str]]]:
    """A line for each resource, a cell for each rate; `hits` is the share of cached images."""
    missed = [rate * (1 - hits) for rate in RATES]
    processes = [math.ceil(rate / costs.events_per_s) for rate in RATES]
    cores = [
        math.ceil((rate * costs.main + miss * costs.decoders) / 1000 / USE) for rate, miss in zip(RATES, missed, strict=True)
    ]
    devices = [math.ceil(miss / (USE * GPU_IMAGES_PER_S)) for miss in missed]
    return [
        ("worker processes, and partitions at least", [f"{n:,}" for n in processes]),
        ("CPU cores (path and decoders)", [f"{n:,}" for n in cores]),
        ("GPUs by arithmetic", [f"{n:,}" for n in devices]),
        ("images fetched, GB/s", [f"{rate * IMAGE_BYTES / 1e9:.1f}" for rate in RATES]),
        ("uploads by reference into Kafka, MB/s", [f"{rate * REFERENCE_BYTES / 1e6:.1f}" for rate in RATES]),
        ("uploads inline into Kafka, GB/s", [f"{rate * IMAGE_BYTES / 1e9:.1f}" for rate in RATES]),
        ("verdicts, MB/s before compression", [f"{rate * VERDICT_BYTES / 1e6:.0f}" for rate in RATES]),
        (
            "Redis commands a second (a look-up each, a write each miss)",
            [f"{rate + miss:,.0f}" for rate, miss in zip(RATES, missed, strict=True)],
        ),
        ("Redis memory for a day of scores, GB", [f"{miss * 86_400 * ENTRY_BYTES / 1e9:,.0f}" for miss in missed]),
    ]


def million(costs: Costs, inference: float) -> list[tuple[str, str, float]]:
    """What a million images take that are not cached, one crop each: resource, its arithmetic, hours.

    Args:
        inference: CPU seconds per 1,000 images where CPUs infer.
    """
    path = costs.main + costs.decoders
    return [
        ("CPU cores, path and decoders", f"1,000 x {path:.2f} / (3,600 x {USE})", 1000 * path / 3600 / USE),
        ("a GPU", f"1,000,000 / (3,600 x {USE} x {GPU_IMAGES_PER_S:,})", 1e6 / 3600 / USE / GPU_IMAGES_PER_S),
        ("or CPU cores for inference", f"1,000 x {inference:.2f} / (3,600 x {USE})", 1000 * inference / 3600 / USE),
    ]


def _million_lines(result: dict[str, Any], costs: Costs) -> list[str]:
    figures = result["figures"]
    inference = number(figures["real_engine"]["cpu_s_per_1000"]) - number(figures["null_engine"]["cpu_s_per_1000"])
    table = million(costs, inference)
    path, gpu, cpu = (hours for _, _, hours in table)
    return [
        "",
        "A million images, none cached, one crop each. The last two lines are for images that are scored: times 1 - h",
        "where a share h is cached, times 5 with five crops.",
        "",
        "| | arithmetic | hours |",
        "|---|---|--:|",
        *[f"| {name} | {arithmetic} | {hours:.3g} |" for name, arithmetic, hours in table],
        "",
        f"At {CORE_HOUR:.2f} a core hour and {GPU_HOUR:.2f} a GPU hour (examples; put in yours) that is "
        f"{path * CORE_HOUR:.3f} + {gpu * GPU_HOUR:.3f} = **{path * CORE_HOUR + gpu * GPU_HOUR:.2f} a million with GPUs**,",
        f"{path * CORE_HOUR:.3f} + {cpu * CORE_HOUR:.3f} = **{(path + cpu) * CORE_HOUR:.2f} with CPUs alone**: "
        "brokers, cache, store and traffic not counted, and every core and GPU busy at",
        f"{USE:.0%} around the clock. A GPU that waits costs the same: at 1,000 images a second it is used for a tenth.",
    ]


def page(result: dict[str, Any]) -> str:
    """The generated part of docs/scaling.md."""
    costs = Costs.of(result)
    machine = result["machine"]
    lines = [
        f"Measured ({machine['cpu']}, {machine['cores']} cores, commit {result['commit']}): the path costs {costs.main:.2f} CPU "
        "seconds per 1,000 events in the main process",
        f"and {costs.decoders:.2f} in its decoders (512x512 JPEGs, inline, none cached), so one process carries "
        f"{costs.events_per_s:,.0f} events/s at {USE:.0%} of a core.",
    ]
    for hits in (0.0, 0.5):
        lines += [
            "",
            f"Share of cached images {hits:.0%}:",
            "",
            "| | " + " | ".join(f"{rate:,}/s" for rate in RATES) + " |",
            "|---|" + "--:|" * len(RATES),
        ]
        lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows(costs, hits)]
    return "\n".join([*lines, *_million_lines(result, costs)])


def rewritten(text: str, result: dict[str, Any]) -> str:
    """The page with its generated part renewed."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{PAGE}: its markers are missing")
    return f"{before}{BEGIN}\n{page(result)}\n{END}{after}"


def main() -> None:
    """Rewrite the page."""
    result = json.loads((RESULTS / "pipeline.json").read_text())
    PAGE.write_text(rewritten(PAGE.read_text(), result))
    sys.stdout.write(f"{PAGE}\n")


if __name__ == "__main__":
    main()
