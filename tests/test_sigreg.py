"""SIGReg against float64 NumPy, against its expectation under the null, and against numerical integration."""

import numpy as np
import pytest
import torch
from numpy_oracles import numpy_sigreg

from ssl_pretrain.parts import sigreg as module
from ssl_pretrain.parts.sigreg import END, KNOTS, sigreg, sigreg_of_a_point


def clouds(n: int = 40, d: int = 6, s: int = 9) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.normal(size=(n, d)) * 1.7 + 0.3, rng.normal(size=(d, s))


def test_value_and_gradient_are_those_of_the_formula() -> None:
    z, directions = clouds()
    found = sigreg(torch.tensor(z, requires_grad=True), torch.tensor(directions))
    assert found.item() == pytest.approx(numpy_sigreg(z, directions), rel=1e-10)
    x = torch.tensor(z, requires_grad=True)
    sigreg(x, torch.tensor(directions)).backward()
    assert x.grad is not None
    for row, column in ((0, 0), (17, 3), (39, 5)):
        moved = []
        for sign in (1, -1):
            other = z.copy()
            other[row, column] += sign * 1e-5
            moved.append(numpy_sigreg(other, directions))
        assert x.grad[row, column].item() == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-5, abs=1e-9)


def test_a_normal_cloud_gives_its_expectation_whatever_its_size() -> None:
    """E |ecf(t) - phi(t)|^2 = (1 - phi(t)^2) / N for samples of N(0, 1), so N times it does not depend on N."""
    t = np.linspace(-END, END, 20001)
    phi = np.exp(-(t**2) / 2)
    expected = np.sum(phi * (1 - phi**2)) * (t[1] - t[0])
    generator = torch.Generator().manual_seed(0)
    for n in (64, 1024):
        found = [
            float(sigreg(torch.randn(n, 4, generator=generator), torch.randn(4, 64, generator=generator)))
            for _ in range(20)
        ]
        assert np.mean(found) == pytest.approx(expected, rel=0.1)


def test_it_grows_with_the_number_of_vectors_off_the_null_and_names_the_collapsed_value() -> None:
    directions = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    for n in (8, 64):
        assert float(sigreg(torch.zeros(n, 5), directions)) == pytest.approx(sigreg_of_a_point(n), rel=1e-5)
    assert sigreg_of_a_point(64) == pytest.approx(8 * sigreg_of_a_point(8))


def test_length_of_the_directions_is_no_matter_and_autocast_neither() -> None:
    z, directions = (torch.tensor(x, dtype=torch.float32) for x in clouds())
    plain = sigreg(z, directions)
    torch.testing.assert_close(sigreg(z, directions * 7), plain)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(sigreg(z, directions), plain)


def plain(z: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """The formula with all knots of all values at once, to be differentiated by autograd."""
    t = torch.linspace(0, END, KNOTS, dtype=z.dtype)
    phi = torch.exp(-t.square() / 2)
    angles = (z @ (directions / directions.norm(dim=0))) * t[:, None, None]  # (K, N, S)
    distance = (angles.cos().mean(1) - phi[:, None]).square() + angles.sin().mean(1).square()
    return len(z) * 2 * torch.trapezoid(phi[:, None] * distance, t, dim=0).mean()


@pytest.mark.parametrize("cached", [1, 7 * 9, 10**6], ids=["one vector", "seven", "all"])
def test_any_number_of_vectors_at_a_time_has_the_gradient_of_autograd(
    cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CACHED", cached)
    z, directions = (torch.tensor(x) for x in clouds())
    z.requires_grad_()
    found, expected = sigreg(z, directions), plain(z, directions)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)
    both = [torch.autograd.grad(value, z)[0] for value in (found, expected)]
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-12)


def test_the_recurrence_is_exact_enough_in_float32() -> None:
    """At the null, where the statistic is a small difference, and with vectors close to 0, where cosines are close to 1."""
    generator = torch.Generator().manual_seed(2)
    directions = torch.randn(32, 64, generator=generator, dtype=torch.float64)
    for scale in (1.0, 1e-2):
        z = (scale * torch.randn(512, 32, generator=generator, dtype=torch.float64)).requires_grad_()
        narrow = z.detach().float().requires_grad_()
        found, expected = sigreg(narrow, directions.float()), plain(z, directions)
        assert found.item() == pytest.approx(expected.item(), rel=2e-5)
        (wanted,) = torch.autograd.grad(expected, z)
        (gradient,) = torch.autograd.grad(found, narrow)
        assert (gradient - wanted).norm() < 1e-4 * wanted.norm()


def test_several_clouds_are_the_mean_of_each() -> None:
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(3, 21, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    directions = torch.randn(6, 16, generator=generator, dtype=torch.float64)
    together, each = sigreg(z, directions), torch.stack([plain(cloud, directions) for cloud in z]).mean()
    torch.testing.assert_close(together, each, rtol=1e-11, atol=0)
    both = [torch.autograd.grad(value, z)[0] for value in (together, each)]
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-12)
