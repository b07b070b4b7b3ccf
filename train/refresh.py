"""`refresh`: from human decisions to a promoted bundle, as one resumable job (docs/refresh.md).

labels -> pack (images) -> embed -> refit -> calibrate -> evaluate -> gate -> promote

The encoder stays; the heads are refitted on the bundle's replay and the labelled images. `train.refresh_encoder` retrains the
encoder too. Every step's output is whole or absent (`train.refresh_job`), so a job that was killed anywhere is started again and
ends as it would have. One job at a time in a work folder, one publisher at a time in a folder of versions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine import bundle as bundles
from engine.bundle import Bundle
from engine.detector import Detector
from engine.file_lock import LockTimeout, hold
from engine.manifest import REPLAY_FILE
from train import refit, refresh_end, replay
from train import refresh_steps as work
from train.data import Damage, DataError, digest, read_manifest
from train.embed import Embedded
from train.refresh_job import Steps
from train.refresh_labels import Found, facts_of, images, is_new, read
from train.refresh_options import Options, Outcome, RefreshError, Say

__all__ = ["Options", "Outcome", "RefreshError", "read", "refresh"]

CODE = "code-refresh/1"
MIN_LABELS = 10


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
    finished = refresh_end.finished(options, champion)
    if finished is not None:
        return finished
    if options.encoder:
        from train import refresh_encoder

        return refresh_encoder.run(options, champion, say)
    return _heads(options, champion, say)


def _heads(options: Options, champion: Bundle, say: Say) -> Outcome:
    steps = Steps(options.work / "steps", lambda name, found: say(f"{name}: {'done before' if found else 'at work'}"))
    parts = _parts(options, champion, steps, say)
    learned = parts.get(replay.LABELS)
    labels, tally = read(options)
    found = images(options, labels, learned, tally)
    for line in tally.lines():
        say(line)
    version = champion.manifest.version
    least = MIN_LABELS if options.min_labels is None else options.min_labels
    if found.new < least:
        return Outcome("kept", f"{found.new} new labels with an image; at least {least} are needed", version)
    key = refresh_end.question(options, champion, CODE, found.labels)
    before = refresh_end.earlier_answer(options, key, champion)
    if before is not None:
        return before
    labelled, reviewers = _embedded(options, champion, steps, found, learned, say)
    fresh = sum(is_new(f.key, f.label, learned) for f in labelled.facts)
    if fresh < least:
        return Outcome("kept", f"{fresh} new labels with a readable image; at least {least} are needed", version)
    weighted = refit.weigh(labelled, reviewers, parts[replay.TRAIN], options.reviewer_images)
    judging = work.without_lookalikes(parts, labelled)
    if len(weighted.contradictory):
        say(f"{len(weighted.contradictory)} labels left out: look-alikes with other labels")

    def fitted(folder: Path) -> dict[str, Any]:
        work.write_bundle(folder / "bundle", work.refitted(champion, judging[replay.TRAIN], weighted))
        return work.held_out(champion, judging, weighted)

    inputs = {"question": key, "labels": [[f.key, f.label] for f in weighted.rows.facts]}
    held_out = steps.run("refit", inputs, fitted)
    fit = bundles.load(steps.path("refit") / "bundle")
    judged = refresh_end.judged(options, champion, steps, fit, judging, judging, key, list(found.paths.values()))
    facts = {
        "labels": {"in_effect": len(labels), "learned": len(weighted.weights), "new": fresh, "digest": key},
        "held_out": held_out,
    }
    # The new bundle carries every labelled image, also one that taught nothing this time.
    return refresh_end.concluded(options, champion, judged, facts, {**parts, replay.LABELS: labelled}, key)


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


def _embedded(
    options: Options, champion: Bundle, steps: Steps, found: Found, learned: Embedded | None, say: Say
) -> tuple[Embedded, list[str]]:
    """Rows of all labelled images, the ones learned before among them, and who decided each."""
    encoder = champion.manifest.encoder.sha256
    facts = [facts_of(label) for label in found.labels if label.sha256 in found.paths]

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
        relabelled = [facts_of(now[f.key]) if f.key in now else f for f in learned.facts]
        rows = replay.joined([Embedded(learned.embedding, relabelled), rows])
    return rows, [f.group for f in rows.facts]
