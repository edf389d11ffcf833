"""Sinkhorn-Knopp against float64 NumPy of the plain algorithm, and two processes against one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_pretrain import memory
from ssl_pretrain.parts.sinkhorn import sinkhorn

EPSILON = 0.05


def numpy_sinkhorn(logits: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    """Section 3.1 as it stands, on probabilities: columns to 1 / K each, then rows to 1 / N each; times N at the end."""
    n, k = logits.shape
    q = np.exp(logits / temperature)
    q /= q.sum()
    for _ in range(iterations):
        q = q / q.sum(0, keepdims=True) / k
        q = q / q.sum(1, keepdims=True) / n
    return q * n


def cosines(n: int = 40, k: int = 7) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (n, k))


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_it_is_the_plain_algorithm(iterations: int) -> None:
    logits = cosines()
    found = sinkhorn(torch.tensor(logits), EPSILON, iterations)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), numpy_sinkhorn(logits, EPSILON, iterations), rtol=2e-4, atol=1e-7)


def test_rows_are_distributions_and_columns_come_out_even() -> None:
    logits = torch.tensor(cosines(60, 5))
    logits[:, 0] += 0.5  # a prototype that all like best
    plain = torch.softmax(logits / EPSILON, dim=1).sum(0)
    found = sinkhorn(logits, EPSILON, 3)
    torch.testing.assert_close(found.sum(1), torch.ones(60), rtol=1e-5, atol=0)
    uneven = [(column.max() / column.min()).item() for column in (plain, found.sum(0))]
    assert uneven[0] > 4
    assert uneven[1] < 2
    torch.testing.assert_close(sinkhorn(logits, EPSILON, 100).sum(0), torch.full((5,), 12.0), rtol=1e-2, atol=0)


def test_logits_of_ten_thousand_do_not_overflow() -> None:
    logits = torch.tensor(cosines()) * 1e4
    found = sinkhorn(logits, 1.0)
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found.sum(1), torch.ones(40), rtol=1e-5, atol=0)
    # where nobody shares: each row its own prototype, exactly
    torch.testing.assert_close(sinkhorn(torch.eye(6) * 1e4, 1.0), torch.eye(6))


def test_no_common_shift_changes_the_result() -> None:
    logits = torch.tensor(cosines())
    once = sinkhorn(logits, EPSILON)
    torch.testing.assert_close(sinkhorn(logits + 3.0, EPSILON), once, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(sinkhorn(logits + torch.arange(7.0) / 7, EPSILON), once, rtol=1e-3, atol=1e-6)


def test_rows_that_do_not_count_are_as_if_absent() -> None:
    logits = torch.tensor(cosines())
    counted = torch.rand(40, generator=torch.Generator().manual_seed(1)) < 0.6
    found = sinkhorn(torch.where(counted[:, None], logits, 100.0), EPSILON, counted=counted)
    torch.testing.assert_close(found[counted], sinkhorn(logits[counted], EPSILON), rtol=1e-5, atol=1e-7)
    assert not found[~counted].any()


def test_where_no_row_counts_all_are_zero() -> None:
    found = sinkhorn(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), EPSILON, 3, torch.zeros(3).bool())
    assert not found.any()


def test_worked_on_a_few_rows_at_a_time_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(23, 17, generator=torch.Generator().manual_seed(0))
    counted = torch.arange(23) % 4 > 0
    whole = sinkhorn(logits, EPSILON, 3, counted)
    monkeypatch.setattr(memory, "CACHED", 2 * 17)
    torch.testing.assert_close(sinkhorn(logits, EPSILON, 3, counted), whole, rtol=1e-5, atol=1e-8)


def test_it_carries_no_gradient() -> None:
    assert not sinkhorn(torch.tensor(cosines(), requires_grad=True), EPSILON).requires_grad


RANK = """
import sys, torch
from ssl_pretrain import distributed
from ssl_pretrain.parts.sinkhorn import sinkhorn
logits, counted = torch.load(sys.argv[1])
with distributed.world() as here:
    # Unequal shares: 10 rows here, 30 there.
    rows = slice(0, 10) if here.rank == 0 else slice(10, 40)
    found = sinkhorn(logits[rows], 0.05), sinkhorn(logits[rows], 0.05, 3, counted[rows])
    torch.save(torch.stack(found), f"{sys.argv[2]}{here.rank}.pt")
"""


def test_two_processes_give_the_rows_of_one(tmp_path: Path) -> None:
    logits, counted = torch.tensor(cosines()), torch.arange(40) % 3 > 0
    torch.save((logits, counted), tmp_path / "in.pt")
    place = {"SSL_PRETRAIN_RENDEZVOUS": (tmp_path / "meet").as_uri(), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, tmp_path / "in.pt", tmp_path / "out"],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    found, counting = torch.cat([torch.load(tmp_path / f"out{rank}.pt") for rank in (0, 1)], dim=1)
    torch.testing.assert_close(found, sinkhorn(logits, EPSILON), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(counting, sinkhorn(logits, EPSILON, 3, counted), rtol=1e-5, atol=1e-7)
