"""The stateless order of samples: a bijection for every size and key, uniform over keys, the same wherever it is
entered."""

import time

import numpy as np
import pytest
from scipy.stats import chi2

from ssl_pretrain.data.sampler import permute, samples

LARGE = 10**10


def p_value(counts: np.ndarray) -> float:
    """Of the hypothesis that all cells are equally likely (Pearson's chi-square)."""
    expected = counts.sum() / counts.size
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), counts.size - 1))


def test_bijection_for_every_small_size_and_some_large():
    for size in [*range(1, 200), 1000, 4095, 4096, 4097, 65_536, 100_003]:
        for key in (0, 2**63 - 1, size * 7919):
            assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size)), (size, key)


def test_no_two_positions_of_ten_billion_meet_and_all_of_the_range_is_used():
    positions = np.concatenate([np.arange(500_000), LARGE - 1 - np.arange(500_000)])
    index = permute(positions, LARGE, 42)
    assert len(np.unique(index)) == len(positions)
    assert index.min() >= 0
    assert index.max() < LARGE
    assert p_value(np.bincount(index * 100 // LARGE, minlength=100)) > 1e-4


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 10, 16, 17, 64])
def test_each_position_goes_everywhere_alike_over_keys(size: int):
    orders = np.stack([permute(np.arange(size), size, key) for key in range(1500)])
    worst = min(p_value(np.bincount(orders[:, position], minlength=size)) for position in range(size))
    assert worst > 1e-3 / size


@pytest.mark.parametrize("size", [5, 6, 11])
def test_pairs_of_positions_go_everywhere_alike_over_keys(size: int):
    orders = np.stack([permute(np.arange(3), size, key) for key in range(3000)])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        pairs = np.bincount(orders[:, i] * size + orders[:, j], minlength=size * size).reshape(size, size)
        assert p_value(pairs[~np.eye(size, dtype=bool)]) > 1e-4


def test_an_order_shows_no_trend_and_no_neighbours():
    size = 50_000
    order = permute(np.arange(size), size, 7)
    # of a random permutation the rank correlation with any other fixed order is normal with sd 1 / sqrt(size)
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 4.5 / np.sqrt(size)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4.5 / np.sqrt(size)
    assert (np.abs(np.diff(order)) == 1).sum() < 20  # 2 expected
    assert (permute(np.arange(size), size, 8) == order).sum() < 12  # 1 expected


def test_shape_is_kept_and_bad_arguments_are_refused():
    assert permute(np.zeros((2, 3), dtype=np.int32), 9, 1).shape == (2, 3)
    assert permute(np.empty(0, dtype=np.int64), 9, 1).shape == (0,)
    for positions, size in ((np.array([9]), 9), (np.array([-1]), 9), (np.array([0]), 0)):
        with pytest.raises(ValueError, match=r"positions|permutation"):
            permute(positions, size, 1)


@pytest.mark.parametrize("size", [1, 3, 10, 1000])
def test_the_stream_is_whole_epochs_in_orders_of_their_own(size: int):
    epoch, index = samples(0, 4 * size, size, seed=3)
    assert np.array_equal(epoch, np.repeat(np.arange(4), size))
    orders = index.reshape(4, size)
    assert (np.sort(orders, axis=1) == np.arange(size)).all()
    if size >= 10:
        assert len({order.tobytes() for order in orders}) == 4
        assert not np.array_equal(orders[0], samples(0, size, size, seed=4)[1])


def test_the_stream_is_the_same_wherever_it_is_entered():
    epoch, index = samples(0, 300, 70, seed=11)
    for start, count in ((0, 1), (69, 2), (65, 150), (123, 70), (299, 1)):
        e, i = samples(start, count, 70, seed=11)
        assert np.array_equal(e, epoch[start : start + count])
        assert np.array_equal(i, index[start : start + count])


def test_a_million_positions_a_second():
    positions = np.random.default_rng(0).integers(0, 1_281_167, 300_000)
    took = []
    for _ in range(3):
        start = time.process_time()
        permute(positions, 1_281_167, 5)
        took.append(time.process_time() - start)
    assert len(positions) / min(took) > 1e6
