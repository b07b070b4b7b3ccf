"""What the steps of a refresh compute: embeddings of labelled images, heads, calibration, and both reports on the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import bundle as bundles
from engine.bundle import Bundle
from engine.detector import Detector
from engine.heads import HEADS, unit_rows
from engine.images import ImageError, read
from engine.manifest import Histogram, Parent, Reference
from engine.preprocess import center_crop
from train import agreement, drafts, evaluate, metrics, probe, refit, replay, shift
from train import calibrate as calibration
from train.augment import PRESETS
from train.data import Damage, DataError, read_manifest, trained_sources
from train.embed import Embedded, Facts, Rgb, degraded, embed, from_files
from train.gate import Rule
from train.ladder import RUNGS
from train.scoring import Scored
from train.store import LIMITS

PARITY_CROPS = 16
MIN_OF_A_CLASS = 5
SCORE_BINS = 20
RULE_MARGIN = 0.02
"""An AUROC on a few dozen held-out labels may fall by this much by chance alone."""

OnCount = Callable[[int], None]


def embed_labelled(
    detector: Detector, images: Sequence[tuple[Facts, Path]], damage: Damage, on_image: OnCount | None = None
) -> Embedded:
    """Embeddings of labelled image files, as serving sees them; what cannot be decoded is reported and left out."""

    def decoded() -> Iterator[tuple[Rgb, Facts]]:
        for facts, path in images:
            try:
                yield read(path.read_bytes(), LIMITS).frames[0], facts
            except (ImageError, OSError) as exc:
                damage.add(facts.key[:16], str(exc) or type(exc).__name__)

    return _finite(embed(lambda crops: detector.outputs(crops).embedding, decoded(), on_image), damage)


def replay_from(
    detector: Detector, data: Path, damage: Damage, on_image: OnCount | None = None, train: bool = True
) -> replay.Parts:
    """The replay of a bundle, from the corpus it was trained on; as probe, calibrate and evaluate make it. train: False leaves
    out what heads are fitted on."""
    clean = RUNGS[0]
    jpeg75 = next(rung for rung in RUNGS if rung.name == "jpeg75")

    def encoder(crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        return detector.outputs(crops).embedding

    def platform(image: Any, rng: np.random.Generator) -> Any:
        return PRESETS["platform"](image, rng, 1.0)

    sources = trained_sources(data)
    val = read_manifest(data, "val")
    seen = [entry for entry in val if entry.source in sources]
    if len({entry.label for entry in seen}) < 2:
        raise DataError(f"{data}: no validation images of both classes from sources that are in training too")
    parts = {}
    if train:
        files = from_files(read_manifest(data, "train"), damage)
        parts[replay.TRAIN] = embed(encoder, degraded(files, platform, seed=0), on_image)
    parts |= {
        replay.CALIBRATE[0]: embed(encoder, from_files(seen, damage), on_image),
        replay.CALIBRATE[1]: embed(encoder, degraded(from_files(seen, damage), platform, seed=1), on_image),
        f"{replay.EVALUATE}{clean.name}": embed(encoder, from_files(val, damage), on_image),
        f"{replay.EVALUATE}{jpeg75.name}": embed(
            encoder, degraded(from_files(val, damage), lambda image, rng: jpeg75.change(image), seed=2), on_image
        ),
    }
    return {name: replay.bounded(_finite(part, damage)) for name, part in parts.items()}


def without_lookalikes(parts: replay.Parts, labelled: Embedded) -> replay.Parts:
    """The replay less every image of calibration and evaluation that is, or looks like, a labelled one: what was learned from
    must not judge. Rows of one image go together, whatever was done to it.

    Raises:
        DataError: nothing of a class is left to calibrate or evaluate on.
    """
    taught = unit_rows(labelled.embedding)
    known = {facts.key for facts in labelled.facts}
    kept = dict(parts)
    for names in (replay.CALIBRATE, tuple(f"{replay.EVALUATE}{name}" for name in replay.CONDITIONS)):
        seen = set(known)
        for name in names:
            nearest = (unit_rows(parts[name].embedding) @ taught.T).max(axis=1, initial=-1.0)
            seen |= {facts.key for facts, cosine in zip(parts[name].facts, nearest, strict=True) if cosine >= refit.ALIKE}
        for name in names:
            kept[name] = parts[name].where(np.array([facts.key not in seen for facts in parts[name].facts], np.bool_))
            if len(set(kept[name].labels.tolist())) < 2:
                raise DataError(f"replay, {name}: every image of a class is among the labelled ones: nothing is left to judge by")
    return kept


def refitted(champion: Bundle, train: Embedded, labelled: refit.Weighted, tuned: Bundle | None = None) -> dict[str, Any]:
    """The fields of a bundle with refitted heads, its calibration still the champion's.

    tuned: a bundle whose encoder replaces the champion's; train and labelled are its embeddings then, and no head is kept.
    """
    manifest, c = champion.manifest, regularisation(champion)
    base = champion.heads if tuned is None else probe.fit(train, c=c)
    parents = (Parent(name=manifest.name, version=manifest.version, digest=champion.digest),)
    return drafts.of(tuned or champion) | {
        "version": "candidate",
        "heads": refit.refit(base, train, labelled, c),
        "linear_c": c,
        "svm_nu": probe.NU,
        "parents": parents,
    }


def held_out(champion: Bundle, parts: replay.Parts, labelled: refit.Weighted) -> dict[str, Any]:
    """How champion and candidate rank labelled images that the candidate was not fitted on, fold by fold.

    `ai_generated` and `authentic`: of each class with at least 5 labelled images the number of them and the mean AUROC over folds
    against the evaluation's images of the other class, of the champion and of linear heads fitted without the fold.
    """
    against = parts[f"{replay.EVALUATE}clean"]
    before = refit.Linear(champion.heads.linear_weight, champion.heads.linear_bias)
    found: dict[str, Any] = {}
    folds = refit.held_out_models(parts[replay.TRAIN], labelled, regularisation(champion))
    for name, label in (("ai_generated", 1), ("authentic", 0)):
        of_class = labelled.rows.labels == label
        others = against.embedding[against.labels != label]
        if of_class.sum() < MIN_OF_A_CLASS or not len(others):
            continue
        pairs = [(rows[of_class[rows]], model) for rows, model in folds]
        scored = [
            [auroc_of(model, labelled.rows.embedding[rows], others, label) for model in (before, after)]
            for rows, after in pairs
            if len(rows)
        ]
        weights = [len(rows) for rows, _ in pairs if len(rows)]
        means = np.average(np.array(scored), axis=0, weights=weights)
        found[name] = {"images": int(of_class.sum()), "champion": float(means[0]), "candidate": float(means[1])}
    return found


def calibrated(
    draft: dict[str, Any], parts: replay.Parts, shifts: Mapping[str, float], sample: tuple[NDArray[np.float32], float] | None
) -> tuple[dict[str, Any], dict[str, float]]:
    """The draft with calibration, thresholds, abstain band and reference; and the logit shift of each head that is in it.

    shifts: what an earlier sample asked for, kept where there is no new one. sample: embeddings float32[n, 192] of unlabelled
    uploads and the share of them that is AI-generated.
    """
    rows = replay.joined([parts[name] for name in replay.CALIBRATE])
    heads = draft["heads"]
    raw = heads.raw_scores(rows.embedding)
    groups = [facts.group if facts.label else facts.key for facts in rows.facts]
    calibrations, thresholds, _ = calibration.calibrate(raw, rows.labels, groups, [facts.key for facts in rows.facts])
    if sample is not None:
        raw_sample = heads.raw_scores(sample[0])
        shifts = {head: shift.logit_shift(calibrations[head].apply(raw_sample[:, i]), sample[1]) for i, head in enumerate(HEADS)}
    for head in HEADS:
        if by := shifts.get(head):
            calibrations[head] = shift.shifted(calibrations[head], by)
            thresholds[head] = {name: shift.moved_threshold(t, by) for name, t in thresholds[head].items()}
    histograms = {}
    for i, head in enumerate(HEADS):
        counts, edges = np.histogram(calibrations[head].apply(raw[:, i]), bins=SCORE_BINS, range=(0.0, 1.0))
        histograms[head] = Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))
    wide = rows.embedding.astype(np.float64)
    reference = Reference(
        images=len(rows.facts),
        embedding_mean=tuple(wide.mean(0).tolist()),
        embedding_std=tuple(wide.std(0).tolist()),
        scores=histograms,
    )
    changed = {
        "calibration": calibrations,
        "thresholds": thresholds,
        "abstain": dict.fromkeys(HEADS, calibration.ABSTAIN),
        "reference": reference,
    }
    return {**draft, **changed}, dict(shifts)


def report(folder: Path, parts: replay.Parts, crops: NDArray[np.uint8] | None) -> dict[str, Any]:
    """The report of a bundle on the replay's evaluation embeddings; with the parity of backends on `crops` where given."""
    conditions = {name: parts[f"{replay.EVALUATE}{name}"] for name in replay.CONDITIONS}
    sources = frozenset(facts.source for facts in parts[replay.CALIBRATE[0]].facts)
    # Scores come from stored embeddings: no backend has anything to compute.
    with Detector.open(folder, backend="null") as detector:
        scored = {name: _scored(detector, part) for name, part in conditions.items()}
        agreed = agreement.measure(detector.bundle, crops) if crops is not None else None
        content = evaluate.report(detector, scored, sources, evaluation_digest(parts), Damage(), agreed)
    return content | {"backend": "numpy, from stored embeddings"}


def evaluation_digest(parts: replay.Parts) -> str:
    """Names the images that a report is on."""
    from train.refresh_job import digest_of

    return digest_of([[f.key, f.label] for name in replay.CONDITIONS for f in parts[f"{replay.EVALUATE}{name}"].facts])


def label_rules(found: dict[str, Any]) -> list[Rule]:
    """The gate's rule on the labels themselves: held-out ones are ranked no worse than by the champion."""
    rules = [
        Rule(
            f"labelled {name}: no worse",
            row["candidate"] >= row["champion"] - RULE_MARGIN,
            f"AUROC {row['candidate']:.3f} on {row['images']} held-out labels, champion's {row['champion']:.3f}",
        )
        for name, row in found.items()
    ]
    return rules or [Rule("labelled images", False, f"fewer than {MIN_OF_A_CLASS} of each class")]


def crops_of(paths: Sequence[Path]) -> NDArray[np.uint8]:
    """Centre crops uint8[n, 224, 224, 3] of the first images that can be decoded; made-up ones where none can."""
    crops: list[Rgb] = []
    for path in paths:
        try:
            crops.append(center_crop(read(path.read_bytes(), LIMITS).frames[0]))
        except (ImageError, OSError):
            continue
        if len(crops) == PARITY_CROPS:
            break
    return np.stack(crops) if crops else agreement.made_up_crops()


def write_bundle(folder: Path, draft: dict[str, Any]) -> Bundle:
    """Writes a bundle from a draft's fields."""
    return bundles.write(folder, bundles.Draft(**draft))


def regularisation(champion: Bundle) -> float:
    """C of the linear head, as the champion's was fitted."""
    known = champion.manifest.heads.linear.c
    return probe.C if known is None else known


def _scored(detector: Detector, part: Embedded) -> Scored:
    raw = detector.bundle.heads.raw_scores(part.embedding)
    return Scored(raw, detector.calibrate(raw), part.embedding, part.facts)


def auroc_of(model: refit.Linear, ours: NDArray[np.float32], others: NDArray[np.float32], label: int) -> float:
    """How well a linear head ranks `ours`, all of the class `label`, against `others` of the other class."""
    scores = np.concatenate((model(ours), model(others)))
    labels = np.concatenate((np.full(len(ours), label), np.full(len(others), 1 - label))).astype(np.uint8)
    return metrics.auroc(labels, scores)


def _finite(part: Embedded, damage: Damage) -> Embedded:
    good = np.array([np.isfinite(row).all() for row in part.embedding], np.bool_)
    for facts, keep in zip(part.facts, good, strict=True):
        if not keep:
            damage.add(facts.key[:16], "its embedding is not finite")
    return part.where(good)
