"""ViTs with a Jumbo token against NumPy in float64, their widths and numbers of weights, and a method that trains one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_pretrain import backbones, encoder, pretext
from ssl_pretrain.backbones.jumbo import Jumbo
from ssl_pretrain.errors import UserError


def build(**options: object) -> Jumbo:
    torch.manual_seed(0)
    built = backbones.build(
        "jumbo_micro", image_size=(16, 24), **{"dim": 32, "depth": 2, "patch_size": 8, "jumbo": 3, **options}
    )
    assert isinstance(built, Jumbo)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return built.eval()


def norm(x: np.ndarray, layer: torch.nn.Module) -> np.ndarray:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * layer.weight.detach().numpy() + layer.bias.detach().numpy()


def linear(x: np.ndarray, layer: torch.nn.Module) -> np.ndarray:
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def mlp(x: np.ndarray, layer: torch.nn.Module) -> np.ndarray:
    return linear(torch.nn.functional.gelu(torch.from_numpy(linear(x, layer.fc1))).numpy(), layer.fc2)


def test_forward_in_numpy() -> None:
    """One image at a time: attention of 3 + 6 tokens, then the wide token as one row of 96 channels."""
    model = build().double()
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = model(images, blocks=(0,))
    for image in range(2):
        pixels = images[image].numpy().reshape(3, 2, 8, 3, 8).transpose(1, 3, 0, 2, 4).reshape(6, 192)
        weight = model.patch_embed.proj.weight.detach().numpy().reshape(32, 192)
        x = pixels @ weight.T + model.patch_embed.proj.bias.detach().numpy() + model.pos_embed.detach().numpy()[0]
        x = np.concatenate([model.jumbo_token.detach().numpy()[0], x])
        for i, block in enumerate(model.blocks):
            q, k, v = np.split(linear(norm(x, block.norm1), block.attn.qkv), 3, axis=1)
            heads = []
            for head in range(4):
                one = slice(8 * head, 8 * head + 8)
                scores = np.exp(q[:, one] @ k[:, one].T / np.sqrt(8))
                heads.append(scores / scores.sum(1, keepdims=True) @ v[:, one])
            x = x + linear(np.concatenate(heads, 1), block.attn.proj)
            wide = x[:3].reshape(96)
            wide = wide + mlp(norm(wide, block.norm3), model.jumbo_mlp)
            x = np.concatenate([wide.reshape(3, 32), x[3:] + mlp(norm(x[3:], block.norm2), block.mlp)])
            if i == 0:
                np.testing.assert_allclose(found.blocks[0][image].detach().numpy(), x, atol=1e-10)
        x = norm(x, model.norm)
        np.testing.assert_allclose(found.tokens[image].detach().numpy(), x, atol=1e-10)
        pooled = np.concatenate([x[:3].reshape(-1), x[3:].mean(0)])
        np.testing.assert_allclose(found.pooled[image].detach().numpy(), pooled, atol=1e-10)


def test_widths() -> None:
    """The token is J times as wide; the shared MLP has 8 (J D)^2 + 5 J D weights (the reference's small: 42.5 M)."""
    for pool, width in {"cls": 96, "all": 128, "mean": 32}.items():
        model = build(pool=pool)
        assert model.pooled_dim == width
        assert model(torch.randn(2, 3, 16, 24)).pooled.shape == (2, width)
    with torch.device("meta"):
        small = backbones.build("jumbo_small", image_size=(224, 224))
    assert isinstance(small, Jumbo)
    shared = sum(p.numel() for p in small.jumbo_mlp.parameters())
    assert shared == 8 * 2304**2 + 5 * 2304
    assert round(shared / 1e6, 1) == 42.5


def test_left_out_patches_do_not_matter_to_the_token() -> None:
    model = build()
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[0, 4], [2, 1]])
    with torch.no_grad():
        found = model(images, keep=keep)
        assert found.prefix is not None
        assert found.prefix.shape == (2, 3, 32)
        assert not torch.allclose(found.prefix, model(images).prefix, atol=1e-4)


@pytest.mark.parametrize("method", ["mae", "simclr"])
def test_a_run_exports_the_wide_vector(method: str, tmp_path: Path, pretrain: object) -> None:
    flags = "--data fractals:classes=2,images=16 --encoder jumbo_micro --depth 1 --dim 32 --heads 2 --jumbo 2 "
    flags += "--image-size 32 --patch-size 8 --batch-size 8 --steps 2 --workers 0 --no-score --monitor-every 1"
    pretrain("--method", method, *flags.split(), "--out", tmp_path / "run")
    loaded = encoder.load(tmp_path / "run")
    with torch.no_grad():
        assert loaded(torch.randn(1, 3, 32, 32)).pooled.shape == (1, 2 * 32)  # small runs pool the token


@pytest.mark.parametrize("name", ["ibot", "dinov2"])
def test_methods_with_one_head_for_patches_and_image_refuse(name: str) -> None:
    kind = pretext.load(name)
    with pytest.raises(UserError, match=f"{name} needs a vector of the image as wide as its patches .32 channels"):
        kind(build(), kind.Config())
    kind(build(pool="mean"), kind.Config())
