"""`python -m benchmarks.peers`: this worker and what one would otherwise put together: same images, model, machine, one run.

For each contestant: throughput over a backlog, CPU seconds and memory; latency at the same load for all, and of the best peer and
this worker at most of what that peer carries; events lost and repeated when everything of it is killed (-9) in the middle and
started again. Packages: extra `peers`. Every figure is written at once; a run of one part keeps the others in
benchmarks/results/peers.json. Each says when it was made.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from benchmarks import record
from benchmarks.compare import merge, number
from benchmarks.peers import page
from benchmarks.peers.contestants import CONTESTANTS, OURS, Contestant
from benchmarks.peers.measures import killed, latency, released, throughput
from benchmarks.peers.pictures import MIXED, mixed
from benchmarks.pipeline import jpegs

PACKAGES = ("faststream", "aiokafka", "litserve", "mosec", "ray", "openvino")
PARTS = ("throughput", "latency", "busy", "kills", "released")
BUSY = 0.65
"""Share of the best peer's throughput at which it and this worker are compared once more."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A model and the pictures it is given; `events` of a backlog."""

    model: str
    events: int
    pictures: Callable[[int], list[bytes]]
    picture: str


COURSES = {
    "openvino": Setting("openvino", 700, jpegs, "512x512 JPEGs of 81 KiB"),
    "simulated": Setting("simulated", 2400, jpegs, "512x512 JPEGs of 81 KiB"),
    "openvino-mixed": Setting("openvino", 300, mixed, MIXED),
    "simulated-mixed": Setting("simulated", 450, mixed, MIXED),
}


class Course:
    """One setting's measurements, written down after each."""

    def __init__(self, name: str, model: str, figures: dict[str, Any], scratch: Path, given: argparse.Namespace) -> None:
        self._name, self._model, self._scratch, self._given = name, model, scratch, given
        self._figures = figures
        self._course: dict[str, Any] = figures.setdefault(name, {})
        setting = COURSES[name]
        self._course["model"] = (
            "the packaged bundle's ONNX file on OpenVINO" if setting.model == "openvino" else f"a batch of n takes {model}"
        )
        self._course["picture"] = setting.picture
        self._pictures = setting.pictures(given.events or setting.events)
        # Before anything runs: the commit is that of the code, the load that of others.
        self._made = record.moment() | {"load_average": os.getloadavg()[0]}

    def run(self, part: str) -> None:
        """Measure a part."""
        match part:
            case "throughput":
                self._throughput()
            case "latency":
                self._latency()
            case "busy":
                self._busy()
            case "kills" if self._name == "simulated":  # what a kill costs has nothing to do with the model
                for contestant in self._left(part):
                    self._note(part, contestant.name, killed(contestant, self._model, self._pictures[:600], self._scratch))
            case "released" if not (self._given.missing and part in self._course):
                for way, measured in released(self._model, self._pictures[:700], self._scratch).items():
                    self._note(part, way, measured)

    def _throughput(self) -> None:
        """In turns, every second round backwards."""
        left = self._left("throughput")
        rounds: dict[str, list[dict[str, float]]] = {contestant.name: [] for contestant in left}
        for turn in range(self._given.rounds):
            for contestant in left[:: -1 if turn % 2 else 1]:
                measured = rounds[contestant.name]
                measured.append(throughput(contestant, self._model, self._pictures, self._scratch))
                self._note("throughput", contestant.name, merge(measured))

    def _latency(self) -> None:
        """Everybody at the same share of the slowest one's throughput."""
        measured = self._course["throughput"]["contestants"].values()
        rate = self._given.load * min(number(figures["events_per_s"]) for figures in measured)
        for contestant in self._left("latency"):
            found = latency(contestant, self._model, self._pictures, rate, self._given.seconds, self._scratch)
            self._note("latency", contestant.name, found)

    def _busy(self) -> None:
        """The best peer and this worker at most of what that peer carries."""
        peers = {name: row for name, row in self._course["throughput"]["contestants"].items() if name not in OURS}
        best = max(peers, key=lambda name: number(peers[name]["events_per_s"]))
        rate = BUSY * number(peers[best]["events_per_s"])
        for contestant in self._left("busy"):
            if contestant.ours or contestant.name == best:
                found = latency(contestant, self._model, self._pictures, rate, self._given.seconds, self._scratch)
                self._note("busy", contestant.name, found)

    def _left(self, part: str) -> list[Contestant]:
        """Everybody, or with `--missing` those without a figure."""
        there = self._course.get(part, {}).get("contestants", {}) if self._given.missing else {}
        return [contestant for contestant in CONTESTANTS if contestant.name not in there]

    def _note(self, part: str, name: str, measured: Mapping[str, Any]) -> None:
        sys.stderr.write(f"{self._name} · {part} · {name}: {json.dumps(measured)}\n")
        noted = self._course.setdefault(part, {"contestants": {}})
        noted["made"] = self._made
        noted["contestants"][name] = measured
        record.write("peers", self._figures)


def main() -> None:
    """Run, print, write benchmarks/results/peers.json and the table of docs/peers.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=f"{', '.join(PARTS)}; all by default")
    parser.add_argument("--only", choices=tuple(COURSES), help="one course: by model and pictures")
    parser.add_argument("--missing", action="store_true", help="only what the result file lacks")
    parser.add_argument("--events", type=int, help="of a backlog (default 300 to 2400, by course)")
    parser.add_argument("--rounds", type=int, default=2, help="of the throughput part")
    parser.add_argument("--seconds", type=float, default=15, help="of paced uploads")
    parser.add_argument("--load", type=float, default=0.6, help="share of the slowest contestant's throughput for the paced part")
    parser.add_argument("--simulated", default="0.004,0.00015", metavar="A,B", help="seconds a batch of n takes: A + B*n")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the contestants, sessions of their own, would stay behind
    figures = json.loads(page.RESULT.read_text())["figures"] if page.RESULT.exists() else {}
    figures |= {"packages": {name: record.version(name) for name in PACKAGES}}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        models = {"openvino": str(scratch / "model.onnx"), "simulated": given.simulated}
        command = [sys.executable, "-m", "engine", "export", "--out", models["openvino"]]
        subprocess.run(command, check=True, capture_output=True)
        os.environ["PEER_DEVICE_LOCK"] = str(scratch / "device.lock")
        for name in (given.only,) if given.only else COURSES:
            course = Course(name, models[COURSES[name].model], figures, scratch, given)
            for part in given.parts or PARTS:
                course.run(part)
    result = json.loads(page.RESULT.read_text())
    Console(width=140).print(Markdown(page.tables(result)))
    page.renew(result)


if __name__ == "__main__":
    main()
