"""The tables of docs/peers.md, from benchmarks/results/peers.json and nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.compare import number
from benchmarks.peers.contestants import OURS
from benchmarks.record import RESULTS

RESULT = RESULTS / "peers.json"
PAGE = Path(__file__).parents[2] / "docs" / "peers.md"
BEGIN, END = "<!-- begin: python -m benchmarks.peers.page -->", "<!-- end -->"

OTHERS = 0.1
"""Of the processors: with more than that beside a contestant, what a clock says is not shown."""
TITLES = {
    "openvino": "The real model on this machine's processor, small pictures",
    "openvino-mixed": "The real model on this machine's processor, a mixture of sizes",
    "simulated": "A simulated device, small pictures",
    "simulated-mixed": "A simulated device, a mixture of sizes",
}


def tables(result: dict[str, Any]) -> str:
    """What was measured, as Markdown. What a clock says is left out where others used the machine: processor time is not."""
    figures, machine = result["figures"], result["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in figures["packages"].items())
    parts = [f"{machine['cpu']}, {machine['cores']} cores; {packages}."]
    parts += [_course(title, figures[name]) for name, title in TITLES.items() if "throughput" in figures.get(name, {})]
    parts += [_kills(figures["simulated"]["kills"])] if "kills" in figures.get("simulated", {}) else []
    return "\n\n".join(parts)


def quiet(part: dict[str, Any]) -> bool:
    """Whether other work took little of the processors beside every contestant."""
    return all(number(row.get("others_share", 1.0)) <= OTHERS for row in part["contestants"].values())


def _course(title: str, course: dict[str, Any]) -> str:
    throughput, latency = course["throughput"], course.get("latency")
    columns = [("CPU s per 1,000", throughput, "cpu_s_per_1000", ".2f"), ("memory, MiB", throughput, "memory_mib", ".0f")]
    if quiet(throughput):
        columns.insert(0, ("events/s", throughput, "events_per_s", ".0f"))
    if latency is not None and quiet(latency):
        columns += [("p50, ms", latency, "p50_ms", ".0f"), ("p99, ms", latency, "p99_ms", ".0f")]
        columns += [("CPU s per 1,000 at that load", latency, "cpu_s_per_1000", ".2f")]
    names = list(throughput["contestants"])
    lines = [
        f"**{title}** ({course['model']}; {course['picture']}). Made: {_moment(throughput)}.{_about_latency(latency)}",
        "",
        f"| | {' | '.join(heading for heading, *_ in columns)} |",
        f"|---|{'--:|' * len(columns)}",
        *(
            f"| {name} | {' | '.join(_cell(part['contestants'][name][key], form) for _, part, key, form in columns)} |"
            for name in names
        ),
        "",
        "This worker over the best peer: "
        + "; ".join(_against(heading, _figures(part, key), most=key == "events_per_s") for heading, part, key, _ in columns)
        + ".",
    ]
    if (busy := course.get("busy")) is not None and quiet(busy):
        lines += ["", _busy(busy)]
    if (released := course.get("released")) is not None:
        ways = (_released(way, row, quiet(throughput)) for way, row in released["contestants"].items())
        lines += ["", f"The released way, from files and without Kafka: {'; '.join(ways)}."]
    if not quiet(throughput):
        lines += [
            "",
            "The machine was busy with other work: events/s and latency are not shown, for they would say who had luck.",
        ]
    return "\n".join(lines)


def _released(way: str, row: dict[str, float], clock: bool) -> str:
    name = {"one": "one image at a time", "dataloader": "a DataLoader's batches"}[way]
    rate = f"{row['images_per_s']:.0f} images/s, " if clock else ""
    return f"{name} {rate}{row['cpu_s_per_1000']:.2f} CPU s per 1,000, {row['memory_mib']:.0f} MiB"


def _about_latency(latency: dict[str, Any] | None) -> str:
    if latency is None or not quiet(latency):
        return ""
    rate = next(iter(latency["contestants"].values()))["rate_per_s"]
    return f" Latency at {rate:.0f} uploads/s, at random moments: {_moment(latency)}."


def _busy(part: dict[str, Any]) -> str:
    rows = part["contestants"]
    rate = next(iter(rows.values()))["rate_per_s"]
    named = ", ".join(f"{name} {row['p50_ms']:.0f} and {row['p99_ms']:.0f} ms" for name, row in rows.items())
    ratios = "; ".join(_against(f"{what}, ms", _figures(part, f"{what}_ms"), most=False) for what in ("p50", "p99"))
    return f"At {rate:.0f} uploads/s, most of what the best peer carries ({_moment(part)}): p50 and p99 of {named}. {ratios}."


def _figures(part: dict[str, Any], key: str) -> dict[str, float]:
    return {name: number(row[key]) for name, row in part["contestants"].items()}


def _cell(figure: Any, form: str) -> str:
    if not isinstance(figure, dict):
        return format(figure, form)
    return f"{figure['median']:{form}} ({figure['low']:{form}} to {figure['high']:{form}})"


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


def _against(what: str, figures: dict[str, float], most: bool) -> str:
    """The better of this worker's shapes over the best of the others."""
    choose = max if most else min
    mine, theirs = ({name: f for name, f in figures.items() if (name in OURS) is own} for own in (True, False))
    own, best = choose(mine, key=lambda name: mine[name]), choose(theirs, key=lambda name: theirs[name])
    ratio = mine[own] / theirs[best]
    ahead = "" if (ratio > 1) == most else " (**the peer is ahead**)"
    shape = own.partition(", ")[2]
    return f"{what} {ratio:.2f} times {best}'s{f' ({shape})' if shape else ''}{ahead}"


def rewritten(text: str, result: dict[str, Any]) -> str:
    """The page with its generated part renewed."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{PAGE}: its markers are missing")
    return f"{before}{BEGIN}\n{tables(result)}\n{END}{after}"


def renew(result: dict[str, Any]) -> None:
    """Rewrite docs/peers.md."""
    PAGE.write_text(rewritten(PAGE.read_text(), result))


if __name__ == "__main__":
    renew(json.loads(RESULT.read_text()))
    sys.stdout.write(f"{PAGE}\n")
