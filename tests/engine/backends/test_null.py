"""The null backend: the contract, and its scores by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.backends import AUTO_ORDER, create
from engine.backends.base import Backend
from tests.engine.backends.contract import BackendContract
from tests.engine.bundles import random_bundle


class TestNull(BackendContract):
    heads_in_graph = False

    @classmethod
    def make(cls) -> Backend:
        return create("null")


def test_scores_are_the_brightness(tmp_path: Path) -> None:
    backend = create("null")
    backend.load(random_bundle(tmp_path / "1"))
    crops = np.stack([np.full((224, 224, 3), value, np.uint8) for value in (0, 51, 255)])
    np.testing.assert_allclose(backend.infer(crops).raw, [[-5] * 3, [-3] * 3, [5] * 3], atol=1e-5)


def test_auto_never_takes_it() -> None:
    assert "null" not in AUTO_ORDER
    with pytest.raises(ValueError, match="unknown backend 'nul'; known are auto, tensorrt"):
        create("nul")
