"""SimCLR: the loss of a small model against NumPy from its embeddings on, and its wiring."""

import math

import numpy as np
import pytest
import torch
from one_step import batch, build
from ssl_pretrain.methods.simclr import SimCLR

from ssl_pretrain.pretext import Step


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


@pytest.mark.parametrize("loss", ["infonce", "dcl"])
def test_the_collapsed_value_is_the_loss_of_equal_embeddings(loss: str) -> None:
    method = SimCLR(build("simclr").encoder, SimCLR.Config(loss=loss, hidden_dim=64))  # type: ignore[arg-type]
    method.projector = torch.nn.Sequential(torch.nn.Identity())  # batch norm would tell equal vectors apart by rounding
    losses = method.loss({"pooled": torch.ones(16, 2, 8)}, step())
    assert method.collapsed(16)["loss"][0] == pytest.approx(losses.total.item(), rel=1e-5)
