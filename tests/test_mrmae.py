"""MR-MAE: both losses and their gradients against NumPy, which tokens each acts on, and the teacher's pixels."""

from typing import Any

import numpy as np
import pytest
import torch
from method_helpers import check_stated, losses_of, make_zero_
from numpy_oracles import numpy_patches
from ssl_pretrain.methods.mrmae import MRMAE

from ssl_pretrain import backbones
from ssl_pretrain.backbones.backbone import UnsupportedByBackbone
from ssl_pretrain.conformance import one_step
from ssl_pretrain.conformance.one_step import BATCH
from ssl_pretrain.errors import UserError
from ssl_pretrain.parts.masked_autoencoder import decoded, masking
from ssl_pretrain.pretext import Batch

KERNELS = 201  # of a step: python tests/kernels.py mrmae
DEVICE_KERNELS = 216  # with the optimiser, on an accelerator: python tests/device.py mrmae


def numpy_distance(p: np.ndarray, t: np.ndarray, loss: str, beta: float) -> np.ndarray:
    if loss == "cosine":
        return 1 - (p * t).sum(-1) / np.sqrt((p * p).sum(-1) * (t * t).sum(-1))
    d = np.abs(p - t)
    return (d**2 if loss == "mse" else np.where(d < beta, 0.5 * d**2 / beta, d - beta / 2)).mean(-1)


def teacher_by_hand(method: MRMAE, batch: Batch) -> np.ndarray:
    """The teacher's patch features (B, N, T) of the crop's pixels in its own normalisation (one_step's numbers)."""
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    pixels = batch.views["teacher"] * std + mean
    teacher = method.target.teacher
    assert teacher is not None
    return teacher.backbone((pixels - 0.5) / 0.25).patches.detach().double().numpy()


def parts(method: MRMAE, batch: Batch) -> dict[str, np.ndarray]:
    """What the losses are made of, float64: the mask, the encoder's patches, the decoder's predictions."""
    images = batch.views["image"]
    with torch.no_grad():
        keep, masked, grid = masking(method.encoder, images, one_step.step(), method.config.mask_ratio)
        seen = method.encoder(images, keep=keep)
        painted = decoded(method, seen, keep, masked, grid)
    return {
        "keep": keep.numpy(),
        "masked": masked.numpy(),
        "tokens": seen.patches.double().numpy(),
        "painted": painted.double().numpy(),
    }


@pytest.mark.parametrize(
    "knobs",
    [
        {"target_norm": "none"},
        {"target_norm": "none", "loss": "cosine", "mimic_weight": 0.3, "norm_pix": False},
        {"target_norm": "l2", "loss": "smooth_l1", "beta": 0.1, "mask_ratio": 0.5},
    ],
)
def test_loss_and_gradient_against_numpy(knobs: dict[str, Any]) -> None:
    method = one_step.build("mrmae", **knobs).eval()
    assert isinstance(method, MRMAE)
    config, batch = method.config, one_step.batch(method)
    losses = method(batch, one_step.step())
    losses.total.backward()

    found = parts(method, batch)
    each_image = np.arange(BATCH)[:, None]
    target = numpy_patches(batch.views["image"].double().numpy(), 8)[each_image, found["masked"]]
    if config.norm_pix:
        target = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, ddof=1, keepdims=True) + 1e-6)
    pixels = ((found["painted"] - target) ** 2).mean((1, 2))
    wanted = teacher_by_hand(method, batch)
    if config.target_norm == "l2":
        wanted = wanted / np.linalg.norm(wanted, axis=-1, keepdims=True)
    wanted = wanted[each_image, found["keep"]]
    weight = method.mimic.weight.detach().double().numpy()
    bias = method.mimic.bias.detach().double().numpy()

    def mimic(bias: np.ndarray) -> np.ndarray:
        return numpy_distance(found["tokens"] @ weight.T + bias, wanted, config.loss, config.beta).mean(1)

    assert losses.terms["reconstruction"].item() == pytest.approx(pixels.mean(), rel=1e-5)
    assert losses.terms["mimic"].item() == pytest.approx(mimic(bias).mean(), rel=1e-5)
    whole = pixels + config.mimic_weight * mimic(bias)
    np.testing.assert_allclose(losses.per_sample, whole, rtol=1e-5)
    assert losses.total.item() == pytest.approx(whole.mean(), rel=1e-5)
    for place in (0, 7):
        moved = np.eye(len(bias))[place] * 1e-5
        quotient = config.mimic_weight * (mimic(bias + moved) - mimic(bias - moved)).mean() / 2e-5
        assert method.mimic.bias.grad[place].item() == pytest.approx(quotient, rel=1e-3, abs=1e-8)
    gradient = 2 * (found["painted"] - target) / target.size
    np.testing.assert_allclose(method.decoder_pred.bias.grad, gradient.sum((0, 1)), rtol=1e-3, atol=1e-7)


def test_targets_of_a_teacher_with_another_patch_are_those_of_the_same_pixels() -> None:
    """The teacher has patches of 16 pixels, the student of 8: its view has twice the pixels, and the same grid."""
    method = one_step.build("mrmae", target_norm="none")
    batch = one_step.batch(method)
    assert batch.views["teacher"].shape[-2:] == (64, 64)
    found = method.target(batch, (4, 4))
    np.testing.assert_allclose(found, teacher_by_hand(method, batch), rtol=1e-5, atol=1e-5)
    # On a grid that is not the student's the map is resized: no patch gets the feature of another place.
    batch.views["teacher"] = batch.views["teacher"][..., :32, :]
    half = method.target(batch, (4, 4)).unflatten(1, (4, 4))
    own = torch.from_numpy(teacher_by_hand(method, batch)).unflatten(1, (2, 4))
    torch.testing.assert_close(half[:, :2].mean(1), own[:, 0].float(), rtol=0.3, atol=0.3)
    assert (half[:, 1] - own[:, 1]).abs().mean() > (half[:, 1] - own[:, 0]).abs().mean()


def test_the_teacher_sees_the_whole_image_and_the_encoder_the_kept_patches() -> None:
    method = one_step.build("mrmae", target_norm="none").eval()
    batch = one_step.batch(method)
    images = batch.views["image"]
    _, masked, _ = masking(method.encoder, images, one_step.step(), method.config.mask_ratio)
    before = losses_of_batch(method, batch)
    # Pixels of a masked patch change the reconstruction alone, as long as the teacher's view stays.
    patch = int(masked[0, 0])
    row, column = 8 * (patch // 4), 8 * (patch % 4)
    batch.views["image"] = images.clone()
    batch.views["image"][0, :, row : row + 8, column : column + 8] = torch.randn(3, 8, 8)
    hidden = losses_of_batch(method, batch)
    assert hidden["mimic"] == before["mimic"]
    assert hidden["reconstruction"] != before["reconstruction"]
    # Pixels of the teacher's view at a masked patch change the mimic loss: its features are of the whole image.
    batch.views["image"] = images
    batch.views["teacher"] = batch.views["teacher"].clone()
    batch.views["teacher"][0, :, 2 * row : 2 * row + 16, 2 * column : 2 * column + 16] += 1
    taught = losses_of_batch(method, batch)
    assert taught["reconstruction"] == before["reconstruction"]
    assert taught["mimic"] != before["mimic"]


def losses_of_batch(method: MRMAE, batch: Batch) -> dict[str, float]:
    with torch.no_grad():
        return {name: value.item() for name, value in method(batch, one_step.step()).terms.items()}


def test_gradient_norms_are_those_of_two_runs() -> None:
    """With mimic_weight 0 the encoder's output gets the reconstruction's gradient, and the rest of the whole is the mimic
    loss's."""
    norms = {}
    for name, weight in (("reconstruction", 0.0), ("both", 0.7)):
        method = one_step.build("mrmae", mimic_weight=weight, gradient_norms=True).eval()
        kept: list[torch.Tensor] = []
        method.encoder.norm.register_forward_hook(lambda module, given, out, kept=kept: kept.append(out))
        losses = method(one_step.batch(method), one_step.step())
        norms[name] = torch.autograd.grad(losses.total, kept[0])[0], losses.terms
    pixels, terms = norms["reconstruction"][0], norms["both"][1]
    assert terms["gradient_reconstruction"].item() == pytest.approx(pixels.norm().item(), rel=1e-5)
    assert terms["gradient_mimic"].item() == pytest.approx((norms["both"][0] - pixels).norm().item(), rel=1e-4)
    assert norms["reconstruction"][1]["gradient_mimic"].item() == 0
    plain = one_step.build("mrmae")
    assert not [name for name in losses_of(plain).terms if name.startswith("gradient")]


def test_collapsed_is_what_it_states() -> None:
    """The decoder paints zero, the mean of a normalised patch; every patch mimics the mean target."""
    method = one_step.build("mrmae", mask_ratio=0.01)  # nearly all patches are visible: "relative" is of visible ones
    assert method.encoder.image_size == (32, 32)
    make_zero_(method.decoder_pred)
    make_zero_(method.mimic)
    batch = one_step.batch(method)
    with torch.no_grad():
        method.mimic.bias.copy_(method.target(batch, (4, 4)).mean((0, 1)))
    many = [method(batch, one_step.step(noise=noise)).terms for noise in range(40)]
    losses = losses_of(method, batch)
    mean = {name: torch.stack([each[name] for each in many]).mean().detach() for name in ("relative", "reconstruction")}
    losses.terms |= {"relative": mean["relative"]}
    check_stated(method, {"relative": losses, "reconstruction": losses})
    assert list(one_step.build("mrmae", norm_pix=False).collapsed(BATCH)) == ["relative"]


def test_pictures_are_those_of_mae() -> None:
    method = one_step.build("mrmae")
    batch = one_step.batch(method)
    shown = method.pictures(batch, one_step.step())
    assert list(shown) == ["input", "masked", "reconstruction"]
    gone = (shown["masked"] != shown["input"]).any(1).float().mean()
    assert gone == 0.75


def test_an_encoder_that_cannot_drop_tokens_is_refused() -> None:
    with pytest.raises(UnsupportedByBackbone, match="mrmae needs an encoder that supports 'keep'"):
        MRMAE(backbones.build("resnet18", image_size=(32, 32)), MRMAE.Config(target="hog"))


@pytest.mark.parametrize("knobs", [{"target_block": 7}, {"mimic_weight": -1.0}, {"mask_ratio": 0.99}])
def test_knobs_that_cannot_be(knobs: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--"):
        one_step.build("mrmae", **knobs)
