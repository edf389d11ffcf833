"""NPID against NumPy written from equations 5 to 8 of the paper, and the bank through several steps."""

import math

import numpy as np
import pytest
import torch
from method_helpers import check_stated, losses_of, make_constant_
from ssl_pretrain.methods.npid import NPID

from ssl_pretrain.conformance.one_step import BATCH, after_step, batch, build
from ssl_pretrain.pretext import Step

KERNELS = 163  # of a step: python tests/kernels.py npid
DEVICE_KERNELS = 174  # with the optimiser, on an accelerator: python tests/device.py npid


def step(noise: int = 1) -> Step:
    return Step(step=0, total=10, noise=noise, rows=slice(0, 16), batch_size=16, device=torch.device("cpu"))


def expected(
    v: np.ndarray, bank: np.ndarray, own: np.ndarray, others: np.ndarray, z: float, weight: float
) -> np.ndarray:
    """Image by image, h = P / (P + m P_n)."""
    count, m, out = len(bank), others.shape[1], []
    for i in range(len(v)):

        def h(j: int) -> float:
            p = math.exp(v[i] @ bank[j] / 0.07) / z  # noqa: B023
            return p / (p + m / count)

        nce = -math.log(h(own[i])) - sum(math.log(1 - h(j)) for j in others[i])
        out.append(nce + weight * ((v[i] - bank[own[i]]) ** 2).sum())
    return np.array(out)


def drawn(noise: int = 1) -> np.ndarray:
    return (step(noise).rand(8) * BATCH).long().numpy()


def given(**settings: object) -> tuple[NPID, torch.Tensor, torch.Tensor]:
    """A method in float64 with such knobs, unit embeddings (16, 16), and the images that they are of."""
    config = NPID.Config(embedding_dim=16, negatives=8, **settings)  # type: ignore[arg-type]
    method = NPID(build("npid").encoder, config)
    method.prepare(BATCH)
    v = torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return method.double(), torch.nn.functional.normalize(v), torch.arange(16).flip(0)


@pytest.mark.parametrize("proximal", [0.0, 3.0])
def test_loss_gradient_and_normaliser(proximal: float) -> None:
    method, v, index = given(proximal=proximal)
    x = v.clone().requires_grad_()
    losses = method.loss({"embedding": x, "index": index}, step())
    bank, others = method.bank.numpy(), drawn()
    z = BATCH * np.mean([[math.exp(v[i].numpy() @ bank[j] / 0.07) for j in others[i]] for i in range(16)])
    assert losses.carry["normaliser"].item() == pytest.approx(z, rel=1e-6)
    rows = expected(v.numpy(), bank, index.numpy(), others, z, proximal)
    np.testing.assert_allclose(losses.per_sample.numpy(), rows, rtol=1e-6)  # type: ignore[union-attr]
    losses.total.backward()
    assert x.grad is not None
    for row, column in ((0, 0), (7, 3)):
        moved = []
        for sign in (1, -1):
            other = v.numpy().copy()
            other[row, column] += sign * 1e-6
            moved.append(expected(other, bank, index.numpy(), others, z, proximal).mean())
        assert x.grad[row, column].item() == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("proximal", [0.0, 3.0])
def test_the_softmax_is_over_the_whole_bank(proximal: float) -> None:
    method, v, index = given(loss="softmax", proximal=proximal, temperature=0.2)
    x = v.clone().requires_grad_()
    losses = method.loss({"embedding": x, "index": index}, step())
    bank, rows, gradient = method.bank.numpy(), [], []
    for i, own in enumerate(index.tolist()):  # eqs. 2 and 3: the probability of being image `own`, and its gradient
        p = np.exp(bank @ v[i].numpy() / 0.2)
        p /= p.sum()
        rows.append(-math.log(p[own]) + proximal * ((v[i].numpy() - bank[own]) ** 2).sum())
        gradient.append((p @ bank - bank[own]) / 0.2 + 2 * proximal * (v[i].numpy() - bank[own]))
    np.testing.assert_allclose(losses.per_sample.numpy(), rows, rtol=1e-9)  # type: ignore[union-attr]
    assert losses.total.item() == pytest.approx(np.mean(rows))
    losses.total.backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), np.array(gradient) / 16, rtol=1e-6, atol=1e-12)
    after_step(method, step(), losses.carry)
    assert float(method.normaliser) == 0  # there is none to estimate


def test_the_normaliser_is_estimated_once() -> None:
    method = build("npid")
    images = batch(method, slice(0, 16))
    first = method(images, step())
    after_step(method, step(), first.carry)
    kept = float(method.normaliser)
    assert kept > 0
    second = method(images, step(2))
    after_step(method, step(2), second.carry)
    assert float(method.normaliser) == kept


def test_the_bank_moves_half_way_and_only_for_the_images_seen() -> None:
    method = build("npid")
    before = method.bank.clone().numpy()
    v = torch.nn.functional.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(2)))
    index = torch.tensor([5, 2, 5])  # one of them twice: the last one counts
    after_step(method, step(), {"index": index, "embedding": v, "normaliser": torch.ones(1)})
    for image, row in ((5, 2), (2, 1)):
        moved = 0.5 * before[image] + 0.5 * v[row].numpy()
        np.testing.assert_allclose(method.bank[image].numpy(), moved / np.linalg.norm(moved), rtol=1e-5)
    untouched = [i for i in range(BATCH) if i not in (2, 5)]
    np.testing.assert_array_equal(method.bank[untouched].numpy(), before[untouched])


def test_a_step_that_is_not_finite_leaves_bank_and_normaliser() -> None:
    method = build("npid")
    before = method.bank.clone()
    here = step()
    here.ok = torch.zeros((), dtype=torch.bool)
    nan = torch.full((2, 16), float("nan"))
    after_step(
        method, here, {"index": torch.tensor([0, 1]), "embedding": nan, "normaliser": torch.full((1,), float("nan"))}
    )
    assert torch.equal(method.bank, before)
    assert float(method.normaliser) == 0


@pytest.mark.parametrize("loss", ["nce", "softmax"])
def test_collapsed_state_has_the_stated_loss(loss: str) -> None:
    method = build("npid", loss=loss)
    make_constant_(method.encoder)
    method.bank.copy_(method.bank[:1].clone().expand_as(method.bank))
    check_stated(method, {"contrast": losses_of(method)})


def test_of_equal_similarities_none_has_a_lower_loss_than_the_collapsed_value() -> None:
    """Whatever the first step made of the constant of normalisation."""
    method = build("npid")
    make_constant_(method.encoder)
    with torch.no_grad():
        embedded = method.embed(batch(method, slice(0, BATCH)), step())
    v = embedded["embedding"][0]
    method.normaliser.fill_(40.0)
    losses = []
    for cosine in np.linspace(-1, 1, 401):
        other = torch.nn.functional.normalize(torch.eye(len(v))[0] - v[0] * v, dim=0)
        method.bank.copy_((cosine * v + math.sqrt(1 - cosine**2) * other).expand_as(method.bank))
        losses.append(float(method.loss(embedded, step()).terms["contrast"]))
    assert min(losses) == pytest.approx(method.collapsed(BATCH)["contrast"][0], rel=1e-3)
    assert max(losses) > 2 * min(losses)
