"""AIM: what is predicted from what, the loss against NumPy, and the prefix lengths' distribution."""

import numpy as np
import pytest
import torch
from method_helpers import check_stated, losses_of, make_zero_
from numpy_oracles import numpy_patches
from ssl_pretrain.methods.aim import AIM

from ssl_pretrain import backbones
from ssl_pretrain.backbones.backbone import UnsupportedByBackbone
from ssl_pretrain.conformance.one_step import BATCH, batch, build
from ssl_pretrain.errors import UserError
from ssl_pretrain.parts import patch_orders
from ssl_pretrain.parts.patch_orders import patch_order
from ssl_pretrain.pretext import Batch, Step

KERNELS = 133  # of a step: python tests/kernels.py aim
DEVICE_KERNELS = 151  # with the optimiser, on an accelerator: python tests/device.py aim


def step(noise: int = 1, rows: slice = slice(0, 16), batch_size: int = 16) -> Step:
    return Step(step=0, total=10, noise=noise, rows=rows, batch_size=batch_size, device=torch.device("cpu"))


def test_the_loss_is_the_mean_over_all_patches_beyond_the_prefixes() -> None:
    method = build("aim").double()
    assert isinstance(method, AIM)
    images = batch(method, slice(0, 16))
    images.views = {"image": images.views["image"].double()}
    losses = method(images, step())
    with torch.no_grad():
        predicted, prefixes = method.predict(images.views["image"], step())
    target = numpy_patches(images.views["image"].numpy(), 8)
    target = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, ddof=1, keepdims=True) + 1e-6)
    total, count = 0.0, 0
    for i, prefix in enumerate(prefixes.tolist()):
        for patch in range(prefix, 16):  # the last patch of the prefix predicts the first beyond it
            total += ((predicted[i, patch - 1].numpy() - target[i, patch]) ** 2).mean()
            count += 1
    assert losses.total.item() == pytest.approx(total / count, rel=1e-5)


def test_a_prediction_depends_on_nothing_that_comes_later() -> None:
    method = build("aim").eval()
    assert isinstance(method, AIM)
    images = batch(method, slice(0, 16)).views["image"]
    with torch.no_grad():
        before, prefixes = method.predict(images, step())
        changed = images.clone()
        changed[:, :, 16:, 16:] += 1  # of the 4 x 4 grid the patches 10, 11, 14, 15
        after, _ = method.predict(changed, step())
    moved = (before - after).abs().amax(-1) > 1e-6  # prediction k is that of patch k + 1 from patches 0 ... k
    for i, prefix in enumerate(prefixes.tolist()):
        first = 10 if prefix <= 10 else 0  # a prefix that holds patch 10 tells all its members of it
        if prefix <= 10:
            assert not moved[i, :first].any()
        assert moved[i, 10:].any()


def test_prefix_lengths_are_uniform_from_one_to_all_but_one() -> None:
    method = build("aim").eval()
    assert isinstance(method, AIM)
    images = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        _, prefixes = method.predict(images, step(rows=slice(0, 1), batch_size=6000))
    counts = np.bincount(prefixes.numpy(), minlength=17)
    assert counts[0] == 0
    assert counts[16] == 0
    expected = 6000 / 15
    assert ((counts[1:16] - expected) ** 2 / expected).sum() < 36.1  # 99.9 % of chi-square with 14 degrees of freedom


def test_plain_pixels_and_another_size_of_image() -> None:
    encoder = build("aim").encoder
    method = AIM(encoder, AIM.Config(norm_pix=False, head_dim=32, head_depth=1))
    images = batch(method, slice(0, 16))
    images.views = {"image": torch.zeros(16, 3, 24, 40)}
    assert torch.isfinite(method(images, step()).total)
    shown = method.pictures(images, step())
    assert shown["prediction"].shape == (16, 3, 24, 40)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match="two patches"):
        AIM(backbones.build("vit_micro", image_size=(8, 8), patch_size=8), AIM.Config(head_dim=32))
    with pytest.raises(UserError, match="--head-dim"):
        AIM(backbones.build("vit_micro", image_size=(16, 16), patch_size=8), AIM.Config(head_dim=30))

    blind = backbones.build("vit_micro", image_size=(16, 16), patch_size=8)
    blind.supports = frozenset()
    with pytest.raises(UnsupportedByBackbone, match="aim needs an encoder that supports 'attention'"):
        AIM(blind, AIM.Config())


def test_collapsed_state_has_the_stated_loss() -> None:
    """The mean colour is zero where the target is normalised; in plain pixels the loss depends on the images."""
    method = build("aim", norm_pix=True)
    make_zero_(method.head_pred)
    check_stated(method, {"loss": losses_of(method)})
    assert build("aim", norm_pix=False).collapsed(BATCH) == {}


ORDERS = {  # of a grid of 3 rows and 4 columns, by hand
    "row": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    "column": [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11],
    "snake": [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11],
    "diagonal": [0, 4, 1, 8, 5, 2, 9, 6, 3, 10, 7, 11],
    "spiral": [0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6],
}


@pytest.mark.parametrize("name", ORDERS)
def test_orders_by_hand(name: str) -> None:
    assert patch_order(name, (3, 4)).tolist() == ORDERS[name]


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 4), (8, 8), (6, 9), (14, 14)])
@pytest.mark.parametrize("name", patch_orders.ORDERS)
def test_an_order_has_each_patch_once(name: str, grid: tuple[int, int]) -> None:
    assert sorted(patch_order(name, grid).tolist()) == list(range(grid[0] * grid[1]))


def test_a_hilbert_curve_goes_from_neighbour_to_neighbour() -> None:
    for side in (2, 4, 8, 16):
        rows, columns = (part.tolist() for part in (patch_order("hilbert", (side, side)) // side,
                                                     patch_order("hilbert", (side, side)) % side))  # fmt: skip
        steps = [abs(a - b) + abs(c - d) for a, b, c, d in zip(rows, rows[1:], columns, columns[1:], strict=False)]
        assert set(steps) == {1}
        # Each quarter is finished before the next one begins.
        quarters = [2 * (r >= side // 2) + (c >= side // 2) for r, c in zip(rows, columns, strict=True)]
        assert len([i for i in range(1, len(quarters)) if quarters[i] != quarters[i - 1]]) == 3


def test_the_loss_in_another_order() -> None:
    """Against NumPy: sequence element k + 1 of the order is predicted from the elements 0 to k, and from nothing later."""
    method = build("aim", patch_order="spiral").double()
    assert isinstance(method, AIM)
    images = batch(method, slice(0, 16)).views["image"].double()
    order = patch_order("spiral", (4, 4)).tolist()
    with torch.no_grad():
        predicted, prefixes = method.predict(images, step())
        changed = images.clone()
        row, column = divmod(order[9], 4)
        changed[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
        after, _ = method.predict(changed, step())
    moved = (predicted - after).abs().amax(-1) > 1e-9
    for i, prefix in enumerate(prefixes.tolist()):
        assert moved[i, 9:].any()
        if prefix <= 9:
            assert not moved[i, :9].any()
    target = numpy_patches(images.numpy(), 8)[:, order]
    target = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, ddof=1, keepdims=True) + 1e-6)
    errors = [
        ((predicted[i, k - 1].numpy() - target[i, k]) ** 2).mean()
        for i, prefix in enumerate(prefixes.tolist())
        for k in range(prefix, 16)
    ]
    losses = method(Batch(views={"image": images}, index=torch.arange(16)), step())
    assert losses.total.item() == pytest.approx(np.mean(errors), rel=1e-5)
    pictures = method.pictures(Batch(views={"image": images}, index=torch.arange(16)), step())
    hidden = (pictures["prefix"] == 0).all(1).reshape(16, 4, 8, 4, 8).all(-1).all(2).flatten(1)
    for i, prefix in enumerate(prefixes.tolist()):
        assert set(hidden[i].nonzero().flatten().tolist()) == set(order[prefix:])
