"""`refresh --encoder`: the rare refresh that trains the encoder too, as one resumable job (docs/refresh.md, "Encoder").

labels -> embed (by the champion) -> corpus, labelled (pixels) -> tune -> replay (by the new encoder) -> refit -> calibrate
-> evaluate -> gate -> promote

Embeddings cannot go through a new encoder, so the corpus is needed and every labelled image. Who looks like whom is judged by the
champion's encoder, before the new one has learned them. A fifth of the labels is held out of the encoder, and of the heads that
the gate's rule on labels is asked about; the heads that are published learn from all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import bundle as bundles
from engine.bundle import Bundle
from engine.detector import Detector
from engine.manifest import REPLAY_FILE
from train import refit, refresh_end, replay
from train import refresh_steps as work
from train import refresh_tuning as tuning
from train.data import Damage, DataError, Entry, digest, read_manifest
from train.embed import Embedded, Facts
from train.labels import Label
from train.recipe import Recipe
from train.refresh_job import Steps, digest_of
from train.refresh_labels import Found, facts_of, images, is_new, read
from train.refresh_options import Options, Outcome, Say

CODE = "code-refresh-encoder/1"
MIN_LABELS = 25
TRAINING = "training-"


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """What every step looks at."""

    options: Options
    champion: Bundle
    data: Path
    train: list[Entry]
    corpus: str
    recipe: Recipe
    steps: Steps
    say: Say

    @property
    def folder(self) -> Path:
        return self.options.work / "encoder"

    @property
    def counts(self) -> tuple[int, int]:
        """Real and generated files of the corpus."""
        fakes = sum(entry.label for entry in self.train)
        return len(self.train) - fakes, fakes


def run(options: Options, champion: Bundle, say: Say) -> Outcome:
    """The job, under the lock of its folder. Raises as `refresh`, and RecipeError and PretrainError."""
    if options.data is None:
        raise DataError("--encoder needs the corpus, --data FOLDER: embeddings of earlier images mean nothing to a new encoder")
    train, val = read_manifest(options.data, "train"), read_manifest(options.data, "val")
    steps = Steps(options.work / "encoder", lambda name, found: say(f"{name}: {'done before' if found else 'at work'}"))
    corpus = digest_of([digest(train), digest(val)])
    job = _Job(options, champion, options.data, train, corpus, tuning.recipe_for(options.recipe, champion), steps, say)
    earlier = replay.of_bundle(champion) or {}
    learned, tuned = earlier.get(replay.LABELS), earlier.get(replay.TUNED)
    labels, tally = read(options)
    found = images(options, _with_learned(labels, learned), None, tally)
    for line in tally.lines():
        say(line)
    dropped = sum(facts.key not in found.paths for facts in learned.facts) if learned is not None else 0
    if dropped:
        say(f"{dropped} labels that the champion has learned are dropped: their images cannot be had any more")
    version, least = champion.manifest.version, MIN_LABELS if options.min_labels is None else options.min_labels
    fresh = sum(is_new(label.sha256, label.label, tuned) for label in found.labels)
    if fresh < least:
        return Outcome("kept", f"{fresh} labels with an image are new to the encoder; at least {least} are needed", version)
    key = refresh_end.question(options, champion, CODE, found.labels, recipe=job.recipe.digest, corpus=corpus)
    before = refresh_end.earlier_answer(options, key, champion)
    if before is not None:
        return before
    theirs = _by_champion(job, found)
    labelled = theirs[replay.LABELS]
    fresh = sum(is_new(facts.key, facts.label, tuned) for facts in labelled.facts)
    if fresh < least:
        return Outcome("kept", f"{fresh} new labels with a readable image; at least {least} are needed", version)
    weighted = refit.weigh(labelled, [f.group for f in labelled.facts], _counted(train), options.reviewer_images)
    if weighted.contradictory:
        say(f"{len(weighted.contradictory)} labels left out: look-alikes with other labels")
    held = tuning.held_out_rows(weighted)
    bundle, facts = _tuned(job, found, weighted, ~held)
    ours, again = _by_tuned(job, found, bundle, weighted)
    judging = _same_images(work.without_lookalikes(theirs, labelled), ours)
    held_out = _refitted(job, key, bundle, earlier, (weighted, again), held, judging)
    fit = bundles.load(steps.path("refit") / "bundle")
    judged = refresh_end.judged(options, champion, steps, fit, judging[0], judging[1], key, list(found.paths.values()))
    about = {
        "labels": {"in_effect": len(labels), "learned": len(again.weights), "new": fresh, "digest": key},
        "held_out": held_out,
        "encoder": facts | {"held_out": int(held.sum()), "labels_dropped": dropped},
    }
    seen = {f.key for f, kept in zip(weighted.rows.facts, ~held, strict=True) if kept}
    taught = again.rows.where(np.array([f.key in seen for f in again.rows.facts], np.bool_))
    return refresh_end.concluded(options, champion, judged, about, {**ours, replay.TUNED: taught}, key)


def _with_learned(labels: list[Label], learned: Embedded | None) -> list[Label]:
    """Also what the champion has learned and the labels' source no longer tells: its image may still be in the archive."""
    known = {label.sha256 for label in labels}
    rest = [f for f in learned.facts if f.key not in known] if learned is not None else []
    return labels + [Label(f.key, f.label, f.group, "", "") for f in rest]


def _counted(entries: list[Entry]) -> Embedded:
    """The corpus as far as weights look at it: a label a row, and no embedding."""
    facts = [Facts(entry.path.name, entry.label, entry.source, entry.generator, entry.group) for entry in entries]
    return Embedded(np.empty((len(facts), 0), np.float32), facts)


def _image_facts(found: Found) -> list[Facts]:
    return [facts_of(label) for label in found.labels]


def _embedding_step(job: _Job, name: str, bundle: Bundle, found: Found, train: bool) -> replay.Parts:
    """The corpus' images and the labelled ones through an encoder; without the training images where they are not needed."""
    facts = _image_facts(found)

    def make(folder: Path) -> dict[str, Any]:
        damage = Damage()
        with Detector.open(bundle.path, backend=job.options.backend, threads=1) as detector:
            parts = work.replay_from(detector, job.data, damage, train=train)
            parts[replay.LABELS] = work.embed_labelled(detector, [(f, found.paths[f.key]) for f in facts], damage)
        (folder / REPLAY_FILE).write_bytes(replay.encode(parts, bundle.manifest.encoder.sha256))
        return {"skipped": str(damage)}

    encoder = bundle.manifest.encoder.sha256
    inputs = {"encoder": encoder, "corpus": job.corpus, "images": sorted([f.key, f.label, f.group] for f in facts)}
    job.say(f"{name}: {job.steps.run(name, inputs, make)['skipped']}")
    file = job.steps.path(name) / REPLAY_FILE
    return replay.decode(file.read_bytes(), encoder, str(file))


def _by_champion(job: _Job, found: Found) -> replay.Parts:
    return _embedding_step(job, "embed", job.champion, found, train=False)


def _by_tuned(job: _Job, found: Found, bundle: Bundle, weighted: refit.Weighted) -> tuple[replay.Parts, refit.Weighted]:
    ours = _embedding_step(job, "replay", bundle, found, train=True)
    return ours, tuning.carried_over(weighted, ours[replay.LABELS], job.counts, ours[replay.TRAIN])


def _tuned(job: _Job, found: Found, weighted: refit.Weighted, seen: NDArray[np.bool_]) -> tuple[Bundle, dict[str, Any]]:
    """The steps corpus, labelled and tune: a bundle with the new encoder, and facts of its training."""
    copies, folder = job.recipe.pool_copies, job.folder
    entries = tuning.entries_of(weighted.rows.where(seen), found.paths)
    inputs: dict[str, Any] = {"corpus": digest(job.train), "copies": copies}
    made = job.steps.run("corpus", inputs, lambda to: tuning.build_corpus(job.train, to, copies))
    job.say(f"corpus: {made['images']} images; {made['skipped']}")
    inputs["labelled"] = sorted([entry.sha256, entry.label] for entry in entries)
    made = job.steps.run("labelled", inputs, lambda to: tuning.build_labelled(entries, to, copies, folder / "corpus"))
    job.say(f"labelled: {made['images']} images; {made['skipped']}")
    weights = [[f.key, float(weight)] for f, weight in zip(weighted.rows.facts, weighted.weights, strict=True)]
    inputs |= {"weights": weights, "recipe": job.recipe.digest, "start": job.champion.digest, "device": job.options.device}
    training = folder / f"{TRAINING}{digest_of(inputs)[:16]}"
    tuning.only(folder, training, TRAINING)

    def make(to: Path) -> dict[str, Any]:
        tuning.mix(training, folder / "corpus", folder / "labelled", job.recipe, weighted, seen, job.counts)
        options = job.options
        return tuning.tune(job.champion, job.recipe, training, to / "bundle", options.device, options.workers, job.say)

    facts = job.steps.run("tune", inputs, make)
    tuning.only(folder, folder, TRAINING)
    bundle = bundles.load(job.steps.path("tune") / "bundle")
    reals, fakes = job.counts
    return bundle, facts | {
        "recipe": job.recipe.name,
        "recipe_sha256": job.recipe.digest,
        "start_sha256": job.champion.manifest.encoder.sha256,
        "encoder_sha256": bundle.manifest.encoder.sha256,
        "labelled": len(entries),
        "corpus": {"real": reals, "fake": fakes, "sha256": digest(job.train)},
    }


def _same_images(theirs: replay.Parts, ours: replay.Parts) -> tuple[replay.Parts, replay.Parts]:
    """Ours and theirs, both less the images of calibration and evaluation that either has not."""
    kept: tuple[replay.Parts, replay.Parts] = dict(ours), dict(theirs)
    for name in (*replay.CALIBRATE, *(f"{replay.EVALUATE}{condition}" for condition in replay.CONDITIONS)):
        both = {f.key for f in theirs[name].facts} & {f.key for f in ours[name].facts}
        for parts in kept:
            part = parts[name]
            parts[name] = part.where(np.array([f.key in both for f in part.facts], np.bool_))
    return kept


def _refitted(
    job: _Job,
    key: str,
    bundle: Bundle,
    earlier: replay.Parts,
    weighted: tuple[refit.Weighted, refit.Weighted],
    held: NDArray[np.bool_],
    judging: tuple[replay.Parts, replay.Parts],
) -> dict[str, Any]:
    """The step refit: heads on the new encoder, and how labelled images that neither it nor its heads have seen are ranked."""
    before, after = weighted
    ours, theirs = judging
    train = ours[replay.TRAIN]
    out = {f.key for f, mine in zip(before.rows.facts, held, strict=True) if mine}

    def fitted(folder: Path) -> dict[str, Any]:
        work.write_bundle(folder / "bundle", work.refitted(job.champion, train, after, bundle))
        c = work.regularisation(job.champion)
        seen = np.array([f.key not in out for f in after.rows.facts], np.bool_)
        candidate = refit.fit_linear(train, after, c, seen)
        found: dict[str, Any] = {}
        for name, label in (("ai_generated", 1), ("authentic", 0)):
            mine = [np.array([f.key in out and f.label == label for f in w.rows.facts], np.bool_) for w in weighted]
            if min(int(rows.sum()) for rows in mine) < work.MIN_OF_A_CLASS:
                continue
            scored = [
                work.auroc_of(model, w.rows.embedding[rows], _others(parts, label), label)
                for model, w, rows, parts in zip(
                    (_champions_head(job, earlier, before, ~held), candidate), weighted, mine, (theirs, ours), strict=True
                )
            ]
            found[name] = {"images": int(mine[1].sum()), "champion": scored[0], "candidate": scored[1]}
        return found

    inputs = {"question": key, "encoder": bundle.manifest.encoder.sha256, "held": sorted(out)}
    return job.steps.run("refit", inputs, fitted)


def _others(parts: replay.Parts, label: int) -> NDArray[np.float32]:
    part = parts[f"{replay.EVALUATE}clean"]
    found: NDArray[np.float32] = part.embedding[part.labels != label]
    return found


def _champions_head(job: _Job, earlier: replay.Parts, weighted: refit.Weighted, seen: NDArray[np.bool_]) -> refit.Linear:
    """The champion's linear head; where it has learned labels that are held out here, one that is fitted without them."""
    heads, learned = job.champion.heads, earlier.get(replay.LABELS)
    known = {f.key for f in learned.facts} if learned is not None else set()
    if replay.TRAIN in earlier and any(f.key in known for f in weighted.rows.where(~seen).facts):
        train = earlier[replay.TRAIN]
        scale = np.array([(train.labels == label).sum() / job.counts[label] for label in (0, 1)])
        same = replace(weighted, weights=weighted.weights * scale[weighted.rows.labels])
        return refit.fit_linear(train, same, work.regularisation(job.champion), seen)
    return refit.Linear(heads.linear_weight, heads.linear_bias)
