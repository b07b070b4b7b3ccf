"""`engine build`: compile TensorRT plans of a bundle, for the GPU here or, with TensorRT-RTX, for GPUs elsewhere."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.backends.base import BackendUnavailable
from engine.commands import CommandError
from engine.graph_writer import PRECISIONS
from engine.tensorrt_api import FLAVOURS

if TYPE_CHECKING:
    from engine.bundle import Bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `engine build`."""
    parser.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="folder; default: the packaged bundle")
    parser.add_argument(
        "--target",
        default="here",
        metavar="SM,…",
        help="compute capabilities (sm75, sm80, sm86, sm89, sm120, …; TensorRT-RTX only); default: the GPU of this machine",
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16", help="of the encoder; default: fp16")
    parser.add_argument(
        "--sizes", type=_sizes, default=(1, 8, 16, 32), metavar="N,…", help="batch sizes with a profile; default: 1,8,16,32"
    )
    parser.add_argument("--flavour", choices=("auto", *FLAVOURS), default="auto", help="default: the first that is installed")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, metavar="FILE", help="write this plan (one target)")
    where.add_argument(
        "--plan-cache", type=Path, metavar="FOLDER", help="put the plans where the worker finds them; default: the user's cache"
    )


def run(arguments: argparse.Namespace) -> int:
    """Build each target in a process of its own, and print a line for each."""
    from engine import build
    from engine.bundle import load, packaged

    bundle = load(arguments.bundle or packaged())
    targets = [target.strip().lower() for target in arguments.target.split(",") if target.strip()]
    if not targets or (arguments.out and len(targets) > 1):
        raise CommandError("--out takes one plan: name one --target, or give --plan-cache")
    try:
        for target in targets:
            print(_build(bundle, target, arguments), flush=True)
    except build.BuildError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"{error.filename or arguments.out}: {error.strerror}") from error
    return 0


@dataclass(frozen=True, slots=True)
class _Place:
    capability: str
    gpu: str
    refit: bool


def _build(bundle: Bundle, target: str, arguments: argparse.Namespace) -> str:
    from engine import build, graph, plans, tensorrt_api

    flavour = _flavour(arguments.flavour, cross=target != "here")
    place = _place(target)
    heads = tensorrt_api.heads_precision(place.capability, arguments.precision)
    try:
        model = graph.model(bundle, arguments.precision, heads_precision=heads)
    except ImportError as error:
        raise CommandError(f"onnx cannot be imported ({error}); install the extra 'tensorrt' or 'tensorrt-rtx'") from error
    except ValueError as error:
        raise CommandError(str(error)) from error
    by_capability = bool(tensorrt_api.targets(tensorrt_api.load(flavour)))
    recipe = build.Recipe(flavour, place.capability if by_capability else "here", arguments.sizes, place.refit)
    key = build.plan_key(
        bundle.digest, model, flavour, place.capability, arguments.precision, arguments.sizes, place.refit, place.gpu
    )

    def make() -> tuple[bytes, plans.Facts]:
        return build.build_apart(graph.serialize(model), recipe)

    began = time.monotonic()
    if arguments.out:
        data, facts = make()
        file = arguments.out
        plan = plans.write(file, data, {**facts, "key": key.as_json()})
    else:
        cache = plans.PlanCache(arguments.plan_cache or plans.default_folder())
        file = cache.file(key)
        plan = cache.obtain(key, make)
    sizes = ",".join(map(str, arguments.sizes))
    facts_line = f"{flavour} {key.version}, {place.capability}, {arguments.precision}, batches of {sizes}"
    return f"{file}: {facts_line}, {len(plan.data) / 2**20:.1f} MiB, {time.monotonic() - began:.1f} s"


def _flavour(asked: str, cross: bool) -> str:
    """The flavour to use; for a GPU elsewhere, one that can build for it."""
    from engine import tensorrt_api

    problems = []
    for flavour in FLAVOURS if asked == "auto" else (asked,):
        try:
            trt = tensorrt_api.load(flavour)
        except BackendUnavailable as error:
            problems.append(str(error))
            continue
        if cross and not tensorrt_api.targets(trt):
            problems.append(f"{flavour} {trt.__version__} builds for the GPU of this machine only: leave --target out")
            continue
        return flavour
    raise CommandError("; ".join(problems))


def _place(target: str) -> _Place:
    """What the plan is for: a refittable one only where a driver is, because TensorRT needs it to build one."""
    from engine.backends.cuda_driver import CudaDriver, has_driver

    if target != "here":
        return _Place(target, "any", has_driver())
    try:
        driver = CudaDriver(0)
    except BackendUnavailable as error:
        raise CommandError(f"{error}; name a --target to build for a GPU elsewhere") from error
    return _Place(driver.capability, driver.gpu, True)


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(sorted({int(part) for part in text.split(",")}))
    if sizes[0] < 1 or sizes[-1] > 1024:
        raise argparse.ArgumentTypeError(f"batch sizes lie between 1 and 1024, not {text}")
    return sizes
