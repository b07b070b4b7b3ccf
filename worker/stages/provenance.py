"""Marks that a generator left in an image file."""

from __future__ import annotations

MAX_CHARS = 200
FIELDS = ("c2pa", "digital_source_type", "generator_metadata")


def read(data: bytes) -> dict[str, str | None]:
    """The contract's `evidence.provenance`."""
    return dict.fromkeys(FIELDS)


def bounded(found: object) -> dict[str, str | None]:
    """`found`, from a process that may lie, as exactly the three fields with short strings or None."""
    values = found if isinstance(found, dict) else {}
    return {name: value[:MAX_CHARS] if isinstance(value := values.get(name), str) else None for name in FIELDS}
