"""MV-MR: distance correlations, the scattering transform, the loss and its gradient against float64 NumPy."""

import cmath
import math
from typing import Any

import numpy as np
import pytest
import torch
from method_helpers import check_stated, losses_of, make_constant_
from ssl_pretrain.methods.mvmr import MVMR, local_deviation
from torch import nn

from ssl_pretrain.conformance import one_step
from ssl_pretrain.conformance.one_step import BATCH
from ssl_pretrain.errors import UserError
from ssl_pretrain.parts.distance_correlation import biased, distances, unbiased
from ssl_pretrain.parts.scattering import scattering
from ssl_pretrain.pretext import Losses, Step

KERNELS = 1562  # of a step: python tests/kernels.py mvmr
DEVICE_KERNELS = 1577  # with the optimiser, on an accelerator: python tests/device.py mvmr

N, K = 12, 5
STEP = Step(step=0, total=10, noise=1, rows=slice(0, N), batch_size=N, device=torch.device("cpu"))
WEIGHTS = {"pixels": 1.0, "hog": 0.5, "std": 0.0, "scattering": 0.0, "augmented": 2.0}


# ---- NumPy, from the definitions


def numpy_distances(x: np.ndarray) -> np.ndarray:
    return np.array([[math.sqrt(((a - b) ** 2).sum()) for b in x] for a in x])


def numpy_biased(x: np.ndarray, z: np.ndarray) -> float:
    """Szekely, Rizzo and Bakirov 2007, definitions 3 to 5."""

    def centred(a: np.ndarray) -> np.ndarray:
        n = len(a)
        out = np.empty_like(a)
        for i in range(n):
            for j in range(n):
                out[i, j] = a[i, j] - a[i].sum() / n - a[:, j].sum() / n + a.sum() / n**2
        return out

    a, b = centred(numpy_distances(x)), centred(numpy_distances(z))
    return math.sqrt((a * b).mean() / math.sqrt((a * a).mean() * (b * b).mean()))


def numpy_unbiased(x: np.ndarray, z: np.ndarray) -> float:
    """Szekely and Rizzo 2014, equations 2.1 and 2.2: the inner product of U-centred matrices."""

    def centred(a: np.ndarray) -> np.ndarray:
        n = len(a)
        out = np.zeros_like(a)
        for i in range(n):
            for j in range(n):
                if i != j:
                    out[i, j] = a[i, j] - a[i].sum() / (n - 2) - a[:, j].sum() / (n - 2) + a.sum() / ((n - 1) * (n - 2))
        return out

    def product(a: np.ndarray, b: np.ndarray) -> float:
        n = len(a)
        return (a * b).sum() / (n * (n - 3))

    a, b = centred(numpy_distances(x)), centred(numpy_distances(z))
    return product(a, b) / math.sqrt(product(a, a) * product(b, b))


def numpy_loss(augmented: np.ndarray, plain: np.ndarray, fixed: dict[str, np.ndarray]) -> float:
    hinge = 0.0
    for z in (augmented, plain):
        for channel in z.T:
            hinge += max(0.0, 1 - math.sqrt(channel.var(ddof=1) + 1e-4)) / K / 2
    total = ((augmented - plain) ** 2).mean() + hinge + 1 - numpy_biased(augmented, plain)
    for name, rows in fixed.items():
        total += WEIGHTS[name] * (1 - (numpy_biased(augmented, rows) + numpy_biased(plain, rows)) / 2)
    return total


def some(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# ---- Distance correlation


def test_distance_correlations_against_numpy() -> None:
    x = some(0, N, 3)
    for z in (some(1, N, 7), x @ some(2, 3, 4), x**2, np.abs(x) + 0.3 * some(3, N, 3)):
        a, b = distances(torch.tensor(x)), distances(torch.tensor(z))
        np.testing.assert_allclose(a, numpy_distances(x), atol=1e-6)
        assert biased(a, b).item() == pytest.approx(numpy_biased(x, z), rel=1e-6)
        assert unbiased(a, b).item() == pytest.approx(numpy_unbiased(x, z), rel=1e-6, abs=1e-9)


def test_it_is_one_for_a_rotation_and_near_zero_for_independent_vectors() -> None:
    x = torch.tensor(some(0, 400, 4), dtype=torch.float32)
    rotation = torch.linalg.qr(torch.tensor(some(1, 4, 4), dtype=torch.float32))[0]
    moved = distances(3 * x @ rotation + 5)
    assert biased(distances(x), moved).item() == pytest.approx(1, abs=1e-4)
    assert unbiased(distances(x), moved).item() == pytest.approx(1, abs=1e-4)
    # Of few samples the V-statistic is far from 0 although nothing depends on anything; the corrected one is not.
    found = []
    for seed in range(60):
        a, b = (distances(torch.tensor(some(2 * seed + i, 16, 8))) for i in (0, 1))
        found.append((biased(a, b).item(), unbiased(a, b).item()))
    means = np.mean(found, axis=0)
    assert means[0] > 0.6
    assert abs(means[1]) < 0.03


def test_equal_vectors_have_a_correlation_of_zero_and_a_finite_gradient() -> None:
    same = torch.ones(N, K, requires_grad=True)
    value = biased(distances(same), distances(torch.tensor(some(0, N, 3), dtype=torch.float32)))
    value.backward()
    assert value.item() == pytest.approx(0, abs=2e-4)
    assert same.grad is not None
    assert bool(torch.isfinite(same.grad).all())


# ---- Representations


def numpy_filter(scale: int, angle: float, angles: int) -> dict[tuple[int, int], complex]:
    """A Morlet wavelet by its pixels (row, column)."""
    sigma, frequency, slant = 0.8 * 2**scale, 3 * math.pi / 4 / 2**scale, 4 / angles
    reach = math.ceil(3 * sigma)
    envelope, wave = {}, {}
    for row in range(-reach, reach + 1):
        for column in range(-reach, reach + 1):
            along = column * math.cos(angle) + row * math.sin(angle)
            across = row * math.cos(angle) - column * math.sin(angle)
            envelope[row, column] = math.exp(-(along**2 + slant**2 * across**2) / (2 * sigma**2))
            wave[row, column] = envelope[row, column] * cmath.exp(1j * frequency * along)
    mean = sum(wave.values()) / sum(envelope.values())
    return {at: (wave[at] - mean * envelope[at]) * slant / (2 * math.pi * sigma**2) for at in wave}


def numpy_convolved(image: np.ndarray, taps: dict[tuple[int, int], Any]) -> np.ndarray:
    reach = max(row for row, _ in taps)
    padded, out = np.pad(image, reach, mode="reflect"), np.zeros(image.shape, complex)
    height, width = image.shape
    for (row, column), tap in taps.items():
        out += tap * padded[reach - row : reach - row + height, reach - column : reach - column + width]
    return out


def test_scattering_against_loops() -> None:
    scales, angles = 2, 4
    image = some(0, 16, 20)
    taps = {
        (scale, i): numpy_filter(scale, math.pi * i / angles, angles) for scale in range(scales) for i in range(angles)
    }
    first = {at: np.abs(numpy_convolved(image, taps[at])) for at in taps}
    second = [np.abs(numpy_convolved(first[0, i], taps[1, j])) for i in range(angles) for j in range(angles)]
    sigma = 0.8 * 2
    reach = math.ceil(3 * sigma)
    window = {
        (r, c): math.exp(-(r * r + c * c) / (2 * sigma**2))
        for r in range(-reach, reach + 1)
        for c in range(-reach, reach + 1)
    }
    window = {at: tap / sum(window.values()) for at, tap in window.items()}
    expected = [numpy_convolved(each, window).real[::4, ::4] for each in (image, *first.values(), *second)]
    found = scattering(torch.tensor(np.stack([image, -2 * image]))[:, None].float(), scales, angles)
    assert found.shape == (2, 1 + 8 + 16, 4, 5)
    np.testing.assert_allclose(found[0], np.stack(expected), atol=1e-5)
    # Moduli: the sign is lost in all paths but the first.
    np.testing.assert_allclose(found[1, 1:], 2 * np.stack(expected)[1:], atol=1e-5)
    assert scattering(torch.zeros(1, 3, 8, 8)).shape == (1, 3 * 81, 2, 2)


def test_a_flat_image_scatters_nothing() -> None:
    found = scattering(torch.full((1, 1, 16, 16), 0.7))
    torch.testing.assert_close(found[:, :1], torch.full((1, 1, 4, 4), 0.7))
    assert found[:, 1:].abs().max() < 1e-5


def test_local_deviations_against_loops() -> None:
    image = some(1, 5, 6)
    padded = np.pad(image, 1, mode="reflect")
    expected = [[padded[y : y + 3, x : x + 3].std() for x in range(6)] for y in range(5)]
    np.testing.assert_allclose(local_deviation(torch.tensor(image)[None, None])[0, 0], expected, atol=1e-7)


def test_representations_are_of_the_plain_image_and_not_larger_than_asked_for() -> None:
    method = one_step.build("mvmr", representation_size=16, teacher_weight=1.0)
    batch = one_step.batch(method)
    before = {name: method.representation(name, batch) for name in method.weights}
    assert before["pixels"].shape == (BATCH, 3 * 16 * 16)
    np.testing.assert_allclose(
        before["pixels"][0].reshape(3, 16, 16)[1, 2, 3], batch.views["plain"][0, 1, 4:6, 6:8].mean(), rtol=1e-5
    )
    assert before["scattering"].shape == (BATCH, 3 * 81 * 4 * 4)
    assert before["hog"].shape == (BATCH, 3 * 9 * 2 * 2)
    assert before["teacher"].shape == (BATCH, method.teacher.dim)
    batch.views["augmented"] = torch.randn(BATCH, 3, 32, 32)
    for name, rows in before.items():
        assert torch.equal(rows, method.representation(name, batch)) == (name != "augmented")


# ---- The loss


def loss_of(augmented: torch.Tensor, plain: torch.Tensor, fixed: dict[str, np.ndarray]) -> Losses:
    """The loss of these embeddings: the projector is left out."""
    method = one_step.build("mvmr", **{f"{name}_weight": weight for name, weight in WEIGHTS.items()})
    method.projector = nn.Sequential()
    rows = {f"of_{name}": torch.tensor(value, dtype=torch.float32) for name, value in fixed.items()}
    return method.loss({"augmented": augmented, "plain": plain, **rows}, STEP)


def test_loss_and_gradient_against_numpy() -> None:
    augmented = some(0, N, K) * np.array([0.3, 0.6, 0.8, 1.6, 2.0])
    plain = augmented + 0.3 * some(1, N, K)
    fixed = {"pixels": some(2, N, 9), "hog": plain[:, :2] ** 2 + 0.1 * some(3, N, 2), "augmented": some(4, N, 3)}
    a, b = (torch.tensor(z, dtype=torch.float32, requires_grad=True) for z in (augmented, plain))
    found = loss_of(a, b, fixed)
    found.total.backward()
    assert found.total.item() == pytest.approx(numpy_loss(augmented, plain, fixed), rel=1e-5)
    for name, rows in {"views": None, **fixed}.items():
        pairs = [(augmented, plain)] if rows is None else [(augmented, rows), (plain, rows)]
        for term, of in (("correlation", numpy_biased), ("unbiased", numpy_unbiased)):
            expected = np.mean([of(*pair) for pair in pairs])
            assert found.terms[f"{term}_{name}"].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for leaf, which in ((a, 0), (b, 1)):
        for row, column in ((0, 0), (3, 4), (11, 2)):
            moved = []
            for sign in (1, -1):
                z = [augmented.copy(), plain.copy()]
                z[which][row, column] += sign * 1e-5
                moved.append(numpy_loss(*z, fixed))
            assert leaf.grad[row, column].item() == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=2e-3, abs=1e-6)


def test_dependence_on_the_representations_lowers_the_loss() -> None:
    """The released code adds + distance correlation, which a training then makes small."""
    rows = some(0, N, K)
    z = torch.tensor(rows, dtype=torch.float32)
    same = dict.fromkeys(("pixels", "hog", "augmented"), rows)
    other = {name: some(i, N, K) for i, name in enumerate(same, start=5)}
    assert loss_of(z, z, same).total.item() < loss_of(z, z, other).total.item() - 0.5


def test_collapsed_is_what_it_states() -> None:
    method = one_step.build("mvmr")
    make_constant_(method.encoder)
    losses = losses_of(method)
    check_stated(method, {"variance": losses})
    assert losses.terms["correlation_pixels"].item() == pytest.approx(0, abs=1e-3)


def test_the_plain_view_is_the_whole_image() -> None:
    augmented, plain = MVMR.views(MVMR.Config(), (32, 48))
    assert (plain.scale, plain.ratio, plain.hflip, plain.jitter, plain.of) == ((1.0, 1.0), (1.5, 1.5), 0.0, None, None)
    assert augmented.jitter is not None


def test_a_representation_of_weight_zero_is_not_computed() -> None:
    method = one_step.build("mvmr", scattering_weight=0.0, std_weight=0.0)
    assert list(method.weights) == ["pixels", "hog", "augmented"]
    assert not [name for name in losses_of(method).terms if name.endswith(("scattering", "std", "teacher"))]


@pytest.mark.parametrize("knobs", [{"hog_weight": -1.0}, {"projector_dim": 1}, {"representation_size": 4}])
def test_knobs_that_cannot_be(knobs: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--"):
        one_step.build("mvmr", **knobs)
