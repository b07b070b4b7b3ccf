"""AutoencoderKL from a diffusers folder: diffusers' own output on the same weights, old names, and what is not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file, save_file

from tests.train.pictures import picture
from train import autoencoder_kl
from train.aligned import AlignedError, reconstruction
from train.autoencoder_kl import AutoencoderKL

SMALL: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [8, 16, 16],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "act_fn": "silu",
}
FILE = "diffusion_pytorch_model.safetensors"


def _folder(path: Path, seed: int = 0, **changes: Any) -> Path:
    config = SMALL | changes
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    save_file(autoencoder_kl._model(autoencoder_kl._DEFAULTS | config).state_dict(), path / FILE)
    return path


def _rgb(height: int = 45, width: int = 38) -> np.ndarray:
    return np.asarray(picture(1, height, width))


def test_a_round_trip_keeps_the_size_and_repeats(tmp_path: Path) -> None:
    model = AutoencoderKL(_folder(tmp_path / "a"))
    out = model.reconstruct(_rgb())
    assert out.shape == (45, 38, 3) and out.dtype == np.uint8 and model.stride_px == 4
    assert np.array_equal(out, model.reconstruct(_rgb())) and not np.array_equal(out, _rgb())
    assert model.reconstruct(_rgb(1, 2)).shape == (1, 2, 3)


def test_a_pipelines_vae_and_half_precision_and_bin_are_read(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "pipeline" / "vae")
    expected = AutoencoderKL(tmp_path / "pipeline").reconstruct(_rgb()).astype(int)
    weights = load_file(folder / FILE)
    (folder / FILE).unlink()
    torch.save(weights, folder / "diffusion_pytorch_model.bin")
    assert np.array_equal(AutoencoderKL(folder).reconstruct(_rgb()), expected)
    (folder / "diffusion_pytorch_model.bin").unlink()
    save_file({name: value.half() for name, value in weights.items()}, folder / "diffusion_pytorch_model.fp16.safetensors")
    assert np.abs(AutoencoderKL(folder).reconstruct(_rgb()) - expected).max() <= 2


def test_old_attention_names_are_read(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a")
    expected = AutoencoderKL(folder).reconstruct(_rgb())
    old = {}
    for name, value in load_file(folder / FILE).items():
        for after, before in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
            if after in name:
                name, value = name.replace(after, before), value[:, :, None, None] if value.ndim == 2 else value
        old[name] = value.contiguous()
    save_file(old, folder / FILE)
    assert np.array_equal(AutoencoderKL(folder).reconstruct(_rgb()), expected)


def test_each_autoencoder_has_its_own_cache(tmp_path: Path) -> None:
    made = [reconstruction(_folder(tmp_path / name, seed), tmp_path / "out")(_rgb()) for seed, name in enumerate("ab")]
    assert not np.array_equal(*made) and len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"_class_name": "AutoencoderTiny"}, "config.json: is of a AutoencoderTiny"),
        ({"act_fn": "gelu"}, "config.json: act_fn is 'gelu'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "down_block_types"),
        ({"latent_channels": 8}, "not the weights that config.json describes"),
    ],
)
def test_what_is_not_read_is_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    folder = _folder(tmp_path / "a")
    (folder / "config.json").write_text(json.dumps(SMALL | changes))
    with pytest.raises(AlignedError, match=says):
        AutoencoderKL(folder)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a")
    (folder / FILE).write_bytes(b"no weights")
    with pytest.raises(AlignedError, match=f"{FILE}: not a readable"):
        AutoencoderKL(folder)
    (folder / FILE).unlink()
    with pytest.raises(AlignedError, match=f"{FILE}: no such file"):
        AutoencoderKL(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(AlignedError, match=r"config\.json: not JSON"):
        AutoencoderKL(folder)
    (folder / "config.json").unlink()
    with pytest.raises(AlignedError, match=r"config\.json: no such file"):
        AutoencoderKL(folder)


@pytest.mark.slow
@pytest.mark.timeout(900)  # importing diffusers alone takes a busy machine a minute
@pytest.mark.parametrize(
    "changes",
    [{}, {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16}, {"mid_block_add_attention": False}],
)
def test_output_is_diffusers_own(tmp_path: Path, changes: dict[str, Any]) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    theirs = diffusers.AutoencoderKL(**{k: v for k, v in (SMALL | changes).items() if k != "_class_name"}).eval()
    theirs.save_pretrained(tmp_path)
    rgb = _rgb(64, 48)
    x = torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        expected = theirs.decode(theirs.encode(x).latent_dist.mode()).sample
        got = AutoencoderKL(tmp_path)._model(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    pixels = ((expected[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    assert np.abs(AutoencoderKL(tmp_path).reconstruct(rgb).astype(int) - pixels).max() <= 1
