"""Contrastive losses against float64 NumPy written from the papers' equations."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_pretrain.errors import UserError
from ssl_pretrain.parts import nt_xent as module
from ssl_pretrain.parts.nt_xent import contrast

TEMPERATURE, SIGMA = 0.2, 0.5


def numpy_losses(first: np.ndarray, second: np.ndarray, kind: str) -> np.ndarray:
    """Row by row, as the equations stand."""
    n = len(first)
    z = np.concatenate([first, second])
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    positives = np.exp([z[i] @ z[i + n] / SIGMA for i in range(n)])
    out = np.empty(2 * n)
    for i in range(2 * n):
        p = (i + n) % (2 * n)
        left_out = {i} if kind == "infonce" else {i, p}
        total = sum(math.exp(z[i] @ z[k] / TEMPERATURE) for k in range(2 * n) if k not in left_out)
        weight = 2 - positives[i % n] / positives.mean() if kind == "dclw" else 1.0
        out[i] = -weight * (z[i] @ z[p]) / TEMPERATURE + math.log(total)
    return out


@pytest.mark.parametrize("kind", ["infonce", "dcl", "dclw"])
def test_value_and_gradient_are_those_of_the_equations(kind: str) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 5, 3))
    a, b = (torch.tensor(x, requires_grad=True) for x in (first, second))
    found = contrast(a, b, TEMPERATURE, kind, SIGMA)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.detach().numpy(), numpy_losses(first, second, kind), rtol=1e-12)
    found.mean().backward()
    assert a.grad is not None
    for row, column in ((0, 0), (3, 2), (4, 1)):
        moved = []
        for sign in (1, -1):
            x = first.copy()
            x[row, column] += sign * 1e-6
            moved.append(numpy_losses(x, second, kind).mean())
        assert a.grad[row, column].item() == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-5, abs=1e-9)


def test_weights_of_decoupled_positives_may_be_constants() -> None:
    """The same losses, and the gradient of positives whose weights stay what they are as the embeddings move."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 5, 3))
    a, b = (torch.tensor(x, requires_grad=True) for x in (first, second))
    found = contrast(a, b, TEMPERATURE, "dclw", SIGMA, detach_weights=True)
    np.testing.assert_allclose(found.detach().numpy(), numpy_losses(first, second, "dclw"), rtol=1e-12)
    found.mean().backward()
    assert a.grad is not None

    def cosines(x: np.ndarray) -> np.ndarray:
        return (x * second).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(second, axis=1)

    fixed = 2 - np.exp(cosines(first) / SIGMA) / np.exp(cosines(first) / SIGMA).mean()

    def of_constants(x: np.ndarray) -> float:
        """dcl with its positives, of weight 1, replaced by those of the fixed weights."""
        plain = numpy_losses(x, second, "dcl").mean()
        return float(plain - ((fixed - 1) * cosines(x) / TEMPERATURE).mean())

    for row, column in ((0, 0), (3, 2), (4, 1)):
        moved = []
        for sign in (1, -1):
            x = first.copy()
            x[row, column] += sign * 1e-6
            moved.append(of_constants(x))
        assert a.grad[row, column].item() == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-5, abs=1e-9)


def test_equal_embeddings_give_the_closed_forms() -> None:
    z = torch.ones(8, 4)
    assert contrast(z, z, TEMPERATURE)[0].item() == pytest.approx(math.log(15))
    assert contrast(z, z, TEMPERATURE, "dcl")[0].item() == pytest.approx(math.log(14))


def test_half_precision_is_computed_in_float32() -> None:
    z = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    half = contrast(z[0].bfloat16(), z[1].bfloat16(), 0.1)
    assert half.dtype == torch.float32
    whole = contrast(z[0].bfloat16().float(), z[1].bfloat16().float(), 0.1)
    torch.testing.assert_close(half, whole)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(contrast(z[0].bfloat16(), z[1].bfloat16(), 0.1), whole)


def plain(first: torch.Tensor, second: torch.Tensor, temperature: float, kind: str) -> torch.Tensor:
    """The equations with the whole table, to be differentiated by autograd."""
    n = len(first)
    z = torch.nn.functional.normalize(torch.cat([first, second]), dim=1)
    scores = z @ z.T / temperature
    row = torch.arange(2 * n)
    other = (row + n) % (2 * n)
    left_out = torch.eye(2 * n, dtype=torch.bool)
    if kind != "infonce":
        left_out = left_out | torch.eye(2 * n, dtype=torch.bool)[other]
    positive = scores[row, other]
    weight = 2 - n * torch.softmax(positive[:n] * temperature / SIGMA, 0).repeat(2) if kind == "dclw" else 1.0
    return scores.masked_fill(left_out, -torch.inf).logsumexp(1) - weight * positive


@pytest.mark.parametrize("kind", ["infonce", "dcl", "dclw"])
@pytest.mark.parametrize("rows", [1, 3, 5, 8, 100])
def test_any_tiles_give_the_gradient_of_autograd_for_any_weights(
    kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS", rows)
    generator = torch.Generator().manual_seed(3)
    first, second = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.randn(14, generator=generator, dtype=torch.float64)
    found = contrast(first, second, TEMPERATURE, kind, SIGMA)  # type: ignore[arg-type]
    expected = plain(first, second, TEMPERATURE, kind)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    both = [torch.autograd.grad(each, (first, second), weights) for each in (found, expected)]
    torch.testing.assert_close(*both, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: contrast(a, b, 0.5, kind), (first, second))  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.003, 0.01, 0.02, 0.03])
def test_a_low_temperature_loses_no_row(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is opposite to all others weighs exp(-2 / temperature): nothing, in float32 and below 0.023."""
    monkeypatch.setattr(module, "SMALL", 0)
    first = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]])
    second = torch.tensor([[1.0, 0.2], [1.0, 0.0], [1.0, 0.0]])
    first.requires_grad_()
    wide = first.detach().double().requires_grad_()
    found, expected = contrast(first, second, temperature), plain(wide, second.double(), temperature, "infonce")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    expected.sum().backward()
    assert first.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(first.grad.double(), wide.grad, rtol=1e-3, atol=1e-3)


def test_temperatures_that_cannot_be_computed_are_refused() -> None:
    with pytest.raises(UserError, match=r"0\.001.*at least 0\.003"):
        contrast(torch.ones(2, 2), torch.ones(2, 2), 0.001)


def test_autocast_leaves_value_and_gradient_alone() -> None:
    first, second = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(4))
    first.requires_grad_()
    plainly = contrast(first, second, 0.1)
    (expected,) = torch.autograd.grad(plainly.sum(), first)
    with torch.autocast("cpu", torch.bfloat16):
        cast = contrast(first, second, 0.1)
        (found,) = torch.autograd.grad(cast.sum(), first)
    torch.testing.assert_close(cast, plainly, rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_table_of_all_pairs_is_made() -> None:
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    Largest.size = max(Largest.size, tensor.numel())
            return out

    first, second = torch.randn(2, 1024, 4, generator=torch.Generator().manual_seed(5)).requires_grad_()
    with Largest():
        contrast(first, second, 0.1).mean().backward(inputs=[first])
    assert 2048 * 100 < Largest.size <= 2048 * module.ROWS


SCRIPT = """
import sys
import torch
from ssl_pretrain.distributed import rank, world
from ssl_pretrain.parts.nt_xent import contrast

z, weights = torch.load(sys.argv[1])
out = {}
with world():
    mine = slice(3 * rank(), 3 * rank() + 3)
    for kind in ("infonce", "dcl", "dclw"):
        first, second = (x[mine].clone().requires_grad_() for x in z)
        each = contrast(first, second, 0.2, kind)
        each.backward(weights[:, mine].flatten())
        out[kind] = each.detach().unflatten(0, (2, 3)), torch.stack([first.grad, second.grad])
    torch.save(out, sys.argv[1] + str(rank()))
"""


def test_two_processes_have_the_losses_and_gradients_of_one(tmp_path: Path) -> None:
    """Each the losses of its own rows, and for these the gradient of all processes' losses."""
    generator = torch.Generator().manual_seed(6)
    z, weights = (torch.randn(2, 6, *more, generator=generator, dtype=torch.float64) for more in ((4,), ()))
    torch.save((z, weights), tmp_path / "in")
    place = {"SSL_PRETRAIN_RENDEZVOUS": (tmp_path / "rendezvous").as_uri(), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, tmp_path / "in"],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    parts = [torch.load(tmp_path / f"in{rank}") for rank in (0, 1)]
    for kind in ("infonce", "dcl", "dclw"):
        first, second = (x.clone().requires_grad_() for x in z)
        each = contrast(first, second, 0.2, kind)
        gradients = torch.stack(torch.autograd.grad(each, (first, second), weights.flatten()))
        found = [torch.cat([part[kind][i] for part in parts], dim=1) for i in (0, 1)]
        torch.testing.assert_close(found, [each.detach().unflatten(0, (2, 6)), gradients], rtol=1e-10, atol=1e-12)
