"""The supervised control against float64 NumPy."""

import numpy as np
import pytest
import torch
from method_helpers import check_stated, losses_of, make_zero_
from ssl_pretrain.methods.supervised import Supervised

from ssl_pretrain import backbones
from ssl_pretrain.backbones.backbone import UnsupportedByBackbone
from ssl_pretrain.conformance import one_step
from ssl_pretrain.conformance.one_step import BATCH, batch, build
from ssl_pretrain.errors import UserError
from ssl_pretrain.parts.masked_autoencoder import decoded
from ssl_pretrain.parts.masks import random_masking
from ssl_pretrain.pretext import Step

KERNELS = 118  # of a step: python tests/kernels.py supervised
DEVICE_KERNELS = 133  # with the optimiser, on an accelerator: python tests/device.py supervised


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


# ---- With masked image modeling


@pytest.mark.parametrize("ratio", [(0.5, 0.5), (0.5, 1.0)])
def test_mim_adds_the_cross_entropy_of_masked_ids(ratio: tuple[float, float]) -> None:
    method = build("supervised", mim=True, mim_weight=0.7, mim_ratio=ratio).eval()
    plain = build("supervised").eval()
    plain.load_state_dict({n: v for n, v in method.state_dict().items() if n in plain.state_dict()})
    images = batch(method, slice(0, 16))
    images.labels[3] = -1  # an image without a label still teaches its tokens
    losses, alone = method(images, step()), plain(images, step())
    losses.total.backward()
    assert losses.terms["classification"].item() == alone.total.item()

    again = step()  # the draws of the forward, in their order
    drawn = ratio[0] + (ratio[1] - ratio[0]) * float(again.shared_rand(1))
    kept = max(1, int(16 * (1 - drawn)))
    keep, masked = random_masking(again.rand(16), kept)
    assert masked.shape == (BATCH, 16 - kept)
    with torch.no_grad():
        ids = method.tokenizer.ids(images.views["tokens"]).flatten(1).gather(1, masked).numpy()
        seen = method.encoder(images.views["image"], keep=keep)
        logits = decoded(method, seen, keep, masked, (4, 4)).double().numpy()
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = -np.take_along_axis(log_p, ids[..., None], axis=-1)[..., 0]
    assert losses.terms["tokens"].item() == pytest.approx(each.mean(), rel=1e-5)
    assert losses.terms["token_accuracy"].item() == pytest.approx((logits.argmax(-1) == ids).mean())
    np.testing.assert_allclose(losses.per_sample, alone.per_sample.numpy() + 0.7 * each.mean(1), rtol=1e-5)
    assert losses.total.item() == pytest.approx(alone.total.item() + 0.7 * each.mean(), rel=1e-5)
    expected = 0.7 * (np.exp(log_p) - np.eye(8)[ids]).sum((0, 1)) / ids.size
    np.testing.assert_allclose(method.decoder_pred.bias.grad, expected, rtol=1e-3, atol=1e-6)


def test_the_masking_ratio_changes_from_step_to_step_and_leaves_something() -> None:
    method = build("supervised", mim=True, mim_ratio=(0.5, 1.0))
    kept: list[int] = []
    method.encoder.patch_embed.register_forward_pre_hook(
        lambda module, given: kept.append(given[1].shape[1]) if given[1] is not None else None
    )
    for noise in range(40):
        with torch.no_grad():
            method(batch(method, slice(0, 16)), one_step.step(noise=noise))
    assert len(kept) == 40
    assert min(kept) == 1
    assert max(kept) <= 8
    assert len(set(kept)) > 4


def test_collapsed_state_with_mim_has_the_stated_terms() -> None:
    method = build("supervised", mim=True, label_smoothing=0.0)
    make_zero_(method.head)
    make_zero_(method.decoder_pred)
    losses = losses_of(method)
    check_stated(method, {"classification": losses, "token_gain": losses})


def test_mim_leaves_nothing_in_the_plain_method() -> None:
    assert not [name for name in build("supervised").state_dict() if "decoder" in name or "mask" in name]
    resnet = backbones.build("resnet18", image_size=(32, 32))
    Supervised(resnet, Supervised.Config())
    with pytest.raises(UnsupportedByBackbone, match="supervised --mim needs an encoder that supports 'keep'"):
        Supervised(resnet, Supervised.Config(mim=True))
