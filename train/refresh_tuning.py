"""The training of `refresh --encoder`: labelled images beside the corpus, a short run that begins with the champion's encoder.

FOLDER/corpus, FOLDER/labelled    pixel stores with their pools, steps of the job
FOLDER/training-<digest>/         mixture.json and last.pt: the run, which a job that is started again resumes bit for bit
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.bundle import Bundle
from train import drafts, mixture, pool, recipe, refit, store
from train import refresh_steps as work
from train.data import DataError, Entry
from train.embed import Embedded
from train.recipe import Recipe, RecipeError
from train.refresh_options import RefreshError, Say
from train.store import PixelStore

RECIPE = Path(__file__).parent / "recipes" / "refresh.toml"
CHECKPOINT_EVERY_S = 30.0
LINE_EVERY_S = 30.0
HELD_OUT = 5
"""One in so many of the labelled images is held out of the encoder, to judge it."""


def recipe_for(path: Path | None, champion: Bundle) -> Recipe:
    """The recipe, as deep as the champion's encoder. Raises RecipeError where it asks for what has no place in a refresh."""
    found = recipe.load(path or RECIPE)
    wrong = {
        "whitened_filters": bool(found.whitened_filters),
        "probe_every": bool(found.probe_every),
        "phases.aligned": any(phase.aligned for phase in found.phases),
    }
    for name, given in wrong.items():
        if given:
            raise RecipeError(f"{path or RECIPE}: {name} has no place in a refresh: leave it at 0")
    if not found.labelled_share:
        raise RecipeError(f"{path or RECIPE}: labelled_share must be above 0, or the labelled images teach the encoder nothing")
    depth = depth_of(champion.encoder)
    return replace(found, phases=tuple(replace(phase, depth=depth) for phase in found.phases))


def depth_of(encoder: Mapping[str, NDArray[np.float32]]) -> int:
    """Blocks up to the last one that adds anything to its input: those beyond were never trained."""
    last = 0
    for name, array in encoder.items():
        if name.startswith("blocks.") and name.split(".", 2)[2].startswith(("attn.proj.", "mlp.fc2.")) and np.any(array):
            last = max(last, int(name.split(".")[1]) + 1)
    return max(1, last)


def held_out_rows(weighted: refit.Weighted) -> NDArray[np.bool_]:
    """bool[n]: labelled images that the encoder does not see: of each class a fifth, but at least 5 where there are twice as many
    (else none of it). Look-alikes stay together."""
    labels, groups = weighted.rows.labels, weighted.groups
    held = np.zeros(len(groups), np.bool_)
    for label in (0, 1):
        of_class = labels == label
        least = work.MIN_OF_A_CLASS
        if of_class.sum() < 2 * least:
            continue
        wanted = max(least, int(of_class.sum()) // HELD_OUT)
        names = np.unique(groups[of_class])
        for name in names[np.random.default_rng((61, label)).permutation(len(names))]:
            if held[of_class].sum() >= wanted:
                break
            held |= groups == name
    return held


def build_corpus(entries: list[Entry], folder: Path, copies: int) -> dict[str, Any]:
    """The corpus decoded (and augmented, where the recipe has a pool)."""
    built, damage = store.build(entries, folder)
    if copies:
        pool.build(folder, folder / "pool", copies)
    return {"images": len(built.items), "skipped": str(damage)}


def build_labelled(entries: list[Entry], folder: Path, copies: int, corpus: Path) -> dict[str, Any]:
    """The labelled images in the same form; first compressions are lent by the corpus' photographs."""
    built, damage = store.build(entries, folder, lent=PixelStore(corpus).tables)
    if not built.items:
        raise DataError(f"no labelled image can be decoded: {damage}")
    if copies:
        pool.build(folder, folder / "pool", copies)
    return {"images": len(built.items), "skipped": str(damage)}


def entries_of(rows: Embedded, paths: Mapping[str, Path]) -> list[Entry]:
    """Labelled images as entries of a source of their own."""
    return [Entry(paths[f.key], "train", f.label, f.source, f.generator, f.group, "single", f.key) for f in rows.facts]


def mix(
    folder: Path,
    corpus: Path,
    labelled: Path,
    recipe: Recipe,
    weighted: refit.Weighted,
    seen: NDArray[np.bool_],
    counts: tuple[int, int],
) -> str:
    """Writes FOLDER/mixture.json and returns the data's digest. seen: rows the encoder may see. counts: reals and fakes of the
    corpus, in whose units the weights are: what weighs as much as all of them takes the recipe's whole share."""
    labels = weighted.rows.labels
    shares = [recipe.labelled_share * min(1.0, float(weighted.weights[labels == c].sum()) / counts[c]) for c in (0, 1)]
    weights = {
        facts.key[: store.NAME_CHARS]: float(weight)
        for facts, weight, mine in zip(weighted.rows.facts, weighted.weights, seen, strict=True)
        if mine
    }
    return mixture.write(folder, corpus, labelled, (shares[0], shares[1]), weights)


def carried_over(weighted: refit.Weighted, ours: Embedded, counts: tuple[int, int], train: Embedded) -> refit.Weighted:
    """The same images and groups with their embeddings by the new encoder, and weights in units of the new replay's classes.

    ours: labelled images by the new encoder; one that has no finite embedding is left out.
    """
    row_of = {facts.key: row for row, facts in enumerate(ours.facts)}
    kept = np.array([facts.key in row_of for facts in weighted.rows.facts], np.bool_)
    rows = weighted.rows.where(kept)
    now = [int((train.labels == label).sum()) / counts[label] for label in (0, 1)]
    weights = weighted.weights[kept] * np.array(now)[rows.labels]
    chosen = np.array([row_of[facts.key] for facts in rows.facts], np.int64)
    return refit.Weighted(Embedded(ours.embedding[chosen], rows.facts), weights, weighted.groups[kept], weighted.contradictory)


def tune(champion: Bundle, recipe: Recipe, training: Path, out: Path, device: str, workers: int, say: Say) -> dict[str, Any]:
    """Trains to the recipe's end and writes OUT as a bundle with the new encoder, whose heads are still the champion's.

    training: folder with mixture.json; the checkpoint in it is resumed. Returns facts of the run.
    Raises RefreshError when a signal stopped it; PretrainError and DataError where it cannot be done.
    """
    import torch

    from engine.model import VisionTransformer
    from train.pretrain import Progress, Run, train

    def told(progress: Progress) -> None:
        say(f"step {progress.step} of {progress.steps}, loss {progress.loss:.3f}, {progress.views_per_s:.0f} views/s")

    threads = torch.get_num_threads()
    # One thread: sums in one order, so that a job that is started again ends with the same bits.
    torch.set_num_threads(1)
    try:
        encoder = VisionTransformer(champion.manifest.encoder.layer_norm_eps)
        encoder.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in champion.encoder.items()})
        run = Run(recipe, training, training, device, encoder)
        run.start_classifier(champion.heads.linear_weight, champion.heads.linear_bias)
        if run.resume():
            say(f"resumed at step {run.step} of {recipe.steps}")
        train(run, workers=workers, checkpoint_every_s=CHECKPOINT_EVERY_S, line_every_s=LINE_EVERY_S, on_progress=told)
    finally:
        torch.set_num_threads(threads)
    if run.step < recipe.steps:
        raise RefreshError(f"stopped at step {run.step} of {recipe.steps}: start the refresh again, it goes on there")
    weights = {name: tensor.numpy() for name, tensor in run.encoder_weights().items()}
    work.write_bundle(out, drafts.of(champion) | {"version": "tuned", "encoder": weights})
    return {"steps": run.step, "views": run.views, "seconds": round(run.train_seconds), "data": run.data_digest}


def only(folder: Path, kept: Path, name: str) -> None:
    """Removes what earlier questions left of their training: FOLDER/NAME* but `kept`."""
    for path in folder.glob(f"{name}*"):
        if path != kept:
            shutil.rmtree(path, ignore_errors=True)
