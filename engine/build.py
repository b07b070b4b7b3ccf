"""Plans from ONNX graphs: one way for TensorRT 10, TensorRT 11 and TensorRT-RTX, each build in a process of its own.

A process of its own, because after one failed build later ones in the same process fail too, because a builder that crashes
must not take the worker along, and because what a build holds in memory is gone with it. The network is strongly typed:
precision comes from the graph. Run as `python -m engine.build FOLDER`, this module is that process.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine import graph, tensorrt_api
from engine.backends.base import BackendUnavailable
from engine.backends.cuda_driver import has_driver
from engine.plans import Facts, PlanKey
from engine.preprocess import CROP_PX

BUILD_TIMEOUT_S = 1500.0
WORKSPACE_BYTES = 2 * 2**30
_FAILED = 3
_DTYPES = {"float": "float32", "half": "float16", "bf16": "bfloat16"}


class BuildError(Exception):
    """A plan cannot be built; the message is one line."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a plan is built.

    `flavour`: tensorrt or tensorrt_rtx; `target`: a compute capability such as sm89, or `here` for the GPU of this machine (the
    only one TensorRT proper builds for); `sizes`: the batch sizes, each with a static profile of its own; `refit`: the weights
    can be replaced later (needs an NVIDIA driver while building).
    """

    flavour: str
    target: str
    sizes: tuple[int, ...]
    refit: bool = False


def plan_key(
    bundle_digest: str, model: Any, flavour: str, capability: str, precision: str, sizes: tuple[int, ...], refit: bool, gpu: str
) -> PlanKey:
    """The key of a plan for a graph.

    Args:
        model: the ONNX model, of `graph.model`.
        gpu: name of the device; without meaning for TensorRT-RTX, which compiles the last step where it runs, so that its plans
            serve every GPU of the capability.

    Raises:
        BackendUnavailable: the flavour is not installed.
    """
    trt = tensorrt_api.load(flavour)
    return PlanKey(
        bundle=bundle_digest,
        graph=hashlib.sha256(graph.serialize(model)).hexdigest(),
        architecture=graph.architecture(model),
        flavour=flavour,
        version=str(trt.__version__),
        gpu="any" if tensorrt_api.targets(trt) else gpu,
        capability=capability,
        precision=precision,
        heads_precision=tensorrt_api.heads_precision(capability, precision),
        sizes=sizes,
        refit=refit,
    )


def build_apart(
    onnx: bytes, recipe: Recipe, timing_cache: Path | None = None, timeout_s: float = BUILD_TIMEOUT_S
) -> tuple[bytes, Facts]:
    """Build in a child process.

    Args:
        onnx: the serialised graph.
        recipe: how.
        timing_cache: a file to read measured timings from and write them back to; TensorRT proper only.
        timeout_s: after which the child is killed.

    Returns:
        (the plan's bytes, facts about it).

    Raises:
        BuildError: TensorRT refused the graph or the recipe, or the child died or took too long.
        BackendUnavailable: the flavour is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="code-plan-") as name:
        folder = Path(name)
        job = {"recipe": asdict(recipe), "timing_cache": str(timing_cache) if timing_cache else None}
        (folder / "graph.onnx").write_bytes(onnx)
        (folder / "job.json").write_text(json.dumps(job))
        code = _run_child(folder, timeout_s)
        try:
            answer = json.loads((folder / "answer.json").read_bytes())
        except (OSError, ValueError) as error:
            raise BuildError(f"{recipe.flavour} {recipe.target}: the builder process {_how_it_ended(code)}") from error
        if "unavailable" in answer:
            raise BackendUnavailable(answer["unavailable"])
        if "error" in answer:
            raise BuildError(f"{recipe.flavour} {recipe.target}: {answer['error']}")
        return (folder / "plan").read_bytes(), answer["facts"]


def _run_child(folder: Path, timeout_s: float) -> int | None:
    """The child's exit code, None if it was killed for taking too long. What it prints is dropped: native code is chatty."""
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-m", "engine.build", str(folder)]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    try:
        return child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Also when this process is interrupted: a builder must not outlive its caller.
        child.kill()
        child.wait()


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "took too long and was killed"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code} and no answer"


def build(onnx: bytes, recipe: Recipe, timing_cache: Path | None = None) -> tuple[bytes, Facts]:
    """Build in this process. Arguments, result and errors as of `build_apart`."""
    trt = tensorrt_api.load(recipe.flavour)
    if recipe.refit and not has_driver():
        raise BuildError("a refittable plan needs an NVIDIA driver while it is built, and there is none here")
    log = tensorrt_api.make_log(trt)
    builder = trt.Builder(log)
    if builder is None:
        raise BuildError(log.problem)
    network = builder.create_network(_strongly_typed(trt))
    _parse(trt, network, onnx, log)
    config = builder.create_builder_config()
    _configure(trt, builder, config, recipe)
    timings = _read_timings(config, recipe, timing_cache)
    began = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(log.problem)
    if timings is not None and timing_cache is not None:
        _write_timings(config, timing_cache)
    data = bytes(plan)
    facts = {
        "flavour": recipe.flavour,
        "version": str(trt.__version__),
        "target": recipe.target,
        "refit": recipe.refit,
        "build_s": round(time.monotonic() - began, 2),
        "inputs": [_tensor(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(i)) for i in range(network.num_outputs)],
        "profiles": [{graph.INPUT: [[size, *_crop_shape(network)]] * 3} for size in recipe.sizes],
        "layers": {"count": network.num_layers, "kinds": _kinds(network)},
        "warnings": [text for severity, text in log.lines if severity == "warning"][:20],
    }
    return data, facts


def _strongly_typed(trt: Any) -> int:
    # TensorRT 11 knows nothing else, and may drop the name.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(trt: Any, network: Any, onnx: bytes, log: Any) -> None:
    parser = trt.OnnxParser(network, log)
    if not parser.parse(onnx):
        problems = [parser.get_error(i) for i in range(parser.num_errors)]
        raise BuildError(_parser_problem(problems[0]) if problems else log.problem)
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    if names != [graph.INPUT]:
        raise BuildError(f"the graph's inputs are {names}, not [{graph.INPUT!r}]")


def _parser_problem(problem: Any) -> str:
    text = tensorrt_api.one_line(problem.desc())
    if problem.node() < 0:
        return f"the graph: {text}"
    return f"node {problem.node_name() or problem.node()} ({problem.node_operator() or 'unknown operator'}): {text}"


def _configure(trt: Any, builder: Any, config: Any, recipe: Recipe) -> None:
    if recipe.target != "here":
        known = tensorrt_api.targets(trt)
        if recipe.target not in known:
            can = f"it knows {', '.join(known)}" if known else "it builds for the GPU of this machine only"
            raise BuildError(f"{recipe.flavour} {trt.__version__} has no target {recipe.target}; {can}")
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(getattr(trt.ComputeCapability, recipe.target.upper()), 0):
            raise BuildError(f"target {recipe.target} was refused")
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # Ten bits of mantissa are too few for the float32 heads.
    config.clear_flag(trt.BuilderFlag.TF32)
    if recipe.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    for size in recipe.sizes:
        profile = builder.create_optimization_profile()
        shape = (size, CROP_PX, CROP_PX, 3)
        profile.set_shape(graph.INPUT, shape, shape, shape)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"the profile for batches of {size} was refused")


def _read_timings(config: Any, recipe: Recipe, file: Path | None) -> Any:
    if file is None or recipe.flavour != "tensorrt":
        return None
    try:
        data = file.read_bytes()
    except OSError:
        data = b""
    timings = config.create_timing_cache(data)
    if timings is None:  # another version's: begin a new one
        timings = config.create_timing_cache(b"")
    config.set_timing_cache(timings, ignore_mismatch=False)
    return timings


def _write_timings(config: Any, file: Path) -> None:
    from engine.plans import replace

    replace(file, bytes(config.get_timing_cache().serialize()))


def _tensor(tensor: Any) -> Facts:
    dtype = tensor.dtype.name.lower()
    return {"name": tensor.name, "dtype": _DTYPES.get(dtype, dtype), "shape": list(tensor.shape)}


def _crop_shape(network: Any) -> list[int]:
    return [int(size) for size in network.get_input(0).shape][1:]


def _kinds(network: Any) -> dict[str, int]:
    return dict(Counter(network.get_layer(i).type.name.lower() for i in range(network.num_layers)).most_common())


def main(folder: Path) -> int:
    """The child: reads the job from the folder and leaves the answer there."""
    job = json.loads((folder / "job.json").read_text())
    recipe = Recipe(**{**job["recipe"], "sizes": tuple(job["recipe"]["sizes"])})
    timing_cache = Path(job["timing_cache"]) if job["timing_cache"] else None
    try:
        data, facts = build((folder / "graph.onnx").read_bytes(), recipe, timing_cache)
    except BuildError as error:
        answer: Facts = {"error": str(error)}
    except BackendUnavailable as error:
        answer = {"unavailable": str(error)}
    else:
        (folder / "plan").write_bytes(data)
        answer = {"facts": facts}
    (folder / "answer.json").write_text(json.dumps(answer))
    return 0 if "facts" in answer else _FAILED


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
