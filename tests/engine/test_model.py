"""The encoder's shape, names and arithmetic."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from engine.model import PARAMETERS, VisionTransformer  # noqa: E402


@pytest.fixture(scope="module")
def encoder() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer().eval()


def test_has_the_published_number_of_parameters(encoder: VisionTransformer) -> None:
    assert sum(p.numel() for p in encoder.parameters()) == PARAMETERS == 5_524_416
    assert tuple(encoder.pos_embed.shape) == (1, 197, 192)


def test_carries_timm_names(encoder: VisionTransformer) -> None:
    outside = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    inside = {
        f"blocks.{i}.{layer}.{kind}"
        for i in range(12)
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    }
    assert set(encoder.state_dict()) == outside | inside


def _slow_forward(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """The formula written out in float64, one image and one head at a time."""
    p = {name: value.double() for name, value in model.state_dict().items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    out = []
    for image in images.double():
        rows = [image[:, r : r + 16, c : c + 16].reshape(-1) for r in range(0, 224, 16) for c in range(0, 224, 16)]
        tokens = torch.stack(rows) @ p["patch_embed.proj.weight"].reshape(192, -1).T + p["patch_embed.proj.bias"]
        x = torch.cat((p["cls_token"][0], tokens)) + p["pos_embed"][0]
        for i in range(12):
            name = f"blocks.{i}"
            qkv = norm(x, f"{name}.norm1") @ p[f"{name}.attn.qkv.weight"].T + p[f"{name}.attn.qkv.bias"]
            heads = []
            for h in range(3):
                q, k, v = (qkv[:, part * 192 + h * 64 : part * 192 + (h + 1) * 64] for part in range(3))
                heads.append(torch.softmax(q @ k.T / 8.0, dim=-1) @ v)
            x = x + torch.cat(heads, 1) @ p[f"{name}.attn.proj.weight"].T + p[f"{name}.attn.proj.bias"]
            hidden = norm(x, f"{name}.norm2") @ p[f"{name}.mlp.fc1.weight"].T + p[f"{name}.mlp.fc1.bias"]
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
            x = x + hidden @ p[f"{name}.mlp.fc2.weight"].T + p[f"{name}.mlp.fc2.bias"]
        out.append(norm(x, "norm")[0])
    return torch.stack(out)


def test_agrees_with_the_formula(encoder: VisionTransformer) -> None:
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = encoder(images)
    assert got.shape == (2, 192)
    torch.testing.assert_close(got.double(), _slow_forward(encoder, images), atol=2e-5, rtol=1e-4)


def test_all_patches_equal_the_whole_image_and_their_order_does_not_matter(encoder: VisionTransformer) -> None:
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    patches = images.reshape(2, 3, 14, 16, 14, 16).permute(0, 2, 4, 1, 3, 5).reshape(2, 196, 3, 16, 16)
    order = torch.randperm(196, generator=torch.Generator().manual_seed(3)).expand(2, -1)
    shuffled = torch.stack([patches[i, order[i]] for i in range(2)])
    with torch.no_grad():
        torch.testing.assert_close(encoder.forward_patches(shuffled, order), encoder(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", [96, 160])
def test_smaller_sides_interpolate_positions(encoder: VisionTransformer, side: int) -> None:
    with torch.no_grad():
        assert encoder(torch.zeros(1, 3, side, side)).shape == (1, 192)


def test_refuses_sides_that_are_not_multiples_of_a_patch(encoder: VisionTransformer) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        encoder(torch.zeros(1, 3, 100, 96))


def test_eps_is_the_checkpoints_own() -> None:
    assert VisionTransformer(layer_norm_eps=1e-12).norm.eps == 1e-12
