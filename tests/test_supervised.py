"""The supervised control against float64 NumPy."""

import numpy as np
import pytest
import torch
from method_helpers import check_stated, losses_of, make_zero_
from ssl_pretrain.methods.supervised import Supervised

from ssl_pretrain.conformance.one_step import batch, build
from ssl_pretrain.errors import UserError
from ssl_pretrain.pretext import Step

KERNELS = 118  # of a step: python tests/kernels.py supervised


def step() -> Step:
    return Step(step=0, total=10, noise=1, rows=slice(0, 16), batch_size=16, device=torch.device("cpu"))


def test_smoothed_cross_entropy_of_known_labels_only() -> None:
    method = build("supervised").double()
    assert isinstance(method, Supervised)
    images = batch(method, slice(0, 16))
    images.views = {"image": images.views["image"].double()}
    assert images.labels is not None
    images.labels[3] = -1
    losses = method(images, step())
    with torch.no_grad():
        logits = method.head(method.encoder(images.views["image"]).pooled).numpy()
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    target = np.full((16, 6), 0.1 / 6)
    for i, label in enumerate(images.labels.tolist()):
        target[i, label] += 0.9
    rows = -(target * log_p).sum(1)
    rows[3] = 0
    assert losses.total.item() == pytest.approx(rows.mean(), rel=1e-6)
    assert losses.per_sample is not None
    np.testing.assert_allclose(losses.per_sample.numpy(), rows, rtol=1e-5)


def test_a_class_too_many_is_a_loss_that_is_not_finite_and_names_its_image() -> None:
    method = build("supervised")
    images = batch(method, slice(0, 16))
    assert images.labels is not None
    images.labels[5] = 6
    losses = method(images, step())
    assert losses.per_sample is not None
    assert (~torch.isfinite(losses.per_sample)).nonzero().flatten().tolist() == [5]


def test_images_without_labels_and_a_single_class_are_refused() -> None:
    method = build("supervised")
    images = batch(method, slice(0, 16))
    images.labels = None
    with pytest.raises(UserError, match="needs labels"):
        method(images, step())
    with pytest.raises(UserError, match="--classes"):
        Supervised(method.encoder, Supervised.Config(classes=1))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_collapsed_state_has_the_stated_loss(label_smoothing: float) -> None:
    method = build("supervised", label_smoothing=label_smoothing)
    make_zero_(method.head)
    check_stated(method, {"loss": losses_of(method)})
