"""`refresh`: from human decisions to a promoted bundle, as one resumable job (docs/training.md, "Refresh").

labels -> pack (images) -> embed -> refit -> calibrate -> evaluate -> gate -> promote

The encoder stays; the heads are refitted on the bundle's replay and the labelled images. Every step's output is whole or absent
(`train.refresh_job`), so a job that was killed anywhere is started again and ends as it would have. One job at a time in a work
folder, one publisher at a time in a folder of versions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine import bundle as bundles
from engine.bundle import Bundle
from engine.detector import Detector
from engine.file_lock import LockTimeout, hold
from engine.manifest import REPLAY_FILE
from train import drafts, gate, promote, refit, replay, rollback, shift
from train import labels as label_records
from train import refresh_steps as work
from train.data import Damage, DataError, digest, read_manifest
from train.embed import Embedded, Facts
from train.labels import Label, Tally
from train.labels_images import Allowed, found_images
from train.labels_topic import KafkaOptions, read_labels
from train.refresh_card import refreshed_card
from train.refresh_job import Steps, digest_of, read_json, write_json

CODE = "code-refresh/1"
MIN_LABELS = 10
MAX_LABELS = 5_000
PROMOTING_FILE = "promoting.json"

_REFRESHED = re.compile(r"(?P<base>.+)-r(?P<number>\d{1,6})")

Say = Callable[[str], None]


class RefreshError(Exception):
    """The job cannot go on now; a later try may. The message says why."""


@dataclass(frozen=True, slots=True)
class Options:
    """Of one refresh. `labels`: files and folders to read instead of the topic; `data`: the corpus, for a bundle that carries no
    replay; `unlabelled` and `share`: a sample of uploads for the logit shift and how much of it is AI-generated."""

    models: Path
    work: Path
    labels: tuple[Path, ...] = ()
    kafka: KafkaOptions = field(default_factory=KafkaOptions)
    allowed: Allowed = field(default_factory=Allowed)
    data: Path | None = None
    unlabelled: Path | None = None
    share: float | None = None
    min_labels: int = MIN_LABELS
    reviewer_images: float = refit.REVIEWER_IMAGES
    max_fpr: float = gate.MAX_FPR
    backend: str = "torch"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a refresh ended. `rules`: the gate's, where it was asked."""

    kind: Literal["promoted", "kept"]
    reason: str
    version: str
    rules: tuple[gate.Rule, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """Labels with what is known of their images: a stored embedding, or a file."""

    labels: list[Label]
    paths: dict[str, Path]
    new: int
    """Labels that the champion has not learned, with an image."""


def refresh(options: Options, say: Say = lambda text: None) -> Outcome:
    """Runs the job, or what is left of it.

    Raises:
        DataError, BundleError: labels, corpus or bundle cannot be used as they are.
        RefreshError, TopicError, PromoteError, DeviceError, OSError: it cannot go on now; nothing was published.
    """
    try:
        options.work.mkdir(parents=True, exist_ok=True)
        with hold(options.work / "lock", timeout_s=0):
            return _locked(options, say)
    except LockTimeout as exc:
        raise RefreshError(f"{options.work}: another refresh is at work there") from exc


def _locked(options: Options, say: Say) -> Outcome:
    champion = bundles.load(options.models)
    if champion.path == options.models:
        raise DataError(f"{options.models}: is a bundle itself; `refresh` needs a folder of versions with CURRENT")
    if any(t.crops != "center" for named in champion.manifest.thresholds.values() for t in named.values()):
        raise DataError(
            f"{champion.path}: is calibrated for five crops, and `refresh` calibrates centre crops: use `probe` and `calibrate`"
        )
    finished = _finish(options, champion)
    if finished is not None:
        return finished
    steps = Steps(options.work / "steps", lambda name, found: say(f"{name}: {'done before' if found else 'at work'}"))
    parts = _parts(options, champion, steps, say)
    learned = parts.get(replay.LABELS)
    labels, tally = read(options)
    found = _images(options, labels, learned, tally)
    for line in tally.lines():
        say(line)
    version = champion.manifest.version
    if found.new < options.min_labels:
        return Outcome("kept", f"{found.new} new labels with an image; at least {options.min_labels} are needed", version)
    key = _question(options, champion, found, learned)
    before = read_json(options.work / "outcomes" / f"{key}.json")
    if before is not None:
        return Outcome("kept", f"no new labels since the last answer: {before.get('reason')}", version)
    labelled, reviewers = _embedded(options, champion, steps, found, learned, say)
    fresh = sum(_is_new(f.key, f.label, learned) for f in labelled.facts)
    if fresh < options.min_labels:
        return Outcome("kept", f"{fresh} new labels with a readable image; at least {options.min_labels} are needed", version)
    weighted = refit.weigh(labelled, reviewers, parts[replay.TRAIN], options.reviewer_images)
    judged = work.without_lookalikes(parts, labelled)
    if len(weighted.contradictory):
        say(f"{len(weighted.contradictory)} labels left out: look-alikes with other labels")
    candidate, reports, held_out, shifts = _candidate(options, champion, steps, judged, weighted, key, found)
    rules = tuple(gate.gate(reports["candidate"], reports["champion"], options.max_fpr) + work.label_rules(held_out))
    if not all(rule.passed for rule in rules):
        return _answered(options, key, Outcome("kept", "the candidate did not pass the gate", version, rules))
    facts = {
        "labels": {"in_effect": len(labels), "learned": len(weighted.weights), "new": fresh, "digest": key},
        "held_out": held_out,
        "shift": shifts,
    }
    # The new bundle carries every labelled image, also one that taught nothing this time.
    return _promote(options, champion, candidate, reports, facts, {**parts, replay.LABELS: labelled}, rules, key)


def _finish(options: Options, champion: Bundle) -> Outcome | None:
    """The outcome of a job that was killed between the swap of CURRENT and its last note."""
    pending = read_json(options.work / PROMOTING_FILE)
    if pending is None or pending.get("heads_sha256") != champion.manifest.heads.sha256:
        return None
    outcome = Outcome("promoted", "published before the job was cut short", champion.manifest.version)
    _answered(options, str(pending.get("question")), outcome)
    (options.work / PROMOTING_FILE).unlink(missing_ok=True)
    return outcome


def _parts(options: Options, champion: Bundle, steps: Steps, say: Say) -> replay.Parts:
    """The bundle's replay, or one made from the corpus."""
    parts = replay.of_bundle(champion)
    encoder = champion.manifest.encoder.sha256
    if parts is None:
        if options.data is None:
            raise DataError(f"{champion.path}: carries no {REPLAY_FILE}; name the corpus it was trained on with --data")
        data = options.data
        inputs = {"encoder": encoder, "train": digest(read_manifest(data, "train")), "val": digest(read_manifest(data, "val"))}

        def make(folder: Path) -> dict[str, Any]:
            damage = Damage()
            with Detector.open(champion.path, backend=options.backend, threads=1) as detector:
                made = work.replay_from(detector, data, damage)
            (folder / REPLAY_FILE).write_bytes(replay.encode(made, encoder))
            return {"skipped": str(damage)}

        say(f"replay: {steps.run('replay', inputs, make)['skipped']}")
        file = steps.path("replay") / REPLAY_FILE
        parts = replay.decode(file.read_bytes(), encoder, str(file))
    needed = (replay.TRAIN, *replay.CALIBRATE, *(f"{replay.EVALUATE}{name}" for name in replay.CONDITIONS))
    missing = [name for name in needed if name not in parts or len(set(parts[name].labels.tolist())) < 2]
    if missing:
        raise DataError(f"{champion.path}: its replay has no images of both classes in {', '.join(missing)}")
    return parts


def read(options: Options) -> tuple[list[Label], Tally]:
    """Labels in effect, from the files and folders that are named, else from the topic; of one image the last source counts.

    Raises DataError for a file that cannot be read, TopicError for a topic that cannot.
    """
    if not options.labels:
        found, tally = read_labels(options.kafka)
    else:
        by_image: dict[str, Label] = {}
        tally = Tally()
        for path in options.labels:
            labels, partial = (label_records.read_folder if path.is_dir() else label_records.read_file)(path)
            by_image |= {label.sha256: label for label in labels}
            tally.records += partial.records
            tally.skipped += partial.skipped
            tally.examples |= partial.examples
        found = [by_image[sha256] for sha256 in sorted(by_image)]
    if len(found) > MAX_LABELS:
        found = sorted(found, key=lambda label: (label.at, label.sha256))
        for label in found[:-MAX_LABELS]:
            tally.skip(f"older than the latest {MAX_LABELS}", label.sha256[:16])
        found = sorted(found[-MAX_LABELS:], key=lambda label: label.sha256)
    return found, tally


def _images(options: Options, labels: list[Label], learned: Embedded | None, tally: Tally) -> _Found:
    """Finds the images of labels whose embedding the champion does not carry."""
    known = {facts.key for facts in learned.facts} if learned is not None else set()
    wanted = [label for label in labels if label.sha256 not in known]
    kafka = None if options.labels else options.kafka
    pairs = found_images(wanted, options.work / "images", options.allowed, kafka, tally)
    paths = {label.sha256: path for label, path in pairs}
    usable = [label for label in labels if label.sha256 in known or label.sha256 in paths]
    new = sum(_is_new(label.sha256, label.label, learned) for label in usable)
    return _Found(usable, paths, new)


def _is_new(key: str, label: int, learned: Embedded | None) -> bool:
    return learned is None or (key, label) not in {(facts.key, facts.label) for facts in learned.facts}


def _question(options: Options, champion: Bundle, found: _Found, learned: Embedded | None) -> str:
    """Names what is asked: the same champion, labels and options have one answer."""
    sample: list[Any] | None = None
    if options.unlabelled is not None:
        files = sorted([path.name, path.stat().st_size] for path in options.unlabelled.iterdir())
        sample = [files, options.share]
    return digest_of(
        {
            "code": CODE,
            "champion": champion.digest,
            "labels": [[label.sha256, label.label, label.by] for label in found.labels],
            "reviewer_images": options.reviewer_images,
            "max_fpr": options.max_fpr,
            "sample": sample,
        }
    )


def _embedded(
    options: Options, champion: Bundle, steps: Steps, found: _Found, learned: Embedded | None, say: Say
) -> tuple[Embedded, list[str]]:
    """Rows of all labelled images, the ones learned before among them, and who decided each."""
    encoder = champion.manifest.encoder.sha256
    facts = [_facts(label) for label in found.labels if label.sha256 in found.paths]

    def make(folder: Path) -> dict[str, Any]:
        damage = Damage()
        with Detector.open(champion.path, backend=options.backend, threads=1) as detector:
            rows = work.embed_labelled(detector, [(f, found.paths[f.key]) for f in facts], damage)
        (folder / REPLAY_FILE).write_bytes(replay.encode({replay.LABELS: rows}, encoder))
        return {"skipped": str(damage)}

    inputs = {"encoder": encoder, "images": sorted([f.key, f.label, f.group] for f in facts)}
    say(f"embed: {steps.run('embed', inputs, make)['skipped']}")
    file = steps.path("embed") / REPLAY_FILE
    rows = replay.decode(file.read_bytes(), encoder, str(file))[replay.LABELS]
    if learned is not None:
        now = {label.sha256: label for label in found.labels}
        # A decision that was reversed since, on an image that is at hand only as its embedding.
        relabelled = [_facts(now[f.key]) if f.key in now else f for f in learned.facts]
        rows = replay.joined([Embedded(learned.embedding, relabelled), rows])
    return rows, [f.group for f in rows.facts]


def _facts(label: Label) -> Facts:
    # The reviewer is the group: what one of them decided is bounded together, also when the topic no longer has the record.
    return Facts(label.sha256, label.label, "labels", "camera" if not label.label else "labelled", label.by)


def _candidate(
    options: Options, champion: Bundle, steps: Steps, parts: replay.Parts, weighted: refit.Weighted, key: str, found: _Found
) -> tuple[Bundle, dict[str, Any], dict[str, Any], dict[str, float]]:
    """The calibrated bundle, both reports, the measures on held-out labels, and the logit shift by head."""

    def fitted(folder: Path) -> dict[str, Any]:
        work.write_bundle(folder / "bundle", work.refitted(champion, parts[replay.TRAIN], weighted))
        return work.held_out(champion, parts, weighted)

    inputs = {"question": key, "labels": [[f.key, f.label] for f in weighted.rows.facts]}
    held_out = steps.run("refit", inputs, fitted)
    fit = bundles.load(steps.path("refit") / "bundle")
    kept = champion.manifest.metrics.get("refresh")
    earlier = kept.get("shift") if isinstance(kept, dict) else None
    before = earlier if isinstance(earlier, dict) else {}
    shifts_before = {str(head): float(by) for head, by in before.items() if isinstance(by, int | float)}

    def calibrated(folder: Path) -> dict[str, Any]:
        draft, shifts = work.calibrated(drafts.of(fit), parts, shifts_before, _sample(options, champion))
        work.write_bundle(folder / "bundle", draft)
        return shifts

    shifts = steps.run("calibrate", {"question": key, "fit": fit.digest, "shift": shifts_before}, calibrated)
    folder = steps.path("calibrate") / "bundle"

    def evaluated(step: Path) -> dict[str, Any]:
        crops = work.crops_of(list(found.paths.values())[: 4 * work.PARITY_CROPS])
        write_json(step / "champion.json", work.report(champion.path, parts, None))
        write_json(step / "candidate.json", work.report(folder, parts, crops))
        return {}

    candidate = bundles.load(folder)
    steps.run("evaluate", {"question": key, "candidate": candidate.digest}, evaluated)
    reports = {name: promote.read_report(steps.path("evaluate") / f"{name}.json") for name in ("champion", "candidate")}
    return candidate, reports, held_out, shifts


def _sample(options: Options, champion: Bundle) -> tuple[NDArray[np.float32], float] | None:
    """Embeddings of the unlabelled sample, and the share of it that is AI-generated."""
    if options.unlabelled is None or options.share is None:
        return None
    damage = Damage()
    files = sorted(path for path in options.unlabelled.iterdir() if path.is_file())
    with Detector.open(champion.path, backend=options.backend, threads=1) as detector:
        rows = work.embed_labelled(detector, [(Facts(path.name, 0, "sample", "", ""), path) for path in files], damage)
    if len(rows.facts) < shift.MIN_SAMPLE:
        raise DataError(f"{options.unlabelled}: {len(rows.facts)} readable images; a shift needs {shift.MIN_SAMPLE}")
    return rows.embedding, options.share


def _answered(options: Options, key: str, outcome: Outcome) -> Outcome:
    content = {"kind": outcome.kind, "reason": outcome.reason, "version": outcome.version}
    rules = [{"name": r.name, "passed": bool(r.passed), "detail": r.detail} for r in outcome.rules]
    write_json(options.work / "outcomes" / f"{key}.json", {**content, "rules": rules})
    return outcome


def _promote(
    options: Options,
    champion: Bundle,
    candidate: Bundle,
    reports: dict[str, Any],
    facts: dict[str, Any],
    carried: replay.Parts,
    rules: tuple[gate.Rule, ...],
    key: str,
) -> Outcome:
    """Publishes the candidate as a new version, unless the champion changed meanwhile or this very candidate was rolled back."""
    models, heads = options.models, candidate.manifest.heads.sha256
    with rollback.publishing(models):
        if bundles.read_manifest(models)[1] != champion.digest:
            raise RefreshError(f"{models}: another version was published meanwhile; start the refresh again")
        if any(row["heads_sha256"] == heads for row in rollback.withdrawn(models)):
            kept = Outcome("kept", "this candidate was published before and rolled back", champion.manifest.version, rules)
            return _answered(options, key, kept)
        version, there = _version(models, champion.manifest.version, candidate)
        write_json(options.work / PROMOTING_FILE, {"version": version, "heads_sha256": heads, "question": key})
        if not there:
            draft = drafts.of(candidate) | {
                "version": version,
                "metrics": {"report": reports["candidate"], "refresh": facts},
                "model_card": refreshed_card(champion, version, reports, facts, rules),
                "replay": replay.encode(carried, candidate.manifest.encoder.sha256),
                "created_at": None,
            }
            work.write_bundle(models / version, draft)
        bundles.publish(models, version)
    outcome = _answered(options, key, Outcome("promoted", "every rule of the gate holds", version, rules))
    (options.work / PROMOTING_FILE).unlink(missing_ok=True)
    return outcome


def _version(models: Path, current: str, candidate: Bundle) -> tuple[str, bool]:
    """The next free version after `current` (2026.11.23 -> 2026.11.23-r1 -> 2026.11.23-r2), and whether a job that was cut short
    has written this candidate under it already."""
    match = _REFRESHED.fullmatch(current)
    base, number = (match["base"], int(match["number"])) if match else (current, 0)
    while True:
        number += 1
        version = f"{base}-r{number}"
        if not (models / version).exists():
            return version, False
        try:
            manifest = bundles.read_manifest(models / version)[0]
        except bundles.BundleError:
            continue
        theirs = (manifest.heads.sha256, manifest.calibration, manifest.parents)
        if theirs == (candidate.manifest.heads.sha256, candidate.manifest.calibration, candidate.manifest.parents):
            return version, True
