"""The encoder: a ViT-Tiny/16 in plain torch whose parameters carry timm's names."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

EMBED_DIM = 192
DEPTH = 12
HEADS = 3
MLP_DIM = 768
PATCH_PX = 16
IMAGE_PX = 224
PARAMETERS = 5_524_416


class Attention(nn.Module):
    """Multi-head self-attention with one projection for query, key and value (timm's layout: rows q, k, v)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, dim = x.shape
        query, key, value = self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(attended.transpose(1, 2).reshape(n, tokens, dim))
        return out


class Mlp(nn.Module):
    """Two linear layers around the exact (erf) GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, hidden: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=layer_norm_eps)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=layer_norm_eps)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each; `proj` is a convolution whose stride is its kernel."""

    def __init__(self, patch_px: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_px, stride=patch_px)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.proj(images)
        return out


class VisionTransformer(nn.Module):
    """CoDE's encoder (arXiv 2407.20337, section 4.1): CLS token after the final LayerNorm, no projection head.

    The defaults are ViT-Tiny/16 at 224 px, 5,524,416 parameters. `layer_norm_eps` is 1e-6 in timm and 1e-12 by default in
    transformers: pass what the checkpoint's own configuration says, or parity fails in the fourth decimal.
    """

    def __init__(
        self,
        layer_norm_eps: float = 1e-6,
        *,
        dim: int = EMBED_DIM,
        depth: int = DEPTH,
        heads: int = HEADS,
        mlp_dim: int = MLP_DIM,
        patch_px: int = PATCH_PX,
        image_px: int = IMAGE_PX,
    ) -> None:
        super().__init__()
        if image_px % patch_px or dim % heads:
            raise ValueError(f"image_px {image_px} must be a multiple of patch_px {patch_px}, and dim {dim} of heads {heads}")
        self.dim, self.patch_px, self.grid = dim, patch_px, image_px // patch_px
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim))
        self.patch_embed = PatchEmbed(patch_px, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_dim, layer_norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=layer_norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """timm's initialisation: truncated normal (0.02) for weights and positions, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        fan_in = 3 * self.patch_px**2
        nn.init.trunc_normal_(self.patch_embed.proj.weight, std=1 / math.sqrt(fan_in))
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Embeds images.

        images: float32[n, 3, h, w], normalised; h and w multiples of 16. Sides other than 224 px interpolate the positions.
        Returns float32[n, 192]: the CLS token after the final LayerNorm, not L2-normalised.
        """
        if images.shape[-2] % self.patch_px or images.shape[-1] % self.patch_px:
            raise ValueError(f"height and width must be multiples of {self.patch_px} px, not {tuple(images.shape[-2:])}")
        patches = self.patch_embed(images)
        positions = self._positions(patches.shape[-2], patches.shape[-1])
        return self._encode(patches.flatten(2).transpose(1, 2), positions)

    def forward_patches(self, patches: Tensor, index: Tensor, depth: int | None = None) -> Tensor:
        """Embeds images of which only some patches are given (training with dropped patches).

        patches: float32[n, k, 3, 16, 16], normalised; index: int64[n, k], each patch's place in the 14x14 grid, row by row.
        With all 196 patches in order this equals `forward` on the whole image. `depth` runs only the first blocks: training
        that grows in depth begins with few. Returns float32[n, 192].
        """
        n, k = index.shape
        weight = self.patch_embed.proj.weight
        tokens = functional.linear(patches.reshape(n, k, -1), weight.reshape(weight.shape[0], -1), self.patch_embed.proj.bias)
        spatial = self.pos_embed[0, 1:][index]
        return self._encode(tokens, spatial, depth)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Positions of the patches as [1, rows * columns, dim], bicubic where the grid is not the trained one."""
        spatial = self.pos_embed[:, 1:]
        if rows == self.grid and columns == self.grid:
            return spatial
        square = spatial.reshape(1, self.grid, self.grid, self.dim).permute(0, 3, 1, 2)
        resized = functional.interpolate(
            square.float(), size=(rows, columns), mode="bicubic", antialias=True, align_corners=False
        )
        return resized.to(spatial.dtype).flatten(2).transpose(1, 2)

    def _encode(self, tokens: Tensor, positions: Tensor, depth: int | None = None) -> Tensor:
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        x = torch.cat((cls.to(tokens.dtype), tokens + positions), dim=1)
        for block in self.blocks[:depth]:
            x = block(x)
        # The norm works on each token alone, so only the CLS token needs it.
        out: Tensor = self.norm(x[:, 0])
        return out
