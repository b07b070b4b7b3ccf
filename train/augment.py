"""Augmentations on Pillow images: CoDE's nineteen operations (`code`) and what platforms do to uploads (`platform`).

Every draw comes from the generator handed in, so a seed reproduces a view bit for bit. Images are RGB; sizes may change.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

Generator = np.random.Generator
Operation = Callable[[Image.Image, Generator], Image.Image]

_BICUBIC = Image.Resampling.BICUBIC
_RESAMPLERS = (Image.Resampling.BILINEAR, _BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BOX)
_SIDES_PX = (64, 176, 288, 400, 512)
_ENHANCEMENTS = (0.5, 0.75, 1.0, 1.25, 1.5)


def _pick(rng: Generator, values: tuple[float, ...]) -> float:
    return float(values[int(rng.integers(len(values)))])


def _sized(image: Image.Image, width: float, height: float, resample: Image.Resampling = _BICUBIC) -> Image.Image:
    return image.resize((max(1, round(width)), max(1, round(height))), resample)


def jpeg(image: Image.Image, quality: int, subsampling: int = 2) -> Image.Image:
    """The image after a JPEG round trip; `subsampling` 0 is 4:4:4, 2 is 4:2:0."""
    return _round_trip(image, "JPEG", quality=quality, subsampling=subsampling)


def webp(image: Image.Image, quality: int) -> Image.Image:
    """The image after a lossy WebP round trip."""
    return _round_trip(image, "WEBP", quality=quality, method=0)


def jpeg_tables(image: Image.Image, tables: list[list[int]], subsampling: int) -> Image.Image:
    """The image after a JPEG round trip with given quantisation tables: the first compression of another photograph."""
    return _round_trip(image, "JPEG", qtables=tables, subsampling=subsampling)


def _round_trip(image: Image.Image, encoding: str, **parameters: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, encoding, **parameters)
    return Image.open(buffer).convert("RGB")


# CoDE's operations, in the release's order (ranges: arXiv 2407.20337, supplementary; github aimagelab/CoDE).


def _blur(image: Image.Image, rng: Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.1, 2.0))))


def _brightness(image: Image.Image, rng: Generator) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.5, 2.0)))


def _aspect_ratio(image: Image.Image, rng: Generator) -> Image.Image:
    ratio = float(rng.uniform(0.75, 2.0))
    area = image.width * image.height
    return _sized(image, (area * ratio) ** 0.5, (area / ratio) ** 0.5)


def _pixelise(image: Image.Image, rng: Generator) -> Image.Image:
    ratio = float(rng.uniform(0.3, 1.0))
    small = _sized(image, image.width * ratio, image.height * ratio, Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


def _rotate(image: Image.Image, rng: Generator) -> Image.Image:
    return image.rotate(float(rng.uniform(90.0, 270.0)), resample=_BICUBIC)


def _contrast(image: Image.Image, rng: Generator) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(_pick(rng, _ENHANCEMENTS))


def _saturation(image: Image.Image, rng: Generator) -> Image.Image:
    return ImageEnhance.Color(image).enhance(_pick(rng, _ENHANCEMENTS))


def _jpeg(image: Image.Image, rng: Generator) -> Image.Image:
    return jpeg(image, int(_pick(rng, (40, 55, 70, 85, 100))))


def _grayscale(image: Image.Image, rng: Generator) -> Image.Image:
    del rng
    return image.convert("L").convert("RGB")


def _horizontal_flip(image: Image.Image, rng: Generator) -> Image.Image:
    del rng
    return ImageOps.mirror(image)


def _opacity(image: Image.Image, rng: Generator) -> Image.Image:
    return Image.blend(Image.new("RGB", image.size, "white"), image, _pick(rng, (0.2, 0.4, 0.6, 0.8, 1.0)))


def _stripes(image: Image.Image, rng: Generator) -> Image.Image:
    """White horizontal stripes over half of the height at most: ten periods, each striped by the drawn share."""
    width = _pick(rng, (0.05, 0.125, 0.2, 0.275, 0.35))
    out = image.copy()
    draw = ImageDraw.Draw(out)
    period = max(2.0, image.height / 10)
    for i in range(int(image.height / period) + 1):
        draw.rectangle((0, round(i * period), image.width, round(i * period + width * period) - 1), fill="white")
    return out


def _pad(image: Image.Image, rng: Generator) -> Image.Image:
    share = _pick(rng, (0.01, 0.07, 0.13, 0.19, 0.25))
    dx, dy = int(image.width * share), int(image.height * share)
    return ImageOps.expand(image, (dx, dy, dx, dy), fill="black")


def _resize_square(image: Image.Image, rng: Generator) -> Image.Image:
    side = _pick(rng, _SIDES_PX)
    return _sized(image, side, side)


def _random_crop(image: Image.Image, rng: Generator) -> Image.Image:
    side = int(_pick(rng, _SIDES_PX))
    dx, dy = max(0, side - image.width), max(0, side - image.height)
    padded = ImageOps.expand(image, (dx // 2, dy // 2, dx - dx // 2, dy - dy // 2), fill="black")
    left = int(rng.integers(padded.width - side + 1))
    top = int(rng.integers(padded.height - side + 1))
    return padded.crop((left, top, left + side, top + side))


def _scale(image: Image.Image, rng: Generator) -> Image.Image:
    factor = _pick(rng, _ENHANCEMENTS)
    return _sized(image, image.width * factor, image.height * factor)


def _sharpen(image: Image.Image, rng: Generator) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(_pick(rng, (1.2, 1.4, 1.6, 1.8, 2.0)))


def _shuffle_pixels(image: Image.Image, rng: Generator) -> Image.Image:
    share = _pick(rng, (0.0, 0.0875, 0.175, 0.2625, 0.35))
    pixels = np.asarray(image).reshape(-1, 3).copy()
    moved = rng.choice(len(pixels), size=int(len(pixels) * share), replace=False)
    pixels[moved] = pixels[rng.permutation(moved)]
    return Image.fromarray(pixels.reshape(image.height, image.width, 3))


def _skew(image: Image.Image, rng: Generator) -> Image.Image:
    factor = _pick(rng, (-1.0, -0.5, 0.0, 0.5, 1.0))
    shift = -factor * image.height / 2
    return image.transform(image.size, Image.Transform.AFFINE, (1, factor, shift, 0, 1, 0), resample=_BICUBIC)


OPERATIONS: tuple[tuple[str, Operation], ...] = (
    ("blur", _blur),
    ("brightness", _brightness),
    ("aspect_ratio", _aspect_ratio),
    ("pixelise", _pixelise),
    ("rotate", _rotate),
    ("contrast", _contrast),
    ("saturation", _saturation),
    ("jpeg", _jpeg),
    ("grayscale", _grayscale),
    ("horizontal_flip", _horizontal_flip),
    ("opacity", _opacity),
    ("stripes", _stripes),
    ("pad", _pad),
    ("resize_square", _resize_square),
    ("random_crop", _random_crop),
    ("scale", _scale),
    ("sharpen", _sharpen),
    ("shuffle_pixels", _shuffle_pixels),
    ("skew", _skew),
)


def code(image: Image.Image, rng: Generator, strength: float = 1.0) -> Image.Image:
    """CoDE's preset: 0, 1 or 2 distinct operations out of nineteen, uniformly, applied in list order.

    `strength` below 1 is the probability of augmenting at all (a curriculum's handle; the paper has 1).
    """
    if rng.random() >= strength:
        return image
    chosen = rng.choice(len(OPERATIONS), size=int(rng.integers(3)), replace=False)
    for i in sorted(chosen):
        image = OPERATIONS[i][1](image, rng)
    return image


# Mostly near the native size; sometimes far smaller, and sometimes larger, as the native pixels of a 12-megapixel photo look.
PLATFORM_SCALES = ((0.74, 1.2), (0.5, 0.74), (1.2, 2.5))
PLATFORM_SCALE_SHARES = (0.6, 0.1, 0.3)


def platform(image: Image.Image, rng: Generator, strength: float = 1.0) -> Image.Image:
    """What an upload goes through: mild colour, a resize, blur or noise, a screenshot, and one to three chained re-encodings.

    `strength` in 0..1 scales how likely each step is; at 1 a quarter of the views still keep their first compression only,
    because uploads are also scored as they come. Evidence for mild operations with chained re-encodings: arXiv 2511.21507.
    """
    if rng.random() < 0.2 * strength:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(float(rng.uniform(0.85, 1.15)))
    if rng.random() < 0.5 * strength:
        factor = float(rng.uniform(*PLATFORM_SCALES[int(rng.choice(len(PLATFORM_SCALES), p=PLATFORM_SCALE_SHARES))]))
        resample = _RESAMPLERS[int(rng.integers(len(_RESAMPLERS)))]
        if factor > 1.2:
            # Only what can end up in a crop is enlarged: a window of the old size, which also bounds the cost.
            width, height = round(image.width / factor * 1.1), round(image.height / factor * 1.1)
            left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
            image = image.crop((left, top, left + width, top + height))
        image = _sized(image, image.width * factor, image.height * factor, resample)
    if rng.random() < 0.15 * strength:
        image = _soft_or_noisy(image, rng)
    if rng.random() < 0.1 * strength:
        # A screenshot: fractional device pixels, resampled by the compositor.
        factor = float(rng.uniform(0.9, 1.1))
        image = _sized(image, image.width * factor, image.height * factor, Image.Resampling.BILINEAR)
    if rng.random() < 0.75 * strength:
        for _ in range(1 + int(rng.choice(3, p=(0.6, 0.3, 0.1)))):
            image = _re_encoded(image, rng)
    return image


def _soft_or_noisy(image: Image.Image, rng: Generator) -> Image.Image:
    if rng.random() < 0.5:
        return image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.2))))
    pixels = np.asarray(image, dtype=np.float32)
    noisy = pixels + rng.normal(0.0, rng.uniform(1.0, 6.0), pixels.shape).astype(np.float32)
    return Image.fromarray(np.clip(np.round(noisy), 0, 255).astype(np.uint8))


def _re_encoded(image: Image.Image, rng: Generator) -> Image.Image:
    # A new origin first: platforms crop, and the old 8 px grid must not stay aligned with the new one.
    if image.width > 40 and image.height > 40 and rng.random() < 0.5:
        left, top = (int(v) for v in rng.integers(8, size=2))
        image = image.crop((left, top, image.width, image.height))
    if rng.random() < 0.15:
        return webp(image, int(rng.integers(50, 96)))
    return jpeg(image, int(rng.integers(50, 97)), subsampling=0 if rng.random() < 0.3 else 2)


PRESETS: dict[str, Callable[[Image.Image, Generator, float], Image.Image]] = {"code": code, "platform": platform}
