"""Why: local evidence over a grid of windows, the three heads, the nearest labelled images, and the policy's rule for a score."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from engine.bundle import Bundle, BundleError, load, packaged, resolve
from engine.detector import Detector, ScoreError
from engine.heads import HEADS, unit_rows
from worker.clock import Clock, Deadline
from worker.console.pictures import Picture, bare
from worker.console.uploads import Unavailable
from worker.contracts.verdict import build_verdict
from worker.engines import engine_of
from worker.errors import ConfigurationError, DependencyError, ItemError, StaleItemError
from worker.items import Scores
from worker.metrics import Metrics
from worker.probes import BundleScale
from worker.settings import Settings
from worker.stages.decode import Decoder
from worker.stages.policy import BoundRule, PolicyKeeper
from worker.stages.policy_file import DEFAULT_TENANT

log = structlog.get_logger(__name__)

NEIGHBOURS = 6
BATCH = 16
MAX_WAITING = 8
"""Explanations and trials that may wait for the one engine; more are turned away."""


class Busy(Exception):  # noqa: N818 - says what it is
    """Too many explanations wait already."""


class Explainer:
    """The console's own engine: one thread loads it when it is first needed, and alone uses it."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        """
        Raises:
            ConfigurationError: the policy file cannot be read or is wrong.
        """
        self._settings = settings
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, "console-engine")
        self._places = threading.BoundedSemaphore(MAX_WAITING)
        self._policy = PolicyKeeper(settings.policy, Metrics())
        # In a process also where the worker decodes in threads: what is tried comes straight from a browser.
        self._decoder = Decoder(settings.decode.model_copy(update={"processes": 1}), settings.engine.crops)
        self._decoder_started = False
        self._bundle: Bundle | None = None
        self._detector: Detector | None = None
        self._path: Path | None = None
        self._opened: Path | None = None

    def explain(self, picture: Picture) -> dict[str, Any]:
        """Evidence for a picture, found anew with the bundle that is in service here.

        Raises:
            Unavailable: no engine runs here.
            Busy: too many wait.
        """
        return self._in_turn(lambda: self._explain(picture))

    def rule(self, verdict: dict[str, Any]) -> dict[str, Any]:
        """The policy's rule for a verdict's tenant, and how its score met it. Raises as `explain`."""
        return self._in_turn(lambda: self._rule(verdict))

    def trial(self, data: bytes, sha256: str, tenant: str) -> dict[str, Any]:
        """The verdict that the worker would give, of bytes that are no upload: nothing is published. Raises as `explain`."""
        return self._in_turn(lambda: self._trial(data, sha256, tenant))

    def close(self) -> None:
        """Give the device back."""
        self._thread.submit(self._close)
        self._thread.shutdown(wait=True)

    def _in_turn(self, task: Any) -> dict[str, Any]:
        if not self._places.acquire(blocking=False):
            raise Busy("too many pictures wait for the engine; try again in a moment")
        try:
            return dict(self._thread.submit(task).result())
        finally:
            self._places.release()

    # -- in the engine's thread --------------------------------------------------------------------------------------

    def _explain(self, picture: Picture) -> dict[str, Any]:
        detector = self._ready()
        started = time.monotonic()
        crops = np.concatenate([picture.center[None], picture.pixels])
        raw, embedding = [], []
        for first in range(0, len(crops), BATCH):
            outputs = detector.outputs(np.ascontiguousarray(crops[first : first + BATCH]))
            raw.append(outputs.raw)
            embedding.append(outputs.embedding[:1])
        probabilities = detector.calibrate(np.concatenate(raw))
        column = HEADS.index(detector.head)
        return {
            "model": {"name": detector.name, "version": detector.version, "head": detector.head},
            "image": {"width": picture.info.width, "height": picture.info.height, "frames": picture.info.frames},
            "center": {head: _finite(probabilities[0, i]) for i, head in enumerate(HEADS)},
            "windows": [
                {"top": w.top, "left": w.left, "height": w.height, "width": w.width, "p": _finite(p)}
                for w, p in zip(picture.windows, probabilities[1:, column], strict=True)
            ],
            "neighbours": _neighbours(detector.bundle, embedding[0]),
            "duration_ms": round((time.monotonic() - started) * 1000),
        }

    def _rule(self, verdict: dict[str, Any]) -> dict[str, Any]:
        self._current_bundle()
        self._policy.reload_if_changed()
        bound, tenant = self._policy.current, verdict["tenant"]
        own = tenant in bound.tenants and tenant != DEFAULT_TENANT
        written = self._policy.policy.tenants.get(tenant if own else DEFAULT_TENANT)
        rule = bound.rule(tenant)
        names = ("label", "review", "block")
        return {
            "policy": {"name": bound.name, "version": bound.version},
            "same_policy": {"name": bound.name, "version": bound.version}
            == {name: verdict["policy"].get(name) for name in ("name", "version")},
            "same_model": self._bundle is not None and verdict["model"].get("version") == self._bundle.manifest.version,
            "rule_of": tenant if own else DEFAULT_TENANT,
            "thresholds": {name: None if math.isinf(value := getattr(rule, name)) else value for name in names},
            "written": {name: _written(getattr(written, name, None)) for name in names},
            "on_undetermined": rule.on_undetermined,
            "uncertain": list(rule.uncertain),
            "because": because(rule, verdict["score"], verdict["reason"]),
        }

    def _trial(self, data: bytes, sha256: str, tenant: str) -> dict[str, Any]:
        detector = self._ready()
        self._policy.reload_if_changed()
        if not self._decoder_started:
            self._decoder.start()
            self._decoder_started = True
        fetched = bare(data, sha256, self._clock, event_id="trial")
        engine, started = engine_of(detector, self._settings.decode.max_frames), time.monotonic()
        timings = fetched.item.timings
        try:
            decoded = self._decoder.decode(fetched, 0)
            timings.decode = (time.monotonic() - started) * 1000
            inferring = time.monotonic()
            score = detector.combine(detector.infer(decoded.crops), decoded.crops_per_frame)
            timings.infer = (time.monotonic() - inferring) * 1000
        except ItemError as error:
            raise Unavailable(f"{error.code}: {error.message}") from error
        except ScoreError as error:
            raise Unavailable(f"engine.failed: {error}") from error
        except (StaleItemError, DependencyError) as error:
            raise Unavailable(f"the decoder is not running: {error}") from error
        scores = Scores(score.heads, score.crops)
        verdict = build_verdict(
            event=fetched.item.event,
            source=fetched.item.record.position,
            model=engine.model,
            decision=self._policy.current.decide(score.score, tenant),
            processed_at=self._clock.time(),
            scores=scores,
            image=decoded.info,
            timings=timings,
            finished=self._clock.monotonic(),
        )
        return verdict.model_dump(mode="json") | {"tenant": tenant}

    def _ready(self) -> Detector:
        """The detector of the bundle in service, opened where there is none or another bundle took its place."""
        from engine.backends.base import BackendError

        bundle, choice = self._current_bundle(), self._settings.engine
        if self._detector is None or self._opened != bundle.path:
            try:
                fresh = Detector.open(bundle.path, choice.backend, choice.device, choice.head, choice.crops, choice.threads)
            except (BackendError, BundleError, ValueError) as error:
                raise Unavailable(f"no engine runs here: {error}") from error
            if self._detector is not None:
                self._detector.close()
            self._detector, self._opened = fresh, bundle.path
        return self._detector

    def _current_bundle(self) -> Bundle:
        """The bundle that is named now, bound to the policy."""
        try:
            path = resolve(self._settings.engine.bundle or packaged())
            if self._bundle is None or path != self._path:
                bundle = load(path)
                self._policy.bind(BundleScale(bundle, self._settings.engine.head))
                self._bundle, self._path = bundle, path
        except BundleError as error:
            raise Unavailable(f"no model here: {error}") from error
        except ConfigurationError as error:
            raise Unavailable(f"the policy does not fit the model here: {error}") from error
        return self._bundle

    def _close(self) -> None:
        self._decoder.close(Deadline(2.0))
        if self._detector is not None:
            self._detector.close()


def because(rule: BoundRule, score: float | None, reason: str | None) -> str:
    """One sentence: how the score met the rule."""
    if score is None:
        return f"There is no score ({reason or 'unknown reason'}): the rule for undetermined images says {rule.on_undetermined}."
    action = rule.action(score)
    if action == "block":
        return f"The score {score:.3f} is at or above the threshold for blocking, {rule.block:.3f}."
    if action == "review":
        beyond = "blocking is off" if math.isinf(rule.block) else f"below the one for blocking, {rule.block:.3f}"
        return f"The score {score:.3f} is at or above the threshold for review, {rule.review:.3f}, and {beyond}."
    if math.isinf(rule.review) and math.isinf(rule.block):
        return f"The score is {score:.3f}; this rule neither reviews nor blocks."
    return f"The score {score:.3f} is below every threshold, the lowest of which is {min(rule.review, rule.block):.3f}."


def _neighbours(bundle: Bundle, embedding: Any) -> list[dict[str, Any]]:
    """The nearest images of the kNN gallery: id, label and cosine, the nearest first."""
    if not np.isfinite(embedding).all():
        return []
    heads = bundle.heads
    cosine = unit_rows(embedding)[0] @ heads.knn_gallery.T
    nearest = np.argsort(-cosine)[:NEIGHBOURS]
    return [
        {
            "id": heads.knn_ids[row] if heads.knn_ids else f"gallery row {row}",
            "label": "ai_generated" if heads.knn_labels[row] else "authentic",
            "cosine": round(float(cosine[row]), 4),
        }
        for row in nearest
    ]


def _written(threshold: Any) -> list[str]:
    return [str(alternative) for alternative in threshold or ()]


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
