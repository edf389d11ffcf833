"""SimCLR: the loss of a small model against NumPy from its embeddings on, and its wiring."""

import math

import numpy as np
import pytest
import torch
from method_helpers import check_stated, losses_of, make_constant_
from ssl_pretrain.methods.simclr import SimCLR

from ssl_pretrain.conformance.one_step import batch, build
from ssl_pretrain.pretext import Step

KERNELS = 218  # of a step: python tests/kernels.py simclr
DEVICE_KERNELS = 244  # with the optimiser, on an accelerator: python tests/device.py simclr


def step() -> Step:
    return Step(step=0, total=10, noise=1, rows=slice(0, 16), batch_size=16, device=torch.device("cpu"))


def test_the_loss_is_nt_xent_of_the_projected_vectors_of_both_views() -> None:
    method = build("simclr").double()
    assert isinstance(method, SimCLR)
    images = batch(method, slice(0, 16))
    images.views = {"view": images.views["view"].double()}
    losses = method(images, step())
    with torch.no_grad():
        vectors = [method.encoder(view).pooled.numpy() for view in images.views["view"]]
    weights = {n: v.numpy() for n, v in method.projector.state_dict().items()}
    x = np.concatenate(vectors)
    x = x @ weights["0.weight"].T
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)  # one batch of both views
    x = np.maximum(x * weights["1.weight"] + weights["1.bias"], 0) @ weights["3.weight"].T
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    z = x / np.linalg.norm(x, axis=1, keepdims=True)
    s = np.exp(z @ z.T / 0.1)
    np.fill_diagonal(s, 0)
    rows = np.array([-z[i] @ z[(i + 16) % 32] / 0.1 + math.log(s[i].sum()) for i in range(32)])
    assert losses.total.item() == pytest.approx(rows.mean(), rel=1e-9)
    assert losses.per_sample is not None
    np.testing.assert_allclose(losses.per_sample.numpy(), (rows[:16] + rows[16:]) / 2, rtol=1e-9)


def test_the_decoupled_losses_are_other_losses() -> None:
    found = []
    for loss in ("infonce", "dcl", "dclw"):
        torch.manual_seed(0)
        method = SimCLR(build("simclr").encoder, SimCLR.Config(loss=loss, hidden_dim=64))  # type: ignore[arg-type]
        found.append(method(batch(method, slice(0, 16)), step()).total.item())
    assert found[1] < found[0]  # a positive number left out of the denominator
    assert len(set(found)) == 3


def test_weights_of_decoupled_positives_have_a_gradient_unless_they_are_detached() -> None:
    gradients = []
    for weights in ("gradient", "detached"):
        torch.manual_seed(0)
        config = SimCLR.Config(loss="dclw", dcl_weights=weights, hidden_dim=64)  # type: ignore[arg-type]
        method = SimCLR(build("simclr").encoder, config)
        method(batch(method, slice(0, 16)), step()).total.backward()
        gradients.append(method.projector[0].weight.grad)
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize("loss", ["infonce", "dcl", "dclw"])
def test_collapsed_state_has_the_stated_loss(loss: str) -> None:
    method = build("simclr", loss=loss)
    make_constant_(method.encoder)
    check_stated(method, {"loss": losses_of(method)})
