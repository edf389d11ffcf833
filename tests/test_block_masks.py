"""Blockwise masks against a simulation, one rectangle after another, of what BEiT's and DINOv2's text says."""

import math

import numpy as np
import pytest
import torch

from ssl_pretrain.parts.block_masks import ATTEMPTS, block_masks, completed, listed, stratified_ratios


def one_mask(
    rng: np.random.Generator, grid: tuple[int, int], wanted: float, smallest: int, largest: float
) -> np.ndarray:
    """A mask made in plain loops."""
    height, width = grid
    mask = np.zeros(grid, dtype=bool)
    while mask.sum() < wanted:
        limit = min(wanted - mask.sum(), largest)
        for _ in range(10):
            area = rng.uniform(min(smallest, limit), max(smallest, limit))
            ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h >= height or w >= width:
                continue
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            new = h * w - mask[top : top + h, left : left + w].sum()
            if 0 < new <= limit:
                mask[top : top + h, left : left + w] = True
                break
        else:
            break
    return mask


def drawn(grid: tuple[int, int], wanted: torch.Tensor, smallest: int, largest: float, seed: int = 0) -> torch.Tensor:
    noise = torch.rand(len(wanted), ATTEMPTS, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return block_masks(noise, grid, wanted, smallest=smallest, largest=largest)


@pytest.mark.parametrize(
    ("grid", "wanted", "smallest", "largest"),
    [((14, 14), 98, 4, 98.0), ((14, 14), 58.8, 16, math.inf), ((6, 10), 20, 4, 30.0)],
    ids=["dinov2", "ibot", "oblong"],
)
def test_counts_and_coverage_are_those_of_the_loops(
    grid: tuple[int, int], wanted: float, smallest: int, largest: float
) -> None:
    many = 1200
    rng = np.random.default_rng(1)
    loops = np.stack([one_mask(rng, grid, wanted, smallest, largest) for _ in range(many)])
    masks = drawn(grid, torch.full((many,), wanted, dtype=torch.float64), smallest, largest).unflatten(1, grid).numpy()
    ours, theirs = masks.sum((1, 2)), loops.sum((1, 2))
    assert ours.max() <= wanted
    # The counts' distributions: a Kolmogorov-Smirnov distance of 0.08 has a chance of 1 in 1,000 at two times 1,200.
    levels = np.arange(math.ceil(wanted) + 1)
    apart = np.abs((ours[:, None] <= levels).mean(0) - (theirs[:, None] <= levels).mean(0)).max()
    assert apart < 0.08
    # Every position as often: five standard deviations of a difference of two shares.
    noise = 5 * np.sqrt(2 * 0.25 / many)
    np.testing.assert_allclose(masks.mean(0), loops.mean(0), atol=noise)
    assert loops.mean(0).std() > 0.05  # corners are rarer than the middle: uniform masks would fail
    # As connected: neighbours that are both masked.
    both = [(m[:, 1:] & m[:, :-1]).sum((1, 2)).mean() for m in (masks, loops)]
    assert both[0] == pytest.approx(both[1], rel=0.03)


def test_the_wanted_number_is_never_passed_and_each_mask_has_its_own() -> None:
    wanted = torch.arange(0, 49).repeat(40)
    counts = drawn((7, 7), wanted, 4, math.inf).sum(1)
    assert bool((counts <= wanted).all())
    assert bool((counts[wanted == 0] == 0).all())
    short = (wanted - counts)[(wanted > 0) & (wanted < 30)]
    assert short.float().mean() < 1
    assert bool((counts[wanted >= 8] > 0).all())


def test_a_mask_is_a_function_of_its_own_noise() -> None:
    noise = torch.rand(8, ATTEMPTS, 4, generator=torch.Generator().manual_seed(0))
    wanted = torch.full((8,), 20.0)
    whole = block_masks(noise, (8, 8), wanted, smallest=4)
    assert torch.equal(block_masks(noise[3:5], (8, 8), wanted[3:5], smallest=4), whole[3:5])
    assert len({tuple(row) for row in whole.tolist()}) == 8


def test_ten_failures_end_a_mask() -> None:
    noise = torch.rand(1, ATTEMPTS, 4, generator=torch.Generator().manual_seed(0))
    noise[0, :10, :2] = torch.tensor([0.999, 0.5])  # an area of the whole grid: never smaller than it both ways
    noise[0, 10:, 0] = 0.0
    wanted = torch.tensor([16.0])
    assert block_masks(noise, (4, 4), wanted, smallest=4).sum() == 0
    assert block_masks(noise[:, 1:], (4, 4), wanted, smallest=4).sum() >= 4


def test_completed_masks_have_exactly_the_wanted_number_and_keep_what_they_had() -> None:
    wanted = torch.tensor([0, 5, 13, 24, 30]).repeat(200)
    blocks = drawn((6, 6), wanted, 4, 18.0)
    noise = torch.rand(1000, 36, generator=torch.Generator().manual_seed(2))
    full = completed(blocks, wanted, noise)
    assert torch.equal(full.sum(1), wanted)
    assert bool((full | ~blocks).all())
    # From nothing: uniformly random.
    random = completed(torch.zeros(1000, 36, dtype=torch.bool), torch.full((1000,), 9), noise)
    assert bool((random.sum(1) == 9).all())
    np.testing.assert_allclose(random.float().mean(0).numpy(), 0.25, atol=5 * math.sqrt(0.25 * 0.75 / 1000))


def test_stratified_ratios_take_each_stratum_once() -> None:
    generator = torch.Generator().manual_seed(0)
    order, noise = torch.rand(21, generator=generator), torch.rand(21, generator=generator)
    ratios = stratified_ratios(order, noise, 0.5, (0.1, 0.5)).numpy()
    assert (ratios == 0).sum() == 11
    edges = np.linspace(0.1, 0.5, 11)
    in_order = np.sort(ratios[ratios > 0])
    assert ((in_order >= edges[:-1] - 1e-6) & (in_order <= edges[1:] + 1e-6)).all()
    assert not (np.diff(ratios[ratios > 0]) > 0).all()  # in a random order
    often = torch.stack(
        [stratified_ratios(*torch.rand(2, 8, generator=generator), 0.5, (0.1, 0.5)) > 0 for _ in range(2000)]
    )
    np.testing.assert_allclose(often.float().mean(0).numpy(), 0.5, atol=5 * math.sqrt(0.25 / 2000))
    assert bool((stratified_ratios(order[:1], noise[:1], 0.5, (0.1, 0.5)) == 0).all())  # int(1 * 0.5) views of one


def test_lists_hold_the_masked_patches_and_say_what_is_padding() -> None:
    masks = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]], dtype=torch.bool)
    index, counted = listed(masks, 3)
    assert counted.tolist() == [[True, True, True], [False, False, False], [True, True, False]]
    assert index[0].tolist() == [1, 3, 4]
    assert index[2, :2].tolist() == [0, 4]
    assert index.shape == (3, 3)
