"""SimMIM: its masks against their distribution, its loss and gradient against float64 NumPy written from the paper."""

import numpy as np
import pytest
import torch
from ssl_pretrain.methods.simmim import SimMIM

from ssl_pretrain import backbones
from ssl_pretrain.conformance import one_step
from ssl_pretrain.errors import UserError
from ssl_pretrain.parts.patches import unpatchify
from ssl_pretrain.pretext import Batch, Step

KERNELS = 113  # of a step: python tests/kernels.py simmim
DEVICE_KERNELS = 135  # with the optimiser, on an accelerator: python tests/device.py simmim


def build(size: tuple[int, int] = (32, 48), patch: int = 8, **knobs: object) -> SimMIM:
    torch.manual_seed(0)
    options = {**backbones.defaults("vit_micro"), "dim": 32, "patch_size": patch, "depth": 2}
    return SimMIM(backbones.build("vit_micro", image_size=size, **options), SimMIM.Config(**knobs)).double()


def step(batch: int = 4, noise: int = 1, rows: slice | None = None) -> Step:
    rows = slice(0, batch) if rows is None else rows
    return Step(step=0, total=10, noise=noise, rows=rows, batch_size=batch, device=torch.device("cpu"))


def images(batch: int = 4, size: tuple[int, int] = (32, 48)) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def a_batch(x: torch.Tensor) -> Batch:
    return Batch(views={"image": x}, index=torch.arange(len(x)))


@pytest.mark.parametrize(
    ("size", "patch", "unit", "masked"),
    [
        ((224, 224), 16, 2, 120),  # 30 of 7 x 7 squares of 2 x 2 patches, the paper's
        ((192, 192), 4, 8, 22 * 64),  # 22 of 6 x 6 squares of 8 x 8: the paper's Swin, were it a ViT
        ((32, 32), 4, 1, 39),  # a sixth of 32 pixels is one patch of 4
        ((96, 96), 8, 2, 22 * 4),
    ],
)
def test_squares_are_masked_as_a_whole_in_the_papers_number(
    size: tuple[int, int], patch: int, unit: int, masked: int
) -> None:
    found, counted = build(size, patch).mask(torch.zeros(6, 3, *size), step(6))
    squares = found.numpy().reshape(6, size[0] // patch // unit, unit, size[1] // patch // unit, unit)
    share = squares.mean((2, 4))
    assert set(np.unique(share)) == {0.0, 1.0}
    assert (found.sum(1) == masked).all()
    assert float(counted) == masked


def test_every_square_is_masked_equally_often_and_none_with_its_neighbour() -> None:
    method, draws = build((32, 32), 4), 4000
    found = method.mask(torch.zeros(draws, 3, 32, 32), step(draws))[0].numpy()
    share = 39 / 64
    deviation = np.sqrt(share * (1 - share) / draws)
    assert np.abs(found.mean(0) - share).max() < 4.5 * deviation
    together = (found[:, :-1] & found[:, 1:]).mean(0)
    expected = 39 * 38 / (64 * 63)
    assert np.abs(together - expected).max() < 4.5 * np.sqrt(expected * (1 - expected) / draws)


def test_squares_at_the_edge_are_cut_off_and_the_count_is_of_the_global_batch() -> None:
    method = build((104, 104), 8)  # 13 x 13 patches under 7 x 7 squares of 2 x 2
    found, counted = method.mask(torch.zeros(8, 3, 104, 104), step(8))
    numbers = found.sum(1).double()
    assert len(set(numbers.tolist())) > 1
    assert float(counted) == pytest.approx(float(numbers.mean()))
    part, same = method.mask(torch.zeros(3, 3, 104, 104), step(8, rows=slice(2, 5)))
    assert torch.equal(part, found[2:5])
    assert torch.equal(same, counted)


@pytest.mark.parametrize(("size", "patch"), [((32, 48), 8), ((104, 104), 8)])
def test_loss_and_gradient_against_numpy(size: tuple[int, int], patch: int) -> None:
    method, x = build(size, patch), images(4, size)
    found = method(a_batch(x), step())
    found.total.backward()
    masked, _ = method.mask(x, step())
    with torch.no_grad():
        painted = method.paint(x, masked, step()).numpy()
    # The paper's form: |x - painted| over all pixels, a mask of pixels, divided by how many it hides and by the channels.
    whole, mask = np.zeros(x.shape), np.zeros((4, *size))
    target = x.numpy()
    for n in range(painted.shape[1]):
        top, left = n // (size[1] // patch) * patch, n % (size[1] // patch) * patch
        block = painted[:, n].reshape(4, patch, patch, 3).transpose(0, 3, 1, 2)
        whole[:, :, top : top + patch, left : left + patch] = block
        mask[:, top : top + patch, left : left + patch] = masked[:, n].numpy()[:, None, None]
    errors = np.abs(target - whole) * mask[:, None]
    assert float(found.total.detach()) == pytest.approx(errors.sum() / mask.sum() / 3, rel=1e-5)
    np.testing.assert_allclose(found.per_sample.mean(), found.total.detach(), rtol=1e-6)
    sign = np.sign(whole - target) * mask[:, None] / mask.sum() / 3
    gradient = np.zeros((patch, patch, 3))
    for top in range(0, size[0], patch):
        for left in range(0, size[1], patch):
            gradient += sign[:, :, top : top + patch, left : left + patch].sum(0).transpose(1, 2, 0)
    np.testing.assert_allclose(method.head.bias.grad.numpy(), gradient.flatten(), rtol=1e-4, atol=1e-7)


def test_the_encoder_does_not_see_what_is_masked_and_the_loss_not_what_is_visible() -> None:
    method, x = build(), images()
    masked, _ = method.mask(x, step())
    pixels = masked.unflatten(1, (4, 6)).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    with torch.no_grad():
        before = method.paint(x, masked, step())
        assert torch.equal(method.paint(torch.where(pixels, x + 1, x), masked, step()), before)
        assert not torch.equal(method.paint(torch.where(pixels, x, x + 1), masked, step()), before)
        method.head.weight.zero_()  # a constant painting: only the target depends on the image
        still = method(a_batch(x), step()).total
        assert torch.equal(method(a_batch(torch.where(pixels, x, x + 1)), step()).total, still)
        assert not torch.equal(method(a_batch(torch.where(pixels, x + 1, x)), step()).total, still)


def around(x: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased standard deviation of each channel over the pixels around each pixel that the image has."""
    mean, deviation = np.zeros_like(x), np.zeros_like(x)
    half = side // 2
    for y in range(x.shape[2]):
        for z in range(x.shape[3]):
            near = x[:, :, max(0, y - half) : y + half + 1, max(0, z - half) : z + half + 1]
            mean[:, :, y, z] = near.mean((2, 3))
            deviation[:, :, y, z] = np.sqrt(near.var((2, 3), ddof=1) + 1e-6)
    return mean, deviation


@pytest.mark.parametrize("side", [3, 47])
def test_the_target_may_be_normalised_around_each_pixel(side: int) -> None:
    """The target of Swin V2, against NumPy: the loss, and the pictures in the colours of the image."""
    method, x = build(norm_target=side), images(2)
    mean, deviation = around(x.numpy(), side)
    method.head.weight.data.zero_()
    method.head.bias.data.fill_(0.25)  # a constant painting
    masked, _ = method.mask(x, step(2))
    pixels = masked.unflatten(1, (4, 6)).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(x).numpy()
    errors = np.abs((x.numpy() - mean) / deviation - 0.25)
    assert float(method(a_batch(x), step(2)).total.detach()) == pytest.approx(errors[pixels].mean(), rel=1e-4)
    shown = method.pictures(a_batch(x), step(2))["reconstruction"].numpy()
    np.testing.assert_allclose(shown[pixels], (0.25 * deviation + mean)[pixels], rtol=1e-3, atol=1e-4)
    assert np.allclose(shown[~pixels], x.numpy()[~pixels], atol=1e-6)


def test_a_flat_picture_has_a_finite_normalised_target() -> None:
    method = build(norm_target=47).float()
    losses = method(a_batch(torch.full((2, 3, 32, 48), 1.7)), step(2))
    losses.total.backward()
    assert torch.isfinite(losses.total)
    assert float(losses.total.detach()) < 10


@pytest.mark.parametrize("side", [2, 46, 1])
def test_a_neighbourhood_that_cannot_be(side: int) -> None:
    with pytest.raises(UserError, match=f"--norm-target is {side}; it must be 0, or an odd number"):
        SimMIM.Config(norm_target=side)


# ---- On a Swin Transformer: a unit is a position of the last map, of many patches.


def swin(size: tuple[int, int] = (64, 96), **knobs: object) -> SimMIM:
    torch.manual_seed(0)
    options = {"dim": 16, "depths": (1, 2), "heads": (1, 2), "window": 4, "patch_size": 2}
    return SimMIM(backbones.build("swin_micro", image_size=size, **options), SimMIM.Config(**knobs)).double()


def test_swin_masks_units_and_replaces_embeddings_of_the_first_stage() -> None:
    method, x = swin(), images(4, (64, 96))
    assert method.mask_token.shape == (16,)
    assert method.encoder.unit == (4, 4)
    units, counted = method.mask(x, step())
    # a sixth of 64 pixels is 10.7, the nearest multiple of 4 is 12: 6 x 8 squares of 3 x 3 units, cut off at the edges
    assert units.shape == (4, 16 * 24)
    assert float(counted) == pytest.approx(float(units.sum(1).double().mean()))
    pixels = units.unflatten(1, (16, 24)).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    with torch.no_grad():
        before = method.paint(x, units, step())
        assert torch.equal(method.paint(torch.where(pixels, x + 1, x), units, step()), before)
        assert not torch.equal(method.paint(torch.where(pixels, x, x + 1), units, step()), before)


def test_the_papers_swin_masks_22_of_36_units() -> None:
    torch.manual_seed(0)
    options = {"dim": 8, "depths": (1, 1, 1, 1), "heads": (1, 1, 1, 1)}
    encoder = backbones.build("swin_tiny", image_size=(192, 192), **options)
    units, counted = SimMIM(encoder, SimMIM.Config()).mask(torch.zeros(5, 3, 192, 192), step(5))
    assert units.shape == (5, 36)
    assert (units.sum(1) == 22).all()
    assert float(counted) == 22


def test_the_head_is_a_convolution_and_a_pixel_shuffle() -> None:
    """As released, except for the order of its outputs: there channel, row, column; here row, column, channel."""
    method, x = swin(), images(2, (64, 96))
    units, _ = method.mask(x, step(2))
    side, width = method.encoder.stride[0], method.encoder.dim
    order = torch.arange(side * side * 3).view(side, side, 3).permute(2, 0, 1).flatten()
    weight, bias = method.head.weight[order].view(-1, width, 1, 1), method.head.bias[order]
    with torch.no_grad():
        seen = method.encoder(x, replace=(units, method.mask_token))
        painted = torch.nn.functional.conv2d(seen.patches.mT.unflatten(2, seen.grid), weight, bias)
        whole = torch.nn.functional.pixel_shuffle(painted, side)
        ours = unpatchify(method.paint(x, units, step(2)), method.encoder.stride, seen.grid)
    torch.testing.assert_close(ours, whole)


def test_the_masks_ratio_is_a_knob() -> None:
    x = torch.zeros(4, 3, 32, 32)
    assert [int(build((32, 32), 8, mask_ratio=r).mask(x, step())[0].sum()) // 4 for r in (0.3, 0.6, 1.0)] == [5, 10, 16]


def test_pictures_keep_what_was_visible() -> None:
    method, x = build(), images()
    shown = method.pictures(a_batch(x), step())
    assert list(shown) == ["input", "masked", "reconstruction"]
    masked, _ = method.mask(x, step())
    pixels = masked.unflatten(1, (4, 6)).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(x)
    for name in ("masked", "reconstruction"):
        assert torch.allclose(shown[name].double()[~pixels], x[~pixels], atol=1e-6)
        assert not torch.allclose(shown[name].double()[pixels], x[pixels], atol=1e-6)
    assert not shown["masked"][pixels].any()


def test_other_image_sizes_than_the_configured_one() -> None:
    assert torch.isfinite(build().float()(a_batch(images(2, (48, 32)).float()), step(2)).total)


@pytest.mark.parametrize("knobs", [{"mask_ratio": 0.0}, {"mask_ratio": 1.1}, {"mask_unit": 0}])
def test_knobs_that_cannot_be(knobs: dict) -> None:
    with pytest.raises(UserError, match="--mask-"):
        build(**knobs)


def test_collapsed_state_has_the_stated_loss() -> None:
    """None is stated. A head that paints one colour everywhere has the mean absolute deviation of the images' pixels as
    its loss, and these are not normalised by patch, so the value depends on the data. Such a model has no other collapse.
    """
    assert one_step.build("simmim").collapsed(one_step.BATCH) == {}
