"""A loaded bundle as the beginning of the next one."""

from __future__ import annotations

from typing import Any

from engine.bundle import Bundle


def of(loaded: Bundle) -> dict[str, Any]:
    """The fields of `engine.bundle.Draft`, without measures, card and replay.

    `created_at` is kept, so that the same content gives the same bytes and a step's outcome is known by its digest; None instead
    makes it now.
    """
    manifest = loaded.manifest
    return {
        "name": manifest.name,
        "version": manifest.version,
        "encoder": loaded.encoder,
        "heads": loaded.heads,
        "calibration": manifest.calibration,
        "layer_norm_eps": manifest.encoder.layer_norm_eps,
        "model_card": f"# {manifest.name} {manifest.version}\n\nA step on the way to a bundle: not for use.\n",
        "preprocess": loaded.preprocess,
        "thresholds": manifest.thresholds,
        "abstain": manifest.abstain,
        "reference": manifest.reference,
        "parents": manifest.parents,
        "linear_c": manifest.heads.linear.c,
        "svm_nu": manifest.heads.ocsvm.nu,
        "created_at": manifest.created_at,
    }
