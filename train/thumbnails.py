"""The best and the worst of an evaluation: which images they are, and small pictures of them for the report."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from train.data import Damage, Entry
from train.embed import from_files
from train.scoring import Scored

SIDE_PX = 112
QUALITY = 70
EACH = 6


@dataclass(frozen=True, slots=True)
class Shown:
    """One image: its key, what it is, and its score."""

    key: str
    label: int
    source: str
    generator: str
    score: float


@dataclass(frozen=True, slots=True)
class Extremes:
    """Images by the serving head's probability, the most extreme first."""

    reals_taken_for_generated: list[Shown]
    generated_taken_for_real: list[Shown]
    surest_reals: list[Shown]
    surest_generated: list[Shown]

    @property
    def keys(self) -> set[str]:
        """Of all of them."""
        groups = (self.reals_taken_for_generated, self.generated_taken_for_real, self.surest_reals, self.surest_generated)
        return {shown.key for group in groups for shown in group}


def extremes(scored: Scored, column: int, each: int = EACH) -> Extremes:
    """At most `each` of every kind; an image may be both among the surest and the mistaken where there are few."""
    scores = scored.probability[:, column].astype(np.float64)

    def chosen(label: int, sign: int) -> list[Shown]:
        rows = [int(i) for i in np.argsort(sign * scores, kind="stable") if scored.facts[i].label == label][:each]
        return [_shown(scored, row, scores[row]) for row in rows]

    return Extremes(chosen(0, -1), chosen(1, 1), chosen(0, 1), chosen(1, -1))


def _shown(scored: Scored, row: int, score: float) -> Shown:
    facts = scored.facts[row]
    return Shown(facts.key, facts.label, facts.source, facts.generator, float(score))


def pictures(entries: Sequence[Entry], keys: Collection[str]) -> dict[str, bytes]:
    """JPEGs of at most 112 px a side, by key; decodes only the files that hold one of `keys`."""
    files = {key.partition("#")[0] for key in keys}
    wanted = [entry for entry in entries if (entry.sha256 or str(entry.path)) in files]
    found = {}
    for rgb, facts in from_files(wanted, Damage()):
        if facts.key in keys and facts.key not in found:
            image = Image.fromarray(rgb)
            image.thumbnail((SIDE_PX, SIDE_PX))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=QUALITY)
            found[facts.key] = buffer.getvalue()
    return found
