"""`train pretrain`: from data and a recipe to an encoder, in one process or under torchrun; resumes where it stopped."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.terminal import at_least, say

if TYPE_CHECKING:
    from train.early_stop import Probe
    from train.pretrain import Run
    from train.ranks import Ranks
    from train.recipe import Recipe

PROBE_RECORDS = 2400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments, without --data and --out."""
    parser.add_argument("--recipe", type=Path, required=True, help="TOML file, e.g. train/recipes/cpu-tiny.toml")
    parser.add_argument(
        "--autoencoder", type=Path, help="folder of an autoencoder, for aligned fakes; default: upsampling artefacts"
    )
    parser.add_argument("--no-aligned", action="store_true", help="make no aligned fakes, for a recipe that has no use for them")
    parser.add_argument(
        "--held-out", type=Path, help="images of the early stop: a folder with a manifest, or shards; default: --data's val"
    )
    parser.add_argument("--start", type=Path, help="encoder.safetensors of an earlier run to go on from, instead of from scratch")
    parser.add_argument("--workers", type=at_least(0), default=1, help="loader processes of each rank (0: none)")
    parser.add_argument("--threads", type=at_least(1), default=1, help="torch's CPU threads; one is the best on shared cores")
    parser.add_argument("--device", default="cpu", help="cpu, cuda (under torchrun the rank's own), cuda:1")
    parser.add_argument("--stop-after", type=at_least(1), help="end at this step, to repeat a run that was stopped there")
    parser.add_argument("--checkpoint-every-s", type=at_least(1), default=180, help="seconds between checkpoints (180)")
    parser.add_argument("--other-world-size", action="store_true", help="resume what another number of processes began")
    parser.add_argument("--export", action="store_true", help="do not train: export the encoder of the checkpoint as it stands")
    parser.add_argument(
        "--probe-records", type=at_least(1), default=PROBE_RECORDS, help=f"records of shards kept for `probe` ({PROBE_RECORDS})"
    )


def run(args: argparse.Namespace) -> int:
    """Trains and exports. Raises DataError, RecipeError and PretrainError, each one line."""
    import torch

    from train import recipe as recipes
    from train.ranks import joined
    from train.training_data import prepared_folder

    torch.set_num_threads(args.threads)
    recipe = recipes.load(args.recipe)
    prepared_folder(args.data, args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    with joined(args.device) as ranks:
        _run(args, recipe, ranks)
    return 0


def _run(args: argparse.Namespace, recipe: Recipe, ranks: Ranks) -> None:
    from train import stages
    from train.aligned import reconstruction
    from train.pretrain import Run, train
    from train.progress import display
    from train.recipe import RecipeError
    from train.training_data import prepare, prepared_folder

    first = ranks.rank == 0
    facts: dict[str, Any] = {}
    if first:
        if args.no_aligned and any(phase.aligned for phase in recipe.phases):
            raise RecipeError(f"{args.recipe}: a phase has aligned fakes; leave --no-aligned out")
        made = not args.no_aligned
        facts = prepare(args.data, args.out, recipe, lambda: reconstruction(args.autoencoder, args.out) if made else None, say)
    ranks.barrier()
    start = stages.encoder_module(args.start) if args.start else None
    run = Run(recipe, prepared_folder(args.data, args.out), args.out, encoder=start, ranks=ranks)
    if run.resume(args.other_world_size) and first:
        say(f"resumed at step {run.step} of {recipe.steps}")
    if not args.export:
        if first:
            with display(args.out, run.step, recipe.steps) as shown:
                train(
                    run,
                    workers=args.workers,
                    checkpoint_every_s=args.checkpoint_every_s,
                    line_every_s=shown.every_s,
                    on_progress=shown.progress,
                    on_skipped=shown.skipped,
                    on_probe=shown.probe,
                    probe=_probe(args, recipe),
                    stop_after=args.stop_after,
                )
        else:
            train(run, workers=args.workers, checkpoint_every_s=args.checkpoint_every_s, stop_after=args.stop_after)
    if first:
        _export(args, run, facts)


def _probe(args: argparse.Namespace, recipe: Recipe) -> Probe | None:
    from train.early_stop import Probe, crops_of
    from train.sources import open_source
    from train.trainee import MEAN, STD
    from train.training_data import fit_images, held_out_images, prepared_folder

    if not recipe.probe_every:
        return None
    source = open_source(prepared_folder(args.data, args.out), recipe)
    fit = crops_of(fit_images(source, recipe), recipe.seed)
    return Probe(fit, crops_of(held_out_images(args.held_out or args.data, recipe.probe_images), recipe.seed + 1), MEAN, STD)


def _export(args: argparse.Namespace, run: Run, facts: dict[str, Any]) -> None:
    from train import stages
    from train.shard_index import ShardIndex
    from train.sources import SHARD_INDEX
    from train.training_data import sample_store

    recipe = run.recipe
    sha256 = stages.save_encoder(run.encoder_weights(), args.out)
    stages.write_facts(
        args.out,
        data=facts,
        summary=stages.summary(recipe, run.step, run.views, run.train_seconds),
        recipe_sha256=recipe.digest,
        encoder_sha256=sha256,
        skipped=run.skipped,
        pretrain_command=_command(args, run.step if run.step < recipe.steps else None),
        earlier=stages.earlier_run(args.start) if args.start else [],
    )
    if run.skipped:
        say(f"{len(run.skipped)} damaged members were skipped; {stages.FACTS_FILE} names them")
    if run.data.name == "shards":
        sample_store(ShardIndex(run.data / SHARD_INDEX), args.out, args.probe_records)
    which = (
        f"the best of its probes, of step {run.watch.best_step}"
        if run.watch.best
        else f"the averaged encoder after {run.step} steps"
    )
    say(f"{args.out / stages.ENCODER_FILE}: {which}")


def _command(args: argparse.Namespace, stopped_at: int | None) -> str:
    """The command as it can be given again; folders of this machine become variables."""
    text = f"python -m train pretrain --data $CORPUS --out $RUN --recipe train/recipes/{shlex.quote(args.recipe.name)}"
    if args.autoencoder is not None:
        text += " --autoencoder $AUTOENCODER"
    if args.no_aligned:
        text += " --no-aligned"
    if args.start is not None:
        text += " --start $EARLIER/encoder.safetensors"
    return text if stopped_at is None else f"{text} --stop-after {stopped_at}"
