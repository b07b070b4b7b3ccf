"""What a refresh is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from train import gate, refit
from train.labels_images import Allowed
from train.labels_topic import KafkaOptions

Say = Callable[[str], None]


class RefreshError(Exception):
    """The job cannot go on now; a later try may. The message says why."""


@dataclass(frozen=True, slots=True)
class Options:
    """Of one refresh. `labels`: files and folders to read instead of the topic; `data`: the corpus, for a bundle that carries no
    replay and for a new encoder; `unlabelled` and `share`: a sample of uploads for the logit shift and how much of it is
    AI-generated; `min_labels`: None is what suits heads or encoder; `encoder`: train the encoder too, by `recipe` (None: the
    one in `train/recipes/refresh.toml`), on `device` with `workers` loader processes."""

    models: Path
    work: Path
    labels: tuple[Path, ...] = ()
    kafka: KafkaOptions = field(default_factory=KafkaOptions)
    allowed: Allowed = field(default_factory=Allowed)
    data: Path | None = None
    unlabelled: Path | None = None
    share: float | None = None
    min_labels: int | None = None
    reviewer_images: float = refit.REVIEWER_IMAGES
    max_fpr: float = gate.MAX_FPR
    backend: str = "torch"
    encoder: bool = False
    recipe: Path | None = None
    device: str = "cpu"
    workers: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a refresh ended. `rules`: the gate's, where it was asked."""

    kind: Literal["promoted", "kept"]
    reason: str
    version: str
    rules: tuple[gate.Rule, ...] = ()
