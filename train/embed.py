"""Embeddings at the serving contract: engine's decoder, engine's crops, engine's encoder. Extracted once, used by every head."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.bundle import Draft, encoder_shapes, write
from engine.calibration import Platt
from engine.detector import Detector
from engine.heads import EMBEDDING_DIM, HEADS, Heads
from engine.images import ImageError, read
from engine.preprocess import Layout, center_crop, crops
from train.augment import PRESETS
from train.data import Damage, DataError, Entry
from train.store import LIMITS, Item, PixelStore
from train.views import base_image

Rgb = NDArray[np.uint8]
BATCH = 32
FIVE = 5


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of an image. `key` names it; copies of one image share it."""

    key: str
    label: int
    source: str
    generator: str
    group: str


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """Embeddings float32[n, 192] and, row by row, whose they are."""

    embedding: NDArray[np.float32]
    facts: list[Facts]

    @property
    def labels(self) -> NDArray[np.uint8]:
        """uint8[n], 1 = AI-generated."""
        return np.array([f.label for f in self.facts], np.uint8)

    def at(self, rows: NDArray[np.int64]) -> Embedded:
        """These rows, in this order."""
        return Embedded(self.embedding[rows], [self.facts[row] for row in rows.tolist()])

    def where(self, mask: NDArray[np.bool_]) -> Embedded:
        """The rows for which mask bool[n] holds."""
        return Embedded(self.embedding[mask], [f for f, keep in zip(self.facts, mask, strict=True) if keep])


def from_files(entries: Sequence[Entry], damage: Damage) -> Iterator[tuple[Rgb, Facts]]:
    """Decodes files as serving does; quarters of a grid come one by one; what cannot be decoded is reported and skipped."""
    for entry in entries:
        try:
            rgb = read(entry.path.read_bytes(), LIMITS).frames[0]
        except (ImageError, OSError) as exc:
            damage.add(str(entry.path), str(exc) or type(exc).__name__)
            continue
        h, w = rgb.shape[0] // 2, rgb.shape[1] // 2
        grid = entry.layout == "grid2x2"
        for part, piece in enumerate((rgb[:h, :w], rgb[:h, w:], rgb[h:, :w], rgb[h:, w:]) if grid else (rgb,)):
            key = entry.sha256 or str(entry.path)
            yield piece, Facts(f"{key}#{part}" if grid else key, entry.label, entry.source, entry.generator, entry.group)


def from_store(store: PixelStore, seed: int, copies: int, aligned: bool) -> Iterator[tuple[Rgb, Facts]]:
    """Images of a pixel store as platforms deliver them: `copies` draws of the `platform` preset at full strength.

    Both classes go through the same draws; `aligned` includes the aligned fakes.
    """
    for number, item in enumerate(store.items):
        if item.pair >= 0 and not aligned:
            continue
        facts = _facts_of(number, item)
        for copy in range(copies):
            # An aligned fake draws what its real draws.
            rng = np.random.default_rng((seed, 41, item.pair if item.pair >= 0 else number, copy))
            yield np.asarray(PRESETS["platform"](base_image(store, item, rng), rng, 1.0)), facts


def from_pool(store: PixelStore, crops: Rgb, copies: int, aligned: bool) -> Iterator[tuple[Rgb, Facts]]:
    """As `from_store`, from the first `copies` of the crops uint8[items, n, 224, 224, 3] that `train.pool` augmented beforehand.

    Raises DataError where it has fewer.
    """
    if copies >= crops.shape[1]:
        raise DataError(f"the pool has {crops.shape[1] - 1} augmented crops an image, not {copies}; give another --copies")
    for number, item in enumerate(store.items):
        if item.pair < 0 or aligned:
            facts = _facts_of(number, item)
            # Copy 0 is the image as delivered.
            yield from ((crops[number, copy], facts) for copy in range(1, copies + 1))


def _facts_of(number: int, item: Item) -> Facts:
    return Facts(item.name or f"item-{number}", item.label, item.source, item.generator, item.group)


class Encoder:
    """timm-named arrays as an encoder, through `engine.detector`: what the heads are fitted on is what a worker will compute.

    The heads that a bundle needs are made up; only embeddings are taken. Raises as `Detector.open`.
    """

    def __init__(
        self, weights: Mapping[str, Any], *, layer_norm_eps: float = 1e-6, device: str = "auto", backend: str = "torch"
    ) -> None:
        arrays = {name: np.asarray(array, np.float32) for name, array in weights.items()}
        options: dict[str, Any] = {"precision": "fp32"} if backend == "torch" else {}
        with tempfile.TemporaryDirectory(prefix="code-encoder-") as folder:
            draft = Draft(
                name="encoder",
                version="0",
                encoder=arrays,
                heads=_no_heads(),
                calibration={head: Platt(slope=1.0) for head in HEADS},
                layer_norm_eps=layer_norm_eps,
                model_card="An encoder on its way to its heads.\n",
            )
            path = write(Path(folder) / "bundle", draft).path
            self._detector = Detector.open(path, backend=backend, device=device, **options)

    def __call__(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8[n, 224, 224, 3] -> float32[n, 192]."""
        return self._detector.outputs(crops).embedding


def _no_heads() -> Heads:
    """Heads that mean nothing."""
    zeros = np.zeros(EMBEDDING_DIM, np.float32)
    return Heads(
        linear_weight=zeros,
        linear_bias=np.zeros((), np.float32),
        knn_gallery=np.eye(2, EMBEDDING_DIM, dtype=np.float32),
        knn_labels=np.array([0, 1], np.uint8),
        svm_vectors=zeros[None],
        svm_dual=np.zeros(1, np.float32),
        svm_intercept=np.zeros((), np.float32),
    )


def embed(
    encoder: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    images: Iterable[tuple[Rgb, Facts]],
    on_image: Callable[[int], None] | None = None,
) -> Embedded:
    """Centre crops of RGB images through the encoder, in batches of 32."""
    parts: list[NDArray[np.float32]] = []
    facts: list[Facts] = []
    waiting: list[Rgb] = []
    for rgb, known in images:
        waiting.append(center_crop(rgb))
        facts.append(known)
        if len(waiting) == BATCH:
            parts.append(encoder(np.stack(waiting)))
            waiting = []
            if on_image is not None:
                on_image(len(facts))
    if waiting:
        parts.append(encoder(np.stack(waiting)))
    return Embedded(np.concatenate(parts) if parts else np.empty((0, 192), np.float32), facts)


def embed_crops(
    encoder: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    images: Iterable[tuple[Rgb, Facts]],
    layout: Layout,
    on_image: Callable[[int], None] | None = None,
) -> tuple[Embedded, NDArray[np.int64]]:
    """Every crop of RGB images, and for each image the rows of its crops, int64[n, 1 or 5]; one that fits into a single crop has
    the same row five times. The centre crop comes first."""
    rows: list[list[int]] = []

    def cut() -> Iterator[tuple[Rgb, Facts]]:
        start = 0
        for rgb, facts in images:
            pieces = crops(rgb, layout)
            several = len(pieces) > 1 or layout == "center"
            rows.append(list(range(start, start + len(pieces))) if several else [start] * FIVE)
            start += len(pieces)
            yield from ((piece, facts) for piece in pieces)

    embedded = embed(encoder, cut(), on_image)
    return embedded, np.array(rows, np.int64).reshape(len(rows), -1)


def degraded(
    images: Iterable[tuple[Rgb, Facts]], change: Callable[[Image.Image, np.random.Generator], Image.Image], seed: int
) -> Iterator[tuple[Rgb, Facts]]:
    """The same images after `change`, each with a generator of its own."""
    for number, (rgb, facts) in enumerate(images):
        rng = np.random.default_rng((seed, 43, number))
        yield np.asarray(change(Image.fromarray(rgb), rng)), facts


def load_encoder(path: Path) -> dict[str, NDArray[np.float32]]:
    """timm-named arrays of an encoder.safetensors; raises DataError naming the file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        weights = dict(load_file(path))
    except FileNotFoundError as exc:
        raise DataError(f"{path}: no such file; `train pretrain` writes it") from exc
    except SafetensorError as exc:
        raise DataError(f"{path}: not a safetensors file ({exc})") from exc
    expected = encoder_shapes()
    for name, shape in expected.items():
        if name not in weights or weights[name].shape != shape:
            raise DataError(f"{path}: tensor {name} is missing or not {list(shape)}")
    return {name: weights[name].astype(np.float32) for name in expected}
