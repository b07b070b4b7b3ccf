"""Augmentations: nineteen operations, seeds reproduce, counts and ranges as published."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.train.pictures import picture
from train.augment import OPERATIONS, code, jpeg, jpeg_tables, platform

NAMES = (
    *("blur", "brightness", "aspect_ratio", "pixelise", "rotate", "contrast", "saturation", "jpeg", "grayscale"),
    *("horizontal_flip", "opacity", "stripes", "pad", "resize_square", "random_crop", "scale", "sharpen"),
    *("shuffle_pixels", "skew"),
)


def test_the_nineteen_in_the_published_order() -> None:
    assert [name for name, _ in OPERATIONS] == list(NAMES)


@pytest.mark.parametrize(("name", "operation"), OPERATIONS)
def test_each_operation_gives_rgb_and_repeats_with_its_seed(name: str, operation) -> None:  # type: ignore[no-untyped-def]
    image = picture(1, 70, 90)
    for seed in range(6):
        first, second = (operation(image, np.random.default_rng(seed)) for _ in range(2))
        assert first.mode == "RGB" and min(first.size) >= 1
        assert np.array_equal(np.asarray(first), np.asarray(second))


def test_what_the_operations_do() -> None:
    image, rng = picture(2, 60, 80), np.random.default_rng(0)
    do = dict(OPERATIONS)
    assert np.array_equal(np.asarray(do["horizontal_flip"](image, rng)), np.asarray(image)[:, ::-1])
    grey = np.asarray(do["grayscale"](image, rng))
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 1] == grey[..., 2]).all()
    assert do["resize_square"](image, rng).size[0] in (64, 176, 288, 400, 512)
    shuffled = np.asarray(do["shuffle_pixels"](image, np.random.default_rng(5))).reshape(-1, 3)
    assert np.array_equal(np.sort(shuffled.sum(1)), np.sort(np.asarray(image).reshape(-1, 3).sum(1)))
    padded = do["pad"](image, np.random.default_rng(3))
    assert padded.width > image.width and np.asarray(padded)[0, 0].sum() == 0


def test_code_draws_none_one_or_two_of_nineteen(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[int]] = []

    def noted(number: int):  # type: ignore[no-untyped-def]
        def operation(image: Image.Image, rng: np.random.Generator) -> Image.Image:
            drawn[-1].append(number)
            return image

        return operation

    monkeypatch.setattr("train.augment.OPERATIONS", tuple((name, noted(i)) for i, name in enumerate(NAMES)))
    rng, image = np.random.default_rng(0), picture(3, 8, 8)
    for _ in range(3000):
        drawn.append([])
        code(image, rng)
    counts = np.bincount([len(d) for d in drawn], minlength=3)
    assert len(counts) == 3 and (abs(counts - 1000) < 120).all()
    assert all(len(set(d)) == len(d) and d == sorted(d) for d in drawn)
    each = np.bincount([i for d in drawn for i in d], minlength=19)
    assert (abs(each - 3000 / 19) < 60).all()


def test_platform_repeats_with_its_seed_and_grows_with_strength() -> None:
    image = picture(4)
    same = [np.asarray(platform(image, np.random.default_rng(7), 1.0)) for _ in range(2)]
    assert np.array_equal(*same)
    assert platform(image, np.random.default_rng(0), 0.0) is image
    touched = [
        sum(platform(image, np.random.default_rng(s), strength) is not image for s in range(60)) for strength in (0.2, 1.0)
    ]
    assert touched[0] < touched[1]
    # A crop must remain possible, or padding would mark what was re-encoded.
    sizes = [min(platform(image, np.random.default_rng(s), 1.0).size) for s in range(40)]
    assert np.median(sizes) >= 170


def test_jpeg_tables_are_those_of_the_photograph(tmp_path) -> None:  # type: ignore[no-untyped-def]
    image = picture(5, 64, 64)
    image.save(tmp_path / "a.jpg", quality=60, subsampling=2)
    with Image.open(tmp_path / "a.jpg") as photograph:
        tables = [list(photograph.quantization[i]) for i in (0, 1)]  # type: ignore[attr-defined]
    assert np.array_equal(np.asarray(jpeg_tables(image, tables, 2)), np.asarray(jpeg(image, 60, 2)))
