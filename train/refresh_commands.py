"""The commands of the everyday retraining: `refresh`, `rollback`, `labels`, and `pack` from labels.

Exit codes of `refresh`: 0 promoted; 3 kept the champion (0 with --ok-if-kept); 2 bad arguments, labels or bundle; 1 failed: it
could not go on, and a later try may. `rollback`: 0 done, 2 refused. `labels`: 0 done, 2 bad arguments or data, 1 the topic is
not usable.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMOTED, FAILED, BAD, KEPT = 0, 1, 2, 3


def add(commands: Any, parser_class: type[argparse.ArgumentParser]) -> None:
    """Adds the commands to the subparsers of `python -m train`."""
    _add_refresh(commands.add_parser("refresh", help="learn from human decisions; promote what passes the gate; resumes"))

    two = commands.add_parser("rollback", help="make the version before the current one")
    two.add_argument("--models", type=Path, required=True, help="folder of the model's versions, with CURRENT")
    two.add_argument("--to", help="a version; default: the one that the current one was made from")
    two.set_defaults(run=_rollback)

    three = commands.add_parser("labels", help="look at human decisions, or make a sample of them")
    inner = three.add_subparsers(dest="what", required=True, metavar="WHAT", parser_class=parser_class)
    show = inner.add_parser("show", help="what the label topic (or a file) says, folded to one label an image")
    show.add_argument("--labels", type=Path, action="append", default=[], help="file or folder instead of the topic")
    _kafka(show)
    show.set_defaults(run=_labels_show)
    _add_sample(inner.add_parser("sample", help="write label records and their images; with --publish also to the topic"))


def add_label_sources(one: argparse.ArgumentParser) -> None:
    """Where labels and their images come from: for `refresh` and `pack`."""
    one.add_argument(
        "--labels",
        type=Path,
        action="append",
        default=[],
        help="file with a label record a line, or folder with manifest.tsv, instead of the label topic; may be given again",
    )
    _kafka(one)
    where = one.add_argument_group("where images may come from, beside the upload event itself")
    where.add_argument("--images", type=Path, action="append", default=[], help="folder of files named by their SHA-256")
    where.add_argument("--file-root", type=Path, action="append", default=[], help="folder that file addresses may lie in")
    where.add_argument("--bucket", action="append", default=[], help="bucket that s3 and gs addresses may name")
    where.add_argument("--host", action="append", default=[], help="host that http and https addresses may name")


def _add_refresh(one: argparse.ArgumentParser) -> None:
    one.add_argument("--models", type=Path, required=True, help="folder of the model's versions, with CURRENT")
    one.add_argument("--work", type=Path, required=True, help="folder of this job; the same one each time")
    add_label_sources(one)
    one.add_argument("--data", type=Path, help="the corpus with manifest.tsv: for --encoder, and a bundle that carries no replay")
    one.add_argument(
        "--encoder", action="store_true", help="train the encoder too, from the champion's, on the corpus and labels"
    )
    one.add_argument("--recipe", type=Path, help="of --encoder: TOML file (train/recipes/refresh.toml)")
    one.add_argument("--device", default="cpu", help="of --encoder: cpu, cuda, cuda:1")
    one.add_argument("--workers", type=_count, default=1, help="of --encoder: loader processes (1)")
    one.add_argument("--unlabelled", type=Path, help="folder of a sample of uploads, for a logit shift")
    one.add_argument("--expected-share", type=_share, help="share of AI-generated images in that sample, e.g. 0.05")
    one.add_argument("--min-labels", type=_positive, help="fewer new labels are left for later (10; --encoder 25)")
    one.add_argument("--reviewer-images", type=_positive, default=50, help="images that one reviewer's labels weigh at most (50)")
    one.add_argument("--max-fpr", type=_share, default=None, help="largest FPR on unseen sources at the threshold for 1%%")
    one.add_argument("--backend", default="torch", help="for embeddings: torch, openvino, tensorrt, auto")
    one.add_argument("--ok-if-kept", action="store_true", help="exit 0 also where the champion is kept (for a CronJob)")
    one.set_defaults(run=_refresh)


def _add_sample(sample: argparse.ArgumentParser) -> None:
    sample.add_argument("--out", type=Path, required=True, help="folder for labels.jsonl and images/")
    sample.add_argument("--data", type=Path, help="folder with manifest.tsv to draw from; default: drawings")
    sample.add_argument("--generator", help="generator of the AI-generated ones, as the manifest names it")
    sample.add_argument("--count", type=_positive, default=50, help="AI-generated images (50)")
    sample.add_argument("--reals", type=_count, default=0, help="real images (0)")
    sample.add_argument("--reviewer", default="sample", help="who decided")
    sample.add_argument("--seed", type=_count, default=0)
    sample.add_argument("--publish", action="store_true", help="write the records to the label topic too")
    _kafka(sample)
    sample.set_defaults(run=_labels_sample)


def _kafka(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Kafka (everything else as in the worker's settings: WORKER_KAFKA__…)")
    group.add_argument("--bootstrap", help="host:port, comma-separated (WORKER_KAFKA__BOOTSTRAP_SERVERS)")
    group.add_argument("--topic", help="the label topic (WORKER_KAFKA__LABEL_TOPIC)")


def _options_of_kafka(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    from train.labels_topic import options_from

    options = options_from()
    if args.bootstrap:
        options = replace(options, bootstrap_servers=tuple(part.strip() for part in args.bootstrap.split(",") if part.strip()))
    return replace(options, label_topic=args.topic) if args.topic else options


def _allowed(args: argparse.Namespace) -> Any:
    from train.labels_images import Allowed

    return Allowed(tuple(args.images), tuple(args.file_root), frozenset(args.bucket), frozenset(args.host))


def _refresh(args: argparse.Namespace) -> int:
    from train import gate
    from train.refresh import Options, refresh

    if (args.unlabelled is None) != (args.expected_share is None):
        _say("train refresh: --unlabelled and --expected-share belong together")
        return BAD
    if args.encoder and args.data is None:
        _say(
            "train refresh: --encoder needs the corpus: --data FOLDER with manifest.tsv (no embedding goes through a new encoder)"
        )
        return BAD
    options = Options(
        models=args.models,
        work=args.work,
        labels=tuple(args.labels),
        kafka=_options_of_kafka(args),
        allowed=_allowed(args),
        data=args.data,
        unlabelled=args.unlabelled,
        share=args.expected_share,
        min_labels=args.min_labels,
        reviewer_images=args.reviewer_images,
        max_fpr=gate.MAX_FPR if args.max_fpr is None else args.max_fpr,
        backend=args.backend,
        encoder=args.encoder,
        recipe=args.recipe,
        device=args.device,
        workers=args.workers,
    )
    return _guarded("refresh", lambda: _told(refresh(options, _say), args.ok_if_kept))


def _told(outcome: Any, ok_if_kept: bool) -> int:
    for rule in outcome.rules:
        print(f"{'pass' if rule.passed else 'FAIL'}  {rule.name}: {rule.detail}")
    if outcome.kind == "promoted":
        print(f"promoted {outcome.version}: {outcome.reason}")
        return PROMOTED
    print(f"kept champion {outcome.version}: {outcome.reason}")
    return PROMOTED if ok_if_kept else KEPT


def pack(args: argparse.Namespace) -> int:
    """`train pack --from-labels`: shards of every labelled image that can be had."""
    from train.labels_images import found_images
    from train.labels_pack import write_label_shards
    from train.refresh import Options, read

    options = Options(Path(), args.out, tuple(args.labels), _options_of_kafka(args), _allowed(args))

    def run() -> int:
        labels, tally = read(options)
        pairs = found_images(labels, args.out / "images", options.allowed, None if args.labels else options.kafka, tally)
        shards = write_label_shards(pairs, args.out, args.records, tally)
        print(f"{len(shards)} shards of {len(pairs)} labelled images in {args.out}")
        print("\n".join(tally.lines()))
        return PROMOTED

    return _guarded("pack", run)


def _rollback(args: argparse.Namespace) -> int:
    from train.rollback import rollback

    left, folder = rollback(args.models, args.to)
    print(f"{folder}: current again, instead of {left}")
    return PROMOTED


def _labels_show(args: argparse.Namespace) -> int:
    from train.refresh import Options, read

    options = Options(Path(), Path(), tuple(args.labels), _options_of_kafka(args))

    def show() -> int:
        labels, tally = read(options)
        by_reviewer: dict[str, list[int]] = {}
        for label in labels:
            by_reviewer.setdefault(label.by, [0, 0])[label.label] += 1
        print(f"{tally.records} records, {len(labels)} labels: {sum(x.label for x in labels)} AI-generated, "
              f"{sum(not x.label for x in labels)} authentic")  # fmt: skip
        for name, (reals, fakes) in sorted(by_reviewer.items()):
            print(f"by {name or 'nobody'}: {fakes} AI-generated, {reals} authentic")
        print("\n".join(tally.lines()))
        return PROMOTED

    return _guarded("labels", show)


def _labels_sample(args: argparse.Namespace) -> int:
    from train import labels_sample

    if args.data is not None and args.generator is None:
        _say("train labels sample: --data needs --generator")
        return BAD

    def make() -> int:
        if args.data is None:
            images = labels_sample.made_up(args.count, args.reals, args.seed)
        else:
            images = labels_sample.chosen(args.data, args.generator, args.count, args.reals, args.seed)
        file = labels_sample.write(args.out, images, args.reviewer)
        print(f"{file}: {len(images)} decisions; their images in {args.out / labels_sample.IMAGES_FOLDER}")
        if args.publish:
            options = _options_of_kafka(args)
            print(f"{labels_sample.publish(file, options)} records written to {options.label_topic}")
        return PROMOTED

    return _guarded("labels", make)


def _guarded(command: str, run: Callable[[], int]) -> int:
    """Maps what a later try may cure to 1; what is wrong with arguments or data stays `main`'s 2."""
    from engine.backends.base import DeviceError
    from train.labels_topic import TopicError
    from train.promote import PromoteError
    from train.refresh import RefreshError

    try:
        return run()
    except (RefreshError, TopicError, PromoteError, DeviceError, OSError) as exc:
        _say(f"train {command}: failed: {' '.join(str(exc).split())}")
        return FAILED


def _positive(text: str) -> int:
    return _number(text, 1)


def _count(text: str) -> int:
    return _number(text, 0)


def _number(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is less than {least}")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{value} does not lie between 0 and 1")
    return value


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
