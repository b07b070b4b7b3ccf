"""Agreement of backends: the same crops through a reference and through others, in scores and in decisions.

A candidate agrees where every head's calibrated probability stays within the tolerance of its precision and at most 0.1% of
the decisions at a shipped threshold flip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import backends
from engine.backends.base import Outputs
from engine.bundle import Bundle
from engine.heads import HEADS, Head

TOLERANCES = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}
"""Largest allowed difference of a calibrated probability, by the candidate's precision."""

MAX_FLIPPED_SHARE = 1e-3
DEFAULT_THRESHOLDS = {"0.5": 0.5}
"""Where decisions are made for a head whose bundle ships no threshold."""

BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class Spec:
    """A backend to compare: its name, and its precision or None for its own choice."""

    backend: str
    precision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Spec:
        """`openvino` or `openvino:bf16`."""
        backend, _, precision = text.strip().partition(":")
        return cls(backend, precision or None)


@dataclass(frozen=True, slots=True)
class HeadAgreement:
    """One head of one candidate against the reference, over all crops.

    `flipped` counts decisions that differ at the threshold where most do; `threshold` is that one's name.
    """

    max_raw: float
    max_probability: float
    mean_probability: float
    flipped: int
    threshold: str


@dataclass(frozen=True, slots=True)
class Agreement:
    """One candidate against the reference."""

    reference: str
    candidate: str
    device: str
    precision: str
    crops: int
    tolerance: float
    max_embedding: float
    heads: dict[Head, HeadAgreement]

    @property
    def problems(self) -> list[str]:
        """What is beyond the tolerance, a line each; empty: the candidate agrees."""
        found = []
        allowed = int(MAX_FLIPPED_SHARE * self.crops)
        for name, head in self.heads.items():
            # Not `>`: a NaN is a problem, too.
            if not head.max_probability <= self.tolerance:
                found.append(f"{name}: a probability is off by {head.max_probability:.2g}, allowed {self.tolerance:.0e}")
            if head.flipped > allowed:
                found.append(f"{name}: {head.flipped} of {self.crops} decisions flip at {head.threshold}, allowed {allowed}")
        return found


def compare(bundle: Bundle, crops: NDArray[np.uint8], reference: Spec, candidates: Sequence[Spec]) -> Iterator[Agreement]:
    """Agreement of each candidate with the reference, one after the other: one backend is loaded at a time.

    Args:
        bundle: the model.
        crops: uint8 [n, 224, 224, 3], n at least 1.
        reference: whose scores count as right.
        candidates: the others.

    Raises:
        BackendUnavailable: one of them cannot run here.
        ValueError: an unknown backend or precision, or no crops.
        OutOfDeviceMemory, DeviceError: from the backends.
    """
    if not len(crops):
        raise ValueError("parity needs at least one image")
    expected, reference_name, _, _ = _run(bundle, crops, reference)
    for candidate in candidates:
        outputs, name, device, precision = _run(bundle, crops, candidate)
        yield Agreement(
            reference=reference_name,
            candidate=name,
            device=device,
            precision=precision,
            crops=len(crops),
            tolerance=TOLERANCES[precision],
            max_embedding=float(np.abs(outputs.embedding - expected.embedding).max()),
            heads={head: _compare_head(bundle, head, outputs.raw[:, i], expected.raw[:, i]) for i, head in enumerate(HEADS)},
        )


def _run(bundle: Bundle, crops: NDArray[np.uint8], spec: Spec) -> tuple[Outputs, str, str, str]:
    """Outputs of a backend, and its name with precision, device and precision."""
    options: dict[str, Any] = {} if spec.precision is None else {"precision": spec.precision}
    backend = backends.create(spec.backend, **options)
    try:
        backend.load(bundle)
        precision = str(getattr(backend, "precision", "fp32"))
        parts = [backend.infer(crops[start : start + BATCH_SIZE]) for start in range(0, len(crops), BATCH_SIZE)]
        raw, embedding = (np.concatenate([getattr(part, name) for part in parts]) for name in ("raw", "embedding"))
        return Outputs(raw, embedding), f"{backend.name} {precision}", backend.device, precision
    finally:
        backend.close()


def _compare_head(bundle: Bundle, head: Head, raw: NDArray[np.float32], expected: NDArray[np.float32]) -> HeadAgreement:
    calibrate: Callable[[NDArray[np.float32]], NDArray[np.float32]] = bundle.manifest.calibration[head].apply
    ours, theirs = calibrate(raw), calibrate(expected)
    shipped = {name: value.threshold for name, value in bundle.manifest.thresholds.get(head, {}).items()}
    flips = {name: int(((ours >= cut) != (theirs >= cut)).sum()) for name, cut in (shipped or DEFAULT_THRESHOLDS).items()}
    worst = max(flips, key=lambda name: flips[name])
    difference = np.abs(ours.astype(np.float64) - theirs)
    return HeadAgreement(
        max_raw=float(np.abs(raw.astype(np.float64) - expected).max()),
        max_probability=float(difference.max()),
        mean_probability=float(difference.mean()),
        flipped=flips[worst],
        threshold=worst,
    )
