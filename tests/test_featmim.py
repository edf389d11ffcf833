"""Masked feature prediction: HOG, morphing and the losses against NumPy written from the papers; the teacher's pixels."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from method_helpers import check_stated
from ssl_pretrain.methods.featmim import FeatMIM

from ssl_pretrain import backbones
from ssl_pretrain.conformance import one_step
from ssl_pretrain.errors import UserError
from ssl_pretrain.parts.hog import hog
from ssl_pretrain.parts.morphing import groups
from ssl_pretrain.parts.targets import distances, tap, transformed
from ssl_pretrain.pretext import Losses

KERNELS = 2174  # of a step: python tests/kernels.py featmim
DEVICE_KERNELS = 220  # with the optimiser, on an accelerator: python tests/device.py featmim


def hog_oracle(image: np.ndarray, patch: int, cell: int) -> np.ndarray:
    """One channel (H, W), float64, by loops: (N, 9 * cells)."""
    height, width = image.shape
    padded = np.pad(image, 1, mode="reflect")
    histogram = np.zeros((9, height // cell, width // cell))
    for y in range(height):
        for x in range(width):
            w = padded[y : y + 3, x : x + 3]
            gx = (w[0, 0] - w[0, 2]) + 2 * (w[1, 0] - w[1, 2]) + (w[2, 0] - w[2, 2])
            gy = (w[0, 0] - w[2, 0]) + 2 * (w[0, 1] - w[2, 1]) + (w[0, 2] - w[2, 2])
            place = math.floor(math.atan2(gx, gy) / math.pi * 9) % 9
            histogram[place, y // cell, x // cell] += math.hypot(gx, gy)
    histogram /= np.maximum(np.sqrt((histogram**2).sum(0, keepdims=True)), 1e-12)
    n = patch // cell
    rows = []
    for top in range(0, height // cell, n):
        for left in range(0, width // cell, n):
            rows.append(histogram[:, top : top + n, left : left + n].reshape(-1))
    return np.array(rows)


@pytest.mark.parametrize(("patch", "cell"), [(8, 4), (8, 8), (16, 4)])
def test_hog_against_loops(patch: int, cell: int):
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 48))
    found = hog(torch.from_numpy(images).float(), (patch, patch), cell)
    for b in range(2):
        channels = [hog_oracle(images[b, c], patch, cell) for c in range(3)]
        np.testing.assert_allclose(found[b], np.concatenate(channels, axis=1), atol=1e-4)


def test_hog_of_a_flat_image_is_zero():
    assert torch.equal(hog(torch.full((1, 3, 16, 16), 0.3), (8, 8), 4), torch.zeros(1, 4, 108))


def morphing_oracle(tokens: np.ndarray, removed: int, rounds: int) -> np.ndarray:
    """One image's averages (N, N), float64, with sets and loops."""
    members = [[i] for i in range(len(tokens))]
    left, each = removed, math.ceil(removed / rounds)
    while left > 0 and len(members) > 1:
        x = np.array([tokens[m].mean(0) for m in members])
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        even, odd = list(range(0, len(x), 2)), list(range(1, len(x), 2))
        best = {i: max(odd, key=lambda j, i=i: x[i] @ x[j]) for i in even}
        r = min(each, left, len(members) // 2)
        gone = sorted(even, key=lambda i: -(x[i] @ x[best[i]]))[:r]
        for i in gone:
            members[best[i]] = members[best[i]] + members[i]
        members = [members[i] for i in even if i not in gone] + [members[i] for i in odd]
        left -= r
    out = np.zeros((len(tokens), len(tokens)))
    for m in members:
        for i in m:
            out[i, m] = 1 / len(m)
    return out


@pytest.mark.parametrize(("removed", "rounds"), [(0, 1), (5, 1), (5, 3), (12, 2), (15, 14)])
def test_morphing_against_sets(removed: int, rounds: int):
    tokens = np.random.default_rng(1).standard_normal((3, 16, 5))
    found = groups(torch.from_numpy(tokens), removed, rounds)
    for b in range(3):
        np.testing.assert_allclose(found[b], morphing_oracle(tokens[b], removed, rounds), atol=1e-5)
    if removed == 0:
        assert torch.equal(found, torch.eye(16).expand(3, -1, -1))


def distance_oracle(p: np.ndarray, t: np.ndarray, loss: str, beta: float) -> np.ndarray:
    if loss == "cosine":
        return 1 - (p * t).sum(-1) / np.sqrt((p * p).sum(-1) * (t * t).sum(-1))
    d = np.abs(p - t)
    if loss == "mse":
        return (d**2).mean(-1)
    return np.where(d < beta, 0.5 * d**2 / beta, d - beta / 2).mean(-1)


@pytest.mark.parametrize("loss", ["cosine", "smooth_l1", "mse"])
def test_distances_against_numpy(loss: str):
    p, t = np.random.default_rng(2).standard_normal((2, 3, 4, 6)) * 2
    found = distances(torch.from_numpy(p), torch.from_numpy(t), loss, 1.5)
    np.testing.assert_allclose(found, distance_oracle(p, t, loss, 1.5), rtol=1e-5)


def test_transforms_against_numpy():
    x = np.random.default_rng(3).standard_normal((2, 5)) * 3 + 1
    norm = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(transformed(torch.from_numpy(x), "layer_norm"), norm, rtol=1e-5)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_allclose(transformed(torch.from_numpy(x), "l2"), unit, rtol=1e-5)


def test_taps_are_the_blocks_before_and_after_the_norm():
    teacher = one_step.networks(("teacher",))["teacher"]
    images = torch.randn(2, 3, 64, 64)
    last = teacher(images)
    assert torch.equal(tap(teacher, images, -1, True).patches, last.patches)
    raw = tap(teacher, images, -1, False)
    torch.testing.assert_close(teacher.backbone.norm(raw.patches), last.patches)
    torch.testing.assert_close(teacher.backbone.norm(raw.cls), last.cls)
    first = tap(teacher, images, 0, True)
    assert not torch.allclose(first.patches, last.patches, atol=1e-2)
    torch.testing.assert_close(first.patches, teacher.backbone.norm(tap(teacher, images, -2, False).patches))


def loss_oracle(method: FeatMIM, predicted: np.ndarray, targets: np.ndarray, masked: np.ndarray, weights) -> float:
    config, total = method.config, 0.0
    for b in range(len(predicted)):
        each = np.zeros(len(masked[b]))
        for w in weights:
            p, t = (predicted[b], targets[b]) if w is None else (w[b] @ predicted[b], w[b] @ targets[b])
            each += distance_oracle(p, t, config.loss, config.beta) / len(weights)
        total += each[masked[b]].mean() + config.visible_weight * each[~masked[b]].mean()
    return total / len(predicted)


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"target": "hog", "loss": "mse"},
        {"loss": "smooth_l1", "morphings": 2, "visible_weight": 1.0, "morphing_rounds": 3},
        {"target_block": 0, "target_final_norm": False, "target_norm": "l2", "loss": "mse"},
    ],
)
def test_loss_and_gradient_against_numpy(knobs: dict):
    method = one_step.build("featmim", **knobs).eval()
    batch, step = one_step.batch(method), one_step.step()
    losses = method(batch, step)
    losses.total.backward()

    images, again = batch.views["image"], one_step.step()
    grid = method.grid(images)
    targets = method.target(batch, grid)
    masked = method.masks(grid, again)
    weights = [None if w is None else w.double().numpy() for w in method.morphed(targets, again)]
    tokens = method.encoder(images, replace=(masked, method.mask_token)).patches.detach().double().numpy()
    w, b = method.head.weight.detach().double().numpy(), method.head.bias.detach().double().numpy()

    def value(bias: np.ndarray) -> float:
        arrays = targets.double().numpy(), masked.numpy(), weights
        return loss_oracle(method, tokens @ w.T + bias, *arrays)

    assert float(losses.total.detach()) == pytest.approx(value(b), rel=1e-5)
    direction = np.random.default_rng(0).standard_normal(b.shape)
    h = 1e-5
    quotient = (value(b + h * direction) - value(b - h * direction)) / (2 * h)
    assert float((method.head.bias.grad.double().numpy() * direction).sum()) == pytest.approx(
        quotient, rel=1e-3, abs=1e-8
    )
    assert float(losses.per_sample.mean()) == pytest.approx(float(losses.total.detach()), rel=1e-5)


def test_targets_of_a_teacher_with_another_patch_are_those_of_the_same_pixels():
    """The teacher has patches of 16 pixels, the student of 8: its view has twice the pixels, and the same grid."""
    method = one_step.build("featmim", target_norm="none")
    batch = one_step.batch(method)
    assert batch.views["teacher"].shape[-2:] == (64, 64)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    by_hand = (batch.views["teacher"] * std + mean - 0.5) / 0.25
    expected = method.target.teacher.backbone(by_hand).patches
    torch.testing.assert_close(method.target(batch, (4, 4)), expected, rtol=1e-5, atol=1e-5)


def test_every_image_has_the_same_number_of_masked_patches():
    method = one_step.build("featmim", mask_ratio=0.4)
    masks = method.masks((4, 6), one_step.step())
    assert set(masks.sum(1).tolist()) == {int(24 * 0.4)}
    assert len({tuple(row.tolist()) for row in masks}) > 4
    # blocks: neighbours agree more often than in random masks of that number
    large = method.masks((14, 14), one_step.step()).unflatten(1, (14, 14))
    same = (large[:, :, 1:] == large[:, :, :-1]).float().mean()
    assert same > 0.7  # random masks: 0.4 ** 2 + 0.6 ** 2 = 0.52


def test_collapsed_is_what_it_states():
    method = one_step.build("featmim")
    with torch.no_grad():
        method.head.weight.zero_()
        batch = one_step.batch(method)
        targets = method.target(batch, method.grid(batch.views["image"]))
        method.head.bias.copy_(torch.nn.functional.normalize(targets, dim=-1).mean((0, 1)))
    # "relative" is of the masked patches, and the stated value of all: mask nearly everything
    method.config = replace(method.config, mask_ratio=0.99)
    assert method.masks((4, 4), one_step.step()).sum(1).tolist() == [15] * one_step.BATCH
    many = [method(batch, one_step.step(noise=noise)).terms["relative"] for noise in range(40)]
    check_stated(method, {"relative": Losses(total=torch.zeros(()), terms={"relative": torch.stack(many).mean()})})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "featmim", "--image-size", "32"], "name it with --teacher"),
        (["--method", "featmim", "--target", "hog", "--teacher", "nowhere"], "reads no teacher"),
    ],
)
def test_mistakes(flags, message, pretrain, photos, tmp_path):
    said = pretrain(*flags, "--data", photos, "--steps", "2", "--out", tmp_path / "run", code=2).stderr
    assert message in said


def test_a_block_that_the_teacher_does_not_have_is_refused():
    with pytest.raises(UserError, match=r"--target-block 7: teacher has 2 blocks"):
        one_step.build("featmim", target_block=7)


def test_hog_needs_no_teacher():
    config = FeatMIM.Config(target="hog")
    assert FeatMIM.frozen(config) == ()
    encoder = backbones.build("vit_micro", image_size=(32, 32), patch_size=8)
    method = FeatMIM(encoder, replace(config, loss="mse"))
    assert method.head.out_features == 3 * 9 * 4
