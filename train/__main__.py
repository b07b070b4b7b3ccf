"""The command line: `python -m train pretrain|probe|calibrate|evaluate|promote|import|refresh|rollback|labels|pack`.

Exit codes: 0 done; 1 the candidate was not promoted (`promote`); 2 bad arguments or data, one line that says what and where.
Those of `refresh` stand in `train.refresh_commands`.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from train import pack, pretrain_command
from train.terminal import at_least as _at_least
from train.terminal import counter as _counter
from train.terminal import say as _say

DONE, NOT_PROMOTED, BAD = 0, 1, 2


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        code: int = parsed.run(parsed)
    except KeyboardInterrupt:
        return 130
    except _expected() as exc:
        # One line, whatever a library put into its message.
        print(f"train {parsed.command}: {' '.join(str(exc).split())}", file=sys.stderr)
        return BAD
    return code


def _expected() -> tuple[type[Exception], ...]:
    from engine.backends.base import BackendError
    from engine.bundle import BundleError
    from train.aligned import AlignedError
    from train.data import DataError
    from train.pickled_heads import PickleError
    from train.pretrain_errors import PretrainError
    from train.promote import PromoteError
    from train.recipe import RecipeError

    expected: tuple[type[Exception], ...] = (
        BackendError,
        BundleError,
        AlignedError,
        DataError,
        PickleError,
        PromoteError,
        RecipeError,
        OSError,
    )
    # Only where torch was needed can its errors have been raised.
    return (*expected, PretrainError) if "torch" in sys.modules else (*expected, PretrainError, ModuleNotFoundError)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="train", description="Trains, calibrates, evaluates and promotes the detector.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    one = commands.add_parser("pretrain", help="train the encoder by a recipe; resumes where it stopped")
    _data(one)
    _out(one)
    pretrain_command.add_arguments(one)
    one.set_defaults(run=pretrain_command.run)

    two = commands.add_parser("probe", help="fit the three heads on the encoder's embeddings")
    _out(two)
    two.add_argument("--name", default="code-vit-tiny-corpus", help="name of the model")
    _version(two)
    two.add_argument("--copies", type=_at_least(1), default=1, help="augmented copies of each image")
    two.add_argument("--pool", action="store_true", help="embed the crops of the run's pool instead of augmenting anew")
    two.add_argument("--no-aligned", action="store_true", help="leave the aligned fakes out")
    two.add_argument(
        "--c",
        type=_c,
        default=None,
        help="inverse regularisation of the linear head; auto: the one that ranks sources left out of the fit best; default: the "
        "paper's 0.316",
    )
    _backend(two)
    two.add_argument("--seed", type=_at_least(0), default=0)
    two.set_defaults(run=_probe)

    three = commands.add_parser("calibrate", help="probabilities, thresholds and abstain band from validation images")
    _data(three)
    _out(three)
    _version(three)
    three.add_argument(
        "--crops", choices=("center", "five"), default="center", help="as the worker that will serve it is set (ENGINE__CROPS)"
    )
    _backend(three)
    three.set_defaults(run=_calibrate)

    four = commands.add_parser("evaluate", help="measure a bundle by source and generator; writes report.json")
    _data(four)
    _out(four)
    four.add_argument("--bundle", type=Path, help="folder of the bundle; default: the calibrated one of --out and --version")
    four.add_argument("--version", help="version in --out")
    four.add_argument("--backend", default="torch", help="torch, openvino, tensorrt, auto")
    four.add_argument("--threads", type=_at_least(0), default=0, help="0: one a core")
    four.add_argument("--head", choices=("linear", "knn", "ocsvm"), default="linear", help="the serving head")
    four.add_argument("--crops", choices=("center", "five"), default="center", help="five: five crops an image, averaged")
    four.add_argument("--no-ladder", action="store_true", help="clean and JPEG 75 only, not every degradation")
    four.add_argument("--no-parity", action="store_true", help="do not compare the backends that run here")
    four.set_defaults(run=_evaluate)

    five = commands.add_parser("promote", help="publish the calibrated bundle if it passes the gate")
    _out(five)
    _version(five)
    five.add_argument("--models", type=Path, required=True, help="folder of the model's versions, with CURRENT")
    five.add_argument("--max-fpr", type=float, default=None, help="largest FPR on unseen sources at the threshold for 1%%")
    five.add_argument("--champion-report", type=Path, help="report.json of the published bundle on this data; default: its own")
    five.add_argument("--note", action="append", default=[], help="a sentence for card and TRAINING.md; may be given again")
    five.set_defaults(run=_promote)

    _import_command(commands)
    from train import refresh_commands

    six = commands.add_parser("pack", help="write shards in D3's layout from a folder with a manifest, or from human decisions")
    six.add_argument("--data", type=Path, help="folder with manifest.tsv and its images")
    six.add_argument(
        "--from-labels", action="store_true", help="the images of the label topic, or of --labels, instead of --data"
    )
    refresh_commands.add_label_sources(six)
    _out(six)
    pack.add_arguments(six)
    six.set_defaults(run=_pack)
    refresh_commands.add(commands, _Parser)
    return parser


def _import_command(commands: argparse._SubParsersAction[_Parser]) -> None:
    one = commands.add_parser("import", help="the published CoDE weights to a bundle, without running what is in their pickles")
    one.add_argument(
        "--from", dest="source", type=Path, required=True, help="folder with config.json, model.safetensors and sklearn/"
    )
    _out(one)
    _version(one)
    one.add_argument("--name", default="code-published", help="name of the model")
    one.set_defaults(run=_import)


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with manifest.tsv and its images (pretrain: or .tar shards)"
    )


def _out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of this run")


def _version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", required=True, help="version of the bundle, e.g. 2026.11.1")


def _backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="torch", help="for embeddings: torch (fp32), openvino, tensorrt, auto")


def _c(text: str) -> float | str:
    """Above 0, or auto."""
    if text == "auto":
        return text
    value = float(text)
    if not (0 < value < math.inf):
        raise ValueError(text)
    return value


def _probe(args: argparse.Namespace) -> int:
    from train import probe, stages

    c = probe.C if args.c is None else None if args.c == "auto" else args.c
    given = f" --name {shlex.quote(args.name)} --copies {args.copies} --seed {args.seed}" + " --no-aligned" * args.no_aligned
    given += "" if args.c is None else f" --c {'auto' if c is None else format(c, 'g')}"
    given += " --pool" * args.pool + f" --backend {args.backend}" * (args.backend != "torch")
    stages.write_facts(args.out, name=args.name, probe_arguments=given)
    folder = stages.run_probe(
        args.out,
        args.name,
        args.version,
        copies=args.copies,
        aligned=not args.no_aligned,
        seed=args.seed,
        on_image=_counter("embedded"),
        c=c,
        pooled=args.pool,
        backend=args.backend,
    )
    if c is None:
        _say(str(stages.read_facts(args.out)["probe_c"]))
    _say(f"{folder}: heads fitted, not calibrated")
    return DONE


def _import(args: argparse.Namespace) -> int:
    from train import imports

    folder, published = imports.run(args.source, args.out, args.name, args.version)
    for line in imports.warnings(published):
        _say(f"warning: {line}")
    _say(f"{folder}: imported, not calibrated; next: train calibrate --out {args.out} --version {args.version} --data DIR")
    return DONE


def _calibrate(args: argparse.Namespace) -> int:
    from engine import bundle
    from train import stages
    from train.calibrate import certification

    given = f" --crops {args.crops}" * (args.crops != "center") + f" --backend {args.backend}" * (args.backend != "torch")
    stages.write_facts(args.out, calibrate_arguments=given)
    folder = stages.run_calibrate(
        args.out, args.data, args.version, _counter("embedded", 250), crops=args.crops, backend=args.backend
    )
    manifest = bundle.load(folder).manifest
    for head, named in manifest.thresholds.items():
        for name, t in named.items():
            print(
                f"{head:7} {manifest.calibration[head].method:12} {name:10} {t.threshold:.4f}  FPR {t.fpr:.4f} "
                f"(at most {t.fpr_upper:.4f} with 95% confidence, {t.reals} reals)  TPR {t.tpr:.4f}  "
                f"certified: {certification(t)}"
            )
    return DONE


def _evaluate(args: argparse.Namespace) -> int:
    from train import stages

    if args.bundle is None and args.version is None:
        _parser().error("evaluate needs --bundle, or --version of a bundle in --out")
    folder = args.bundle or args.out / "bundles" / f"{args.version}-calibrated"
    report = stages.run_evaluate(
        folder,
        args.data,
        args.out,
        backend=args.backend,
        threads=args.threads,
        on_image=_counter("scored", 250),
        head=args.head,
        crops=args.crops,
        ladder=not args.no_ladder,
        parity=not args.no_parity,
    )
    if args.bundle is None and (args.out / stages.FACTS_FILE).exists():
        flags = {"no_ladder": args.no_ladder, "no_parity": args.no_parity}
        given = f" --backend {args.backend} --head {args.head} --crops {args.crops}"
        given += "".join(f" --{name.replace('_', '-')}" for name, on in flags.items() if on)
        stages.write_facts(args.out, evaluate_arguments=given)
    for condition, parts in report["conditions"].items():
        for part, values in parts.items():
            for head, measured in values["heads"].items():
                auroc, tpr = measured["auroc"], measured["tpr_at_fpr_0.01"]
                print(
                    f"{condition:7} {part:20} {head:7} AUROC {auroc['value']:.3f} ({auroc['low']:.3f}-{auroc['high']:.3f})  "
                    f"TPR at FPR 1% {tpr['value']:.3f} ({tpr['low']:.3f}-{tpr['high']:.3f})"
                )
    _say(f"{args.out / 'report.html'}: the whole report; {args.out / 'report.json'}: the same for machines")
    return DONE


def _promote(args: argparse.Namespace) -> int:
    from train import promote, stages

    stages.read_facts(args.out)
    facts = stages.write_facts(args.out, notes=args.note)
    commands = [*facts.get("earlier", []), str(facts["pretrain_command"])]
    steps = [("probe", ""), ("calibrate", " --data $CORPUS"), ("evaluate", " --data $CORPUS")]
    for command, needs in steps[1:] if "imported" in facts else steps:
        given = facts.get(f"{command}_arguments", "")
        commands.append(f"python -m train {command}{needs} --out $RUN --version {shlex.quote(args.version)}{given}")
    commands.append(f"python -m train promote --out $RUN --version {shlex.quote(args.version)} --models models")
    max_fpr = promote.MAX_FPR if args.max_fpr is None else args.max_fpr
    rules, published = stages.run_promote(args.out, args.models, args.version, commands, max_fpr, args.champion_report)
    for rule in rules:
        print(f"{'pass' if rule.passed else 'FAIL'}  {rule.name}: {rule.detail}")
    if published is None:
        _say("not promoted")
        return NOT_PROMOTED
    _say(f"{published}: promoted")
    return DONE


def _pack(args: argparse.Namespace) -> int:
    from train import refresh_commands

    if args.from_labels == (args.data is not None):
        _parser().error("pack needs either --data or --from-labels")
    return refresh_commands.pack(args) if args.from_labels else pack.run(args)


def _leave(code: int) -> NoReturn:
    """Ends the process; under torchrun without the interpreter's teardown, in which gloo's threads can abort what went well."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main())
