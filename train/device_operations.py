"""CoDE's operations and the platform's, in batches on whatever device the pixels lie (kornia and torch).

Each takes float[g, 3, h, w] in 0..1 and one parameter an image, and gives float[g, 3, h', w']; the caller rounds to 8 bits after
each, as Pillow does. They agree with `train.augment` within what another rounding, blur kernel or JPEG's own arithmetic makes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

Values = list[float]
Operation = Callable[[Tensor, Values], Tensor]

RESIZING = frozenset({"aspect_ratio", "resize_square", "random_crop", "scale", "pad", "shift", "rescale"})
"""These give all images of a group one size, so a group has one value; the others take one an image."""


def _column(x: Tensor, values: Values) -> Tensor:
    return torch.tensor(values, dtype=x.dtype, device=x.device)


def resized(x: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, as Pillow resizes; float[g, 3, height, width]."""
    return functional.interpolate(x, (max(1, height), max(1, width)), mode="bicubic", antialias=True, align_corners=False)


def _blur(x: Tensor, values: Values) -> Tensor:
    from kornia.filters import gaussian_blur2d

    sigma = _column(x, values)
    out: Tensor = gaussian_blur2d(x, (13, 13), torch.stack((sigma, sigma), dim=1))
    return out


def _brightness(x: Tensor, values: Values) -> Tensor:
    from kornia.enhance import adjust_brightness_accumulative

    out: Tensor = adjust_brightness_accumulative(x, _column(x, values))
    return out


def _contrast(x: Tensor, values: Values) -> Tensor:
    from kornia.enhance import adjust_contrast_with_mean_subtraction

    out: Tensor = adjust_contrast_with_mean_subtraction(x, _column(x, values))
    return out


def _saturation(x: Tensor, values: Values) -> Tensor:
    from kornia.enhance import adjust_saturation_with_gray_subtraction

    out: Tensor = adjust_saturation_with_gray_subtraction(x, _column(x, values))
    return out


def _sharpen(x: Tensor, values: Values) -> Tensor:
    from kornia.enhance import sharpness

    out: Tensor = sharpness(x, _column(x, values))
    return out


def _jpeg(x: Tensor, values: Values) -> Tensor:
    from kornia.enhance import jpeg_codec_differentiable

    # The codec works on multiples of 16 px; a JPEG file repeats its border, too.
    height, width = x.shape[-2:]
    padded = functional.pad(x, (0, -width % 16, 0, -height % 16), mode="replicate")
    out: Tensor = jpeg_codec_differentiable(padded.float(), _column(x, values).float())
    return out[..., :height, :width].to(x.dtype)


def _grayscale(x: Tensor, values: Values) -> Tensor:
    from kornia.color import rgb_to_grayscale

    del values
    out: Tensor = rgb_to_grayscale(x)
    return out.expand_as(x)


def _horizontal_flip(x: Tensor, values: Values) -> Tensor:
    from kornia.geometry.transform import hflip

    del values
    out: Tensor = hflip(x)
    return out


def _rotate(x: Tensor, values: Values) -> Tensor:
    from kornia.geometry.transform import rotate

    out: Tensor = rotate(x, _column(x, values), mode="bicubic", align_corners=True)
    return out


def _skew(x: Tensor, values: Values) -> Tensor:
    from kornia.geometry.transform import warp_affine

    # warp_affine takes where a source pixel goes; Pillow's skew says where a target pixel comes from.
    matrix = torch.zeros(len(x), 2, 3, dtype=x.dtype, device=x.device)
    factor = _column(x, values)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1
    matrix[:, 0, 1], matrix[:, 0, 2] = -factor, factor * (x.shape[-2] / 2 - 0.5)
    out: Tensor = warp_affine(x, matrix, (x.shape[-2], x.shape[-1]), mode="bicubic", align_corners=True)
    return out


def _opacity(x: Tensor, values: Values) -> Tensor:
    share = _column(x, values).view(-1, 1, 1, 1)
    return 1 + share * (x - 1)


def _stripes(x: Tensor, values: Values) -> Tensor:
    period = max(2.0, x.shape[-2] / 10)
    rows = torch.arange(x.shape[-2], device=x.device)
    out = x.clone()
    for i in range(int(x.shape[-2] / period) + 1):
        first = round(i * period)
        for image, width in enumerate(values):
            out[image, :, (rows >= first) & (rows <= round(i * period + width * period) - 1)] = 1
    return out


def _boxes(side: int, kept: int) -> Tensor:
    """float[kept, side]: Pillow's BOX reduction of one axis as a matrix; torch's `area` takes other windows."""
    scale = side / kept
    centre = (torch.arange(kept) + 0.5) * scale
    distance = (torch.arange(side) + 0.5 - centre[:, None]) / scale
    weight = ((distance > -0.5) & (distance <= 0.5)).float()
    return weight / weight.sum(1, keepdim=True)


def _pixelise(x: Tensor, values: Values) -> Tensor:
    parts = []
    for image, ratio in zip(x[:, None], values, strict=True):
        rows, columns = (_boxes(side, max(1, round(side * ratio))).to(x) for side in x.shape[-2:])
        small = rows @ image @ columns.T
        parts.append(functional.interpolate(small, x.shape[-2:], mode="nearest-exact"))
    return torch.cat(parts)


def _shuffle_pixels(x: Tensor, values: Values) -> Tensor:
    # A value is the share plus an even whole number, the seed of what moves where.
    out = x.flatten(2).clone()
    for image, value in enumerate(values):
        seed, share = divmod(value, 2)
        generator = torch.Generator().manual_seed(int(seed))
        moved = torch.randperm(out.shape[-1], generator=generator)[: int(out.shape[-1] * share)]
        order = torch.randperm(len(moved), generator=generator)
        out[image, :, moved.to(x.device)] = out[image, :, moved[order].to(x.device)]
    return out.view_as(x)


def _noise(x: Tensor, values: Values) -> Tensor:
    # As above: the standard deviation in grey levels plus a seed times 16.
    out = []
    for image, value in zip(x, values, strict=True):
        seed, deviation = divmod(value, 16)
        normal = torch.randn(image.shape, generator=torch.Generator().manual_seed(int(seed)))
        out.append(image + normal.to(x.device, x.dtype) * deviation / 255)
    return torch.stack(out)


def _aspect_ratio(x: Tensor, values: Values) -> Tensor:
    area = x.shape[-1] * x.shape[-2]
    return resized(x, round((area / values[0]) ** 0.5), round((area * values[0]) ** 0.5))


def _resize_square(x: Tensor, values: Values) -> Tensor:
    return resized(x, round(values[0]), round(values[0]))


def _scale(x: Tensor, values: Values) -> Tensor:
    return resized(x, round(x.shape[-2] * values[0]), round(x.shape[-1] * values[0]))


def _pad(x: Tensor, values: Values) -> Tensor:
    dx, dy = int(x.shape[-1] * values[0]), int(x.shape[-2] * values[0])
    return functional.pad(x, (dx, dx, dy, dy))


def cropped(x: Tensor, side: int, spot: tuple[float, float]) -> Tensor:
    """A square window, `spot` in 0..1 each way; what is too small is padded with black, the image in the middle."""
    dy, dx = (max(0, side - extent) for extent in x.shape[-2:])
    x = functional.pad(x, (dx // 2, dx - dx // 2, dy // 2, dy - dy // 2))
    top, left = (int(share * (extent - side + 1)) for share, extent in zip(spot, x.shape[-2:], strict=True))
    return x[..., top : top + side, left : left + side]


def _random_crop(x: Tensor, values: Values) -> Tensor:
    # Side in px, plus the spot in parts of 1/64 px: side + row / 64 + column / 4096, so that one number says all.
    side, rest = divmod(values[0], 1)
    row, column = divmod(round(rest * 4096), 64)
    return cropped(x, int(side), (row / 64, column / 64))


def _shift(x: Tensor, values: Values) -> Tensor:
    top, left = divmod(int(values[0]), 8)
    return x[..., top:, left:]


OPERATIONS: dict[str, Operation] = {
    "blur": _blur,
    "brightness": _brightness,
    "aspect_ratio": _aspect_ratio,
    "pixelise": _pixelise,
    "rotate": _rotate,
    "contrast": _contrast,
    "saturation": _saturation,
    "jpeg": _jpeg,
    "grayscale": _grayscale,
    "horizontal_flip": _horizontal_flip,
    "opacity": _opacity,
    "stripes": _stripes,
    "pad": _pad,
    "resize_square": _resize_square,
    "random_crop": _random_crop,
    "scale": _scale,
    "sharpen": _sharpen,
    "shuffle_pixels": _shuffle_pixels,
    "skew": _skew,
    "noise": _noise,
    "rescale": _scale,
    "shift": _shift,
}


def applied(images: list[Tensor], programs: list[list[tuple[str, float]]]) -> list[Tensor]:
    """uint8[3, h, w] images after their programs of (operation, value); equal operations and sizes are computed together."""
    images = list(images)
    for place in range(max((len(program) for program in programs), default=0)):
        groups: dict[tuple[str, torch.Size, float | None], list[int]] = {}
        for i, program in enumerate(programs):
            if place < len(program):
                name, value = program[place]
                key = (name, images[i].shape, value if name in RESIZING else None)
                groups.setdefault(key, []).append(i)
        for key, members in groups.items():
            x = torch.stack([images[i] for i in members]).float() / 255
            y = OPERATIONS[key[0]](x, [programs[i][place][1] for i in members])
            for i, image in zip(members, to_bytes(y), strict=True):
                images[i] = image
    return images


def to_bytes(x: Tensor) -> Tensor:
    """float in 0..1 -> uint8, rounded."""
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def seeded(rng: np.random.Generator, value: float, step: int) -> float:
    """A value below `step` with a 20-bit seed above it, as `shuffle_pixels` (step 2) and `noise` (16) take it."""
    return float(int(rng.integers(1 << 20)) * step + value)
