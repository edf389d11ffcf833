"""VICReg against float64 NumPy written from the paper's equations 1 to 6."""

import math

import numpy as np
import pytest
import torch
from method_helpers import check_stated, losses_of, make_constant_
from ssl_pretrain.methods.vicreg import VICReg
from torch import nn

from ssl_pretrain import backbones
from ssl_pretrain.conformance import one_step
from ssl_pretrain.errors import UserError
from ssl_pretrain.pretext import Losses, Step

KERNELS = 284  # of a step: python tests/kernels.py vicreg
DEVICE_KERNELS = 310  # with the optimiser, on an accelerator: python tests/device.py vicreg

K, N = 5, 20
STEP = Step(step=0, total=10, noise=1, rows=slice(0, N), batch_size=N, device=torch.device("cpu"))


def build(**knobs: object) -> VICReg:
    torch.manual_seed(0)
    options = {**backbones.defaults("vit_micro"), "patch_size": 8, "depth": 1, **VICReg.recipe.encoder}
    encoder = backbones.build("vit_micro", image_size=(32, 32), **options)
    return VICReg(encoder, VICReg.Config(**{"projector_dim": K, **knobs}))


def loss_of(first: torch.Tensor, second: torch.Tensor, **knobs: object) -> Losses:
    """The loss of these embeddings: the projector is left out."""
    method = build(**knobs)
    method.projector = nn.Sequential()
    return method.loss({"first": first, "second": second}, STEP)


def numpy_terms(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    n, k = first.shape
    variance = covariance = 0.0
    for z in (first, second):
        mean = z.sum(0) / n
        matrix = sum(np.outer(row - mean, row - mean) for row in z) / (n - 1)
        for i in range(k):
            variance += max(0.0, 1 - math.sqrt(matrix[i, i] + 1e-4)) / k / 2
            covariance += sum(matrix[i, j] ** 2 for j in range(k) if j != i) / k
    invariance = sum(((a - b) ** 2).mean() for a, b in zip(first, second, strict=True)) / n
    return {"invariance": invariance, "variance": variance, "covariance": covariance}


def numpy_loss(first: np.ndarray, second: np.ndarray, weights: tuple[float, float, float]) -> float:
    return sum(w * term for w, term in zip(weights, numpy_terms(first, second).values(), strict=True))


def embeddings() -> tuple[np.ndarray, np.ndarray]:
    """Some channels spread more than 1, where the hinge is flat, some less."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(N, K)) * np.array([0.3, 0.6, 0.8, 1.6, 2.0]) + 4
    first[:, 1] += first[:, 0]
    return first, first + rng.normal(size=(N, K)) * 0.2


@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)])
def test_loss_and_gradient_against_numpy(weights: tuple[float, float, float]) -> None:
    first, second = embeddings()
    a, b = (torch.tensor(z, dtype=torch.float32, requires_grad=True) for z in (first, second))
    names = ("invariance_weight", "variance_weight", "covariance_weight")
    knobs = {} if weights == (25.0, 25.0, 1.0) else dict(zip(names, weights, strict=True))
    found = loss_of(a, b, **knobs)
    assert found.total.item() == pytest.approx(numpy_loss(first, second, weights), rel=1e-4)
    for name, value in numpy_terms(first, second).items():
        assert found.terms[name].item() == pytest.approx(value, rel=1e-4)
    found.total.backward()
    for leaf, which in ((a, 0), (b, 1)):
        expected = np.empty((N, K))
        for row in range(N):
            for column in range(K):
                moved = []
                for sign in (1, -1):
                    z = [first.copy(), second.copy()]
                    z[which][row, column] += sign * 1e-5
                    moved.append(numpy_loss(*z, weights))
                expected[row, column] = (moved[0] - moved[1]) / 2e-5
        assert leaf.grad is not None
        np.testing.assert_allclose(leaf.grad.numpy(), expected, rtol=1e-3, atol=2e-4 * np.abs(expected).max())


def test_collapsed_state_has_the_stated_loss() -> None:
    method = one_step.build("vicreg")
    make_constant_(method.encoder)
    check_stated(method, {"variance": losses_of(method)})


def test_collapsed_embeddings_have_a_finite_gradient() -> None:
    same = torch.ones(N, K, requires_grad=True)
    loss_of(same, same.detach()).total.backward()
    assert same.grad is not None
    assert bool(torch.isfinite(same.grad).all())


def test_a_white_cloud_seen_twice_has_no_loss() -> None:
    white = np.linalg.qr(np.concatenate([np.ones((N, 1)), np.random.default_rng(1).normal(size=(N, K))], 1))[0][:, 1:]
    z = torch.tensor(white * math.sqrt(N), dtype=torch.float32)
    assert loss_of(z, z).total.item() == pytest.approx(0, abs=1e-5)


def test_half_precision_is_computed_in_float32() -> None:
    first, second = (torch.tensor(z, dtype=torch.bfloat16) for z in embeddings())
    with torch.autocast("cpu", torch.bfloat16):
        half = loss_of(first, second).total
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss_of(first.float(), second.float()).total)


def test_the_views_are_byols() -> None:
    first, second = VICReg.views(VICReg.Config(), (32, 32))
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    plain = VICReg.views(VICReg.Config(blur=0.0), (32, 32))
    assert [spec.blur for spec in plain] == [0.0, 0.0]


def test_a_projector_of_one_channel_is_refused() -> None:
    with pytest.raises(UserError, match="projector-dim"):
        build(projector_dim=1)
