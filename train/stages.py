"""The steps of a training run as functions over folders: what each reads, computes and leaves behind.

pretrain:  data -> OUT/store, OUT/encoder.safetensors, OUT/facts.json      probe:    OUT -> OUT/bundles/<version>-probe
calibrate: OUT  -> OUT/bundles/<version>-calibrated                        evaluate: bundle -> OUT/report.json, OUT/report.html
promote:   calibrated bundle + report -> MODELS/<version>, TRAINING.md, CURRENT
"""

from __future__ import annotations

import hashlib
import json
import os
import platform as machine
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine import bundle as bundles
from engine.calibration import Platt
from engine.detector import Detector
from engine.heads import HEADS
from engine.manifest import Histogram, Parent, Reference
from engine.preprocess import Layout
from train import agreement, card, drafts, evaluate, probe, promote, replay, report_page, rollback, scoring, thumbnails
from train import calibrate as calibration
from train.augment import PRESETS
from train.data import Damage, DataError, Entry, digest, licences, read_manifest, trained_sources
from train.embed import Embedded, Encoder, degraded, embed, embed_crops, from_files, from_pool, from_store, load_encoder
from train.ladder import REPORTED, RUNGS
from train.recipe import Recipe

ENCODER_FILE = "encoder.safetensors"
FACTS_FILE = "facts.json"
LAYER_NORM_EPS = 1e-6
SCORE_BINS = 20

OnCount = Callable[[int], None]


def write_facts(out: Path, **changes: Any) -> dict[str, Any]:
    """Adds to OUT/facts.json and returns all of it."""
    path = out / FACTS_FILE
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    facts.update(changes)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(facts, indent=1, sort_keys=True), encoding="utf-8")
    partial.replace(path)
    return facts


def read_facts(out: Path) -> dict[str, Any]:
    """OUT/facts.json; raises DataError where pretraining has not been here."""
    path = out / FACTS_FILE
    if not path.exists():
        raise DataError(f"{path}: no such file; `train pretrain` writes it")
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts


def data_facts(root: Path, entries: list[Entry], aligned: int) -> dict[str, Any]:
    """What a model card says of the training data."""
    terms = licences(root)
    counts = Counter((e.label, e.source, e.generator) for e in entries)
    return {
        "real": sum(not e.label for e in entries),
        "fake": sum(e.label for e in entries),
        "aligned": aligned,
        "sha256": digest(entries),
        "sources": [
            {"label": "fake" if label else "real", "source": source, "generator": generator, "files": n, "licence": terms[source]}
            for (label, source, generator), n in sorted(counts.items())
        ],
    }


def save_encoder(weights: Mapping[str, Any], out: Path) -> str:
    """Writes OUT/encoder.safetensors whole; returns its SHA-256."""
    from safetensors.numpy import save

    data = save({name: np.ascontiguousarray(np.asarray(array, np.float32)) for name, array in weights.items()})
    partial = out / f"{ENCODER_FILE}.partial"
    partial.write_bytes(data)
    partial.replace(out / ENCODER_FILE)
    return hashlib.sha256(data).hexdigest()


def encoder_module(path: Path) -> Any:
    """The encoder of an earlier run as a module to go on training; raises DataError naming the file."""
    import torch

    from engine.model import VisionTransformer

    module = VisionTransformer(LAYER_NORM_EPS)
    module.load_state_dict({name: torch.from_numpy(array) for name, array in load_encoder(path).items()})
    return module


def earlier_run(path: Path) -> list[str]:
    """How the run that left `path` was given, as commands whose folder is $EARLIER; empty where it left no facts."""
    facts = read_facts(path.parent) if (path.parent / FACTS_FILE).exists() else {}
    given = [*facts.get("earlier", []), facts["pretrain_command"]] if "pretrain_command" in facts else []
    return [command.replace("$EARLIER", "$EARLIER_STILL").replace("$RUN", "$EARLIER") for command in given]


def hardware() -> str:
    """The machine in words: processor and usable cores, GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} CPU cores"
    model = machine.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, no GPU"


def summary(recipe: Recipe, steps: int, views: int, seconds: float) -> dict[str, str]:
    """Facts of a pretraining run for card and TRAINING.md."""
    import torch

    return {
        "recipe": f"{recipe.name}, loss `{recipe.loss}` with cross entropy of weight {recipe.cross_entropy_weight:g} beside it",
        "steps": f"{steps} of {recipe.steps}, {views} views",
        "time": f"{seconds / 60:.0f} minutes",
        "seed": str(recipe.seed),
        "hardware": hardware(),
        "versions": f"torch {torch.__version__}, numpy {np.__version__}, Python {machine.python_version()}",
    }


def run_probe(
    out: Path,
    name: str,
    version: str,
    *,
    copies: int,
    aligned: bool,
    seed: int,
    on_image: OnCount,
    c: float | None = probe.C,
    pooled: bool = False,
    backend: str = "torch",
) -> Path:
    """Fits the heads on OUT's store and writes an uncalibrated bundle; returns its folder. pooled: on the crops of its pool.

    c: the linear head's inverse regularisation; None: chosen by `probe.choose_c`.
    """
    from train import pool
    from train.store import PixelStore

    weights = load_encoder(out / ENCODER_FILE)
    store = PixelStore(out / "store")
    if pooled:
        images = from_pool(store, pool.opened(store, out / "store" / "pool"), copies, aligned)
    else:
        images = from_store(store, seed, copies, aligned)
    embedded = embed(Encoder(weights, layer_norm_eps=LAYER_NORM_EPS, backend=backend), images, on_image)
    if c is None:
        try:
            c, ranked = probe.choose_c(embedded)
        except ValueError as exc:
            raise DataError(f"{out / 'store'}: {exc}") from exc
        told = ", ".join(f"{one:g}: {auroc:.3f}" for one, auroc in ranked.items())
        write_facts(out, probe_c=f"C {c:g} of the linear head ranks sources that are left out of its fit best (AUROC at {told})")
    heads = probe.fit(embedded, seed=seed, c=c)
    scale = np.maximum(np.std(heads.raw_scores(embedded.embedding), axis=0), 1e-6)
    draft = bundles.Draft(
        name=name,
        version=version,
        encoder=weights,
        heads=heads,
        # Monotone placeholders until `calibrate`: ranking is right, probabilities are not.
        calibration={head: Platt(slope=float(1 / scale[i])) for i, head in enumerate(HEADS)},
        layer_norm_eps=LAYER_NORM_EPS,
        model_card=f"# {name} {version}\n\nNot calibrated and not evaluated: not for use.\n",
        linear_c=c,
        svm_nu=probe.NU,
    )
    text = (
        f"{len(embedded.facts)} crops of {len(store.items)} images, preset `platform`, aligned fakes {'in' if aligned else 'out'}"
    )
    write_facts(out, probe=text)
    folder = _replaced(out / "bundles" / f"{version}-probe", draft)
    replay.begin(out, bundles.read_manifest(folder)[0].encoder.sha256, embedded)
    return folder


def run_calibrate(
    out: Path, data: Path, version: str, on_image: OnCount, *, crops: Layout = "center", backend: str = "torch"
) -> Path:
    """Calibrates the probe's bundle on the validation images of trained sources; returns the calibrated bundle's folder.

    crops: as serving will cut images; of five, the mean probability is what is calibrated and what thresholds are on.
    """
    loaded = bundles.load(out / "bundles" / f"{version}-probe")
    sources = trained_sources(data)
    entries = [e for e in read_manifest(data, "val") if e.source in sources]
    if not entries or len({e.label for e in entries}) < 2:
        raise DataError(f"{data}: no validation images of both classes from sources that are in training too")
    damage = Damage()
    encoder = Encoder(loaded.encoder, layer_norm_eps=loaded.manifest.encoder.layer_norm_eps, backend=backend)
    images = list(from_files(entries, damage))
    clean, clean_rows = embed_crops(encoder, images, crops, on_image)
    changed_images = degraded(images, lambda image, rng: PRESETS["platform"](image, rng, 1.0), seed=1)
    copies, copies_rows = embed_crops(encoder, changed_images, crops, on_image)
    embedding = np.concatenate((clean.embedding, copies.embedding))
    rows = np.concatenate((clean_rows, copies_rows + len(clean.facts)))
    facts = [(clean.facts + copies.facts)[row] for row in rows[:, 0].tolist()]
    labels = np.array([f.label for f in facts], np.uint8)
    raw = loaded.heads.raw_scores(embedding)[rows]
    # Photographs of one folder are independent of each other; generated images of one folder may share a prompt.
    groups = [f.group if f.label else f.key for f in facts]
    calibrations, thresholds, losses = calibration.calibrate(raw, labels, groups, [f.key for f in facts], crops)
    draft = drafts.of(loaded) | {"created_at": None}
    scores = {}
    for i, head in enumerate(HEADS):
        scored = calibration.probabilities(calibrations[head], raw[..., i])
        counts, edges = np.histogram(scored, bins=SCORE_BINS, range=(0.0, 1.0))
        scores[head] = Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))
    reference = Reference(
        images=len(facts),
        embedding_mean=tuple(embedding.astype(np.float64).mean(0).tolist()),
        embedding_std=tuple(embedding.astype(np.float64).std(0).tolist()),
        scores=scores,
    )
    changed = {"calibration": calibrations, "thresholds": thresholds, "abstain": dict.fromkeys(HEADS, calibration.ABSTAIN)}
    write_facts(out, calibration_losses=losses, calibration_skipped=str(damage))
    # The centre crop comes first.
    centres = (clean.at(clean_rows[:, 0]), copies.at(copies_rows[:, 0]))
    replay.add(out, loaded.manifest.encoder.sha256, dict(zip(replay.CALIBRATE, centres, strict=True)))
    return _replaced(out / "bundles" / f"{version}-calibrated", bundles.Draft(**{**draft, **changed, "reference": reference}))


def run_evaluate(
    folder: Path,
    data: Path,
    out: Path,
    *,
    backend: str,
    threads: int,
    on_image: OnCount,
    head: str = "linear",
    crops: str = "center",
    ladder: bool = True,
    parity: bool = True,
    page: bool = True,
) -> dict[str, Any]:
    """Evaluates a bundle on all validation images; writes OUT/report.json and, with `page`, OUT/report.html.

    ladder: every rung of `train.ladder`, not only clean and JPEG 75; parity: compare the backends that run here.
    """
    entries = read_manifest(data, "val")
    damage = Damage()
    rungs = [rung for rung in RUNGS if ladder or rung.name in REPORTED]
    with Detector.open(folder, backend=backend, threads=threads, head=head, crops=crops) as detector:
        scored = scoring.score(detector, entries, rungs, damage, on_image)
        agreed = agreement.measure(detector.bundle, agreement.crops_of(entries)) if parity else None
        report = evaluate.report(detector, scored, trained_sources(data), digest(entries), damage, agreed)
    if crops == "center":
        replay.add(
            out,
            detector.bundle.manifest.encoder.sha256,
            {
                f"{replay.EVALUATE}{name}": Embedded(scored[name].embedding, scored[name].facts)
                for name in replay.CONDITIONS
                if name in scored
            },
        )
    out.mkdir(parents=True, exist_ok=True)
    files = {"report.json": json.dumps(report, indent=1)}
    if page:
        shown = thumbnails.extremes(scored["clean"], HEADS.index(head))
        files["report.html"] = report_page.page(report, scored, shown, thumbnails.pictures(entries, shown.keys))
    for name, text in files.items():
        partial = out / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(out / name)
    return report


def run_promote(
    out: Path, models: Path, version: str, commands: list[str], max_fpr: float, champion_report: Path | None = None
) -> tuple[list[promote.Rule], Path | None]:
    """Gates the calibrated bundle on its report and, if every rule holds, publishes it under MODELS; else (rules, None).

    champion_report: a newer report of the published bundle than the one it carries, on the data of the candidate's.
    """
    report = promote.read_report(out / "report.json")
    loaded = bundles.load(out / "bundles" / f"{version}-calibrated")
    if (
        report["model"]["heads_sha256"] != loaded.manifest.heads.sha256
        or report["model"]["encoder_sha256"] != loaded.manifest.encoder.sha256
    ):
        raise promote.PromoteError(f"{out / 'report.json'}: is of another bundle than {loaded.path}; evaluate it again")
    champion: dict[str, Any] | None = None
    parents: tuple[Parent, ...] = ()
    if (models / bundles.CURRENT_FILE).exists():
        current = bundles.load(models)
        parents = (Parent(name=current.manifest.name, version=current.manifest.version, digest=current.digest),)
        champion = promote.champion_report(current, champion_report)
    rules = promote.gate(report, champion, max_fpr)
    if not all(rule.passed for rule in rules):
        return rules, None
    facts = read_facts(out)
    text = card.model_card(loaded, report, facts)
    draft = drafts.of(loaded) | {"model_card": text, "metrics": {"report": report}, "parents": parents, "created_at": None}
    draft["replay"] = replay.kept(out, loaded.manifest.encoder.sha256)
    with rollback.publishing(models):
        bundles.write(models / version, bundles.Draft(**draft))
        (models / "TRAINING.md").write_text(card.training_page(loaded.manifest.name, version, facts, commands), encoding="utf-8")
        return rules, bundles.publish(models, version)


def _replaced(folder: Path, draft: bundles.Draft) -> Path:
    # A step's own folder may be made again; what was promoted lies elsewhere and is never replaced.
    if folder.exists():
        shutil.rmtree(folder)
    return bundles.write(folder, draft).path
