"""What 50 labels of a generator absent from the first training are worth: TPR and FPR before and after a refit, by generator.

    python -m benchmarks.refresh_gain --models MODELS --generator NAME... [--seeds 5] [--labels 50]

For each generator its rows are taken out of the replay's training and calibration parts, and the heads are fitted and calibrated
anew: the first training of the heads (the encoder may have seen the generator; docs/refresh.md says which). Then 50 of its images
are labelled and the steps of `train refresh` run. What is left of the generator is scored by both; the reals are those of sources
that neither training nor calibration has seen. Needs a bundle that carries a replay; writes benchmarks/results/refresh_gain.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from engine import bundle as bundles
from engine.heads import HEADS
from train import metrics, probe, refit, refresh_steps, replay
from train.embed import Embedded


def without(part: Embedded, generator: str) -> Embedded:
    """The part less every image of a generator."""
    return part.where(np.array([f.generator != generator for f in part.facts], np.bool_))


def one(bundle: bundles.Bundle, parts: replay.Parts, generator: str, labels: int, seed: int) -> dict[str, Any]:
    """Before and after for one draw of labelled images."""
    judged = {n: without(p, generator) if not n.startswith(replay.EVALUATE) else p for n, p in parts.items()}
    pool_parts = [parts[replay.TRAIN], parts["evaluate/clean"]]
    pool = replay.joined([p.where(np.array([f.generator == generator for f in p.facts], np.bool_)) for p in pool_parts])
    if len(pool.facts) < labels + 10:
        raise SystemExit(f"{generator}: {len(pool.facts)} images in the replay are too few for {labels} labels and a test")
    order = np.random.default_rng(seed).permutation(len(pool.facts))
    chosen = np.zeros(len(order), np.bool_)
    chosen[order[:labels]] = True
    labelled, rest = pool.where(chosen), pool.where(~chosen)
    c = bundle.manifest.heads.linear.c or probe.C
    first = refresh_steps.draft_of(bundle) | {"heads": probe.fit(judged[replay.TRAIN], c=c)}
    weighted = refit.weigh(labelled, ["ada"] * len(labelled.facts), judged[replay.TRAIN])
    second = first | {"heads": refit.refit(first["heads"], judged[replay.TRAIN], weighted, c)}
    seen = {f.source for f in judged[replay.CALIBRATE[0]].facts}
    reals = parts["evaluate/clean"].where(np.array([not f.label and f.source not in seen for f in parts["evaluate/clean"].facts]))
    row: dict[str, Any] = {"generator": generator, "seed": seed, "labels": int(chosen.sum()), "tested": len(rest.facts),
                           "reals": len(reals.facts)}  # fmt: skip
    for name, draft in (("before", first), ("after", second)):
        calibrated, _ = refresh_steps.calibrated(draft, judged, {}, None)
        row[name] = {head: measured(calibrated, head, rest, reals) for head in HEADS}
    return row


def measured(draft: dict[str, Any], head: str, fakes: Embedded, reals: Embedded) -> dict[str, float]:
    """TPR and FPR at the threshold for FPR 1%, AUROC, and the bound that the calibration's reals give."""
    column = HEADS.index(head)  # type: ignore[arg-type]
    raw = [draft["heads"].raw_scores(part.embedding)[:, column] for part in (fakes, reals)]
    probability = [draft["calibration"][head].apply(scores).astype(np.float64) for scores in raw]
    at = draft["thresholds"][head]["fpr_0.01"]
    labels = np.repeat([1, 0], [len(raw[0]), len(raw[1])]).astype(np.uint8)
    return {
        "tpr": float((probability[0] >= at.threshold).mean()),
        "fpr_unseen_reals": float((probability[1] >= at.threshold).mean()),
        "fpr_calibration": at.fpr,
        "fpr_bound": at.fpr_upper,
        "auroc": metrics.auroc(labels, np.concatenate(raw).astype(np.float64)),
        "tpr_at_fpr_0.05": metrics.tpr_at_fpr(0.05)(labels, np.concatenate(raw).astype(np.float64)),
    }


def main() -> int:
    """Prints means by generator and writes the rows."""
    parser = argparse.ArgumentParser(prog="refresh_gain")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--generator", action="append", required=True)
    parser.add_argument("--labels", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    bundle = bundles.load(args.models)
    parts = replay.of_bundle(bundle)
    if parts is None:
        parser.error(f"{bundle.path} carries no replay")
    rows = []
    for generator in args.generator:
        mine = [one(bundle, parts, generator, args.labels, seed) for seed in range(args.seeds)]
        rows += mine
        for head in HEADS:
            print(f"{generator} ({mine[0]['tested']} tested), {head}: {summary(mine, head)}", flush=True)
    print(record.write("refresh_gain", {"bundle": bundle.manifest.version, "rows": rows}))
    return 0


def summary(rows: list[dict[str, Any]], head: str) -> str:
    """Means over the draws, before and after."""
    means = {
        key: [float(np.mean([row[when][head][key] for row in rows])) for when in ("before", "after")]
        for key in rows[0]["before"][head]
    }
    return ", ".join(f"{key} {before:.3f} -> {after:.3f}" for key, (before, after) in means.items())


if __name__ == "__main__":
    sys.exit(main())
