"""The second half of a refresh, the same whatever was learned: calibrate, evaluate, gate, promote; and how it is noted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import bundle as bundles
from engine.bundle import Bundle
from engine.detector import Detector
from train import drafts, gate, promote, replay, rollback, shift
from train import refresh_steps as work
from train.data import Damage, DataError
from train.embed import Facts
from train.labels import Label
from train.refresh_card import refreshed_card, training_page
from train.refresh_job import Steps, digest_of, read_json, write_json
from train.refresh_options import Options, Outcome, RefreshError

PROMOTING_FILE = "promoting.json"

_REFRESHED = re.compile(r"(?P<base>.+)-r(?P<number>\d{1,6})")


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """A calibrated candidate, its report and the champion's on the same images, and the logit shift by head."""

    candidate: Bundle
    reports: dict[str, Any]
    shifts: dict[str, float]


def question(options: Options, champion: Bundle, code: str, labels: Sequence[Label], **more: Any) -> str:
    """Names what is asked: the same champion, labels and options have one answer."""
    sample: list[Any] | None = None
    if options.unlabelled is not None:
        files = sorted([path.name, path.stat().st_size] for path in options.unlabelled.iterdir())
        sample = [files, options.share]
    return digest_of(
        {
            "code": code,
            "champion": champion.digest,
            "labels": [[label.sha256, label.label, label.by] for label in labels],
            "reviewer_images": options.reviewer_images,
            "max_fpr": options.max_fpr,
            "sample": sample,
            **more,
        }
    )


def earlier_answer(options: Options, key: str, champion: Bundle) -> Outcome | None:
    """What a job with the same question was told."""
    before = read_json(options.work / "outcomes" / f"{key}.json")
    if before is None:
        return None
    return Outcome("kept", f"no new labels since the last answer: {before.get('reason')}", champion.manifest.version)


def judged(
    options: Options,
    champion: Bundle,
    steps: Steps,
    fit: Bundle,
    ours: replay.Parts,
    theirs: replay.Parts,
    key: str,
    pictures: Sequence[Path],
) -> Judged:
    """The steps calibrate and evaluate. fit: the candidate with its heads fitted. ours, theirs: candidate's and champion's
    embeddings of the same images, which are the same parts where they share an encoder. pictures: for the parity of backends."""
    kept = champion.manifest.metrics.get("refresh")
    earlier = kept.get("shift") if isinstance(kept, dict) else None
    before = earlier if isinstance(earlier, dict) else {}
    shifts_before = {str(head): float(by) for head, by in before.items() if isinstance(by, int | float)}

    def calibrated(folder: Path) -> dict[str, Any]:
        draft, shifts = work.calibrated(drafts.of(fit), ours, shifts_before, _sample(options, fit))
        work.write_bundle(folder / "bundle", draft)
        return shifts

    shifts = steps.run("calibrate", {"question": key, "fit": fit.digest, "shift": shifts_before}, calibrated)
    folder = steps.path("calibrate") / "bundle"

    def evaluated(step: Path) -> dict[str, Any]:
        crops = work.crops_of(pictures[: 4 * work.PARITY_CROPS])
        write_json(step / "champion.json", work.report(champion.path, theirs, None))
        write_json(step / "candidate.json", work.report(folder, ours, crops))
        return {}

    candidate = bundles.load(folder)
    steps.run("evaluate", {"question": key, "candidate": candidate.digest}, evaluated)
    reports = {name: promote.read_report(steps.path("evaluate") / f"{name}.json") for name in ("champion", "candidate")}
    return Judged(candidate, reports, shifts)


def concluded(
    options: Options, champion: Bundle, found: Judged, facts: dict[str, Any], carried: replay.Parts, key: str
) -> Outcome:
    """Asks the gate and promotes, or keeps the champion. facts: for the manifest, `held_out` among them. carried: the replay."""
    reports = found.reports
    rules = tuple(gate.gate(reports["candidate"], reports["champion"], options.max_fpr) + work.label_rules(facts["held_out"]))
    if not all(rule.passed for rule in rules):
        reason = "the candidate did not pass the gate"
        return _answered(options, key, Outcome("kept", reason, champion.manifest.version, rules))
    return _promoted(options, champion, found.candidate, reports, {**facts, "shift": found.shifts}, carried, rules, key)


def finished(options: Options, champion: Bundle) -> Outcome | None:
    """The outcome of a job that was killed between the swap of CURRENT and its last note."""
    pending = read_json(options.work / PROMOTING_FILE)
    if pending is None or pending.get("heads_sha256") != champion.manifest.heads.sha256:
        return None
    outcome = Outcome("promoted", "published before the job was cut short", champion.manifest.version)
    _answered(options, str(pending.get("question")), outcome)
    (options.work / PROMOTING_FILE).unlink(missing_ok=True)
    return outcome


def _answered(options: Options, key: str, outcome: Outcome) -> Outcome:
    content = {"kind": outcome.kind, "reason": outcome.reason, "version": outcome.version}
    rules = [{"name": r.name, "passed": bool(r.passed), "detail": r.detail} for r in outcome.rules]
    write_json(options.work / "outcomes" / f"{key}.json", {**content, "rules": rules})
    return outcome


def _promoted(
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
        if "encoder" in facts:
            page = models / "TRAINING.md"
            before = page.read_text(encoding="utf-8") if page.exists() else ""
            text = training_page(champion.manifest.name, version, facts, before)
            partial = page.with_suffix(".partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(page)
        bundles.publish(models, version)
    outcome = _answered(options, key, Outcome("promoted", "every rule of the gate holds", version, rules))
    (options.work / PROMOTING_FILE).unlink(missing_ok=True)
    return outcome


def _sample(options: Options, fit: Bundle) -> tuple[NDArray[np.float32], float] | None:
    """Embeddings of the unlabelled sample by the encoder that is to serve, and the share of it that is AI-generated."""
    if options.unlabelled is None or options.share is None:
        return None
    damage = Damage()
    files = sorted(path for path in options.unlabelled.iterdir() if path.is_file())
    with Detector.open(fit.path, backend=options.backend, threads=1) as detector:
        rows = work.embed_labelled(detector, [(Facts(path.name, 0, "sample", "", ""), path) for path in files], damage)
    if len(rows.facts) < shift.MIN_SAMPLE:
        raise DataError(f"{options.unlabelled}: {len(rows.facts)} readable images; a shift needs {shift.MIN_SAMPLE}")
    return rows.embedding, options.share


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
