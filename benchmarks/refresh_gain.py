"""What 50 labels of a generator absent from the first training are worth: TPR and FPR before and after a refit, by generator.

    python -m benchmarks.refresh_gain --models MODELS [--generator NAME]... [--draws 10] [--labels 50]

For each generator its rows are taken out of the replay's training and calibration parts, and the heads are fitted and calibrated
anew: the first training of the heads (the encoder may have seen the generator; docs/refresh.md says which). Then 50 of its images
are labelled and the steps of `train refresh` run. What is left of the generator is scored by both; images of a file or small
folder that a labelled one is of are left out. False positives are counted on reals of sources that neither training nor
calibration has seen. Needs a bundle that carries a replay; writes benchmarks/results/refresh_gain.json.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import record
from engine import bundle as bundles
from engine.heads import HEADS
from train import drafts, metrics, probe, refit, refresh_steps, replay
from train.embed import Embedded, Facts

MIN_TESTED = 20
PROMPT_FOLDER = 8
"""A folder of at most so many of the generator's images is taken for one prompt's."""
GAINS = ("tpr", "tpr_at_fpr_0.01", "tpr_at_fpr_0.05", "auroc", "fpr_unseen_reals")


def without(part: Embedded, generator: str) -> Embedded:
    """The part less every image of a generator."""
    return part.where(np.array([f.generator != generator for f in part.facts], np.bool_))


def images_of(parts: replay.Parts, generator: str) -> Embedded:
    """The generator's images, those of training and those that training has not seen."""
    found = [parts[replay.TRAIN], parts["evaluate/clean"]]
    return replay.joined([p.where(np.array([f.generator == generator for f in p.facts], np.bool_)) for p in found])


def drawn(pool: Embedded, labels: int, seed: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Rows to label, and rows to test on: of no file and no small folder that a labelled row is of."""
    order = np.random.default_rng(seed).permutation(len(pool.facts))
    chosen = np.zeros(len(order), np.bool_)
    chosen[order[:labels]] = True
    sizes = Counter(f.group for f in pool.facts)

    def kin(facts: Facts) -> str:
        return facts.group if sizes[facts.group] <= PROMPT_FOLDER else facts.key.partition("#")[0]

    taught = {kin(f) for f, mine in zip(pool.facts, chosen.tolist(), strict=True) if mine}
    return chosen, np.array([kin(f) not in taught for f in pool.facts], np.bool_)


def one(bundle: bundles.Bundle, parts: replay.Parts, generator: str, labels: int, seed: int) -> dict[str, Any]:
    """Before and after for one draw of labelled images."""
    judged = {n: without(p, generator) if not n.startswith(replay.EVALUATE) else p for n, p in parts.items()}
    pool = images_of(parts, generator)
    chosen, tested = drawn(pool, labels, seed)
    labelled, rest = pool.where(chosen), pool.where(tested)
    c = bundle.manifest.heads.linear.c or probe.C
    first = drafts.of(bundle) | {"heads": probe.fit(judged[replay.TRAIN], c=c)}
    weighted = refit.weigh(labelled, ["ada"] * len(labelled.facts), judged[replay.TRAIN])
    second = first | {"heads": refit.refit(first["heads"], judged[replay.TRAIN], weighted, c)}
    every = parts["evaluate/clean"].where(parts["evaluate/clean"].labels == 0)
    seen = {f.source for f in judged[replay.CALIBRATE[0]].facts}
    unseen = np.array([f.source not in seen for f in every.facts], np.bool_)
    row: dict[str, Any] = {"generator": generator, "draw": seed, "labels": int(chosen.sum()), "tested": len(rest.facts),
                           "unseen_reals": int(unseen.sum()), "reals": len(every.facts)}  # fmt: skip
    for name, draft in (("before", first), ("after", second)):
        calibrated, _ = refresh_steps.calibrated(draft, judged, {}, None)
        row[name] = {head: measured(calibrated, head, rest, every, unseen) for head in HEADS}
    return row


def measured(draft: dict[str, Any], head: str, fakes: Embedded, reals: Embedded, unseen: NDArray[np.bool_]) -> dict[str, float]:
    """TPR and FPR at the threshold for FPR 1%, the bound that the calibration's reals give, and TPR at the FPR of all reals."""
    column = HEADS.index(head)
    raw = [draft["heads"].raw_scores(part.embedding)[:, column] for part in (fakes, reals)]
    probability = [draft["calibration"][head].apply(scores).astype(np.float64) for scores in raw]
    at = draft["thresholds"][head]["fpr_0.01"]
    labels = np.repeat([1, 0], [len(raw[0]), len(raw[1])]).astype(np.uint8)
    scores = np.concatenate(raw).astype(np.float64)
    return {
        "tpr": float((probability[0] >= at.threshold).mean()),
        "fpr_unseen_reals": float((probability[1][unseen] >= at.threshold).mean()),
        "fpr_calibration": at.fpr,
        "fpr_bound": at.fpr_upper,
        "auroc": metrics.auroc(labels, scores),
        "tpr_at_fpr_0.01": metrics.tpr_at_fpr(0.01)(labels, scores),
        "tpr_at_fpr_0.05": metrics.tpr_at_fpr(0.05)(labels, scores),
    }


def summary(rows: list[dict[str, Any]], head: str) -> dict[str, dict[str, float]]:
    """Of each measure the mean over draws before and after, the mean gain and its 95% interval (Student's t over the draws)."""
    from scipy.stats import t

    found = {}
    for key in (*GAINS, "fpr_calibration", "fpr_bound"):
        before, after = (np.array([row[when][head][key] for row in rows]) for when in ("before", "after"))
        gains = after - before
        half = float(t.ppf(0.975, len(rows) - 1) * gains.std(ddof=1) / np.sqrt(len(rows))) if len(rows) > 1 else float("nan")
        mean = float(gains.mean())
        found[key] = {"before": float(before.mean()), "after": float(after.mean()), "gain": mean, "low": mean - half,
                      "high": mean + half}  # fmt: skip
    return found


def known_generators(parts: replay.Parts, labels: int) -> list[str]:
    """Generators with enough images to label some and test on others, by name."""
    counts = Counter(f.generator for name in (replay.TRAIN, "evaluate/clean") for f in parts[name].facts if f.label)
    return sorted(name for name, n in counts.items() if n >= labels + MIN_TESTED)


def main() -> int:
    """Prints the linear head's means by generator and writes every row."""
    parser = argparse.ArgumentParser(prog="refresh_gain")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--generator", action="append", default=[], help="default: every one with enough images")
    parser.add_argument("--labels", type=int, default=50)
    parser.add_argument("--draws", type=int, default=10)
    args = parser.parse_args()
    bundle = bundles.load(args.models)
    parts = replay.of_bundle(bundle)
    if parts is None:
        parser.error(f"{bundle.path} carries no replay")
    generators = args.generator or known_generators(parts, args.labels)
    rows: list[dict[str, Any]] = []
    means: dict[str, Any] = {}
    for generator in generators:
        if len(images_of(parts, generator).facts) < args.labels + MIN_TESTED:
            parser.error(f"{generator}: too few images in the replay for {args.labels} labels and a test")
        mine = [one(bundle, parts, generator, args.labels, draw) for draw in range(args.draws)]
        rows += mine
        means[generator] = {head: summary(mine, head) for head in HEADS}
        told = ", ".join(f"{key} {v['before']:.3f} -> {v['after']:.3f} ({v['low']:+.3f} to {v['high']:+.3f})"
                         for key, v in means[generator]["linear"].items() if key in GAINS)  # fmt: skip
        print(f"{generator} ({mine[0]['tested']} tested): {told}", flush=True)
    figures = {"bundle": bundle.manifest.version, "draws": args.draws, "labels": args.labels, "generators": means, "rows": rows}
    print(record.write("refresh_gain", figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
