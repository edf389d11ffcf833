"""LeJEPA: prediction and SIGReg put together as the paper says, against NumPy."""

import numpy as np
import pytest
import torch
from method_helpers import check_stated, losses_of, make_zero_
from numpy_oracles import numpy_sigreg
from ssl_pretrain.methods.lejepa import LeJEPA

from ssl_pretrain import backbones
from ssl_pretrain.conformance.one_step import batch, build
from ssl_pretrain.errors import UserError
from ssl_pretrain.parts.sigreg import sigreg
from ssl_pretrain.pretext import Step

KERNELS = 454  # of a step: python tests/kernels.py lejepa
DEVICE_KERNELS = 469  # with the optimiser, on an accelerator: python tests/device.py lejepa


def step(number: int = 0) -> Step:
    return Step(step=number, total=10, noise=number, rows=slice(0, 16), batch_size=16, device=torch.device("cpu"))


def test_the_loss_is_the_weighted_sum_of_prediction_and_sigreg_over_all_views() -> None:
    method = build("lejepa").double()
    assert isinstance(method, LeJEPA)
    images = batch(method, slice(0, 16))
    images.views = {name: view.double() for name, view in images.views.items()}
    embedded = method.embed(images, step())
    assert embedded["pooled"].shape == (16, 4, method.encoder.dim)  # two global, two local
    losses = method(images, step())

    weights = {n: v.numpy() for n, v in method.projector.state_dict().items()}
    x = embedded["pooled"].detach().numpy().transpose(1, 0, 2).reshape(64, -1)
    for linear, norm in ((0, 1), (3, 4)):
        x = x @ weights[f"{linear}.weight"].T
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        x = np.maximum(x * weights[f"{norm}.weight"] + weights[f"{norm}.bias"], 0)
    z = (x @ weights["6.weight"].T + weights["6.bias"]).reshape(4, 16, -1)
    centre = (z[0] + z[1]) / 2
    prediction = np.mean([(view - centre) ** 2 for view in z])
    directions = step().shared_randn(16, 32).double().numpy()
    normality = np.mean([numpy_sigreg(view, directions) for view in z])
    assert losses.terms["prediction"].item() == pytest.approx(prediction, rel=1e-5)
    assert losses.terms["sigreg"].item() == pytest.approx(normality, rel=1e-5)
    assert losses.total.item() == pytest.approx(0.95 * prediction + 0.05 * normality, rel=1e-5)


def test_directions_are_new_in_every_step() -> None:
    method = build("lejepa")
    images = batch(method, slice(0, 16))
    with torch.no_grad():
        one, other = (method(images, step(number)).terms["sigreg"].item() for number in (1, 2))
    assert one != other


def test_gradients_reach_the_centre_nothing_is_stopped() -> None:
    """With the centre detached the gradient would be another one."""
    method = build("lejepa").double()
    pooled = torch.randn(16, 4, method.encoder.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    method.projector = torch.nn.Sequential(torch.nn.Identity())
    z = pooled.clone().requires_grad_()
    torch.manual_seed(0)
    losses = method.loss({"pooled": z}, step())
    losses.total.backward()
    x = pooled.clone().requires_grad_()
    centre = x[:, :2].mean(1, keepdim=True)
    prediction = (x - centre).square().mean()
    directions = step().shared_randn(method.encoder.dim, 32)
    (0.95 * prediction + 0.05 * sum(sigreg(x[:, v], directions) for v in range(4)) / 4).backward()
    torch.testing.assert_close(z.grad, x.grad)


def test_collapsed_state_has_the_stated_loss() -> None:
    method = build("lejepa")
    make_zero_(method.projector[-1])
    losses = losses_of(method)
    assert losses.terms["prediction"] == 0
    check_stated(method, {"sigreg": losses})


@pytest.mark.parametrize(
    ("knobs", "said"),
    [({"sigreg_weight": 1.0}, "--sigreg-weight"), ({"global_views": 1, "local_views": 0}, "--local-views at least 2")],
)
def test_knobs_out_of_range_are_refused(knobs: dict, said: str) -> None:
    encoder = backbones.build("vit_micro", image_size=(32, 32), patch_size=8, depth=1)
    with pytest.raises(UserError, match=said):
        LeJEPA(encoder, LeJEPA.Config(**knobs))
