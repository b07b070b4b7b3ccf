"""The tables of docs/peers.md, from benchmarks/results/peers.json and nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

RESULT = RESULTS / "peers.json"
PAGE = Path(__file__).parents[2] / "docs" / "peers.md"
BEGIN, END = "<!-- begin: python -m benchmarks.peers.page -->", "<!-- end -->"

OURS = "this worker"
TITLES = {"openvino": "The real model on this machine's processor", "simulated": "A simulated device"}


def tables(result: dict[str, Any]) -> str:
    """The courses that were run to their end, as Markdown."""
    figures = result["figures"]
    packages = ", ".join(f"{name} {version}" for name, version in figures["packages"].items())
    machine = result["machine"]
    parts = [f"{machine['cpu']}, {machine['cores']} cores; {figures['picture']}; {packages}."]
    parts += [_course(title, figures[name]) for name, title in TITLES.items() if complete(figures.get(name, {}))]
    return "\n\n".join(parts)


def complete(course: dict[str, Any]) -> bool:
    """Whether every part of a course was run."""
    return {"speed", "kills"} <= course.keys()


def _course(title: str, course: dict[str, Any]) -> str:
    speed, kills = course["speed"], course["kills"]
    made, released = speed["made"], speed["released"]
    lines = [
        f"**{title}** ({course['model']}); commit {made['commit']}, {made['at'][:10]}; throughput: mean of {made['rounds']} "
        f"rounds (range), latency at {speed['paced_per_s']:.0f} uploads/s at random moments:",
        "",
        "| | events/s | CPU s per 1,000 | memory, MiB | p50, ms | p99, ms | CPU s per 1,000, paced | killed: lost, repeated |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in speed["contestants"].items():
        lost = kills["contestants"][name]
        cells = [
            f"{row['events_per_s']['mean']:.0f} ({row['events_per_s']['low']:.0f} to {row['events_per_s']['high']:.0f})",
            f"{row['cpu_s_per_1000']['mean']:.2f}",
            f"{row['memory_mib']['mean']:.0f}",
            f"{row['p50_ms']:.0f}",
            f"{row['p99_ms']:.0f}",
            f"{row['paced_cpu_s_per_1000']:.2f}",
            f"{lost['lost']}, {lost['repeated']} of {lost['events']}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        f"| released way from files, no Kafka: {name} | {row['images_per_s']:.0f} | {row['cpu_s_per_1000']:.2f} | | | | | |"
        for name, row in released.items()
    ]
    return "\n".join([*lines, "", _verdict(speed)])


def _verdict(speed: dict[str, Any]) -> str:
    """Who is ahead by how much; where this worker is not, that too."""
    rows = {name: row for name, row in speed["contestants"].items() if name != OURS}
    own = speed["contestants"][OURS]
    sentences = [
        _against("events/s", own["events_per_s"]["mean"], {n: r["events_per_s"]["mean"] for n, r in rows.items()}, most=True),
        _against("p50", own["p50_ms"], {n: r["p50_ms"] for n, r in rows.items()}),
        _against("p99", own["p99_ms"], {n: r["p99_ms"] for n, r in rows.items()}),
        _against("CPU", own["cpu_s_per_1000"]["mean"], {n: r["cpu_s_per_1000"]["mean"] for n, r in rows.items()}),
        _against("CPU, paced", own["paced_cpu_s_per_1000"], {n: r["paced_cpu_s_per_1000"] for n, r in rows.items()}),
        _against("memory", own["memory_mib"]["mean"], {n: r["memory_mib"]["mean"] for n, r in rows.items()}),
    ]
    return f"This worker over the best peer: {'; '.join(sentences)}."


def _against(what: str, own: float, others: dict[str, float], most: bool = False) -> str:
    best = (max if most else min)(others, key=lambda name: others[name])
    ratio = own / others[best]
    wins = "" if (ratio > 1) == most else ": **the peer is ahead**"
    return f"{what} {ratio:.2f} times {best}'s{wins}"


def rewritten(text: str, result: dict[str, Any]) -> str:
    """The page with its generated part renewed."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{PAGE}: its markers are missing")
    return f"{before}{BEGIN}\n{tables(result)}\n{END}{after}"


def renew(result: dict[str, Any]) -> None:
    """Rewrite docs/peers.md, once both courses have been run."""
    if all(complete(result["figures"].get(name, {})) for name in TITLES):
        PAGE.write_text(rewritten(PAGE.read_text(), result))


if __name__ == "__main__":
    renew(json.loads(RESULT.read_text()))
    sys.stdout.write(f"{PAGE}\n")
