"""`engine bench`: throughput and latency of a bundle on a backend, by batch size, without decoding."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from engine.backends.base import CROP_SHAPE, OutOfDeviceMemory, usable_cores
from engine.commands import CommandError, model_arguments
from engine.detector import Detector

PACKAGES = ("torch", "openvino", "tensorrt", "tensorrt-rtx-cu13-bindings", "onnx", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `engine bench`."""
    parser.add_argument("--batch-sizes", type=_sizes, default=(1, 4, 16, 32), metavar="N,N…", help="default: 1,4,16,32")
    parser.add_argument("--seconds", type=_seconds, default=5.0, metavar="S", help="for each size; default: 5")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of a table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there, too")
    model_arguments.add(parser, scores=False)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    started = time.perf_counter()
    with model_arguments.detector(arguments) as detector:
        load_s = time.perf_counter() - started
        report = {
            "benchmark": "engine",
            **surroundings(),
            "model": {"name": detector.name, "version": detector.version, "digest": detector.bundle.digest},
            "backend": detector.backend_name,
            "device": detector.device,
            "precision": arguments.precision or "default",
            "threads": arguments.threads or usable_cores(),
            "load_s": round(load_s, 3),
            "results": [measure(detector, size, arguments.seconds) for size in arguments.batch_sizes],
        }
    text = json.dumps(report, indent=1)
    if arguments.out is not None:
        try:
            arguments.out.write_text(text + "\n", "utf-8")
        except OSError as error:
            raise CommandError(f"{arguments.out}: cannot be written: {error.strerror}") from error
    if arguments.json:
        print(text)
    else:
        _print(report)
    return 0


def measure(detector: Detector, batch_size: int, seconds: float) -> dict[str, Any]:
    """Run one batch size for a time, at least three batches, after a warm-up.

    Returns:
        images_per_s over the whole time; latency_ms of a batch: mean, p50, p95, p99, max; or an error where it does not fit.
    """
    crops = np.random.default_rng(0).integers(0, 256, (batch_size, *CROP_SHAPE), np.uint8)
    try:
        warming = time.perf_counter()
        detector.warm_up([batch_size])
        warm_up_s = time.perf_counter() - warming
        latencies_s: list[float] = []
        while len(latencies_s) < 3 or sum(latencies_s) < seconds:
            before = time.perf_counter()
            detector.infer(crops)
            latencies_s.append(time.perf_counter() - before)
    except OutOfDeviceMemory as error:
        return {"batch_size": batch_size, "error": str(error)}
    p50, p95, p99 = np.percentile(latencies_s, (50, 95, 99)) * 1000
    return {
        "batch_size": batch_size,
        "batches": len(latencies_s),
        "warm_up_ms": round(warm_up_s * 1000, 3),
        "images_per_s": round(batch_size * len(latencies_s) / sum(latencies_s), 2),
        "latency_ms": {
            "mean": round(1000 * sum(latencies_s) / len(latencies_s), 3),
            "p50": round(float(p50), 3),
            "p95": round(float(p95), 3),
            "p99": round(float(p99), 3),
            "max": round(1000 * max(latencies_s), 3),
        },
    }


def surroundings() -> dict[str, Any]:
    """Machine, versions, commit and time: what a figure means nothing without."""
    return {
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "usable_cores": usable_cores(),
            "gpu": _gpu(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "commit": _commit(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _gpu() -> str | None:
    return _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")


def _commit() -> str | None:
    return _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")


def _output(*command: str) -> str | None:
    """What a program says, None where it is not installed or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    machine = report["machine"]
    title = f"{report['model']['name']} {report['model']['version']} on {report['backend']} ({report['device']})"
    where = machine["gpu"] if report["device"].startswith("cuda") else f"{machine['cpu']}, {report['threads']} threads"
    table = Table("batch", "images/s", "p50 ms", "p95 ms", "p99 ms", "warm-up ms", title=title, caption=where)
    for result in report["results"]:
        if "error" in result:
            table.add_row(str(result["batch_size"]), result["error"])
            continue
        figures = [result["images_per_s"], *(result["latency_ms"][name] for name in ("p50", "p95", "p99")), result["warm_up_ms"]]
        table.add_row(str(result["batch_size"]), *(f"{figure:.1f}" for figure in figures))
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(model_arguments.positive(part.strip()) for part in text.split(",")))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: batch sizes are whole numbers from 1, separated by commas") from error


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error
    if not 0 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text} does not lie between 0 and 3600")
    return seconds
