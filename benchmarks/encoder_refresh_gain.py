"""What labels of a generator that the encoder has never seen are worth: before, heads refitted, encoder and heads.

    python -m benchmarks.encoder_refresh_gain --models MODELS --data CORPUS --work FOLDER --draw N... [--labels 35] [--reals 15]

Of the generator's validation images 35 are labelled, and 15 reals of the sources that neither training nor calibration has seen;
a fifth of each is held out of the encoder, as `train refresh --encoder` does. Tested are images of no file or prompt folder with
a labelled one; false positives are counted on the other reals of those sources. FOLDER/corpus holds the decoded corpus (made
where it is missing); each draw is kept in FOLDER and not computed again. Writes benchmarks/results/encoder_refresh_gain.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.refresh_gain import drawn, measured, summary
from engine import bundle as bundles
from engine.detector import Detector
from train import drafts, refit, refresh_steps, refresh_tuning, replay
from train.data import Damage, read_manifest
from train.embed import Embedded

GENERATOR = "nano-banana(2.5-flash-image/pro)"
HEAD = "linear"


def one(args: argparse.Namespace, draw: int) -> dict[str, Any]:
    """One draw: the measures of the three, and the recipe's digest."""
    champion = bundles.load(args.models)
    parts = replay.of_bundle(champion)
    if parts is None:
        raise SystemExit(f"{champion.path} carries no replay")
    clean = parts["evaluate/clean"]
    seen = {f.source for f in parts[replay.CALIBRATE[0]].facts}
    fakes = clean.where(np.array([f.generator == args.generator for f in clean.facts], np.bool_))
    strange = clean.where(np.array([not f.label and f.source not in seen for f in clean.facts], np.bool_))
    chosen, tested = drawn(fakes, args.labels, draw)
    real = np.zeros(len(strange.facts), np.bool_)
    real[np.random.default_rng((draw, 1)).permutation(len(real))[: args.reals]] = True
    labelled = replay.joined([fakes.where(chosen), strange.where(real)])
    labelled = Embedded(labelled.embedding, [replace(f, source="labels", group="ada") for f in labelled.facts])
    test = {f.key for f in fakes.where(tested).facts}
    judged = refresh_steps.without_lookalikes(parts, labelled)
    row: dict[str, Any] = {"draw": draw, "labels": int(chosen.sum()), "reals_labelled": int(real.sum()), "tested": len(test)}

    weighted = refit.weigh(labelled, ["ada"] * len(labelled.facts), parts[replay.TRAIN], len(labelled.facts))
    row["before"] = scores(drafts.of(champion), judged, test, seen)
    row["heads"] = scores(refresh_steps.refitted(champion, parts[replay.TRAIN], weighted), judged, test, seen)

    ours, again = tuned(args, champion, weighted, draw)
    judged_ours = {
        name: part.where(np.array([name == replay.TRAIN or f.key in kept for f in part.facts], np.bool_))
        for name, part in ours.items()
        for kept in [{f.key for f in judged[name].facts}]
    }
    tuned_bundle = bundles.load(args.work / f"draw-{draw}" / "bundle")
    draft = refresh_steps.refitted(champion, ours[replay.TRAIN], again, tuned_bundle)
    row["encoder"] = scores(draft, judged_ours, test, seen)
    row["unseen_reals"] = int(sum(not f.label and f.source not in seen for f in judged["evaluate/clean"].facts))
    return row


def tuned(args: argparse.Namespace, champion: bundles.Bundle, weighted: refit.Weighted, draw: int) -> tuple[Any, refit.Weighted]:
    """The replay through the tuned encoder, and the labelled images' rows and weights in it."""
    recipe = refresh_tuning.recipe_for(args.recipe, champion)
    folder = args.work / f"draw-{draw}"
    entries = read_manifest(args.data, "train")
    corpus = args.work / "corpus"
    if not (corpus / "index.json").exists():
        refresh_tuning.build_corpus(entries, corpus, recipe.pool_copies)
    paths = {entry.sha256: entry.path for entry in read_manifest(args.data, "val")}
    seen_by_encoder = ~refresh_tuning.held_out_rows(weighted)
    rows = weighted.rows.where(seen_by_encoder)
    refresh_tuning.build_labelled(refresh_tuning.entries_of(rows, paths), folder / "labelled", recipe.pool_copies, corpus)
    labels = np.array([f.label for f in replay.of_bundle(champion)[replay.TRAIN].facts])  # type: ignore[index]
    counts = (int((labels == 0).sum()), int(labels.sum()))
    refresh_tuning.mix(folder / "training", corpus, folder / "labelled", recipe, weighted, seen_by_encoder, counts)
    if not (folder / "bundle").exists():
        refresh_tuning.tune(
            champion, recipe, folder / "training", folder / "bundle", "cpu", 0, lambda text: print(text, flush=True)
        )
    damage = Damage()
    with Detector.open(folder / "bundle", backend=args.backend, threads=1) as detector:
        ours = refresh_steps.replay_from(detector, args.data, damage)
        mine = refresh_steps.embed_labelled(detector, [(f, paths[f.key]) for f in weighted.rows.facts], damage)
    return ours, refresh_tuning.carried_over(weighted, mine, counts, ours[replay.TRAIN])


def scores(draft: dict[str, Any], parts: replay.Parts, test: set[str], seen: set[str]) -> dict[str, Any]:
    """As `refresh_gain` measures, on the tested fakes and the reals that are left."""
    calibrated, _ = refresh_steps.calibrated(draft, parts, {}, None)
    clean = parts["evaluate/clean"]
    fakes = clean.where(np.array([f.key in test for f in clean.facts], np.bool_))
    reals = clean.where(clean.labels == 0)
    unseen = np.array([f.source not in seen for f in reals.facts], np.bool_)
    others = clean.where(np.array([bool(f.label) and f.source in seen for f in clean.facts], np.bool_))
    found: dict[str, Any] = measured(calibrated, HEAD, fakes, reals, unseen)
    found["auroc_seen_generators"] = measured(calibrated, HEAD, others, reals, unseen)["auroc"]
    return found


def main() -> int:
    """Measures the draws asked for and writes those that are there."""
    parser = argparse.ArgumentParser(prog="encoder_refresh_gain")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--generator", default=GENERATOR)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--labels", type=int, default=35)
    parser.add_argument("--reals", type=int, default=15)
    parser.add_argument("--draw", type=int, action="append", default=[])
    parser.add_argument("--backend", default="torch")
    args = parser.parse_args()
    for draw in args.draw:
        args.work.mkdir(parents=True, exist_ok=True)
        row = one(args, draw)
        (args.work / f"draw-{draw}.json").write_text(json.dumps(row), encoding="utf-8")
        print(json.dumps(row), flush=True)
    rows = [json.loads(path.read_text("utf-8")) for path in sorted(args.work.glob("draw-*.json"))]
    means = {
        name: summary([{"before": {HEAD: row["before"]}, "after": {HEAD: row[name]}} for row in rows], HEAD)
        for name in ("heads", "encoder")
    }
    for name, found in means.items():
        told = ", ".join(f"{key} {v['before']:.3f} -> {v['after']:.3f}" for key, v in found.items())
        print(f"{name}: {told}")
    print(record.write("encoder_refresh_gain", {"generator": args.generator, "means": means, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
