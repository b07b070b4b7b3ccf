"""Embeddings at the serving contract: engine's decoder, engine's crops, engine's encoder. Extracted once, used by every head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.bundle import encoder_shapes
from engine.images import ImageError, read
from engine.preprocess import Preprocess, center_crop
from train.augment import PRESETS
from train.data import Damage, DataError, Entry
from train.store import LIMITS, PixelStore
from train.views import base_image

Rgb = NDArray[np.uint8]
BATCH = 32


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
        facts = Facts(f"item-{number}", item.label, item.source, item.generator, item.group)
        for copy in range(copies):
            # An aligned fake draws what its real draws.
            rng = np.random.default_rng((seed, 41, item.pair if item.pair >= 0 else number, copy))
            yield np.asarray(PRESETS["platform"](base_image(store, item, rng), rng, 1.0)), facts


class Encoder:
    """The encoder on the CPU or a GPU, from timm-named arrays; normalises inside, as the backends do."""

    def __init__(self, weights: Mapping[str, Any], *, layer_norm_eps: float = 1e-6, device: str = "cpu") -> None:
        import torch

        from engine.model import VisionTransformer

        self._torch, self._device = torch, torch.device(device)
        self._model = VisionTransformer(layer_norm_eps)
        self._model.load_state_dict({name: torch.as_tensor(np.asarray(array)) for name, array in weights.items()})
        self._model.eval().to(self._device)
        contract = Preprocess()
        self._mean = torch.tensor(contract.mean, device=self._device).view(3, 1, 1)
        self._std = torch.tensor(contract.std, device=self._device).view(3, 1, 1)

    def __call__(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8[n, 224, 224, 3] -> float32[n, 192]."""
        torch = self._torch
        with torch.inference_mode():
            x = torch.from_numpy(crops).to(self._device).permute(0, 3, 1, 2).float() / 255
            return np.asarray(self._model((x - self._mean) / self._std).cpu().numpy())


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
