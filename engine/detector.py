"""The facade: a bundle on a backend, crops in, calibrated scores out. Worker, evaluation and command line all call it.

One thread infers: a second one inside `infer` at the same time gets a `BackendStateError`. Everything that does not touch the
backend (`combine`, the properties) may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from engine import backends
from engine.backends.base import Backend, Outputs
from engine.bundle import Bundle, load, packaged
from engine.heads import HEADS, Head
from engine.manifest import Band, Threshold
from engine.preprocess import LAYOUTS, Layout

if TYPE_CHECKING:
    from engine.classify import Classified, ImageBytes
    from engine.images import Limits


class ScoreError(ValueError):
    """The model's output for an image is not finite: the image is undetermined, never authentic."""


@dataclass(frozen=True, slots=True)
class ImageScore:
    """One image's calibrated scores.

    `score`: probability of the serving head that the image is AI-generated; `heads`: the same by head name; `crops`: of the
    serving head, for each crop of the deciding frame; `frame`: its index.
    """

    score: float
    heads: dict[str, float]
    crops: tuple[float, ...]
    frame: int


class Detector:
    """A loaded model. Made by `open` or `from_parts`; a context manager."""

    def __init__(self, bundle: Bundle, backend: Backend, head: Head, crops: Layout) -> None:
        self._backend = backend
        self.bundle = bundle
        self.head = head
        self.crops = crops

    @classmethod
    def open(
        cls,
        bundle_path: Path | str | None = None,
        backend: str = "auto",
        device: str = "auto",
        head: str = "linear",
        crops: str = "center",
        threads: int = 0,
        opening: Callable[[Bundle, Backend], None] | None = None,
        **options: Any,
    ) -> Detector:
        """Load a bundle on a backend.

        Args:
            bundle_path: a folder with manifest.json, or with CURRENT; None: the packaged bundle.
            backend, device, threads, options: as `engine.backends.create` takes them; `plan_cache` and `batch_sizes` may be
                given to any backend, and mean something to those that compile plans.
            head: the serving head: linear, knn or ocsvm.
            crops: how images are cut: center or five.
            opening: called when the bundle is found whole and a backend's packages and device are there, before it is loaded.

        Raises:
            BundleError: the bundle is missing or damaged.
            BackendUnavailable: no such backend runs here.
            ValueError: an unknown name.
            OutOfDeviceMemory, DeviceError: from the device.
        """
        _check_names(head, crops)
        bundle = load(packaged() if bundle_path is None else bundle_path)
        loaded = backends.load_first(bundle, backend, device, threads, opening, **options)
        return cls(bundle, loaded, cast(Head, head), cast(Layout, crops))

    @classmethod
    def from_parts(cls, bundle: Bundle, backend: Backend, head: str = "linear", crops: str = "center") -> Detector:
        """A detector on a backend that is not loaded yet; it is loaded here. Raises as `open`."""
        _check_names(head, crops)
        backend.load(bundle)
        return cls(bundle, backend, cast(Head, head), cast(Layout, crops))

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.bundle.manifest.name

    @property
    def version(self) -> str:
        """Version of the model."""
        return self.bundle.manifest.version

    @property
    def backend_name(self) -> str:
        """torch, openvino, tensorrt, …"""
        return self._backend.name

    @property
    def device(self) -> str:
        """cpu, cuda:0, …"""
        return self._backend.device

    @property
    def cache_scope(self) -> str:
        """What a cached score depends on beside the image: model, preprocessing, crops layout and serving head.

        The digest's first digits tell apart two bundles that carry the same name and version; the head chooses the deciding
        frame and the crops' scores.
        """
        manifest = self.bundle.manifest
        parts = (manifest.name, manifest.version, self.bundle.digest[:12], manifest.preprocess.id, self.crops, self.head)
        return "/".join(parts)

    @property
    def thresholds(self) -> Mapping[str, Threshold]:
        """The serving head's thresholds by name (fpr_0.01, …)."""
        return self.bundle.manifest.thresholds.get(self.head, {})

    @property
    def abstain(self) -> Band | None:
        """The serving head's band of uncertain scores, where the bundle has one."""
        return self.bundle.manifest.abstain.get(self.head)

    def threshold(self, name: str) -> float:
        """The calibrated probability from which on the serving head calls an image AI-generated at a named FPR.

        Raises:
            ValueError: the bundle has no such threshold; the message lists those it has.
        """
        if name not in self.thresholds:
            known = ", ".join(sorted(self.thresholds)) or "none"
            raise ValueError(f"model {self.name} {self.version} has no threshold {name!r} for head {self.head}; it has: {known}")
        return self.thresholds[name].threshold

    def warm_up(self, batch_sizes: Iterable[int]) -> None:
        """Run each batch size once. Raises as `infer`."""
        self._backend.warm_up(batch_sizes)

    def infer(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Calibrated probabilities that crops are AI-generated.

        Args:
            crops: uint8 [n, 224, 224, 3], RGB, from `engine.preprocess.crops`.

        Returns:
            f32 [n, 3], columns in the order of `HEADS`. A crop whose output is not finite has a row of NaN.

        Raises:
            ValueError: wrong dtype or shape.
            BackendStateError, OutOfDeviceMemory, DeviceError: as in `engine.backends.base`.
        """
        return self.calibrate(self.outputs(crops).raw)

    def outputs(self, crops: NDArray[np.uint8]) -> Outputs:
        """Raw scores and embeddings of crops, for training heads and measuring drift. Arguments and errors as `infer`."""
        return self._backend.infer(crops)

    @property
    def depth(self) -> int:
        """Batches the backend takes at once: 2 where copying overlaps with computing, else 1."""
        return int(getattr(self._backend, "depth", 1))

    def submit(self, crops: NDArray[np.uint8]) -> object:
        """Start a batch; at most `depth` may be under way. Its ticket, for `collect`. Arguments and errors as `infer`.

        The array must stay as it is until then: a backend that takes one batch at a time computes in `collect`.
        """
        submit = getattr(self._backend, "submit", None)
        return crops if submit is None else submit(crops)

    def collect(self, ticket: Any) -> NDArray[np.float32]:
        """Calibrated probabilities of a submitted batch; each ticket once, in the order of `submit`. Errors as `infer`."""
        return self.calibrate(self.collect_outputs(ticket).raw)

    def collect_outputs(self, ticket: Any) -> Outputs:
        """As `collect`, raw scores and embeddings."""
        collect = getattr(self._backend, "collect", None)
        outputs: Outputs = self._backend.infer(ticket) if collect is None else collect(ticket)
        return outputs

    def calibrate(self, raw: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raw scores f32 [n, 3] to probabilities f32 [n, 3]; a row with a value that is not finite becomes NaN."""
        calibration = self.bundle.manifest.calibration
        probabilities = np.stack([calibration[head].apply(raw[:, i]) for i, head in enumerate(HEADS)], axis=1)
        probabilities[~np.isfinite(raw).all(axis=1)] = np.nan
        return probabilities

    def combine(self, probabilities: NDArray[np.float32], crops_per_frame: int) -> ImageScore:
        """One score for an image from those of its crops.

        Per frame, each head's mean over the crops; over frames, the frame whose serving-head mean is the largest, the first
        of equals.

        Args:
            probabilities: f32 [frames * crops_per_frame, 3], frame-major, of one image.

        Raises:
            ScoreError: a probability is NaN.
            ValueError: the shape does not fit.
        """
        if probabilities.ndim != 2 or probabilities.shape[1] != len(HEADS) or crops_per_frame < 1:
            raise ValueError(f"expected probabilities as [crops, {len(HEADS)}], got {list(probabilities.shape)}")
        if not len(probabilities) or len(probabilities) % crops_per_frame:
            raise ValueError(f"{len(probabilities)} crops are no whole number of frames of {crops_per_frame}")
        if np.isnan(probabilities).any():
            raise ScoreError("the model's output for this image is not finite")
        if len(probabilities) == 1:  # nothing to combine: most images
            only = dict(zip(HEADS, probabilities[0].tolist(), strict=True))
            return ImageScore(score=only[self.head], heads=only, crops=(only[self.head],), frame=0)
        frames = probabilities.reshape(-1, crops_per_frame, len(HEADS)).astype(np.float64)
        means = frames.mean(axis=1)
        serving = HEADS.index(self.head)
        frame = int(means[:, serving].argmax())
        return ImageScore(
            score=float(means[frame, serving]),
            heads={head: float(means[frame, i]) for i, head in enumerate(HEADS)},
            crops=tuple(float(p) for p in frames[frame, :, serving]),
            frame=frame,
        )

    def classify(
        self, images: Iterable[tuple[str, ImageBytes]], limits: Limits | None = None, batch_size: int = 16, threads: int = 0
    ) -> Iterator[Classified]:
        """Scores of many images, in their order, in bounded memory; see `engine.classify`."""
        from engine.classify import classify

        return classify(self, images, limits, batch_size, threads)

    def close(self) -> None:
        """Give back the device's memory. May be called again."""
        self._backend.close()

    def __enter__(self) -> Detector:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _check_names(head: str, crops: str) -> None:
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}; known are {', '.join(HEADS)}")
    if crops not in LAYOUTS:
        raise ValueError(f"unknown crops layout {crops!r}; known are {', '.join(LAYOUTS)}")
