"""SimMIM: its masks against their distribution, its loss and gradient against float64 NumPy written from the paper."""

import numpy as np
import pytest
import torch
from ssl_pretrain.methods.simmim import SimMIM

from ssl_pretrain import backbones
from ssl_pretrain.conformance import one_step
from ssl_pretrain.errors import UserError
from ssl_pretrain.pretext import Batch, Step

KERNELS = 113  # of a step: python tests/kernels.py simmim


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
