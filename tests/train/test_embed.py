"""Embeddings: the encoder alone in plain torch as the oracle; batches, order and copies."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.engine.bundles import random_encoder
from tests.train.pictures import picture
from train.embed import BATCH, Encoder, Facts, degraded, embed, embed_crops


def _facts(key: str) -> Facts:
    return Facts(key, 0, "s", "g", "s")


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_the_detectors_embedding_is_the_encoders_own(eps: float) -> None:
    import torch

    from engine.model import VisionTransformer
    from engine.preprocess import Preprocess

    weights = random_encoder()
    crops = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    model = VisionTransformer(eps).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    contract = Preprocess()
    pixels = (crops / 255 - np.array(contract.mean)) / np.array(contract.std)
    with torch.inference_mode():
        expected = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))).numpy()
    np.testing.assert_allclose(Encoder(weights, layer_norm_eps=eps, device="cpu")(crops), expected, atol=1e-5)


def test_images_are_embedded_in_order_in_bounded_batches() -> None:
    sizes: list[int] = []

    def brightness(crops: np.ndarray) -> np.ndarray:
        sizes.append(len(crops))
        return np.repeat(crops.mean(axis=(1, 2, 3), dtype=np.float32)[:, None], 192, axis=1)

    images = [(np.full((224, 230, 3), i, np.uint8), _facts(str(i))) for i in range(BATCH + 5)]
    got = embed(brightness, images)
    assert sizes == [BATCH, 5] and [f.key for f in got.facts] == [str(i) for i in range(BATCH + 5)]
    np.testing.assert_allclose(got.embedding[:, 0], np.arange(BATCH + 5))
    assert embed(brightness, []).embedding.shape == (0, 192)


def test_degraded_copies_draw_by_their_number() -> None:
    images = [(np.asarray(picture(i, 40, 40)), _facts(str(i))) for i in range(3)]

    def shifted(image, rng):  # type: ignore[no-untyped-def]
        return image.point(lambda value: min(255, value + int(rng.integers(1, 99))))

    once, again, other = (list(degraded(images, shifted, seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(once, again, strict=True))
    assert any(not np.array_equal(a, b) for (a, _), (b, _) in zip(once, other, strict=True))
    assert [f.key for _, f in once] == ["0", "1", "2"]


def test_of_five_crops_each_image_knows_its_rows() -> None:
    images = [(np.full((300, 300, 3), 7, np.uint8), _facts("large")), (np.full((100, 90, 3), 9, np.uint8), _facts("small"))]
    seen: list[np.ndarray] = []

    def encoder(crops: np.ndarray) -> np.ndarray:
        seen.append(crops)
        return crops[:, 112, 112, :1].astype(np.float32).repeat(192, axis=1)

    embedded, rows = embed_crops(encoder, images, "five")
    assert rows.tolist() == [[0, 1, 2, 3, 4], [5] * 5] and embedded.embedding[:, 0].tolist() == [7] * 5 + [9]
    assert [f.key for f in embedded.at(rows[:, 0]).facts] == ["large", "small"]
    embedded, rows = embed_crops(encoder, images, "center")
    assert rows.tolist() == [[0], [1]] and len(embedded.facts) == 2
