"""`python -m benchmarks.peers`: this worker and what one would otherwise put together: same images, model, machine, one run.

For each contestant: throughput over a backlog, CPU seconds and memory; latency at the same load for all; events lost and
repeated when everything of it is killed (-9) in the middle and started again. Packages: extra `peers`. A run of one part keeps
the other part's and the other model's figures of benchmarks/results/peers.json; each says when, and on which commit, it was made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from benchmarks import record
from benchmarks.peers import page
from benchmarks.peers.contestants import CONTESTANTS
from benchmarks.peers.measures import killed, latency, released, throughput
from benchmarks.pipeline import jpegs

PACKAGES = ("faststream", "aiokafka", "litserve", "mosec", "openvino")
EVENTS = {"openvino": 700, "simulated": 2400}
PARTS = ("speed", "kills")


def speed(model: str, events: int, rounds: int, seconds: float, load: float, scratch: Path) -> dict[str, Any]:
    """Throughput of everybody, in turns (every second round backwards), then latency at a share of the slowest one's."""
    pictures = jpegs(events)
    found: dict[str, dict[str, Any]] = {contestant.name: {} for contestant in CONTESTANTS}
    for number in range(rounds):
        for contestant in CONTESTANTS[:: -1 if number % 2 else 1]:
            for name, value in throughput(contestant, model, pictures, scratch).items():
                found[contestant.name].setdefault(name, []).append(value)
    for figures in found.values():
        for name, values in figures.items():
            figures[name] = {"mean": sum(values) / rounds, "low": min(values), "high": max(values)}
    rate = load * min(figures["events_per_s"]["mean"] for figures in found.values())
    for contestant in CONTESTANTS:
        found[contestant.name] |= latency(contestant, model, pictures, rate, seconds, scratch)
    return {
        "made": record.moment() | {"load_average": os.getloadavg()[0], "rounds": rounds},
        "paced_per_s": rate,
        "released": released(model, pictures[: min(events, 700)], scratch),
        "contestants": found,
    }


def kills(model: str, events: int, scratch: Path) -> dict[str, Any]:
    """What a kill costs everybody."""
    pictures = jpegs(events)
    found = {contestant.name: killed(contestant, model, pictures, scratch) for contestant in CONTESTANTS}
    return {"made": record.moment(), "contestants": found}


def main() -> None:
    """Run, print, write benchmarks/results/peers.json and the table of docs/peers.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", help="speed, kills; both by default")
    parser.add_argument("--only", choices=tuple(EVENTS), help="one model: the real one, or the simulated device")
    parser.add_argument("--events", type=int, help="of a backlog (default 700 and 2400)")
    parser.add_argument("--rounds", type=int, default=2, help="of the throughput part")
    parser.add_argument("--seconds", type=float, default=15, help="of paced uploads")
    parser.add_argument("--load", type=float, default=0.6, help="share of the slowest contestant's throughput for the paced part")
    parser.add_argument("--simulated", default="0.004,0.00015", metavar="A,B", help="seconds a batch of n takes: A + B*n")
    given = parser.parse_args()
    figures = json.loads(page.RESULT.read_text())["figures"] if page.RESULT.exists() else {}
    figures |= {"picture": "512x512 JPEG, inline", "packages": {name: record.version(name) for name in PACKAGES}}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        models = {"openvino": str(scratch / "model.onnx"), "simulated": given.simulated}
        command = [sys.executable, "-m", "engine", "export", "--out", models["openvino"]]
        subprocess.run(command, check=True, capture_output=True)
        os.environ["PEER_DEVICE_LOCK"] = str(scratch / "device.lock")
        for name in (given.only,) if given.only else models:
            events = given.events or EVENTS[name]
            course = figures.setdefault(name, {})
            if "speed" in (given.parts or PARTS):
                course["speed"] = speed(models[name], events, given.rounds, given.seconds, given.load, scratch)
            if "kills" in (given.parts or PARTS):
                course["kills"] = kills(models[name], min(events, 600), scratch)
            course["model"] = given.simulated if name == "simulated" else "the packaged bundle's ONNX file on OpenVINO"
            path = record.write("peers", figures)
    result = json.loads(path.read_text())
    Console(width=140).print(Markdown(page.tables(result)))
    page.renew(result)


if __name__ == "__main__":
    main()
