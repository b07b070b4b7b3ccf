"""Fill in the hardware table: every path that runs on this machine, images a second and latency by batch size.

    python -m benchmarks.engine_gpu [--bundle FOLDER] [--batch-sizes 1,8,32,128,512] [--seconds 3] [--events 2000]

On a GPU: torch eager, torch.compile and a CUDA graph, TensorRT and TensorRT-RTX (one batch at a time, and two under way), each
with the share of what a large half-precision matrix product reaches on the same device. On the CPU: OpenVINO and torch in float32
and bfloat16, in turns, so that all see the same load. Last a worker end to end, with the default backend of the machine. What
cannot run is named with its reason. Results go to
benchmarks/results/engine-<device>.json; the table is Markdown, ready for the README.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import pipeline, record
from benchmarks.uploads import inline
from engine import backends
from engine.backends.base import CROP_SHAPE, BackendUnavailable, OutOfDeviceMemory
from engine.bundle import Bundle, load, packaged
from engine.detector import Detector

FLOPS_PER_IMAGE = 2 * 1.26e9
"""Of the encoder, multiplications and additions (CoDE's ViT-Tiny/16 at 224 px)."""

CPU_PATHS = (("torch", "fp32"), ("torch", "bf16"), ("openvino", "fp32"), ("openvino", "bf16"))
TURNS = 5
SIZES = {True: (1, 8, 32, 128, 512), False: (1, 8, 32)}
"""Batch sizes on a GPU, and on the CPU."""

Run = Callable[[NDArray[np.uint8]], object]


@dataclass(frozen=True, slots=True)
class Figure:
    """One path at one batch size.

    `latency_ms`: median time of a batch, copies included; `roofline`: share of the device's measured peak.
    """

    path: str
    device: str
    batch_size: int
    images_per_s: float
    latency_ms: float
    roofline: float | None = None


@dataclass(frozen=True, slots=True)
class Missing:
    """A path that does not run here, and why."""

    path: str
    reason: str


def measure(run: Run, batch_size: int, seconds: float, warm_up: int = 2) -> tuple[float, float]:
    """Images a second and median seconds of a batch, after `warm_up` batches that do not count."""
    crops = np.random.default_rng(0).integers(0, 256, (batch_size, *CROP_SHAPE), np.uint8)
    for _ in range(warm_up):
        run(crops)
    times_s: list[float] = []
    while not times_s or sum(times_s) < seconds:
        began = time.perf_counter()
        run(crops)
        times_s.append(time.perf_counter() - began)
    return batch_size * len(times_s) / sum(times_s), median(times_s)


def cpu(bundle: Bundle, batch_sizes: list[int], seconds: float) -> Iterator[Figure | Missing]:
    """The CPU paths, in turns: each figure is the median over the turns."""
    with ExitStack() as stack:
        loaded = {}
        for name, precision in CPU_PATHS:
            try:
                backend = backends.create(name, "cpu", precision=precision)
                backend.load(bundle)
            except BackendUnavailable as error:
                yield Missing(f"{name} {precision}", str(error))
                continue
            stack.callback(backend.close)
            loaded[f"{name} {precision}"] = backend
        for size in batch_sizes:
            for backend in loaded.values():
                backend.warm_up([size])
            turns = [{path: measure(b.infer, size, seconds / TURNS, 0) for path, b in loaded.items()} for _ in range(TURNS)]
            for path in loaded:
                yield Figure(path, "cpu", size, median(t[path][0] for t in turns), 1000 * median(t[path][1] for t in turns))


def gpu(bundle: Bundle, batch_sizes: list[int], seconds: float) -> Iterator[Figure | Missing]:
    """The CUDA paths, one after the other."""
    peak = _peak_flops()
    for path, open_path in _gpu_paths(bundle, batch_sizes):  # one at a time: their memory adds up
        try:
            with ExitStack() as stack:
                run = open_path(stack)
                for size in batch_sizes:
                    rate, batch_s = measure(run, size, seconds)
                    share = rate * FLOPS_PER_IMAGE / peak if peak else None
                    yield Figure(path, "cuda:0", size, rate, 1000 * batch_s, share)
        except (BackendUnavailable, OutOfDeviceMemory) as error:
            yield Missing(path, str(error))


def _gpu_paths(bundle: Bundle, batch_sizes: list[int]) -> Iterator[tuple[str, Callable[[ExitStack], Run]]]:
    def backend(stack: ExitStack, name: str, precision: str) -> Any:
        made = backends.create(name, "cuda", precision=precision, batch_sizes=tuple(batch_sizes))
        stack.callback(made.close)
        made.load(bundle)
        return made

    def plain(name: str, precision: str) -> Callable[[ExitStack], Run]:
        return lambda stack: backend(stack, name, precision).infer

    def overlapped(name: str, precision: str) -> Callable[[ExitStack], Run]:
        return lambda stack: _overlapped(backend(stack, name, precision))

    yield "torch eager fp32", plain("torch", "fp32")
    yield "torch eager fp16", plain("torch", "fp16")
    yield "torch compile fp16", lambda _: _torch(bundle, "compile")
    yield "torch CUDA graph fp16", lambda _: _torch(bundle, "graph")
    for name in ("tensorrt", "tensorrt_rtx"):
        yield f"{name} fp16", plain(name, "fp16")
        yield f"{name} fp16, two under way", overlapped(name, "fp16")


def _overlapped(backend: Any) -> Run:
    """Collects the batch before the one it submits: a call takes as long as the slowest of copying and computing."""
    waiting: list[object] = []

    def run(crops: NDArray[np.uint8]) -> object:
        waiting.append(backend.submit(crops))
        return backend.collect(waiting.pop(0)) if len(waiting) == backend.depth else None

    return run


def _torch(bundle: Bundle, how: str) -> Run:
    """torch.compile, or a CUDA graph captured for each batch size; crops are copied in and scores out in each call."""
    torch = _torch_on_cuda()
    from engine.backends.torch_graph import Scorer

    scorer = Scorer(bundle, torch.float16).to("cuda")
    if how == "compile":
        compiled = torch.compile(scorer)

        def run_compiled(crops: NDArray[np.uint8]) -> object:
            with torch.inference_mode():
                return [output.cpu() for output in compiled(torch.from_numpy(crops).to("cuda"))]

        return run_compiled
    graphs: dict[int, tuple[Any, Any, Any]] = {}

    def run_graph(crops: NDArray[np.uint8]) -> object:
        if len(crops) not in graphs:
            graphs[len(crops)] = _capture(torch, scorer, len(crops))
        graph, crops_in, outputs = graphs[len(crops)]
        crops_in.copy_(torch.from_numpy(crops))
        graph.replay()
        return [output.cpu() for output in outputs]

    return run_graph


def _capture(torch: Any, scorer: Any, batch_size: int) -> tuple[Any, Any, Any]:
    crops = torch.zeros((batch_size, *CROP_SHAPE), dtype=torch.uint8, device="cuda")
    side = torch.cuda.Stream()
    with torch.inference_mode():
        with torch.cuda.stream(side):
            for _ in range(3):
                scorer(crops)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = scorer(crops)
    return graph, crops, outputs


def _torch_on_cuda() -> Any:
    try:
        import torch
    except ImportError as error:
        raise BackendUnavailable(f"torch cannot be imported ({error})") from error
    if not torch.cuda.is_available():
        raise BackendUnavailable("torch has no usable CUDA device")
    return torch


def _peak_flops(size: int = 8192, repetitions: int = 20) -> float | None:
    """What a large half-precision matrix product reaches on this device; None without torch on CUDA."""
    try:
        torch = _torch_on_cuda()
    except BackendUnavailable:
        return None
    a = torch.randn(size, size, dtype=torch.float16, device="cuda")
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repetitions):
        a @ a
    torch.cuda.synchronize()
    return float(2 * size**3 * repetitions / (time.perf_counter() - began))


def ratios(figures: list[Figure]) -> dict[str, dict[int, float]]:
    """OpenVINO over torch, by batch size."""
    rate = {(figure.path, figure.batch_size): figure.images_per_s for figure in figures}
    return {
        f"{ours} / {theirs}": {
            size: round(rate[ours, size] / rate[theirs, size], 3)
            for path, size in rate
            if path == ours and (theirs, size) in rate
        }
        for ours, theirs in (("openvino fp32", "torch fp32"), ("openvino bf16", "torch fp32"), ("openvino bf16", "torch bf16"))
    }


def worker(events: int) -> dict[str, Any]:
    """A worker with the machine's default backend over `events` inline JPEGs, from broker to verdict.

    Returns `backend`, `device`, `events_per_s` and `cpu_s_per_1000` (all of the worker's processes).
    """
    with Detector.open(backend="auto") as detector:
        chosen = {"backend": detector.backend_name, "device": detector.device}
    whole = pipeline.path(inline(pipeline.jpegs(events)), "worker run", warm_up=min(500, events // 4))
    return chosen | {name: whole[name] for name in ("events_per_s", "cpu_s_per_1000", "events")}


def where(cpu_only: bool = False) -> tuple[str, bool]:
    """The device whose paths are measured, and whether it is a GPU."""
    from engine.backends.cuda_driver import CudaDriver

    if not cpu_only:
        try:
            return CudaDriver(0).gpu, True
        except BackendUnavailable as error:
            print(f"no GPU: {error}; measuring the CPU paths")
    return record.surroundings()["machine"]["cpu"], False


def part(seconds: float) -> dict[str, Any]:
    """Every backend that runs here, as a part of the suite: images a second and milliseconds a batch by batch size."""
    device, on_gpu = where()
    figures: dict[str, Any] = {"device": device}
    for row in (gpu if on_gpu else cpu)(load(packaged()), list(SIZES[on_gpu]), seconds):
        if isinstance(row, Missing):
            figures[row.path] = row.reason
        else:
            measured = {"images_per_s": row.images_per_s, "batch_ms": row.latency_ms}
            figures.setdefault(row.path, {})[f"batch {row.batch_size}"] = measured
    record.write("engines", figures)
    return figures


def markdown(device: str, figures: list[Figure], missing: list[Missing]) -> str:
    """The table of one device: a row a path, a column a batch size (images a second, milliseconds a batch)."""
    sizes = sorted({figure.batch_size for figure in figures})
    lines = [f"| {device} | " + " | ".join(f"batch {size}" for size in sizes) + " | best share of peak |"]
    lines.append("|" + "---|" * (len(sizes) + 2))
    for path in dict.fromkeys(figure.path for figure in figures):
        mine = {figure.batch_size: figure for figure in figures if figure.path == path}
        cells = [f"{mine[size].images_per_s:,.0f} ({mine[size].latency_ms:.1f} ms)" if size in mine else "" for size in sizes]
        shares = [figure.roofline for figure in mine.values() if figure.roofline is not None]
        lines.append(f"| {path} | " + " | ".join(cells) + f" | {f'{max(shares):.0%}' if shares else ''} |")
    lines += [f"| {row.path} | " + " | ".join("—" for _ in sizes) + " | |" for row in missing]
    return "\n".join(lines)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--bundle", type=Path, help="model bundle; default: the packaged one")
    parser.add_argument("--batch-sizes", default="", help="default: 1,8,32,128,512 on a GPU, 1,8,32 on the CPU")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each path and size; default: 3")
    parser.add_argument("--events", type=int, default=2000, help="of the worker end to end; 0: leave it out; default: 2000")
    parser.add_argument("--cpu", action="store_true", help="the CPU paths, also where there is a GPU")
    arguments = parser.parse_args()
    device, on_gpu = where(arguments.cpu)
    sizes = [int(size) for size in arguments.batch_sizes.split(",")] if arguments.batch_sizes else list(SIZES[on_gpu])
    bundle = load(arguments.bundle or packaged())
    rows = list((gpu if on_gpu else cpu)(bundle, sizes, arguments.seconds))
    figures = [row for row in rows if isinstance(row, Figure)]
    missing = [row for row in rows if isinstance(row, Missing)]
    result: dict[str, Any] = {
        "device": device,
        "model": {"name": bundle.manifest.name, "version": bundle.manifest.version, "digest": bundle.digest},
        "figures": [asdict(figure) for figure in figures],
        "missing": [asdict(row) for row in missing],
        "ratios": {} if on_gpu else ratios(figures),
        "worker": worker(arguments.events) if arguments.events else None,
    }
    path = record.write("engine-" + re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-"), result)
    print(markdown(device, figures, missing))
    for row in missing:
        print(f"not measured: {row.path}: {row.reason}")
    if whole := result["worker"]:
        print(f"worker end to end, {whole['backend']} on {whole['device']}: {whole['events_per_s']:,.0f} events/s")
    for name, by_size in result["ratios"].items():
        print(f"{name}: " + ", ".join(f"{ratio:.2f} at {size}" for size, ratio in by_size.items()))
    print(path)


if __name__ == "__main__":
    main()
