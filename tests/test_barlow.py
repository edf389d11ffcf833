"""Barlow Twins against float64 NumPy written from the paper's equations 1 and 2."""

import math

import numpy as np
import pytest
import torch
from method_helpers import check_stated, losses_of, make_constant_
from ssl_pretrain.methods.barlow import BarlowTwins
from torch import nn

from ssl_pretrain import backbones
from ssl_pretrain.conformance import one_step
from ssl_pretrain.errors import UserError
from ssl_pretrain.pretext import Losses, Step

KERNELS = 229  # of a step: python tests/kernels.py barlow
DEVICE_KERNELS = 255  # with the optimiser, on an accelerator: python tests/device.py barlow

K, N = 6, 24
STEP = Step(step=0, total=10, noise=1, rows=slice(0, N), batch_size=N, device=torch.device("cpu"))


def build(**knobs: object) -> BarlowTwins:
    torch.manual_seed(0)
    options = {**backbones.defaults("vit_micro"), "patch_size": 8, "depth": 1, **BarlowTwins.recipe.encoder}
    encoder = backbones.build("vit_micro", image_size=(32, 32), **options)
    return BarlowTwins(encoder, BarlowTwins.Config(**{"projector_dim": K, **knobs}))


def loss_of(first: torch.Tensor, second: torch.Tensor, **knobs: object) -> Losses:
    """The loss of these embeddings: the projector is left out."""
    method = build(**knobs)
    method.projector = nn.Sequential()
    return method.loss({"first": first, "second": second}, STEP)


def numpy_terms(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Equation 2 on channels of mean zero, and the two sums of equation 1."""
    invariance = redundancy = 0.0
    a, b = (z - z.mean(0) for z in (first, second))
    for i in range(a.shape[1]):
        for j in range(a.shape[1]):
            norms = math.sqrt((a[:, i] ** 2).sum()) * math.sqrt((b[:, j] ** 2).sum())
            c = (a[:, i] * b[:, j]).sum() / norms
            if i == j:
                invariance += (1 - c) ** 2
            else:
                redundancy += c**2
    return invariance, redundancy


def numpy_loss(first: np.ndarray, second: np.ndarray, weight: float = 0.0051, scale: float = 0.024) -> float:
    invariance, redundancy = numpy_terms(first, second)
    return scale * (invariance + weight * redundancy)


def embeddings() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    first = rng.normal(size=(N, K)) * 3 + 5
    first[:, 1] += first[:, 0]
    return first, first + rng.normal(size=(N, K)) * 2


@pytest.mark.parametrize("knobs", [{}, {"redundancy_weight": 0.5, "loss_scale": 1.0}])
def test_loss_and_gradient_against_numpy(knobs: dict[str, float]) -> None:
    first, second = embeddings()
    a, b = (torch.tensor(z, dtype=torch.float32, requires_grad=True) for z in (first, second))
    found = loss_of(a, b, **knobs)
    weight, scale = knobs.get("redundancy_weight", 0.0051), knobs.get("loss_scale", 0.024)
    # Batch norm divides by sqrt(variance + 1e-5), the paper by the plain norm.
    assert found.total.item() == pytest.approx(numpy_loss(first, second, weight, scale), rel=1e-4)
    invariance, redundancy = numpy_terms(first, second)
    assert found.terms["invariance"].item() == pytest.approx(invariance, rel=1e-4)
    assert found.terms["redundancy"].item() == pytest.approx(redundancy, rel=1e-4)
    found.total.backward()
    for leaf, which in ((a, 0), (b, 1)):
        expected = np.empty((N, K))
        for row in range(N):
            for column in range(K):
                moved = []
                for sign in (1, -1):
                    z = [first.copy(), second.copy()]
                    z[which][row, column] += sign * 1e-5
                    moved.append(numpy_loss(*z, weight, scale))
                expected[row, column] = (moved[0] - moved[1]) / 2e-5
        assert leaf.grad is not None
        np.testing.assert_allclose(leaf.grad.numpy(), expected, rtol=1e-3, atol=2e-4 * np.abs(expected).max())


def test_each_view_is_normalised_by_its_own_statistics() -> None:
    first, second = (torch.tensor(z, dtype=torch.float32) for z in embeddings())
    moved = loss_of(first * 7 - 100, second)
    torch.testing.assert_close(moved.total, loss_of(first, second).total, rtol=1e-3, atol=0)


def test_collapsed_state_has_the_stated_loss() -> None:
    method = one_step.build("barlow")
    make_constant_(method.encoder)
    constant = losses_of(method)

    method = one_step.build("barlow")
    with torch.no_grad():
        rows = method.projector[-1].weight
        rows.copy_(100 * rows[:1].clone().expand_as(rows))  # far from the norm's epsilon
    images = one_step.batch(method, slice(0, one_step.BATCH))
    images.views["second"] = images.views["first"]
    one_channel = losses_of(method, images)
    assert one_channel.terms["invariance"].item() == pytest.approx(0, abs=1e-4)
    check_stated(method, {"invariance": constant, "redundancy": one_channel})


def test_uncorrelated_views_have_the_collapsed_invariance() -> None:
    h = np.array([[1.0]])
    for _ in range(4):
        h = np.block(
            [[h, h], [h, -h]]
        )  # the columns of a Hadamard matrix are orthogonal, and but the first of mean zero
    apart = loss_of(torch.tensor(h[:, 1:7]).float(), torch.tensor(h[:, 7:13]).float())
    assert apart.terms["invariance"].item() == pytest.approx(build().collapsed(N)["invariance"][0], rel=1e-5)
    assert apart.terms["redundancy"].item() == pytest.approx(0, abs=1e-9)


def test_decorrelated_views_that_agree_have_no_loss() -> None:
    h = np.linalg.qr(np.concatenate([np.ones((N, 1)), np.random.default_rng(1).normal(size=(N, K))], 1))[0][:, 1:]
    z = torch.tensor(h, dtype=torch.float32) * 30
    assert loss_of(z, z).total.item() == pytest.approx(0, abs=1e-6)


def test_half_precision_is_computed_in_float32() -> None:
    first, second = (torch.tensor(z, dtype=torch.bfloat16) for z in embeddings())
    with torch.autocast("cpu", torch.bfloat16):
        half = loss_of(first, second).total
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss_of(first.float(), second.float()).total)


def test_the_views_are_byols() -> None:
    first, second = BarlowTwins.views(BarlowTwins.Config(), (32, 32))
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    plain = BarlowTwins.views(BarlowTwins.Config(blur=0.0), (32, 32))
    assert [spec.blur for spec in plain] == [0.0, 0.0]


def test_the_projector_is_the_papers() -> None:
    method = build()
    shapes = [tuple(p.shape) for name, p in method.projector.named_parameters() if p.ndim == 2]
    assert shapes == [(K, method.encoder.dim), (K, K), (K, K)]
    assert all(part.bias is None for part in method.projector if isinstance(part, nn.Linear))


@pytest.mark.parametrize("knobs", [{"projector_dim": 1}, {"loss_scale": 0.0}])
def test_knobs_out_of_range_are_refused(knobs: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(knobs)).replace("_", "-")):
        build(**knobs)
