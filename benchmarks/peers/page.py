"""The tables of docs/peers.md, from benchmarks/results/peers.json and nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.compare import number
from benchmarks.record import RESULTS

RESULT = RESULTS / "peers.json"
PAGE = Path(__file__).parents[2] / "docs" / "peers.md"
BEGIN, END = "<!-- begin: python -m benchmarks.peers.page -->", "<!-- end -->"

OURS = "this worker"
WAYS = {"one": "released way, from files without Kafka: one by one", "dataloader": "the same by a DataLoader of two processes"}
TITLES = {"openvino": "The real model on this machine's processor", "simulated": "A simulated device"}


def tables(result: dict[str, Any]) -> str:
    """The courses that were run to their end, as Markdown."""
    figures = result["figures"]
    packages = ", ".join(f"{name} {version}" for name, version in figures["packages"].items())
    machine = result["machine"]
    parts = [f"{machine['cpu']}, {machine['cores']} cores; {figures['picture']}; {packages}."]
    parts += [_course(title, figures[name]) for name, title in TITLES.items() if complete(figures.get(name, {}))]
    parts += [_kills(figures["simulated"]["kills"])] if "kills" in figures.get("simulated", {}) else []
    return "\n\n".join(parts)


def complete(course: dict[str, Any]) -> bool:
    """Whether a course was run to its end."""
    return {"throughput", "latency"} <= course.keys()


def _course(title: str, course: dict[str, Any]) -> str:
    rates, paced = (course[part]["contestants"] for part in ("throughput", "latency"))
    made = ", ".join(f"{part} {_moment(course[part])}" for part in ("throughput", "latency"))
    lines = [
        f"**{title}** ({course['model']}). Latency at {paced[OURS]['rate_per_s']:.0f} uploads/s, at random moments.",
        f"Made: {made}.",
        "",
        "| | events/s | CPU s per 1,000 | memory, MiB | p50, ms | p99, ms | the same at that load |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rates.items():
        calm = paced[name]
        cells = [
            _with_range(row["events_per_s"]),
            f"{number(row['cpu_s_per_1000']):.2f}",
            f"{number(row['memory_mib']):.0f}",
            f"{calm['p50_ms']:.0f}",
            f"{calm['p99_ms']:.0f}",
            f"{calm['cpu_s_per_1000']:.2f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        f"| {WAYS[name]} | {row['images_per_s']:.0f} | {row['cpu_s_per_1000']:.2f} | | | | |"
        for name, row in course.get("released", {"contestants": {}})["contestants"].items()
    ]
    return "\n".join([*lines, "", _verdict(rates, paced)])


def _kills(part: dict[str, Any]) -> str:
    lines = [
        f"**Killed** (-9) after a third of a backlog, then started again. Made: {_moment(part)}.",
        "",
        "| | events | lost | repeated |",
        "|---|--:|--:|--:|",
    ]
    rows = part["contestants"].items()
    return "\n".join([*lines, *(f"| {name} | {row['events']} | {row['lost']} | {row['repeated']} |" for name, row in rows)])


def _moment(part: dict[str, Any]) -> str:
    made = part["made"]
    return f"{made['at'][:16]} at commit {made['commit']}, load average {made['load_average']:.0f}"


def _with_range(figure: Any) -> str:
    if not isinstance(figure, dict):
        return f"{figure:.0f}"
    return f"{figure['median']:.0f} ({figure['low']:.0f} to {figure['high']:.0f})"


def _verdict(rates: dict[str, Any], paced: dict[str, Any]) -> str:
    """Who is ahead by how much; where this worker is not, that too."""
    compared = (
        ("events/s", "events_per_s", rates),
        ("CPU", "cpu_s_per_1000", rates),
        ("memory", "memory_mib", rates),
        ("p50", "p50_ms", paced),
        ("p99", "p99_ms", paced),
        ("CPU at that load", "cpu_s_per_1000", paced),
    )
    sentences = [
        _against(what, {name: number(row[key]) for name, row in rows.items()}, most=key == "events_per_s")
        for what, key, rows in compared
    ]
    return f"This worker over the best peer: {'; '.join(sentences)}."


def _against(what: str, figures: dict[str, float], most: bool) -> str:
    others = {name: figure for name, figure in figures.items() if name != OURS}
    best = (max if most else min)(others, key=lambda name: others[name])
    ratio = figures[OURS] / others[best]
    ahead = "" if (ratio > 1) == most else " (**the peer is ahead**)"
    return f"{what} {ratio:.2f} times {best}'s{ahead}"


def rewritten(text: str, result: dict[str, Any]) -> str:
    """The page with its generated part renewed."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{PAGE}: its markers are missing")
    return f"{before}{BEGIN}\n{tables(result)}\n{END}{after}"


def renew(result: dict[str, Any]) -> None:
    """Rewrite docs/peers.md, once a course was run to its end."""
    if any(complete(result["figures"].get(name, {})) for name in TITLES):
        PAGE.write_text(rewritten(PAGE.read_text(), result))


if __name__ == "__main__":
    renew(json.loads(RESULT.read_text()))
    sys.stdout.write(f"{PAGE}\n")
