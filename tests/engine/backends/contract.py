"""The contract every backend meets, run on each of them: subclass `BackendContract` and give it a `backend` to make.

class TestOpenVINO(BackendContract):
    @classmethod
    def make(cls) -> Backend:
        pytest.importorskip("openvino")
        return create("openvino")
"""

from __future__ import annotations

import threading

import numpy as np
import pytest

from engine.backends.base import Backend, BackendStateError, Outputs
from engine.bundle import Bundle
from engine.heads import EMBEDDING_DIM, HEADS
from tests.engine.bundles import random_bundle


def random_crops(count: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, 224, 224, 3]: noise on colours of its own for each crop, so that embeddings differ."""
    rng = np.random.default_rng(seed)
    colour = rng.integers(0, 200, (count, 1, 1, 3))
    return (colour + rng.integers(0, 56, (count, 224, 224, 3))).astype(np.uint8)


class BackendContract:
    """What holds for every backend. Tolerances may be widened by backends of lower precision."""

    heads_in_graph = True
    batch_tolerance = 1e-4
    heads_tolerance = 1e-5
    """Of raw scores against the numpy heads on the backend's own embedding, relative above 1."""

    @classmethod
    def make(cls) -> Backend:
        """A backend that is not loaded yet; skips where it cannot run."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def bundle(cls, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
        return random_bundle(tmp_path_factory.mktemp("bundle") / "1")

    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls, request: pytest.FixtureRequest, bundle: Bundle) -> Backend:
        backend = cls.make()
        backend.load(bundle)
        request.addfinalizer(backend.close)
        return backend

    def test_names_itself(self, loaded: Backend) -> None:
        assert loaded.name and loaded.device
        assert loaded.device != "auto"

    @pytest.mark.parametrize("count", [1, 2, 5, 17])
    def test_shapes_and_dtypes(self, loaded: Backend, count: int) -> None:
        outputs = loaded.infer(random_crops(count))
        assert isinstance(outputs, Outputs)
        assert outputs.raw.shape == (count, len(HEADS)) and outputs.raw.dtype == np.float32
        assert outputs.embedding.shape == (count, EMBEDDING_DIM) and outputs.embedding.dtype == np.float32
        assert np.isfinite(outputs.raw).all() and np.isfinite(outputs.embedding).all()

    def test_an_empty_batch_has_empty_outputs(self, loaded: Backend) -> None:
        outputs = loaded.infer(np.empty((0, 224, 224, 3), np.uint8))
        assert outputs.raw.shape == (0, len(HEADS)) and outputs.raw.dtype == np.float32
        assert outputs.embedding.shape == (0, EMBEDDING_DIM) and outputs.embedding.dtype == np.float32

    def test_the_same_crops_give_the_same_scores(self, loaded: Backend) -> None:
        crops = random_crops(4)
        first, second = loaded.infer(crops), loaded.infer(crops)
        np.testing.assert_array_equal(first.raw, second.raw)
        np.testing.assert_array_equal(first.embedding, second.embedding)

    def test_different_crops_give_different_scores(self, loaded: Backend) -> None:
        raw = loaded.infer(random_crops(4)).raw
        assert len({tuple(row) for row in raw.tolist()}) == 4

    def test_a_crop_scores_the_same_alone_and_in_a_batch(self, loaded: Backend) -> None:
        crops = random_crops(5)
        together = loaded.infer(crops)
        for i in range(len(crops)):
            alone = loaded.infer(crops[i : i + 1])
            np.testing.assert_allclose(alone.embedding[0], together.embedding[i], rtol=0, atol=self.batch_tolerance)
            np.testing.assert_allclose(alone.raw[0], together.raw[i], rtol=self.batch_tolerance, atol=self.batch_tolerance)

    def test_the_order_of_a_batch_is_kept(self, loaded: Backend) -> None:
        crops = random_crops(5)
        forth, back = loaded.infer(crops), loaded.infer(crops[::-1])
        np.testing.assert_allclose(back.raw[::-1], forth.raw, rtol=self.batch_tolerance, atol=self.batch_tolerance)

    def test_raw_scores_are_those_of_the_numpy_heads(self, loaded: Backend, bundle: Bundle) -> None:
        if not self.heads_in_graph:
            pytest.skip("this backend has no heads")
        outputs = loaded.infer(random_crops(4))
        expected = bundle.heads.raw_scores(outputs.embedding)
        np.testing.assert_allclose(outputs.raw, expected, rtol=self.heads_tolerance, atol=self.heads_tolerance)

    def test_black_and_white_crops_are_finite(self, loaded: Backend) -> None:
        crops = np.stack([np.zeros((224, 224, 3), np.uint8), np.full((224, 224, 3), 255, np.uint8)])
        assert np.isfinite(loaded.infer(crops).raw).all()

    def test_outputs_belong_to_the_caller(self, loaded: Backend) -> None:
        crops = random_crops(3)
        first = loaded.infer(crops)
        kept = first.raw.copy(), first.embedding.copy()
        loaded.infer(random_crops(3, seed=1))
        np.testing.assert_array_equal(first.raw, kept[0])
        np.testing.assert_array_equal(first.embedding, kept[1])
        first.raw[:] = 0.0
        first.embedding[:] = 0.0
        np.testing.assert_array_equal(loaded.infer(crops).raw, kept[0])

    def test_crops_are_left_untouched_and_may_be_read_only_or_strided(self, loaded: Backend) -> None:
        crops = random_crops(4)
        before = crops.copy()
        crops.flags.writeable = False
        strided = np.repeat(crops, 2, axis=0)[::2]
        np.testing.assert_array_equal(loaded.infer(crops).raw, loaded.infer(strided).raw)
        np.testing.assert_array_equal(crops, before)

    @pytest.mark.parametrize(
        "crops",
        [
            np.zeros((2, 224, 224, 3), np.float32),
            np.zeros((2, 3, 224, 224), np.uint8),
            np.zeros((2, 224, 224, 4), np.uint8),
            np.zeros((224, 224, 3), np.uint8),
            np.zeros((2, 225, 224, 3), np.uint8),
        ],
        ids=lambda crops: f"{crops.dtype}{list(crops.shape)}",
    )
    def test_other_shapes_and_dtypes_are_refused(self, loaded: Backend, crops: np.ndarray) -> None:
        with pytest.raises(ValueError, match=r"uint8 \[n, 224, 224, 3\]"):
            loaded.infer(crops)
        assert loaded.infer(random_crops(1)).raw.shape == (1, len(HEADS))

    def test_warm_up_takes_sizes_in_any_order(self, loaded: Backend) -> None:
        loaded.warm_up([4, 1, 2, 2])
        loaded.warm_up([])
        with pytest.raises(ValueError, match="start at 1"):
            loaded.warm_up([0])

    def test_another_thread_may_take_over(self, loaded: Backend) -> None:
        crops = random_crops(2)
        results: list[Outputs] = []
        thread = threading.Thread(target=lambda: results.append(loaded.infer(crops)))
        thread.start()
        thread.join()
        np.testing.assert_array_equal(results[0].raw, loaded.infer(crops).raw)

    def test_life_cycle(self, bundle: Bundle) -> None:
        backend = self.make()
        with pytest.raises(BackendStateError, match="this one is new"):
            backend.infer(random_crops(1))
        with pytest.raises(BackendStateError):
            backend.warm_up([1])
        backend.load(bundle)
        with pytest.raises(BackendStateError, match="this one is loaded"):
            backend.load(bundle)
        backend.infer(random_crops(1))
        backend.close()
        backend.close()
        with pytest.raises(BackendStateError, match="this one is closed"):
            backend.infer(random_crops(1))
        with pytest.raises(BackendStateError):
            backend.load(bundle)

    def test_closing_before_loading_is_fine(self) -> None:
        self.make().close()
