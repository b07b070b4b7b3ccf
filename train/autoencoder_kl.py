"""AutoencoderKL: the autoencoder of Stable Diffusion 1 to 3, SDXL and FLUX, read from a diffusers folder without diffusers.

Layers and names are diffusers' (diffusers.models.autoencoders.autoencoder_kl, after CompVis' latent diffusion, arXiv 2112.10752):
`config.json` and `diffusion_pytorch_model.safetensors` (or `.bin`, read with torch's `weights_only`). A round trip takes the mean
of the posterior, so the same image gives the same fake.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from train.aligned import AlignedError

if TYPE_CHECKING:
    import torch
    from torch import nn

Rgb = NDArray[np.uint8]

CONFIG_FILE = "config.json"
WEIGHTS = "diffusion_pytorch_model"
EPS = 1e-6
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
# Names from before diffusers 0.17, and how they are called since.
_RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class AutoencoderKL:
    """A folder's autoencoder, ready for round trips.

    folder: of the autoencoder, or of a pipeline with a `vae` folder. device: cpu, cuda, cuda:1. `digest`: SHA-256 of its
    configuration and weights. Raises AlignedError naming the file.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        import torch

        folder = folder / "vae" if (folder / "vae" / CONFIG_FILE).exists() else folder
        config = _config(folder / CONFIG_FILE)
        self._device = torch.device(device)
        self._model = _model(config)
        path, weights = _weights(folder)
        try:
            self._model.load_state_dict(weights)
        except RuntimeError as exc:
            reason = " ".join(str(exc).split())[:200]
            raise AlignedError(f"{path}: not the weights that {CONFIG_FILE} describes ({reason})") from exc
        self._model.eval().to(self._device)
        self.digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes() + path.read_bytes()).hexdigest()
        self.stride_px = 2 ** (len(config["block_out_channels"]) - 1)

    def reconstruct(self, rgb: Rgb) -> Rgb:
        """uint8[h, w, 3] -> uint8[h, w, 3] through the autoencoder and back; borders are mirrored to a multiple of its stride."""
        import torch

        height, width = rgb.shape[:2]
        sides = [(0, -height % self.stride_px), (0, -width % self.stride_px), (0, 0)]
        # What is smaller than its own border cannot be mirrored.
        padded = np.pad(rgb, sides, mode="reflect") if min(height, width) >= self.stride_px else np.pad(rgb, sides, mode="edge")
        x = torch.from_numpy(padded).permute(2, 0, 1)[None].to(self._device).float() / 127.5 - 1
        with torch.inference_mode():
            out = self._model(x)
        pixels = ((out[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return np.ascontiguousarray(pixels.cpu().numpy()[:height, :width])


def is_folder(folder: Path) -> bool:
    """Whether a folder is, or holds as `vae`, a diffusers model."""
    return (folder / CONFIG_FILE).exists() or (folder / "vae" / CONFIG_FILE).exists()


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise AlignedError(f"{path}: no such file; give the folder of a diffusers AutoencoderKL") from exc
    except ValueError as exc:
        raise AlignedError(f"{path}: not JSON ({exc})") from exc
    if not isinstance(found, dict) or found.get("_class_name") != "AutoencoderKL":
        name = found.get("_class_name") if isinstance(found, dict) else type(found).__name__
        raise AlignedError(f"{path}: is of a {name}; an AutoencoderKL is needed")
    config: dict[str, Any] = _DEFAULTS | found
    levels = len(config["block_out_channels"])
    wanted = {
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    for name, value in wanted.items():
        if config.get(name) != value:
            raise AlignedError(f"{path}: {name} is {config.get(name)!r}; only {value!r} is read")
    return config


def _weights(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    names = [f"{WEIGHTS}{variant}.{ending}" for ending in ("safetensors", "bin") for variant in ("", ".fp16")]
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        raise AlignedError(f"{folder / names[0]}: no such file")
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as exc:
        raise AlignedError(f"{path}: not a readable file of weights ({type(exc).__name__})") from exc
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise AlignedError(f"{path}: not a dictionary of tensors")
    return path, dict(_renamed(str(name), value) for name, value in found.items())


def _renamed(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Old attention names and 1x1 convolutions to linear layers; float32."""
    if ".attentions." in name:
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        if value.ndim == 4:
            value = value[:, :, 0, 0]
    return name, value.float()


def _model(config: dict[str, Any]) -> nn.Module:
    from torch import nn

    channels: list[int] = list(config["block_out_channels"])
    groups, layers, latent = config["norm_num_groups"], config["layers_per_block"], config["latent_channels"]

    class Resnet(nn.Module):
        def __init__(self, before: int, after: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.GroupNorm(groups, before, EPS), nn.GroupNorm(groups, after, EPS)
            self.conv1, self.conv2 = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
            self.conv_shortcut = nn.Conv2d(before, after, 1) if before != after else None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner: torch.Tensor = self.conv1(nn.functional.silu(self.norm1(x)))
            inner = self.conv2(nn.functional.silu(self.norm2(inner)))
            kept: torch.Tensor = x if self.conv_shortcut is None else self.conv_shortcut(x)
            return kept + inner

    class Attention(nn.Module):
        """One head over all places."""

        def __init__(self, dim: int) -> None:
            super().__init__()
            self.group_norm = nn.GroupNorm(groups, dim, EPS)
            self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, dim, height, width = x.shape
            rows = self.group_norm(x.reshape(n, dim, -1)).transpose(1, 2)
            attended = nn.functional.scaled_dot_product_attention(self.to_q(rows), self.to_k(rows), self.to_v(rows))
            out: torch.Tensor = self.to_out[0](attended).transpose(1, 2).reshape(n, dim, height, width)
            return x + out

    class Middle(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.resnets = nn.ModuleList([Resnet(dim, dim), Resnet(dim, dim)])
            self.attentions = nn.ModuleList([Attention(dim)] if config["mid_block_add_attention"] else [])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.resnets[0](x)
            for attention in self.attentions:
                x = attention(x)
            out: torch.Tensor = self.resnets[1](x)
            return out

    class Sampler(nn.Module):
        """Halves (a row and a column of zeros at the far side, then a stride of two) or doubles (nearest, then a convolution)."""

        def __init__(self, dim: int, up: bool) -> None:
            super().__init__()
            self.up = up
            self.conv = nn.Conv2d(dim, dim, 3, padding=1) if up else nn.Conv2d(dim, dim, 3, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            moved = nn.functional.interpolate(x, scale_factor=2.0) if self.up else nn.functional.pad(x, (0, 1, 0, 1))
            out: torch.Tensor = self.conv(moved)
            return out

    class Level(nn.Module):
        def __init__(self, before: int, after: int, count: int, up: bool, last: bool) -> None:
            super().__init__()
            self.resnets = nn.ModuleList(Resnet(before if i == 0 else after, after) for i in range(count))
            samplers = nn.ModuleList([] if last else [Sampler(after, up)])
            setattr(self, "upsamplers" if up else "downsamplers", samplers)
            self._samplers = "upsamplers" if up else "downsamplers"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in (*self.resnets, *getattr(self, self._samplers)):
                x = part(x)
            return x

    class Half(nn.Module):
        """Encoder (down, then the middle) or decoder (the middle, then up)."""

        def __init__(self, up: bool) -> None:
            super().__init__()
            widths = channels[::-1] if up else channels
            pairs = list(zip([widths[0], *widths], widths, strict=False))
            levels = nn.ModuleList(
                Level(before, after, layers + up, up, last=i == len(widths) - 1) for i, (before, after) in enumerate(pairs)
            )
            self.conv_in = nn.Conv2d(latent if up else 3, widths[0], 3, padding=1)
            self.mid_block = Middle(channels[-1])
            self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
            self.conv_out = nn.Conv2d(widths[-1], 3 if up else 2 * latent, 3, padding=1)
            setattr(self, "up_blocks" if up else "down_blocks", levels)
            self._order = ("mid_block", "up_blocks") if up else ("down_blocks", "mid_block")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv_in(x)
            for name in self._order:
                part = getattr(self, name)
                for block in part if isinstance(part, nn.ModuleList) else (part,):
                    x = block(x)
            out: torch.Tensor = self.conv_out(nn.functional.silu(self.conv_norm_out(x)))
            return out

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = Half(up=False), Half(up=True)
            self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config["use_quant_conv"] else None
            self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config["use_post_quant_conv"] else None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            moments = self.encoder(x)
            moments = moments if self.quant_conv is None else self.quant_conv(moments)
            mean = moments.chunk(2, dim=1)[0]
            out: torch.Tensor = self.decoder(mean if self.post_quant_conv is None else self.post_quant_conv(mean))
            return out

    return Whole()
