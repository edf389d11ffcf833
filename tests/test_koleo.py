"""KoLeo and the kernel-density estimate against float64 NumPy, and over two real processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_pretrain.errors import UserError
from ssl_pretrain.parts.koleo import DUPLICATES, kde, koleo

TWO = """
import sys, torch
from ssl_pretrain import distributed
from ssl_pretrain.parts.koleo import kde, koleo
with distributed.world() as here:
    x = torch.load(sys.argv[1])
    share = slice(here.rank * len(x) // 2, (here.rank + 1) * len(x) // 2)
    found = {}
    for name, loss in (("koleo", koleo), ("kde", lambda v: kde(v, 5.0))):
        mine = x[share].clone().requires_grad_()
        value = loss(mine)
        value.backward()
        found[name] = (distributed.mean(value.detach()), distributed.gather(mine.grad) / 2)
    if here.first:
        torch.save(found, sys.argv[2])
"""


def numpy_koleo(x: np.ndarray) -> float:
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    total = 0.0
    for i in range(len(x)):
        total -= np.log(min(np.linalg.norm(x[i] - x[j]) for j in range(len(x)) if j != i) + 1e-8)
    return total / len(x)


def numpy_kde(x: np.ndarray, kappa: float) -> float:
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    density = [np.mean([np.exp(kappa * x[i] @ x[j]) for j in range(len(x)) if j != i]) for i in range(len(x))]
    return float(np.mean(np.log(density)))


def slope(f: object, x: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    for i in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[i] = 1e-6
        out[i] = (f(x + step) - f(x - step)) / 2e-6
    return out


def vectors(count: int = 7, dim: int = 5) -> torch.Tensor:
    return 3 * torch.randn(count, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1


PAIRS = {
    "koleo": (koleo, numpy_koleo),
    "kde 5": (lambda x: kde(x, 5.0), lambda x: numpy_kde(x, 5.0)),
    "kde 0.5": (lambda x: kde(x, 0.5), lambda x: numpy_kde(x, 0.5)),
}


@pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)
def test_value_and_gradient(ours: object, theirs: object) -> None:
    x = vectors().requires_grad_()
    value = ours(x)
    value.backward()
    assert float(value.detach()) == pytest.approx(theirs(x.detach().numpy()), rel=1e-10)
    np.testing.assert_allclose(x.grad.numpy(), slope(theirs, x.detach().numpy()), rtol=1e-5, atol=1e-8)


def test_in_bfloat16_autocast_the_neighbours_are_those_of_float32() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    expected = koleo(x), kde(x, 5.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = koleo(x), kde(x, 5.0)
        half = koleo(x.bfloat16())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert half.dtype == torch.float32


def test_duplicates_are_finite_and_leave_the_others_their_gradients() -> None:
    x = vectors().float()
    x[1] = x[0]
    x.requires_grad_()
    value = koleo(x)
    value.backward()
    alone = [i for i in range(7) if i > 1]
    rest = numpy_koleo(x.detach().double().numpy())
    assert float(value.detach()) == pytest.approx(rest, rel=1e-4)
    assert bool(torch.isfinite(x.grad).all())
    assert x.grad[alone].abs().sum() > 0
    assert x.grad.abs().max() < 100
    same = vectors(1).float().expand(6, -1)
    assert float(koleo(same)) == pytest.approx(-np.log(DUPLICATES), rel=1e-6)
    assert float(kde(same, 5.0)) == pytest.approx(5.0, rel=1e-6)


def test_spread_vectors_are_better_than_huddled_ones() -> None:
    wide = torch.eye(6)
    huddled = torch.ones(6, 6) + 0.1 * wide
    assert koleo(wide) < koleo(huddled)
    assert kde(wide, 5.0) < kde(huddled, 5.0)
    assert float(koleo(wide)) == pytest.approx(-np.log(np.sqrt(2)), abs=1e-6)
    assert float(kde(wide, 5.0)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("loss", [koleo, lambda x: kde(x, 5.0)], ids=["koleo", "kde"])
def test_one_vector_is_a_mistake_with_a_remedy(loss: object) -> None:
    with pytest.raises(UserError, match=r"--batch-size of at least 2, or --regulariser-weight 0"):
        loss(vectors(1))


def test_two_processes_have_the_loss_and_gradient_of_one(tmp_path: Path) -> None:
    x = vectors(8)
    torch.save(x, tmp_path / "x.pt")
    place = {"SSL_PRETRAIN_RENDEZVOUS": (tmp_path / "rendezvous").as_uri(), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, tmp_path / "x.pt", tmp_path / "found.pt"],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    found = torch.load(tmp_path / "found.pt")
    for name, theirs in (("koleo", numpy_koleo), ("kde", lambda v: numpy_kde(v, 5.0))):
        value, gradient = found[name]
        assert float(value) == pytest.approx(theirs(x.numpy()), rel=1e-10)
        np.testing.assert_allclose(gradient.numpy(), slope(theirs, x.numpy()), rtol=1e-5, atol=1e-8)
