"""What `engine inspect` says of a compiled plan: from the JSON that was written beside it when it was built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.commands import CommandError
from engine.plans import Plan, PlanError, read

Section = list[tuple[str, str]]


def load(file: Path) -> Plan:
    """The plan, verified against its JSON.

    Raises:
        CommandError: it cannot be read, or is not what its JSON says.
    """
    try:
        return read(file)
    except PlanError as error:
        raise CommandError(str(error)) from error


def sections(file: Path, plan: Plan) -> dict[str, Section]:
    """Headings, each with names and values."""
    facts, key = plan.facts, plan.facts.get("key", {})
    parts: dict[str, Section] = {
        f"{key.get('flavour', 'plan')} {key.get('version', '')}".strip(): [
            ("file", str(file)),
            ("size", f"{len(plan.data) / 2**20:.1f} MiB, SHA-256 {facts['sha256'][:16]}… verified"),
            ("built", f"{facts.get('built_at', '?')}" + (f" in {facts['build_s']} s" if "build_s" in facts else "")),
            *(
                (name, _text(key[name]))
                for name in ("bundle", "gpu", "capability", "precision", "heads_precision")
                if name in key
            ),
            ("refittable", "yes" if key.get("refit") else "no"),
        ],
        "inputs": [_tensor(tensor) for tensor in facts.get("inputs", [])],
        "outputs": [_tensor(tensor) for tensor in facts.get("outputs", [])],
        "profiles": [
            (str(i), "; ".join(f"{name} min {low}, opt {best}, max {high}" for name, (low, best, high) in profile.items()))
            for i, profile in enumerate(facts.get("profiles", []))
        ],
    }
    layers = facts.get("layers")
    if layers:
        kinds = [(str(kind), str(count)) for kind, count in layers["kinds"].items()]
        parts[f"layers of the network: {layers['count']}"] = kinds
    if facts.get("warnings"):
        parts["warnings of the builder"] = [(str(i + 1), str(text)) for i, text in enumerate(facts["warnings"])]
    return parts


def _tensor(tensor: dict[str, Any]) -> tuple[str, str]:
    shape = ["n" if size == -1 else str(size) for size in tensor["shape"]]
    return str(tensor["name"]), f"{tensor['dtype']} [{', '.join(shape)}]"


def _text(value: Any) -> str:
    return str(value)
