"""`engine parity`: do the backends agree, on real images, in scores and decisions?"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.commands import CommandError, model_arguments
from engine.preprocess import CROP_PX

if TYPE_CHECKING:
    from engine.bundle import Bundle
    from engine.parity import Agreement, Spec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--bundle", type=Path, help="model bundle; the packaged one if not given")
    parser.add_argument("--images", type=Path, nargs="+", metavar="PATH", help="image files and folders; drawn patterns if none")
    parser.add_argument(
        "--backends",
        metavar="NAME[:PRECISION],…",
        help="the reference, then what is compared with it; torch:fp32 and every other backend that runs here if not given",
    )
    parser.add_argument("--limit", type=model_arguments.positive, default=2_000, help="images at most (2000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON, - for standard output")


def run(arguments: argparse.Namespace) -> int:
    """0: all agree; 1: one does not."""
    from engine import parity
    from engine.bundle import load, packaged

    bundle = load(arguments.bundle or packaged())
    specs = [parity.Spec.parse(text) for text in arguments.backends.split(",")] if arguments.backends else _all_that_run()
    if len(specs) < 2:
        raise CommandError("parity needs a reference and one more backend, such as torch,openvino")
    crops, unread = _crops(arguments.images, arguments.limit)
    if not len(crops):
        raise CommandError("no readable image in the given paths")
    try:
        results = list(parity.compare(bundle, crops, specs[0], specs[1:]))
    except ValueError as error:
        raise CommandError(str(error)) from error
    _print_table(results, bundle, unread, drawn=not arguments.images)
    if arguments.json:
        text = json.dumps(_document(results, bundle, drawn=not arguments.images), indent=2)
        if str(arguments.json) == "-":
            print(text)
        else:
            arguments.json.write_text(f"{text}\n", "utf-8")
    return 1 if any(agreement.problems for agreement in results) else 0


def _all_that_run() -> list[Spec]:
    from engine.backends import AUTO_ORDER, create
    from engine.backends.base import BackendUnavailable
    from engine.parity import Spec

    precisions = {"torch": ("fp32", "bf16"), "openvino": ("fp32", "bf16"), "tensorrt": ("fp16",), "tensorrt_rtx": ("fp16",)}
    specs = []
    for name in reversed(AUTO_ORDER):
        for precision in precisions[name]:
            try:
                create(name, precision=precision).close()
            except BackendUnavailable:
                continue
            specs.append(Spec(name, precision))
    return specs


def _crops(paths: list[Path] | None, limit: int) -> tuple[NDArray[np.uint8], int]:
    """Centre crops of the images, one a file, and how many files could not be read."""
    from engine.images import ImageError, Limits, read_crops

    if not paths:
        return _patterns(min(limit, 64)), 0
    crops: list[NDArray[np.uint8]] = []
    unread = 0
    for file in _files(paths):
        if len(crops) >= limit:
            break
        try:
            crops.append(read_crops(file.read_bytes(), Limits(max_pixels=64_000_000, max_frames=1)).crops[:1])
        except (ImageError, OSError):
            unread += 1
    return np.concatenate(crops) if crops else np.empty((0, CROP_PX, CROP_PX, 3), np.uint8), unread


def _files(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        yield from (file for file in sorted(path.rglob("*")) if file.is_file()) if path.is_dir() else (path,)


def _patterns(count: int) -> NDArray[np.uint8]:
    """Gradients, waves and noise of many colours: no photographs, but inputs that spread over the scores."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:CROP_PX, 0:CROP_PX] / CROP_PX
    crops = np.empty((count, CROP_PX, CROP_PX, 3), np.uint8)
    for i in range(count):
        waves = np.sin(x[..., None] * rng.uniform(0, 60, 3) + y[..., None] * rng.uniform(0, 60, 3) + rng.uniform(0, 6, 3))
        noise = rng.standard_normal((CROP_PX, CROP_PX, 3)) * rng.uniform(0, 40)
        crops[i] = np.clip(rng.uniform(40, 215, 3) + waves * rng.uniform(0, 90) + noise, 0, 255)
    return crops


def _print_table(results: list[Agreement], bundle: Bundle, unread: int, drawn: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    facts = f"{bundle.manifest.name} {bundle.manifest.version}, {results[0].crops} {'drawn patterns' if drawn else 'images'}"
    table = Table(box=None, pad_edge=False)
    for column in ("backend", "head", "max Δraw", "max Δp", "mean Δp", "allowed", "flips", "agrees"):
        table.add_column(column, justify="left" if column in ("backend", "head") else "right", no_wrap=True)
    for agreement in results:
        for name, head in agreement.heads.items():
            differences = (f"{value:.1e}" for value in (head.max_raw, head.max_probability, head.mean_probability))
            agrees = not any(problem.startswith(f"{name}:") for problem in agreement.problems)
            table.add_row(
                agreement.candidate,
                name,
                *differences,
                f"{agreement.tolerance:.0e}",
                f"{head.flipped} at {head.threshold}" if head.flipped else "0",
                "yes" if agrees else "NO",
            )
    # Into a pipe, lines stay whole whatever the width of the terminal that started it.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(f"{facts}, against {results[0].reference}" + (f"; {unread} files unreadable" if unread else ""))
    console.print(table)
    for agreement in results:
        for problem in agreement.problems:
            print(f"engine parity: {agreement.candidate}: {problem}", file=sys.stderr)


def _document(results: list[Agreement], bundle: Bundle, drawn: bool) -> dict[str, Any]:
    return {
        "model": {"name": bundle.manifest.name, "version": bundle.manifest.version, "digest": bundle.digest},
        "images": "drawn patterns" if drawn else "given",
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "agreements": [{**asdict(agreement), "problems": agreement.problems} for agreement in results],
    }
