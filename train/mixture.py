"""A corpus and labelled images drawn together: what an encoder refresh trains on.

    FOLDER/mixture.json   where the two pixel stores lie (each may hold a pool beside its pixels), of each class the share of a
                          batch that labelled images take, and the weight of each labelled image within it

Pixels stay where they are: the corpus is decoded once and serves every refresh. `open_source` knows the folder, so training,
checkpoints and loader processes need nothing of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train import pool
from train.data import DataError
from train.recipe import Recipe
from train.sources import MIXTURE
from train.store import Item, PixelStore, Rgb
from train.views import Balanced, Draws, Sampler

FORMAT = "code-mixture/1"

Shares = tuple[float, float]


def write(folder: Path, corpus: Path, labelled: Path, shares: Shares, weights: dict[str, float]) -> str:
    """Writes FOLDER/mixture.json whole and returns the mixture's digest.

    shares: of reals and of fakes, 0 to below 1. weights: of each labelled image by its name in the store (`Item.name`).
    Raises DataError where a store is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "corpus": _relative(corpus, folder),
        "labelled": _relative(labelled, folder),
        "shares": list(shares),
        "weights": dict(sorted(weights.items())),
    }
    partial = folder / f"{MIXTURE}.partial"
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(folder / MIXTURE)
    return _digest(PixelStore(corpus), PixelStore(labelled), shares, weights)


def opened(folder: Path, recipe: Recipe) -> Mixture:
    """The mixture of a folder. Raises DataError where it, a store or a pool cannot be used."""
    path = folder / MIXTURE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise DataError(f"{path}: not JSON ({exc})") from exc
    if content.get("format") != FORMAT:
        raise DataError(f"{path}: format {content.get('format')!r} is not {FORMAT}")
    places = [folder / str(content[name]) for name in ("corpus", "labelled")]
    stores = [PixelStore(place) for place in places]
    joined = JoinedStore(*stores)
    crops = None
    if recipe.pool_copies:
        crops = pool.Joined([pool.opened(s, place / "pool", recipe.pool_copies) for s, place in zip(stores, places, strict=True)])
    shares = (float(content["shares"][0]), float(content["shares"][1]))
    return Mixture(joined, recipe.source_balance, shares, content["weights"], crops)


class JoinedStore(PixelStore):
    """Two stores as one: the corpus' items, then the labelled ones. First compressions are lent by the corpus' photographs."""

    def __init__(self, corpus: PixelStore, labelled: PixelStore) -> None:
        self._parts = corpus, labelled
        last = corpus.items[-1]
        self._bytes = last.offset + last.height * last.width * 3
        self.corpus_items = len(corpus.items)
        self.tables = corpus.tables
        self.digest = hashlib.sha256(f"{corpus.digest}|{labelled.digest}".encode()).hexdigest()
        self.items = corpus.items + [replace(item, offset=item.offset + self._bytes, tables=-1) for item in labelled.items]

    def pixels(self, item: Item) -> Rgb:
        corpus, labelled = self._parts
        if item.offset < self._bytes:
            return corpus.pixels(item)
        return labelled.pixels(replace(item, offset=item.offset - self._bytes))


class Mixture(Sampler):
    """Draws from the corpus as ever, and of each class the given share from the labelled images, by their weights."""

    def __init__(
        self, store: JoinedStore, balance: float, shares: Shares, weights: dict[str, float], crops: pool.Joined | None
    ) -> None:
        super().__init__(store, balance, crops)
        corpus, labelled = store._parts
        self._mixture_digest = _digest(corpus, labelled, shares, weights)
        drawers = [
            _Shared([i for i in side if i < store.corpus_items], [i for i in side if i >= store.corpus_items], share, weights,
                    store, balance)
            for side, share in zip(self.sides(), shares, strict=True)
        ]  # fmt: skip
        self._reals, self._fakes = drawers

    @property
    def digest(self) -> str:
        return self._mixture_digest


class _Shared(Draws):
    """Draws of one class: a labelled image with probability `share`, else one of the corpus."""

    def __init__(
        self, corpus: list[int], labelled: list[int], share: float, weights: dict[str, float], store: PixelStore, balance: float
    ) -> None:
        self._corpus = Balanced(corpus, store, balance)
        self._labelled = labelled
        given = np.array([weights.get(store.items[i].name, 0.0) for i in labelled], np.float64)
        self._share = share if given.sum() > 0 else 0.0
        self._probabilities: NDArray[np.float64] = given / given.sum() if given.sum() > 0 else given

    def draw(self, n: int, rng: np.random.Generator) -> list[int]:
        mine = int((rng.random(n) < self._share).sum())
        chosen = rng.choice(len(self._labelled), size=mine, p=self._probabilities).tolist() if mine else []
        return [self._labelled[i] for i in chosen] + self._corpus.draw(n - mine, rng)


def _digest(corpus: PixelStore, labelled: PixelStore, shares: Sequence[float], weights: dict[str, float]) -> str:
    content = [FORMAT, corpus.digest, labelled.digest, list(shares), sorted(weights.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _relative(path: Path, folder: Path) -> str:
    """So that a work folder can be moved, or mounted elsewhere, as a whole."""
    return os.path.relpath(path.resolve(), folder.resolve())
