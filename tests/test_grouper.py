"""The perceptual group tokenizer: its grouping against NumPy in float64, and a number of groups that can change."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import losses

from ssl_pretrain import backbones, encoder
from ssl_pretrain.backbones import grouper
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError


def build(**options: object) -> grouper.Grouper:
    torch.manual_seed(0)
    built = backbones.build("grouper_micro", image_size=(16, 24), **{"dim": 32, "depth": 2, "groups": 6, **options})
    assert isinstance(built, grouper.Grouper)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return built.eval()


def norm(x: np.ndarray, layer: torch.nn.Module) -> np.ndarray:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * layer.weight.detach().numpy() + layer.bias.detach().numpy()


def linear(x: np.ndarray, layer: torch.nn.Module) -> np.ndarray:
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def mlp(x: np.ndarray, layer: torch.nn.Module) -> np.ndarray:
    hidden = torch.nn.functional.gelu(torch.from_numpy(linear(x, layer.fc1))).numpy()
    return linear(hidden, layer.fc2)


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    x = np.exp(x - x.max(axis, keepdims=True))
    return x / x.sum(axis, keepdims=True)


@pytest.mark.parametrize("rounds", [1, 3])
def test_grouping_in_numpy(rounds: int) -> None:
    """One image and head at a time: tokens share themselves among groups, then each group averages what it got."""
    layer = build().double().blocks[1].grouping
    x, noise = np.random.default_rng(0).standard_normal((2, 10, 32)), grouper.group_noise(5, 32).double()
    found = layer(torch.from_numpy(x), noise, rounds).detach().numpy()
    for image in range(2):
        tokens = norm(x[image], layer.norm_x)
        keys, values = np.split(linear(tokens, layer.kv), 2, axis=1)
        groups = layer.mean.detach().numpy() + layer.deviation.detach().numpy() * noise.numpy()
        for _ in range(rounds):
            queries = linear(norm(groups, layer.norm_groups), layer.q)
            parts = []
            for head in range(4):
                one = slice(8 * head, 8 * head + 8)
                shares = softmax(queries[:, one] @ keys[:, one].T / np.sqrt(8), 0).astype(np.float64)
                assert np.allclose(shares.sum(0), 1)
                parts.append(shares / (shares.sum(1, keepdims=True) + 1e-6) @ values[:, one])
            groups = groups + linear(np.concatenate(parts, 1), layer.proj)
            groups = groups + mlp(norm(groups, layer.norm_mlp), layer.mlp)
        np.testing.assert_allclose(found[image], groups, rtol=1e-5, atol=1e-5)  # shares are float32


def test_layer_and_pool_in_numpy() -> None:
    model = build(depth=1).double()
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = model(images)
    (layer,) = model.blocks
    pixels = images.numpy().reshape(2, 3, 4, 4, 6, 4).transpose(0, 2, 4, 1, 3, 5).reshape(2, 24, 48)
    x = pixels @ model.patch_embed.proj.weight.detach().numpy().reshape(32, 48).T
    x = x + model.patch_embed.proj.bias.detach().numpy() + model.pos_embed.detach().numpy()
    groups = layer.grouping(torch.from_numpy(x), model.noise, 3).detach().numpy()
    keys, values = np.split(linear(norm(groups, layer.norm_groups), layer.kv), 2, axis=2)
    queries = linear(norm(x, layer.norm1), layer.q)
    heads = [slice(8 * head, 8 * head + 8) for head in range(4)]
    y = [softmax(queries[..., h] @ keys[..., h].swapaxes(1, 2) / np.sqrt(8), -1) @ values[..., h] for h in heads]
    x = x + linear(np.concatenate(y, 2), layer.proj)
    x = x + mlp(norm(x, layer.norm2), layer.mlp)
    np.testing.assert_allclose(found.patches.detach().numpy(), norm(x, model.norm), rtol=1e-5, atol=1e-5)
    keys, values = np.split(linear(norm(groups, model.pool_norm), model.pool_kv), 2, axis=2)
    query = model.pool_query.detach().numpy()[0]
    pooled = [softmax(query[:, h] @ keys[..., h].swapaxes(1, 2) / np.sqrt(8), -1) @ values[..., h] for h in heads]
    np.testing.assert_allclose(found.pooled.detach().numpy(), np.concatenate(pooled, 2)[:, 0], rtol=1e-5, atol=1e-5)


def test_the_number_of_groups_can_change() -> None:
    """The first groups stay those that they were, features change, and another encoder of that number of groups gives the
    same."""
    model = build()
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(images).pooled
        first = model.noise.clone()
        model.groups = 12
        after = model(images).pooled
    assert torch.equal(model.noise[:6], first)
    assert after.shape == before.shape
    assert not torch.allclose(after, before, atol=1e-4)
    other = build(groups=12)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(images).pooled, after)
        model.groups = 6
        assert torch.equal(model(images).pooled, before)
    with pytest.raises(UserError, match="2000 groups: there are 1 to 1024"):
        model.groups = 2000


def test_an_export_takes_another_number_of_groups(tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    how = Preprocessing.for_size((16, 24), (0.5,) * 3, (0.25,) * 3)
    encoder.save(folder, Encoder(build(), "grouper_micro", how, {}))
    loaded = encoder.load(folder)
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        six = loaded(images).pooled
        loaded.backbone.groups = 3
        assert not torch.allclose(loaded(images).pooled, six, atol=1e-4)


def test_groups_differ_from_each_other() -> None:
    """The noise of the groups is what tells them apart."""
    layer = build().blocks[0].grouping
    x = torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alike = layer(x, torch.zeros(5, 32), 3)
        different = layer(x, grouper.group_noise(5, 32), 3)
    assert torch.allclose(alike, alike[:, :1].expand_as(alike), atol=1e-5)
    assert float((different - different[:, :1]).abs().mean()) > 0.1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 5}, "--heads 5 must divide --dim 32"),
        ({"patch_size": 5}, "patches of 5 x 5"),
        ({"groups": 2000}, "2000"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(**options)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mae", "simclr"])
def test_a_method_of_patches_or_of_whole_images_alone_runs_on_two_processes(
    method: str, photos: Path, tmp_path: Path, pretrain: Callable
) -> None:
    """Each leaves parameters without a gradient: the pool, or what makes the last block's patches."""
    same = ("--method", method, "--data", photos, "--encoder", "grouper_micro", "--image-size", 16, "--depth", 1,
            "--batch-size", 8, "--steps", 3, "--log-every", 1, "--workers", 0, "--no-score", "--precision", "fp32",
            "--lr", 1e-4)  # fmt: skip
    pretrain(*same, "--out", tmp_path / "one")
    pretrain(*same, "--out", tmp_path / "two", "--nproc", 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
