"""Mask units of several patches: indices, and the methods that mask whole units (MAE by `keep`, SimMIM by `replace`), on a
backbone of another package whose units are 2 x 2 patches."""

import sys
from collections.abc import Iterator
from typing import Any

import acme
import numpy as np
import pytest
import torch
from distributions import install

from ssl_pretrain import backbones, pretext
from ssl_pretrain.backbones.backbone import UnsupportedByBackbone
from ssl_pretrain.errors import UserError
from ssl_pretrain.parts import units
from ssl_pretrain.pretext import Batch, Step


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of the encoder: patches of 4 pixels, units of 8."""
    site = tmp_path_factory.mktemp("site")
    install(site, "acme_units", acme.UNITS, {"ssl_pretrain.backbones": {"cells_small": "acme_units:Cells"}})
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        yield "cells_small"
        sys.modules.pop("acme_units", None)


def method(name: str, cells: str, size: tuple[int, int] = (24, 32), **options: Any) -> Any:
    kind = pretext.load(name)
    torch.manual_seed(0)
    built = kind(backbones.build(cells, image_size=size), kind.Config(**options))
    built.prepare(100)
    return built.train()


def step(batch: int) -> Step:
    return Step(step=0, total=10, noise=3, rows=slice(0, batch), batch_size=batch, device=torch.device("cpu"))


SMALL = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}


def test_patches_of_a_unit_are_its_pixels(cells: str) -> None:
    encoder = backbones.build(cells, image_size=(24, 32))
    assert encoder.unit == (8, 8)
    assert encoder.stride == (4, 4)
    assert units.unit_grid(encoder, (24, 32)) == (3, 4)
    assert units.patches_a_unit(encoder) == (2, 2)
    # Every patch of a grid of 6 x 8 is numbered; unit 5 is in row 1, column 1 of 3 x 4 units.
    numbers = np.arange(48).reshape(6, 8)
    found = units.patches_of(torch.tensor([[5, 0], [11, 3]]), encoder, (3, 4)).numpy()
    blocks = {u: numbers[u // 4 * 2 : u // 4 * 2 + 2, u % 4 * 2 : u % 4 * 2 + 2].ravel() for u in range(12)}
    np.testing.assert_array_equal(found, [[*blocks[5], *blocks[0]], [*blocks[11], *blocks[3]]])
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, [5, 3]] = True
    patches = units.mask_of_patches(mask, encoder, (3, 4))[0].nonzero().flatten().tolist()
    assert patches == sorted([*blocks[5], *blocks[3]])


def test_a_unit_of_a_vit_is_a_patch() -> None:
    encoder = backbones.build("vit_micro", image_size=(32, 32), patch_size=8)
    index, mask = torch.tensor([[3, 1]]), torch.ones(1, 16, dtype=torch.bool)
    assert encoder.unit == encoder.stride
    assert encoder.token_dim == encoder.dim
    assert units.patches_of(index, encoder, (4, 4)) is index
    assert units.mask_of_patches(mask, encoder, (4, 4)) is mask


def test_images_are_whole_units(cells: str) -> None:
    with pytest.raises(UserError, match=r"28 x 32 pixels .* do not divide into the encoder's mask units of 8 x 8"):
        method("mae", cells, (28, 32), **SMALL)


def test_mae_masks_whole_units(cells: str) -> None:
    """12 units, of which 3 are kept: 12 of 48 patches. The loss is that of the masked patches, computed here in NumPy from
    the predictions."""
    mae = method("mae", cells, **SMALL)
    images = torch.randn(5, 3, 24, 32, generator=torch.Generator().manual_seed(1))
    batch = Batch(views={"image": images}, index=torch.arange(5))
    predicted, masked, keep, grid = mae.reconstruct(images, step(5))
    assert grid == (6, 8)
    assert keep.shape == (5, 12)
    assert masked.shape == (5, 36)
    assert predicted.shape == (5, 36, 48)
    for image in range(5):
        assert sorted([*keep[image].tolist(), *masked[image].tolist()]) == list(range(48))
        rows, columns = masked[image] // 8, masked[image] % 8
        counted = np.zeros((3, 4), int)
        np.add.at(counted, (rows.numpy() // 2, columns.numpy() // 2), 1)
        assert set(counted.ravel().tolist()) == {0, 4}
    losses = mae(batch, step(5))
    pixels = images.double().numpy().reshape(5, 3, 6, 4, 8, 4).transpose(0, 2, 4, 3, 5, 1).reshape(5, 48, 48)
    target = np.take_along_axis(pixels, masked.numpy()[:, :, None], 1)
    target = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, ddof=1, keepdims=True) + 1e-6)
    expected = ((predicted.detach().double().numpy() - target) ** 2).mean()
    assert float(losses.total.detach()) == pytest.approx(expected, rel=1e-5)
    pictures = mae.pictures(batch, step(5))
    away = (pictures["masked"] == 0).all(1)
    assert away.float().mean() == pytest.approx(0.75)
    losses.total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mae.parameters() if p.requires_grad)


def test_hidden_pixels_do_not_reach_maes_predictions(cells: str) -> None:
    mae = method("mae", cells, **SMALL)
    images = torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(1))
    predicted, masked, _, _ = mae.reconstruct(images, step(2))
    hidden = torch.zeros(2, 48, dtype=torch.bool).scatter(1, masked, True).unflatten(1, (6, 8))
    hidden = hidden.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    other, _, _, _ = mae.reconstruct(torch.where(hidden, 9.0, images), step(2))
    assert torch.equal(predicted, other)
    other, _, _, _ = mae.reconstruct(torch.where(hidden, images, 9.0), step(2))
    assert not torch.equal(predicted, other)


def test_simmim_masks_whole_units(cells: str) -> None:
    """The token has the width of the patch embeddings, and the loss is the mean over the pixels of masked units."""
    simmim = method("simmim", cells)
    assert simmim.mask_token.shape == (12,)
    assert simmim.head.out_features == 48
    images = torch.randn(4, 3, 24, 32, generator=torch.Generator().manual_seed(1))
    chosen, counted = simmim.mask(images, step(4))
    assert chosen.shape == (4, 12)
    assert chosen.sum(1).tolist() == [8] * 4
    assert float(counted) == 32
    painted = simmim.paint(images, chosen, step(4)).detach().numpy().reshape(4, 6, 8, 4, 4, 3)
    painted = painted.transpose(0, 5, 1, 3, 2, 4).reshape(4, 3, 24, 32)
    pixels = np.kron(chosen.numpy().reshape(4, 3, 4), np.ones((8, 8), bool))
    expected = np.abs(painted - images.numpy()).mean(1)[pixels].mean()
    losses = simmim(Batch(views={"image": images}, index=torch.arange(4)), step(4))
    assert float(losses.total.detach()) == pytest.approx(float(expected), rel=1e-5)
    losses.total.backward()
    assert simmim.mask_token.grad is not None
    assert simmim.mask_token.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["ijepa", "data2vec2", "beit"])
def test_methods_of_single_patches_refuse(cells: str, name: str) -> None:
    kind = pretext.load(name)
    with pytest.raises(UnsupportedByBackbone) as refused:
        kind(backbones.build(cells, image_size=(64, 64)), kind.Config())
    assert "4 x 4" in str(refused.value) or "supports 'blocks'" in str(refused.value)
    assert name in str(refused.value)
