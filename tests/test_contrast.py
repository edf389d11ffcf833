"""Contrastive losses against float64 NumPy written from the papers' equations."""

import math

import numpy as np
import pytest
import torch

from ssl_pretrain.parts.contrast import contrast

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
