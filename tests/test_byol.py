"""BYOL: loss and gradients against float64 NumPy from the encoders' vectors on, the target network, and the wiring."""

import numpy as np
import pytest
import torch
from method_helpers import check_stated, double_batch, losses_of, make_constant_, perturb_, step
from numpy_oracles import Weights, check_gradients, numpy_head, numpy_normalize, weights_of
from ssl_pretrain.methods.byol import BYOL
from torch import nn

from ssl_pretrain.conformance.one_step import after_step, build
from ssl_pretrain.errors import UserError

KERNELS = 305  # of a step: python tests/kernels.py byol
DEVICE_KERNELS = 334  # with the optimiser, on an accelerator: python tests/device.py byol

PROJECTOR = PREDICTOR = "linear norm relu linear"


def made() -> BYOL:
    method = build("byol").double()
    assert isinstance(method, BYOL)
    perturb_(method.teacher)
    return method


def test_loss_and_gradients_against_numpy() -> None:
    method = made()
    rng = np.random.default_rng(0)
    at = {"online": rng.standard_normal((16, 2, method.encoder.dim))}
    at |= weights_of(method.projector, "projector.") | weights_of(method.predictor, "predictor.")
    target = rng.standard_normal(at["online"].shape)
    held = weights_of(method.teacher["projector"], "")
    targets = [numpy_normalize(numpy_head(held, "", PROJECTOR, target[:, v])) for v in (0, 1)]

    def each(given: Weights) -> np.ndarray:
        predicted = []
        for v in (0, 1):
            z = numpy_head(given, "projector.", PROJECTOR, given["online"][:, v])
            predicted.append(numpy_normalize(numpy_head(given, "predictor.", PREDICTOR, z)))
        return ((predicted[0] - targets[1]) ** 2).sum(1) + ((predicted[1] - targets[0]) ** 2).sum(1)

    online = torch.tensor(at["online"], requires_grad=True)
    other = torch.tensor(target, requires_grad=True)
    losses = method.loss({"online": online, "target": other}, step())
    assert losses.total.item() == pytest.approx(each(at).mean(), rel=1e-10)
    assert losses.per_sample is not None
    np.testing.assert_allclose(losses.per_sample.numpy(), each(at), rtol=1e-10)
    losses.total.backward()
    gradients = {n: p.grad.numpy() for n, p in method.named_parameters() if p.grad is not None}
    assert online.grad is not None
    check_gradients(lambda given: each(given).mean(), at, {**gradients, "online": online.grad.numpy()})
    assert other.grad is None  # nothing flows into the target network
    assert not any(name.startswith("teacher") for name in gradients)


def test_heads_have_the_papers_shape() -> None:
    method = BYOL(build("byol").encoder, BYOL.Config(hidden_dim=4096))
    shapes = {n: tuple(p.shape) for n, p in method.named_parameters() if not n.startswith("encoder")}
    assert shapes == {
        "projector.0.weight": (4096, 128), "projector.1.weight": (4096,), "projector.1.bias": (4096,),
        "projector.3.weight": (256, 4096),
        "predictor.0.weight": (4096, 256), "predictor.1.weight": (4096,), "predictor.1.bias": (4096,),
        "predictor.3.weight": (256, 4096),
    }  # fmt: skip


def test_each_view_goes_through_both_networks() -> None:
    method = made()
    images = double_batch(method)
    embedded = method.embed(images, step())
    for v, name in enumerate(("view1", "view2")):
        with torch.no_grad():
            torch.testing.assert_close(embedded["online"][:, v], method.encoder(images.views[name]).pooled)
            torch.testing.assert_close(embedded["target"][:, v], method.teacher["encoder"](images.views[name]).pooled)
    assert not torch.allclose(embedded["online"], embedded["target"])
    assert embedded["online"].requires_grad
    assert not embedded["target"].requires_grad


@pytest.mark.parametrize("ok", [True, False])
def test_the_target_follows_the_online_network_where_the_step_was_good(ok: bool) -> None:
    method = made()
    before = {n: v.clone() for n, v in method.teacher.named_parameters()}
    after_step(method, step(3, ok), {})
    tau = 1 - (1 - 0.996) * (np.cos(np.pi * 3 / 10) + 1) / 2  # section 3.3
    online = {**weights_of(method.encoder, "encoder."), **weights_of(method.projector, "projector.")}
    assert before.keys() == online.keys()
    for name, now in method.teacher.named_parameters():
        old = before[name].numpy()
        np.testing.assert_allclose(
            now.numpy(), tau * old + (1 - tau) * online[name] if ok else old, rtol=1e-5, atol=1e-7
        )


def test_the_online_encoder_is_exported_and_the_target_begins_as_it() -> None:
    method = build("byol")
    assert method.exported() is method.encoder
    for name, value in method.encoder.state_dict().items():
        assert torch.equal(method.teacher["encoder"].state_dict()[name], value)


def test_the_two_views_are_not_alike() -> None:
    first, second = BYOL.views(BYOL.Config(), (48, 32))
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    first, second = BYOL.views(BYOL.Config(blur=0.0, crop_scale=(0.2, 1.0)), (48, 32))
    assert (first.blur, second.blur, first.scale, second.scale) == (0.0, 0.0, (0.2, 1.0), (0.2, 1.0))


def test_collapsed_state_has_the_stated_loss() -> None:
    method = build("byol")
    make_constant_(method.encoder)
    make_constant_(method.teacher.backbone)
    # Batch norm takes a constant away and leaves its own shift. With shifts of one, the last layer gives the sums of its
    # rows, and the predictor's are the target's.
    for head in (method.projector, method.teacher["projector"], method.predictor):
        nn.init.ones_(head[1].bias)
    with torch.no_grad():
        target = method.teacher["projector"][3].weight.sum(1, keepdim=True)
        method.predictor[3].weight.copy_(
            (target / method.predictor[3].in_features).expand_as(method.predictor[3].weight)
        )
    check_stated(method, {"loss": losses_of(method)})


def test_a_momentum_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"--momentum is 1.5; it must lie between 0 and 1"):
        BYOL(build("byol").encoder, BYOL.Config(momentum=1.5))
