"""The ladder of degradations: what happens to uploads on their way, rung by rung, the same for both classes, without chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageFilter

from train.augment import jpeg, webp

Change = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True, slots=True)
class Rung:
    """One degradation. `family` groups rungs that differ in `level` alone; a higher level is not always a harder one."""

    name: str
    family: str
    level: float
    change: Change


def _clean(image: Image.Image) -> Image.Image:
    return image


def _resized(image: Image.Image, factor: float, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, resample)


def _cropped(image: Image.Image, share: float) -> Image.Image:
    width, height = max(1, round(image.width * share)), max(1, round(image.height * share))
    # Three pixels off the middle: a crop by hand does not keep the old 8 px grid.
    left = min(image.width - width, (image.width - width) // 2 + 3)
    top = min(image.height - height, (image.height - height) // 2 + 3)
    return image.crop((left, top, left + width, top + height))


def _screenshot(image: Image.Image) -> Image.Image:
    """Shown by a compositor at a fractional scale, captured with a margin of the page around it, saved losslessly."""
    shown = _resized(image, 1.1, Image.Resampling.BILINEAR)
    page = Image.new("RGB", (shown.width + 32, shown.height + 32), (245, 245, 245))
    page.paste(shown, (16, 16))
    return page


def _screenshot_sent_on(image: Image.Image) -> Image.Image:
    return jpeg(_screenshot(image), 80)


def _blurred(image: Image.Image, radius_px: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius_px))


def _family(family: str, change: Callable[[Image.Image, float], Image.Image], levels: tuple[float, ...]) -> list[Rung]:
    def at(level: float) -> Change:
        return lambda image: change(image, level)

    return [Rung(f"{family}{level:g}", family, level, at(level)) for level in levels]


def _rungs() -> tuple[Rung, ...]:
    return (
        Rung("clean", "clean", 0, _clean),
        *_family("jpeg", lambda image, quality: jpeg(image, int(quality)), (95, 90, 85, 75, 65, 50)),
        *_family("webp", lambda image, quality: webp(image, int(quality)), (90, 75, 50)),
        *_family("resize", _resized, (0.5, 0.75, 1.5)),
        *_family("crop", _cropped, (0.9, 0.75)),
        *_family("blur", _blurred, (0.5, 1, 2)),
        Rung("screenshot", "screenshot", 0, _screenshot),
        Rung("screenshot_jpeg80", "screenshot", 80, _screenshot_sent_on),
    )


RUNGS: tuple[Rung, ...] = _rungs()
"""Every rung, the untouched image first."""

BY_NAME: dict[str, Rung] = {rung.name: rung for rung in RUNGS}

REPORTED = ("clean", "jpeg75")
"""The conditions with every slice and head in report.json and on the model card."""
