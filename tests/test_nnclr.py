"""NNCLR and its queue: loss and gradients against float64 NumPy from the encoder's vectors on, the queue against a list."""

import math

import numpy as np
import pytest
import torch
from method_helpers import check_stated, double_batch, losses_of, make_constant_, step
from numpy_oracles import Weights, check_gradients, numpy_head, numpy_normalize, weights_of
from ssl_pretrain.methods.nnclr import NNCLR

from ssl_pretrain.conformance.one_step import after_step, build
from ssl_pretrain.errors import UserError
from ssl_pretrain.parts.feature_queue import Queue

KERNELS = 339  # of a step: python tests/kernels.py nnclr
DEVICE_KERNELS = 365  # with the optimiser, on an accelerator: python tests/device.py nnclr

PROJECTOR, PREDICTOR = "linear norm relu linear norm relu linear norm", "linear norm relu linear"
SMALL = {"queue": 40, "hidden_dim": 64, "predictor_dim": 64, "embedding_dim": 16}


def made(**knobs: object) -> NNCLR:
    return NNCLR(build("nnclr").encoder, NNCLR.Config(**{**SMALL, **knobs})).double()  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "temperature"), [("infonce", 0.1), ("dcl", 0.1), ("infonce", 0.3)])
def test_loss_and_gradients_against_numpy(kind: str, temperature: float) -> None:
    method = made(loss=kind, temperature=temperature)
    at = {"pooled": np.random.default_rng(0).standard_normal((16, 2, method.encoder.dim))}
    at |= weights_of(method.projector, "projector.") | weights_of(method.predictor, "predictor.")
    queue = method.queue.rows.numpy().copy()
    # Neighbours are constants: no gradient goes through the choice of them, nor into the queue.
    projected = [numpy_normalize(numpy_head(at, "projector.", PROJECTOR, at["pooled"][:, v])) for v in (0, 1)]
    neighbours = [[queue[np.argmin(((queue - z) ** 2).sum(1))] for z in view] for view in projected]

    def each(given: Weights) -> np.ndarray:
        predicted = []
        for v in (0, 1):
            z = numpy_head(given, "projector.", PROJECTOR, given["pooled"][:, v])
            predicted.append(numpy_normalize(numpy_head(given, "predictor.", PREDICTOR, z)))
        total = np.zeros(16)
        for v in (0, 1):
            for i in range(16):
                chances = np.exp(predicted[1 - v] @ neighbours[v][i] / temperature)
                told_from = chances.sum() - (chances[i] if kind == "dcl" else 0)
                total[i] -= np.log(chances[i] / told_from) / 2
        return total

    pooled = torch.tensor(at["pooled"], requires_grad=True)
    losses = method.loss({"pooled": pooled}, step())
    assert losses.total.item() == pytest.approx(each(at).mean(), rel=1e-10)
    assert losses.per_sample is not None
    np.testing.assert_allclose(losses.per_sample.numpy(), each(at), rtol=1e-10)
    np.testing.assert_allclose(losses.carry["projected"].numpy(), projected[0], rtol=1e-9, atol=1e-12)
    losses.total.backward()
    gradients = {n: p.grad.numpy() for n, p in method.named_parameters() if p.grad is not None}
    assert pooled.grad is not None
    check_gradients(lambda given: each(given).mean(), at, {**gradients, "pooled": pooled.grad.numpy()})


def test_heads_have_the_papers_shape() -> None:
    method = NNCLR(made().encoder, NNCLR.Config(queue=8, hidden_dim=2048, predictor_dim=4096))
    shapes = {n: tuple(p.shape) for n, p in method.named_parameters() if not n.startswith("encoder")}
    assert shapes == {
        "projector.0.weight": (2048, 128), "projector.1.weight": (2048,), "projector.1.bias": (2048,),
        "projector.3.weight": (2048, 2048), "projector.4.weight": (2048,), "projector.4.bias": (2048,),
        "projector.6.weight": (256, 2048), "projector.7.weight": (256,), "projector.7.bias": (256,),
        "predictor.0.weight": (4096, 256), "predictor.1.weight": (4096,), "predictor.1.bias": (4096,),
        "predictor.3.weight": (256, 4096), "predictor.3.bias": (256,),
    }  # fmt: skip


def test_each_view_goes_through_the_encoder() -> None:
    method = made()
    images = double_batch(method)
    pooled = method.embed(images, step())["pooled"]
    with torch.no_grad():
        for v, name in enumerate(("view1", "view2")):
            torch.testing.assert_close(pooled[:, v], method.encoder(images.views[name]).pooled)


def test_the_queue_takes_the_first_views_projections() -> None:
    method = made()
    before = method.queue.rows.clone()
    losses = method(double_batch(method), step())
    assert torch.equal(method.queue.rows, before)  # forward changes nothing
    after_step(method, step(), losses.carry)
    assert torch.equal(method.queue.rows[:16], losses.carry["projected"])
    assert torch.equal(method.queue.rows[16:], before[16:])
    assert int(method.queue.oldest) == 16


def test_a_queue_is_first_in_first_out_and_skips_bad_steps() -> None:
    torch.manual_seed(0)
    queue = Queue(7, 4)
    expected = list(queue.rows.numpy().copy())  # the oldest first
    for number, count in enumerate((3, 3, 3, 7, 2, 11, 1)):
        rows = torch.nn.functional.normalize(torch.randn(count, 4), dim=1)
        state = {n: v.clone() for n, v in queue.state_dict().items()}
        queue.put_(rows, torch.tensor(False))
        assert all(torch.equal(v, state[n]) for n, v in queue.state_dict().items())
        queue.put_(rows, torch.tensor(True))
        expected = [*expected, *rows.numpy()][-7:]
        oldest = int(queue.oldest)
        np.testing.assert_array_equal(np.roll(queue.rows.numpy(), -oldest, axis=0), expected, err_msg=f"{number}")


def test_a_queue_begins_with_random_unit_vectors() -> None:
    torch.manual_seed(0)
    rows = Queue(4000, 8).rows.double()
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4000, dtype=torch.float64), rtol=1e-6, atol=0)
    assert rows.mean(0).abs().max() < 4 / math.sqrt(8 * 4000)
    torch.testing.assert_close(rows.T @ rows / 4000, torch.eye(8, dtype=torch.float64) / 8, rtol=0, atol=0.01)


def test_the_nearest_row_is_the_one_of_least_distance() -> None:
    torch.manual_seed(0)
    queue = Queue(50, 6)
    vectors = torch.nn.functional.normalize(torch.randn(9, 6), dim=1).requires_grad_()
    found = queue.nearest(vectors)
    assert not found.requires_grad
    for vector, row in zip(vectors.detach(), found, strict=True):
        assert torch.equal(row, queue.rows[(queue.rows - vector).norm(dim=1).argmin()])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(queue.nearest(vectors), found)


def test_the_two_views_are_not_alike() -> None:
    first, second = NNCLR.views(NNCLR.Config(crop_scale=(0.2, 1.0)), (48, 32))
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    assert first.scale == second.scale == (0.2, 1.0)
    assert [view.blur for view in NNCLR.views(NNCLR.Config(blur=0.0), (48, 32))] == [0.0, 0.0]


@pytest.mark.parametrize("loss", ["infonce", "dcl"])
def test_collapsed_state_has_the_stated_loss(loss: str) -> None:
    method = build("nnclr", loss=loss)
    make_constant_(method.encoder)
    check_stated(method, {"loss": losses_of(method)})


@pytest.mark.parametrize("knob", [{"queue": 0}, {"temperature": 0.0}])
def test_knobs_out_of_range_are_refused(knob: dict) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(knob))} is "):
        made(**knob)
