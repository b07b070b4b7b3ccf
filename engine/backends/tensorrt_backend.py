"""The bundle on TensorRT or TensorRT-RTX, without torch: plans from the cache or built on the spot, two batches under way."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from engine import build, graph, plans, tensorrt_api
from engine.backends.base import CROP_SHAPE, BackendUnavailable, CheckedBackend, DeviceError, OutOfDeviceMemory, Outputs
from engine.backends.cuda_driver import CudaDriver
from engine.backends.plan_engine import PlanEngine, PlanRejected
from engine.backends.tensorrt_runner import DEPTH, Runner, Ticket
from engine.bundle import Bundle
from engine.file_lock import LockTimeout
from engine.graph_writer import PRECISIONS, Precision
from engine.plans import Plan, PlanCache, PlanKey

log = structlog.get_logger()

DEFAULT_SIZES = (1, 8, 16, 32)
HEADS_TOLERANCE = 0.02
"""Of raw scores in the engine against the numpy heads on its embedding, relative above one: half-precision products on SM 75."""


EMBEDDING_TOLERANCE = 0.05
"""Of the plan's embedding of a test pattern against the float32 graph's in numpy, as a share of its length; another encoder's is
off by about one, bf16's by less than a hundredth."""


class TensorRTBackend(CheckedBackend):
    """Runs a plan of the bundle's graph.

    Args:
        device: auto, cuda or cuda:N.
        threads: not used; the backends have one signature.
        precision: of the encoder: fp16, bf16 or fp32.
        plan_cache: folder of plans; None: `plans.default_folder()`.
        batch_sizes: sizes that run without padding, each with a profile and CUDA graphs of its own; 1 is always among them.
            The largest is the most crops in one batch.

    Raises:
        BackendUnavailable: TensorRT, cuda-python, the driver or the device is missing, or the device has no target.
        ValueError: unknown precision, or a size below 1.
    """

    name = "tensorrt"
    flavour: tensorrt_api.Flavour = "tensorrt"
    depth = DEPTH
    OPTIONS = ("precision", "plan_cache", "batch_sizes")

    def __init__(
        self,
        device: str = "auto",
        threads: int = 0,
        precision: Precision = "fp16",
        plan_cache: Path | str | None = None,
        batch_sizes: tuple[int, ...] = DEFAULT_SIZES,
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}; known are {', '.join(PRECISIONS)}")
        if not batch_sizes or min(batch_sizes) < 1:
            raise ValueError(f"batch sizes start at 1, got {list(batch_sizes)}")
        if device == "cpu":
            raise BackendUnavailable("device cpu: this backend runs on NVIDIA GPUs only")
        self._trt = tensorrt_api.load(self.flavour)
        index = int(device.partition(":")[2] or 0)
        self._driver = self._open_driver(index)
        self.device = f"cuda:{index}"
        known = tensorrt_api.targets(self._trt)
        if known and self._driver.capability not in known:
            gpu = f"{self._driver.gpu} ({self._driver.capability})"
            raise BackendUnavailable(
                f"{self.flavour} {self._trt.__version__} has no target for {gpu}; it knows {', '.join(known)}"
            )
        if precision == "bf16" and int(self._driver.capability[2:]) < 80:
            raise BackendUnavailable(f"{self._driver.gpu} ({self._driver.capability}) has no bfloat16; take fp16")
        self.precision: Precision = precision
        self._cache = PlanCache(Path(plan_cache) if plan_cache else plans.default_folder())
        self._sizes = tuple(sorted({1, *batch_sizes}))
        self._runner: Runner | None = None
        self._thread: int | None = None
        self._problem = ""

    @staticmethod
    def _open_driver(index: int) -> Any:
        return CudaDriver(index)

    def submit(self, crops: NDArray[np.uint8]) -> object:
        """Start a batch while another one is computed; arguments and errors as of `infer`, and:

        Raises:
            BackendStateError: `depth` batches are under way.
        """
        self._require("loaded", "submit")
        crops = self._checked(crops)
        runner = self._ready()
        if not 0 < len(crops) <= runner.sizes[-1]:
            return self.infer(crops)
        with self._alone("submit"):
            return runner.submit(crops)

    def collect(self, ticket: object) -> Outputs:
        """Outputs of a batch, in the order of `submit`; each ticket once."""
        self._require("loaded", "collect")
        if isinstance(ticket, Outputs):
            return ticket
        if not isinstance(ticket, Ticket):
            raise TypeError(f"not a ticket of this backend: {ticket!r}")
        with self._alone("collect"):
            return self._marked(self._ready().collect(ticket))

    def _load(self, bundle: Bundle) -> None:
        self._enter_thread()
        model = self._model(bundle)
        onnx = graph.serialize(model)
        capability, gpu = self._driver.capability, self._driver.gpu
        key = build.plan_key(bundle.digest, model, self.flavour, capability, self.precision, self._sizes, True, gpu)
        for engine, plan_key in self._engines(key, onnx):
            try:
                runner = self._start(engine)
                self._verify(runner, bundle)
            except PlanRejected as error:
                self._reject(error)
                continue
            self._runner = runner
            self.max_batch_size = runner.sizes[-1]
            self._keep_kernels(engine, plan_key)
            return
        raise DeviceError(f"{self.name}: a plan was built, and is of no use: {self._problem}")

    def _model(self, bundle: Bundle) -> Any:
        heads = tensorrt_api.heads_precision(self._driver.capability, self.precision)
        try:
            return graph.model(bundle, self.precision, heads_precision=heads)
        except ImportError as error:
            raise BackendUnavailable(f"onnx cannot be imported ({error}); install it with the TensorRT extra") from error
        except ValueError as error:
            raise BackendUnavailable(str(error)) from error

    def _engines(self, key: PlanKey, onnx: bytes) -> Iterator[tuple[PlanEngine, PlanKey]]:
        """Engines for the graph, the cheapest first: a cached plan, an alike one with new weights, one built now."""
        fixed = replace(key, refit=False)  # what `engine build` makes on a machine without a GPU
        rejected: dict[PlanKey, str] = {}
        for candidate in (key, fixed):
            plan = self._cache.get(candidate)
            if plan is not None:
                rejected[candidate] = plan.facts["sha256"]
                yield from self._opened(plan, candidate)
        for alike in self._cache.alike(key):
            for engine, _ in self._opened(alike, key):
                try:
                    engine.refit(onnx)
                except PlanRejected as error:
                    self._reject(error)
                    continue
                facts = {name: alike.facts[name] for name in ("inputs", "outputs", "profiles", "layers") if name in alike.facts}
                kept = self._obtain(key, lambda engine=engine, facts=facts: (engine.serialize(), facts), rejected)
                rejected[key] = kept.facts.get("sha256", "")
                log.info("plan.refitted", file=self._cache.file(key).name)
                yield engine, key
        for candidate in (key, fixed):
            try:
                plan = self._obtain(candidate, partial(self._build, candidate, onnx), rejected)
            except build.BuildError as error:
                if candidate is fixed:
                    raise BackendUnavailable(f"{self.name}: no plan can be built for {self._driver.gpu}: {error}") from error
                log.warning("plan.not_refittable", reason=str(error))
            else:
                yield from self._opened(plan, candidate)
                return

    def _build(self, key: PlanKey, onnx: bytes) -> tuple[bytes, plans.Facts]:
        recipe = build.Recipe(self.flavour, key.capability if tensorrt_api.targets(self._trt) else "here", key.sizes, key.refit)
        slug = re.sub(r"[^A-Za-z0-9]+", "-", f"{key.version}-{key.gpu}")
        log.info("plan.building", capability=key.capability, precision=key.precision, refit=key.refit)
        data, facts = build.build_apart(onnx, recipe, self._cache.folder / f"timing-{slug}.cache")
        return data, facts

    def _obtain(self, key: PlanKey, make: Any, rejected: dict[PlanKey, str]) -> Plan:
        """Through the cache; without it where its folder cannot be used."""
        try:
            return self._cache.obtain(key, make, rejected.get(key))
        except (OSError, LockTimeout) as error:
            log.warning("plan.cache_unusable", folder=str(self._cache.folder), reason=str(error))
            data, facts = make()
            return Plan(data, facts)

    def _opened(self, plan: Plan, key: PlanKey) -> Iterator[tuple[PlanEngine, PlanKey]]:
        try:
            yield PlanEngine(self._trt, plan.data, self._sizes, self._kernels(key)), key
        except PlanRejected as error:
            self._reject(error)

    def _reject(self, error: PlanRejected) -> None:
        self._problem = str(error)
        log.warning("plan.rejected", reason=self._problem)

    def _start(self, engine: PlanEngine) -> Runner:
        """A runner for all sizes, or for as many as the memory holds."""
        sizes = self._sizes
        while True:
            try:
                return Runner(self._driver, engine, sizes)
            except OutOfDeviceMemory as error:
                if len(sizes) == 1:
                    raise
                sizes = sizes[:-1]
                log.warning("engine.batch_capped", crops=sizes[-1], max_batch_size=self._sizes[-1], reason=str(error))

    def _verify(self, runner: Runner, bundle: Bundle) -> None:
        """The plan must be the bundle's, whatever its file says: its heads are computed here again from its own embeddings, and
        its embedding of a pattern from the graph in numpy."""
        for brightness in (0, 128, 255):
            outputs = runner.collect(runner.submit(np.full((1, *CROP_SHAPE), brightness, np.uint8)))
            if not np.isfinite(outputs.embedding).all():
                self._drop(runner, "its embedding of a plain image is not finite")
            expected = bundle.heads.raw_scores(outputs.embedding)
            if not np.allclose(outputs.raw, expected, rtol=HEADS_TOLERANCE, atol=HEADS_TOLERANCE):
                self._drop(runner, f"its heads give {outputs.raw.tolist()}, the bundle's {expected.tolist()}")
        pattern = np.random.default_rng(0).integers(0, 256, (1, *CROP_SHAPE), np.uint8)
        embedding, expected = runner.collect(runner.submit(pattern)).embedding, self._reference(bundle, pattern)
        off = float(np.linalg.norm(embedding - expected) / np.linalg.norm(expected))
        if not off <= EMBEDDING_TOLERANCE:  # not `>`: NaN is off, too
            self._drop(runner, f"its encoder's answer to a test pattern is off by {off:.2g}, allowed {EMBEDDING_TOLERANCE}")

    @staticmethod
    def _reference(bundle: Bundle, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        return graph.reference(bundle, crops)

    @staticmethod
    def _drop(runner: Runner, reason: str) -> None:
        runner.close()
        raise PlanRejected(f"the plan is not this bundle's: {reason}")

    def _kernels(self, key: PlanKey) -> bytes | None:
        try:
            return plans.read(self._kernels_file(key)).data
        except plans.PlanError:
            return None

    def _keep_kernels(self, engine: PlanEngine, key: PlanKey) -> None:
        kernels = engine.runtime_cache
        if kernels and kernels != self._kernels(key):
            try:
                plans.write(self._kernels_file(key), kernels, {"kind": "runtime cache"})
            except OSError as error:
                log.warning("plan.cache_unusable", folder=str(self._cache.folder), reason=str(error))

    def _kernels_file(self, key: PlanKey) -> Path:
        # Compiled for this GPU by this driver.
        slug = re.sub(r"[^A-Za-z0-9]+", "-", f"{self._driver.gpu}-{self._driver.version}")
        return self._cache.folder / f"{key.name}-{slug}.kernels"

    def _infer(self, crops: NDArray[np.uint8]) -> Outputs:
        runner = self._ready()
        return runner.collect(runner.submit(crops))

    def _ready(self) -> Runner:
        if self._runner is None:
            raise DeviceError("the model is not on the device")
        self._enter_thread()
        return self._runner

    def _enter_thread(self) -> None:
        if self._thread != threading.get_ident():
            self._driver.make_current()
            self._thread = threading.get_ident()

    def _close(self) -> None:
        if self._runner is not None:
            self._enter_thread()
            self._runner.close()
            self._runner = None


class TensorRTRTXBackend(TensorRTBackend):
    """The same on TensorRT-RTX, whose wheels are on PyPI and whose plans are built on any machine."""

    name = "tensorrt_rtx"
    flavour: tensorrt_api.Flavour = "tensorrt_rtx"
