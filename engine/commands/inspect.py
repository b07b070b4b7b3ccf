"""`engine inspect`: what is in a model bundle or a compiled plan, after verifying every file of it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from engine.bundle import Bundle, load, packaged
from engine.heads import HEADS

Section = list[tuple[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `engine inspect`."""
    parser.add_argument(
        "bundle",
        nargs="?",
        type=Path,
        metavar="BUNDLE_OR_PLAN",
        help="a bundle's folder or a .plan file; default: the packaged bundle",
    )
    parser.add_argument("--json", action="store_true", help="everything that is known as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Verify and print."""
    if arguments.bundle is not None and arguments.bundle.is_file():
        from engine.commands import plan_sections

        plan = plan_sections.load(arguments.bundle)
        if arguments.json:
            print(json.dumps(plan.facts, indent=2))
        else:
            _print(plan_sections.sections(arguments.bundle, plan))
        return 0
    bundle = load(packaged() if arguments.bundle is None else arguments.bundle)
    if arguments.json:
        print(json.dumps(to_json(bundle), indent=2))
    else:
        _print(sections(bundle))
    return 0


def to_json(bundle: Bundle) -> dict[str, Any]:
    """What is in the bundle, for programs."""
    manifest = bundle.manifest
    files = [manifest.encoder.file, manifest.heads.file, manifest.model_card.file]
    return {
        "path": str(bundle.path),
        "digest": bundle.digest,
        "verified": True,
        "size_bytes": {name: (bundle.path / name).stat().st_size for name in files},
        "manifest": manifest.model_dump(mode="json"),
    }


def sections(bundle: Bundle) -> dict[str, Section]:
    """What is in the bundle, for people: headings, each with names and values."""
    manifest, heads = bundle.manifest, bundle.manifest.heads
    parts: dict[str, Section] = {
        f"{manifest.name} {manifest.version}": [
            ("folder", str(bundle.path)),
            ("digest", bundle.digest),
            ("created", manifest.created_at.isoformat()),
            *(("parent", f"{parent.name} {parent.version} {parent.digest[:12]}") for parent in manifest.parents),
            (
                "encoder",
                f"{manifest.encoder.arch}, {manifest.encoder.parameters:,} parameters, eps {manifest.encoder.layer_norm_eps:g}",
            ),
            ("linear", "logistic regression" + (f", C {heads.linear.c:g}" if heads.linear.c is not None else "")),
            ("knn", f"1 nearest, cosine, {heads.knn.reals:,} real and {heads.knn.fakes:,} generated images"),
            ("ocsvm", f"degree {heads.ocsvm.degree}, gamma {heads.ocsvm.gamma:g}, {heads.ocsvm.support_vectors:,} vectors"),
            ("preprocess", f"{manifest.preprocess.id}: {manifest.preprocess.crop_px} px at native resolution"),
        ]
    }
    for head in HEADS:
        parts[head] = _head(bundle, head)
    if manifest.metrics:
        parts["metrics"] = list(_flat(manifest.metrics))
    return parts


def _head(bundle: Bundle, head: Any) -> Section:
    manifest = bundle.manifest
    lines: Section = [("calibration", manifest.calibration[head].method)]
    for name, cut in sorted(manifest.thresholds.get(head, {}).items()):
        caught = "" if cut.tpr is None else f", finds {cut.tpr:.1%} of {cut.fakes or '?'} generated"
        measured = f"FPR {cut.fpr:.3%} of {cut.reals:,} reals (95% sure: below {cut.fpr_upper:.3%})"
        lines.append((name, f"score from {cut.threshold:.4f}: {measured}{caught}, {cut.crops} crops"))
    if head in manifest.abstain:
        lines.append(("undecided", f"{manifest.abstain[head].low:.4f} to {manifest.abstain[head].high:.4f}"))
    return lines


def _flat(values: Any, prefix: str = "") -> Section:
    """Nested metrics as dotted names; lists in one line, cut where they are long."""
    if isinstance(values, dict):
        return [line for key, value in values.items() for line in _flat(value, f"{prefix}.{key}" if prefix else str(key))]
    text = json.dumps(values)
    return [(prefix, text if len(text) <= 80 else text[:79] + "…")]


def _print(parts: dict[str, Section]) -> None:
    from rich.console import Console
    from rich.text import Text

    # Into a pipe, lines stay whole whatever the width of the terminal that started it.
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 10_000)
    for heading, lines in parts.items():
        console.print(Text(heading, style="bold"))
        width = max((len(name) for name, _ in lines), default=0)
        for name, value in lines:
            console.print(Text.assemble(f"  {name:<{width}}  ", value))
