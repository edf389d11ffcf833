"""SimSiam: loss and gradients against float64 NumPy from the encoder's vectors on, the stop-gradient, and the wiring."""

import numpy as np
import pytest
import torch
from method_helpers import check_stated, double_batch, losses_of, step
from numpy_oracles import Weights, check_gradients, numpy_head, numpy_normalize, weights_of
from ssl_pretrain.methods.simsiam import SimSiam
from torch import nn

from ssl_pretrain.conformance.one_step import BATCH, batch, build

KERNELS = 296  # of a step: python tests/kernels.py simsiam
DEVICE_KERNELS = 307  # with the optimiser, on an accelerator: python tests/device.py simsiam

PROJECTOR, PREDICTOR = "linear norm relu linear norm relu linear norm", "linear norm relu linear"


def made() -> SimSiam:
    method = build("simsiam").double()
    assert isinstance(method, SimSiam)
    return method


def test_loss_and_gradients_against_numpy() -> None:
    method = made()
    at = {"pooled": np.random.default_rng(0).standard_normal((16, 2, method.encoder.dim))}
    at |= weights_of(method.projector, "projector.") | weights_of(method.predictor, "predictor.")
    # What the gradient must not flow through: the projections as they are, constant while parameters move.
    stopped = [numpy_normalize(numpy_head(at, "projector.", PROJECTOR, at["pooled"][:, v])) for v in (0, 1)]

    def each(given: Weights) -> np.ndarray:
        predicted = []
        for v in (0, 1):
            z = numpy_head(given, "projector.", PROJECTOR, given["pooled"][:, v])
            predicted.append(numpy_normalize(numpy_head(given, "predictor.", PREDICTOR, z)))
        return -((predicted[0] * stopped[1]).sum(1) + (predicted[1] * stopped[0]).sum(1)) / 2

    pooled = torch.tensor(at["pooled"], requires_grad=True)
    losses = method.loss({"pooled": pooled}, step())
    assert losses.total.item() == pytest.approx(each(at).mean(), rel=1e-10)
    assert losses.per_sample is not None
    np.testing.assert_allclose(losses.per_sample.numpy(), each(at), rtol=1e-10)
    losses.total.backward()
    gradients = {n: p.grad.numpy() for n, p in method.named_parameters() if p.grad is not None}
    assert pooled.grad is not None
    check_gradients(lambda given: each(given).mean(), at, {**gradients, "pooled": pooled.grad.numpy()})


def test_without_a_way_through_the_predictor_the_encoder_gets_no_gradient() -> None:
    method = made()
    nn.init.zeros_(method.predictor[3].weight)  # predictions are the last bias, whatever the image
    losses = method(double_batch(method), step())
    losses.total.backward()
    assert all(
        p.grad is None or not p.grad.any() for p in (*method.encoder.parameters(), *method.projector.parameters())
    )
    assert method.predictor[3].bias.grad.abs().sum() > 0


def test_heads_have_the_papers_shape() -> None:
    method = SimSiam(made().encoder, SimSiam.Config(hidden_dim=2048, embedding_dim=2048, bottleneck_dim=512))
    shapes = {n: tuple(p.shape) for n, p in method.named_parameters() if not n.startswith("encoder")}
    assert shapes == {
        "projector.0.weight": (2048, 128), "projector.1.weight": (2048,), "projector.1.bias": (2048,),
        "projector.3.weight": (2048, 2048), "projector.4.weight": (2048,), "projector.4.bias": (2048,),
        "projector.6.weight": (2048, 2048),  # and a batch norm without gain and shift
        "predictor.0.weight": (512, 2048), "predictor.1.weight": (512,), "predictor.1.bias": (512,),
        "predictor.3.weight": (2048, 512), "predictor.3.bias": (2048,),
    }  # fmt: skip


def test_each_view_goes_through_the_encoder() -> None:
    method = made()
    images = double_batch(method)
    pooled = method.embed(images, step())["pooled"]
    with torch.no_grad():
        for v in (0, 1):
            torch.testing.assert_close(pooled[:, v], method.encoder(images.views["view"][v]).pooled)


def test_the_views_are_mocos() -> None:
    (view,) = SimSiam.views(SimSiam.Config(crop_scale=(0.3, 0.9), blur=0.25), (48, 32))
    assert (view.count, view.size, view.scale, view.blur, view.grayscale) == (2, (48, 32), (0.3, 0.9), 0.25, 0.2)
    assert view.jitter is not None
    strengths = (view.jitter.brightness, view.jitter.contrast, view.jitter.saturation, view.jitter.hue, view.jitter.p)
    assert strengths == (0.4, 0.4, 0.4, 0.1, 0.8)


def test_collapsed_state_has_the_stated_loss() -> None:
    """The projector gives one vector or its opposite, for its last batch norm leaves nothing of one vector alone; the
    predictor gives what it gets; the views are equal, so that every image's agree."""
    method = build("simsiam")
    signs = 1 - 2 * (torch.arange(method.config.embedding_dim) % 2)
    with torch.no_grad():
        rows = method.projector[6].weight  # the map before the last norm
        rows.copy_(signs[:, None] * rows[:1].clone())
        # x as relu(x) - relu(-x), with x the length along the one vector
        method.predictor[0].weight.zero_()
        method.predictor[0].weight[:2] = torch.stack([signs, -signs])
        method.predictor[3].weight.zero_()
        method.predictor[3].weight[:, :2] = torch.stack([signs, -signs], dim=1)
        method.predictor[3].bias.zero_()
    images = batch(method, slice(0, BATCH))
    images.views["view"] = images.views["view"][:1].repeat(2, 1, 1, 1, 1)
    projected = method.projector(method.embed(images, step())["pooled"][:, 0])
    cosines = torch.nn.functional.normalize(projected, dim=1)
    torch.testing.assert_close((cosines @ cosines.T).abs(), torch.ones(BATCH, BATCH), rtol=0, atol=1e-4)
    check_stated(method, {"loss": losses_of(method, images)})
