"""The arguments that say which model runs where: the same for every command that loads one."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.backends import AUTO_ORDER
from engine.commands import CommandError
from engine.detector import Detector
from engine.heads import HEADS
from engine.preprocess import LAYOUTS


def add(parser: argparse.ArgumentParser, scores: bool = True) -> None:
    """--bundle, --backend, --device, --threads and --precision; for commands that give out scores, --head and --crops."""
    parser.add_argument("--bundle", type=Path, metavar="FOLDER", help="model bundle; default: the packaged one")
    parser.add_argument("--backend", choices=("auto", *AUTO_ORDER), default="auto", help="default: the first that runs here")
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=natural, default=0, metavar="N", help="CPU threads; default: one per core")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="of the encoder, for a named backend; default: the backend's"
    )
    if not scores:
        parser.set_defaults(head=HEADS[0], crops=LAYOUTS[0])
        return
    parser.add_argument("--head", choices=HEADS, default="linear", help="the head whose score decides; default: linear")
    parser.add_argument("--crops", choices=LAYOUTS, default="center", help="the centre, or it and the corners; default: center")


def natural(text: str) -> int:
    """A count from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def positive(text: str) -> int:
    """A count from 1."""
    if natural(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def detector(arguments: argparse.Namespace) -> Detector:
    """The detector that the arguments name.

    Raises:
        CommandError: a wrong device or precision.
        BundleError, BackendUnavailable, DeviceError, OutOfDeviceMemory: as `Detector.open`.
    """
    if arguments.precision is not None and arguments.backend == "auto":
        raise CommandError("--precision needs a --backend: which precisions there are depends on it")
    options = {} if arguments.precision is None else {"precision": arguments.precision}
    try:
        return Detector.open(
            arguments.bundle, arguments.backend, arguments.device, arguments.head, arguments.crops, arguments.threads, **options
        )
    except ValueError as error:
        raise CommandError(str(error)) from error
