"""Made-up images on disk for the training tests: a manifest, real JPEGs, generated PNGs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

HEADER = "file\tsplit\tlabel\tgenerator\tsource\tlayout\trepo\tpath\tlicence\tsha256"


def picture(seed: int, height: int = 240, width: int = 256, *, fake: bool = False) -> Image.Image:
    """Smooth noise; a fake one carries a striped pattern that a detector can learn."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    rgb = np.asarray(coarse).astype(int) + rng.integers(-6, 7, (height, width, 3))
    if fake:
        rgb[::2] += 90
    return Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))


def corpus(root: Path, reals: int = 6, fakes: int = 6, splits: tuple[str, ...] = ("train",), sources: int = 2) -> Path:
    """Writes `reals` JPEGs and `fakes` PNGs a split and the manifest; returns the folder."""
    lines = [HEADER]
    for split in splits:
        for label, count in (("real", reals), ("fake", fakes)):
            for i in range(count):
                source = f"{label}-source-{i % sources}"
                name = f"{split}/{label}/{i}.{'jpg' if label == 'real' else 'png'}"
                path = root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                seed = i + 1000 * (label == "fake") + 5000 * splits.index(split)
                image = picture(seed, fake=label == "fake")
                image.save(path, **({"quality": 85 + i} if label == "real" else {}))
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                generator = "camera" if label == "real" else "machine"
                lines.append(
                    f"{name}\t{split}\t{label}\t{generator}\t{source}\tsingle\towner/{source}\tfolder{i}/x.png\tCC0\t{digest}"
                )
    (root / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return root
