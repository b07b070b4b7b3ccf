"""`engine export`: a bundle as one ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.commands import CommandError
from engine.graph_writer import PRECISIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("bundle", nargs="?", type=Path, help="model bundle; the packaged one if not given")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the ONNX file to write")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the encoder (fp32)")
    parser.add_argument(
        "--heads-precision", choices=("fp32", "fp16"), default="fp32", help="of kNN and SVM: fp16 for TensorRT-RTX on SM 75"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the file, whole or not at all.

    Raises:
        BundleError: the bundle is missing or damaged.
        CommandError: a weight beyond the precision, no package onnx, or the file cannot be written.
    """
    from engine import graph
    from engine.bundle import load, packaged
    from engine.plans import replace

    bundle = load(arguments.bundle or packaged())
    try:
        data = graph.serialize(graph.model(bundle, arguments.precision, heads_precision=arguments.heads_precision))
        replace(arguments.out, data)
    except ImportError as error:
        raise CommandError(f"onnx cannot be imported ({error}); install the extra 'openvino' or 'tensorrt'") from error
    except ValueError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"{arguments.out}: {error.strerror}") from error
    name = f"{bundle.manifest.name} {bundle.manifest.version}"
    print(f"{arguments.out}: {name}, {arguments.precision}, opset {graph.OPSET}, {len(data) / 2**20:.1f} MiB")
    return 0
