"""Scores labelled images through `engine.detector`, under any number of degradations, each file decoded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.backends.base import Outputs
from engine.detector import Detector
from engine.preprocess import crops
from train.data import Damage, DataError, Entry
from train.embed import Facts, from_files
from train.ladder import Rung

BATCH = 16
COUNTED = 32


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Scores of n images under one condition.

    `raw` float32[n, 3], `probability` float32[n, 3] (calibrated) and `embedding` float32[n, 192], each the mean over an
    image's crops; the mean of the probabilities is what serving reports (`Detector.combine`). `several`: some image has more
    than one crop.
    """

    raw: NDArray[np.float32]
    probability: NDArray[np.float32]
    embedding: NDArray[np.float32]
    facts: list[Facts]
    several: bool = False

    @property
    def labels(self) -> NDArray[np.uint8]:
        """uint8[n], 1 = AI-generated."""
        return np.array([f.label for f in self.facts], np.uint8)

    @property
    def clusters(self) -> NDArray[np.int64]:
        """int64[n]: images of one file (the quarters of a grid) share a number."""
        names = [f.key.partition("#")[0] for f in self.facts]
        return np.unique(names, return_inverse=True)[1].astype(np.int64)

    def ranking(self, column: int) -> NDArray[np.float64]:
        """float64[n]: what a head's ranking measures use.

        Of one crop the raw score, which has no ties; of several the mean probability, because the raw scores of crops are not
        what serving averages.
        """
        values = self.probability if self.several else self.raw
        return values[:, column].astype(np.float64)

    def where(self, mask: NDArray[np.bool_]) -> Scored:
        """The rows for which mask bool[n] holds."""
        facts = [f for f, keep in zip(self.facts, mask, strict=True) if keep]
        return Scored(self.raw[mask], self.probability[mask], self.embedding[mask], facts, self.several)


def score(
    detector: Detector,
    entries: Sequence[Entry],
    rungs: Sequence[Rung],
    damage: Damage,
    on_image: Callable[[int], None] | None = None,
) -> dict[str, Scored]:
    """Scores of the images of `entries` under each of `rungs`, cropped as the detector is set, by the rung's name.

    All conditions hold the same images in the same order: what cannot be decoded, or has an output that is not finite under any
    of them, goes to `damage`. `on_image` hears of every 32nd image. Raises DataError where nothing is left.
    """
    runs = {rung.name: _Run() for rung in rungs}
    facts: list[Facts] = []
    waiting: list[tuple[_Run, NDArray[np.uint8]]] = []
    for rgb, known in from_files(entries, damage):
        image = Image.fromarray(rgb)
        for rung in rungs:
            waiting.append((runs[rung.name], crops(np.asarray(rung.change(image)), detector.crops)))
        facts.append(known)
        if sum(len(cut) for _, cut in waiting) >= BATCH:
            _flush(detector, waiting)
        if on_image is not None and len(facts) % COUNTED == 0:
            on_image(len(facts))
    _flush(detector, waiting)
    if not facts:
        raise DataError(f"none of {len(entries)} images can be decoded; {damage}")
    whole = {name: run.scored(detector, facts) for name, run in runs.items()}
    finite = np.logical_and.reduce([np.isfinite(s.raw).all(axis=1) for s in whole.values()])
    for known, good in zip(facts, finite.tolist(), strict=True):
        if not good:
            damage.add(known.key, "the model's output is not finite")
    if not finite.any():
        raise DataError(f"the model gives no finite score for any of {len(facts)} images")
    return whole if finite.all() else {name: scored.where(finite) for name, scored in whole.items()}


class _Run:
    """Outputs of one condition as they come, and how many crops each image has."""

    def __init__(self) -> None:
        self.outputs: list[Outputs] = []
        self.counts: list[int] = []

    def scored(self, detector: Detector, facts: list[Facts]) -> Scored:
        raw = np.concatenate([o.raw for o in self.outputs])
        embedding = np.concatenate([o.embedding for o in self.outputs])
        counts = np.array(self.counts, np.int64)
        starts = np.cumsum(counts) - counts
        probability = detector.calibrate(raw)

        def mean(values: NDArray[np.float32]) -> NDArray[np.float32]:
            total = np.add.reduceat(values.astype(np.float64), starts, axis=0)
            return (total / counts[:, None]).astype(np.float32)

        return Scored(mean(raw), mean(probability), mean(embedding), facts, bool((counts > 1).any()))


def _flush(detector: Detector, waiting: list[tuple[_Run, NDArray[np.uint8]]]) -> None:
    """Infers what waits, whichever conditions it is of, and hands it back to them."""
    if not waiting:
        return
    outputs = detector.outputs(np.concatenate([cut for _, cut in waiting]))
    start = 0
    for run, cut in waiting:
        stop = start + len(cut)
        run.outputs.append(Outputs(outputs.raw[start:stop], outputs.embedding[start:stop]))
        run.counts.append(len(cut))
        start = stop
    waiting.clear()
