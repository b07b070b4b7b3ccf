"""`python -m engine export`: a bundle as one ONNX file."""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("bundle", nargs="?", type=Path, help="model bundle; the packaged one if not given")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the ONNX file to write")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the encoder (fp32)")
    parser.add_argument(
        "--heads-precision", choices=("fp32", "fp16"), default="fp32", help="of kNN and SVM: fp16 for TensorRT-RTX on SM 75"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the file, whole or not at all.

    Raises:
        BundleError: the bundle is missing or damaged.
    """
    try:
        import onnx  # noqa: F401
    except ImportError:
        print("engine export: the package onnx is missing; install the extra 'openvino' or 'tensorrt'", file=sys.stderr)
        return 2
    from engine import graph
    from engine.bundle import load, packaged

    bundle = load(arguments.bundle or packaged())
    try:
        model = graph.model(bundle, arguments.precision, heads_precision=arguments.heads_precision)
        data = graph.serialize(model)
        _write(arguments.out, data)
    except (ValueError, OSError) as error:
        reason = f"{arguments.out}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"engine export: {reason}", file=sys.stderr)
        return 2
    name = f"{bundle.manifest.name} {bundle.manifest.version}"
    print(f"{arguments.out}: {name}, {arguments.precision}, opset {graph.OPSET}, {len(data) / 2**20:.1f} MiB")
    return 0


def _write(file: Path, data: bytes) -> None:
    staged = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        staged.write_bytes(data)
        staged.replace(file)
    finally:
        staged.unlink(missing_ok=True)
