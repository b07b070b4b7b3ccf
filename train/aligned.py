"""Aligned fakes: a real image passed through a generator's autoencoder and back, its own fake with the same content.

The pair differs only in what the decoder leaves behind, so nothing about subject, size or container can tell the two apart
(Dual-Data-Alignment, github roy-ch/Dual-Data-Alignment; B-Free, arXiv 2412.17671). Where no autoencoder is at hand, `upsampled`
imitates the periodic traces of a decoder's upsampling layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    import torch
    from torch import nn

Rgb = NDArray[np.uint8]

LATENT_STRIDE_PX = 8


class AlignedError(Exception):
    """The autoencoder's folder cannot be used; the message names the file."""


def _block(channels: int, *, pool: bool) -> nn.Module:
    import torch
    from torch import nn

    class Block(nn.Module):
        """Three convolutions with a skip; with `pool`, a normalised 1x1 branch is first added to the input."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
            )
            self.pool: nn.Module | None = None
            if pool:
                self.pool = nn.Sequential(
                    nn.Conv2d(channels, channels * 4, 1, bias=False),
                    nn.GroupNorm(4, channels * 4),
                    nn.ReLU(),
                    nn.Conv2d(channels * 4, channels, 1, bias=False),
                )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.pool is not None:
                x = x + self.pool(x)
            return torch.relu(self.conv(x) + x)

    return Block()


def _encoder() -> nn.Sequential:
    from torch import nn

    def down() -> nn.Module:
        return nn.Conv2d(64, 64, 3, padding=1, stride=2, bias=False)

    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), _block(64, pool=False)]
    for pool in (False, False, True):
        layers += [down(), *(_block(64, pool=pool) for _ in range(3))]
    return nn.Sequential(*layers, nn.Conv2d(64, 32, 3, padding=1))


def _decoder() -> nn.Sequential:
    import torch
    from torch import nn

    class Clamp(nn.Module):
        """Soft limit of the latent to +-3."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x / 3) * 3

    layers: list[nn.Module] = [Clamp(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
    for blocks, pool in ((3, True), (3, False), (3, False)):
        layers += [*(_block(64, pool=pool) for _ in range(blocks)), nn.Upsample(scale_factor=2, mode="nearest")]
        layers.append(nn.Conv2d(64, 64, 3, padding=1, bias=False))
    return nn.Sequential(*layers, _block(64, pool=False), nn.Conv2d(64, 3, 3, padding=1))


class ReconstructionCache:
    """Remembers reconstructions in a folder by the digest of the pixels, so that a second store costs no second pass."""

    def __init__(self, folder: Path, reconstruct: Callable[[Rgb], Rgb]) -> None:
        self._folder, self._reconstruct = folder, reconstruct
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, rgb: Rgb) -> Path:
        """Where the reconstruction of uint8[h, w, 3] lies or will lie."""
        return self._folder / f"{hashlib.sha256(repr(rgb.shape).encode() + rgb.tobytes()).hexdigest()[:32]}.png"

    def __call__(self, rgb: Rgb) -> Rgb:
        path = self.path(rgb)
        if path.exists():
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
        fake = self._reconstruct(rgb)
        partial = path.with_suffix(".partial")
        Image.fromarray(fake).save(partial, "PNG", compress_level=1)
        partial.replace(path)
        return fake


def reconstruction(autoencoder: Path | None, out: Path, device: str = "cpu") -> ReconstructionCache:
    """How a run makes its aligned fakes, remembered in a folder of `out`.

    autoencoder: a diffusers AutoencoderKL folder (or a pipeline with `vae`), or one with the tiny autoencoder's two files; None:
    the upsampling artefacts. Raises AlignedError naming the file.
    """
    from train import autoencoder_kl

    if autoencoder is None:
        return ReconstructionCache(out / "upsampled-2", lambda rgb: upsampled(rgb, np.random.default_rng(int(rgb.sum()))))
    if autoencoder_kl.is_folder(autoencoder):
        model = autoencoder_kl.AutoencoderKL(autoencoder, device)
        # A folder of its own for each autoencoder: another one's reconstructions are other fakes.
        return ReconstructionCache(out / f"aligned-{model.digest[:12]}", model.reconstruct)
    return ReconstructionCache(out / "aligned", TinyAutoencoder(autoencoder).reconstruct)


class TinyAutoencoder:
    """The tiny autoencoder for FLUX.2's latents (taef2, github madebyollin/taesd, MIT); weights from the user's folder."""

    def __init__(self, folder: Path) -> None:
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        self._dtype = torch.bfloat16
        self._parts: list[nn.Sequential] = []
        for name, part in (("encoder", _encoder()), ("decoder", _decoder())):
            path = folder / f"{name}.safetensors"
            try:
                part.load_state_dict(load_file(path))
            except FileNotFoundError as exc:
                raise AlignedError(f"{path}: no such file; give the autoencoder's folder") from exc
            except (SafetensorError, RuntimeError) as exc:
                reason = str(exc).splitlines()[0]
                raise AlignedError(f"{path}: not the weights of the tiny autoencoder ({reason})") from exc
            self._parts.append(part.eval().to(self._dtype))

    def reconstruct(self, rgb: Rgb, passes: int = 1) -> Rgb:
        """uint8[h, w, 3] -> uint8[h, w, 3] after `passes` round trips; borders are reflected to a multiple of 8 px."""
        import torch

        height, width = rgb.shape[:2]
        pad = [(0, -height % LATENT_STRIDE_PX), (0, -width % LATENT_STRIDE_PX), (0, 0)]
        padded = np.pad(rgb, pad, mode="reflect")
        x = torch.from_numpy(padded).permute(2, 0, 1)[None].to(self._dtype).contiguous(memory_format=torch.channels_last) / 255
        with torch.inference_mode():
            for _ in range(passes):
                for part in self._parts:
                    x = part(x)
                x = x.clamp(0, 1)
        out = (x[0].permute(1, 2, 0).float() * 255).round().to(torch.uint8).numpy()
        return np.ascontiguousarray(out[:height, :width])


UPSAMPLERS = ("nearest", "bilinear", "transposed")


def upsampled(rgb: Rgb, rng: np.random.Generator, kind: str | None = None) -> Rgb:
    """The fallback: shrink, enlarge as a decoder's upsampling layer does, add back part of the detail.

    Leaves the traces of a 2x or 4x upsampling layer in uint8[h, w, 3] while content and size stay. kind: `nearest` and a small
    convolution (replicas of the spectrum), `bilinear` (its periodic softness), `transposed` (the checkerboard of a transposed
    convolution whose kernel overlaps unevenly, Odena et al. 2016); None: drawn.
    """
    height, width = rgb.shape[:2]
    kind = str(rng.choice(UPSAMPLERS)) if kind is None else kind
    factor = int(rng.choice((2, 4)))
    small = Image.fromarray(rgb).resize((max(1, width // factor), max(1, height // factor)), Image.Resampling.BOX)
    way = Image.Resampling.NEAREST if kind == "nearest" else Image.Resampling.BILINEAR
    big = np.asarray(small.resize((width, height), way), dtype=np.float32)
    if kind == "nearest":
        taps = rng.dirichlet(np.ones(3) * 4).astype(np.float32)
        for axis in (0, 1):
            before, after = np.roll(big, 1, axis), np.roll(big, -1, axis)
            big = taps[0] * before + taps[1] * big + taps[2] * after
    elif kind == "transposed":
        for axis, length in ((0, height), (1, width)):
            gains = rng.uniform(0.94, 1.06, factor).astype(np.float32)
            pattern = np.resize(gains / gains.mean(), length)
            big = big * pattern.reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    detail = float(rng.uniform(0.3, 0.7))
    mixed = big + detail * (rgb.astype(np.float32) - big)
    return np.clip(np.round(mixed), 0, 255).astype(np.uint8)
