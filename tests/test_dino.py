"""DINO against NumPy written from the paper's algorithm 1: loss, gradient, centre, teacher, schedules."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from method_helpers import check_stated, losses_of, make_certain_, make_uniform_
from numpy_oracles import numpy_softmax
from ssl_pretrain.methods.dino import DINO

from ssl_pretrain import backbones, encoder, pretext
from ssl_pretrain.conformance.one_step import after_step, batch, build
from ssl_pretrain.data.views import Jitter
from ssl_pretrain.parts.ema_teacher import cosine_momentum, ema_copy, ema_update_
from ssl_pretrain.parts.self_distillation import cross_entropy_of_pairs, warmed_up
from ssl_pretrain.pretext import Batch, Step

KERNELS = 302  # of a step: python tests/kernels.py dino
DEVICE_KERNELS = 327  # with the optimiser, on an accelerator: python tests/device.py dino

ONE = torch.ones((), dtype=torch.bool)


def step(number: int = 3, total: int = 10) -> Step:
    return Step(step=number, total=total, noise=1, rows=slice(0, 16), batch_size=16, device=torch.device("cpu"))


def numpy_loss(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    """(B,), pair by pair."""
    total, pairs = np.zeros(student.shape[1]), 0
    for t in range(len(teacher)):
        for s in range(len(student)):
            if s != t:
                total -= (teacher[t] * np.log(numpy_softmax(student[s] / temperature))).sum(-1)
                pairs += 1
    return total / pairs


def test_cross_entropy_and_its_gradient_are_those_of_the_pairs() -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(5, 3, 7)), numpy_softmax(rng.normal(size=(2, 3, 7)) * 3)
    x = torch.tensor(student, requires_grad=True)
    each, entropy = cross_entropy_of_pairs(x, torch.tensor(teacher), 0.3)
    np.testing.assert_allclose(each.detach().numpy(), numpy_loss(student, teacher, 0.3), rtol=1e-12)
    assert entropy.item() == pytest.approx(-(teacher * np.log(teacher)).sum(-1).mean())
    each.mean().backward()
    assert x.grad is not None
    for place in ((0, 0, 0), (1, 2, 3), (4, 1, 6)):
        moved = []
        for sign in (1, -1):
            other = student.copy()
            other[place] += sign * 1e-6
            moved.append(numpy_loss(other, teacher, 0.3).mean())
        assert x.grad[place].item() == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-4, abs=1e-9)


def test_a_uniform_student_loses_log_k_and_a_certain_teacher_has_no_entropy() -> None:
    teacher = torch.eye(8)[:3].expand(2, 3, 8)
    each, entropy = cross_entropy_of_pairs(torch.zeros(4, 3, 8), teacher, 0.1)
    torch.testing.assert_close(each, torch.full((3,), math.log(8)))
    assert entropy.item() == pytest.approx(0, abs=1e-6)


def views_of(method: DINO) -> Batch:
    images = batch(method, slice(0, 16))
    images.views = {name: view.double() for name, view in images.views.items()}
    return images


def test_loss_centre_and_teacher_of_two_steps() -> None:
    method = build("dino").double().eval()  # without drop path
    assert isinstance(method, DINO)
    images = views_of(method)
    with torch.no_grad():
        for p in method.head.parameters():  # the student has moved away from its teacher
            p.add_(0.05 * torch.randn_like(p))
        crops = [images.views["global1"], images.views["global2"], *images.views["local"]]
        student = np.stack([method.head(method.encoder(crop).pooled).numpy() for crop in crops])
        seen = np.stack([method.teacher["head"](method.teacher["encoder"](crop).pooled).numpy() for crop in crops[:2]])
    centre = np.zeros(48)
    for number in (3, 4):
        losses = method(images, step(number))
        expected = numpy_loss(student, numpy_softmax((seen - centre) / 0.04), 0.1)
        np.testing.assert_allclose(losses.per_sample.numpy(), expected, rtol=1e-5)  # type: ignore[union-attr]
        weight = method.teacher["head"].prototypes.weight.numpy().copy()
        here = step(number)
        here.ok = ONE
        after_step(method, here, losses.carry)
        centre = 0.9 * centre + 0.1 * seen.mean((0, 1))
        np.testing.assert_allclose(method.centre.numpy(), centre, rtol=1e-6)
        momentum = 1 - (1 - 0.996) * (math.cos(math.pi * number / 10) + 1) / 2
        moved = momentum * weight + (1 - momentum) * method.head.prototypes.weight.detach().numpy()
        # Numbers near 0 carry the rounding of those they are the sum of.
        np.testing.assert_allclose(method.teacher["head"].prototypes.weight.numpy(), moved, rtol=1e-6, atol=1e-9)
        with torch.no_grad():
            crops2 = crops[:2]
            seen = np.stack([method.teacher["head"](method.teacher["encoder"](c).pooled).numpy() for c in crops2])


def test_a_step_that_is_not_finite_moves_neither_teacher_nor_centre() -> None:
    method = build("dino")
    images = batch(method, slice(0, 16))
    losses = method(images, step())
    with torch.no_grad():
        for p in method.head.parameters():
            p.add_(1)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    here = step()
    here.ok = ~ONE
    after_step(method, here, {"teacher": torch.full_like(losses.carry["teacher"], float("nan"))})
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_the_teacher_gets_no_gradient_and_sees_only_global_views() -> None:
    method = build("dino")
    assert isinstance(method, DINO)
    images = batch(method, slice(0, 16))
    losses = method(images, step())
    losses.total.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    images.views["local"] = torch.zeros_like(images.views["local"])
    torch.testing.assert_close(method(images, step()).carry["teacher"], losses.carry["teacher"])
    assert method.exported() is method.teacher["encoder"]


def test_prototypes_are_frozen_at_the_start_and_learn_later() -> None:
    method = build("dino")
    assert isinstance(method, DINO)
    for number, total in ((0, 1000), (20, 1000)):
        method.zero_grad()
        method(batch(method, slice(0, 16)), step(number, total)).total.backward()
        grad = method.head.prototypes.weight.grad
        assert grad is not None
        assert bool((grad != 0).any()) == (number == 20)


def test_the_temperature_of_the_teacher_warms_up() -> None:
    assert warmed_up(0.04, 0.07, 0.3, 0.0) == pytest.approx(0.04)
    assert warmed_up(0.04, 0.07, 0.3, 0.15) == pytest.approx(0.055)
    assert warmed_up(0.04, 0.07, 0.3, 0.5) == 0.07
    assert warmed_up(0.04, 0.07, 0.0, 0.0) == 0.07


def test_the_teacher_drops_nothing_and_follows_only_what_is_trained() -> None:
    student = backbones.build(
        "vit_micro", image_size=(16, 16), patch_size=8, depth=2, drop_path=0.5, positions="sincos"
    )
    student.norm.bias.requires_grad_(False)
    teacher = ema_copy(student)
    teacher.train()
    teacher(torch.zeros(2, 3, 16, 16))  # no noise asked for
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    ema_update_(teacher, student, 0.75, ONE)
    for name, p in teacher.named_parameters():
        expected = before[name] + (0 if name == "norm.bias" else 0.25)
        torch.testing.assert_close(p, expected)
    assert cosine_momentum(0.9, 0.0) == pytest.approx(0.9)
    assert cosine_momentum(0.9, 1.0) == pytest.approx(1.0)
    assert cosine_momentum(0.9, 0.5) == pytest.approx(0.95)


def test_views_are_the_papers() -> None:
    first, second, local = DINO.views(DINO.Config(), (224, 224))
    assert (first.blur, first.solarize, second.blur, second.solarize, local.blur) == (1.0, 0.0, 0.1, 0.2, 0.5)
    assert local.size == (96, 96)
    assert local.count == 8
    assert len(DINO.views(DINO.Config(local_views=0), (224, 224))) == 2


def test_the_teacher_begins_with_the_weights_of_init_from(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    """Made in the constructor it would keep the random ones, and be exported with them."""
    same = ["--method", "dino", "--data", photos, "--encoder", "vit_micro", "--depth", 1, "--image-size", 32]
    same += ["--patch-size", 8, "--batch-size", 8, "--hidden-dim", 16, "--prototypes", 8, "--local-views", 1]
    same += ["--steps", 1, "--workers", 0]
    pretrain(*same, "--out", tmp_path / "first", "--seed", 1)
    pretrain(*same, "--out", tmp_path / "second", "--seed", 2, "--lr", 0, "--init-from", tmp_path / "first")
    first, second = (encoder.load(tmp_path / name).state_dict() for name in ("first", "second"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("name", ["dino", "ibot", "dinov2", "lejepa", "byol", "mocov3", "nnclr", "barlow", "vicreg"])
def test_colour_jitter_is_that_of_the_papers_with_saturation_at_half(name: str) -> None:
    """0.4, 0.4, 0.2, 0.1 with probability 0.8: not SimCLR's at half strength, whose saturation is 0.4."""
    kind = pretext.load(name)
    for spec in kind.views(kind.Config(), (224, 224)):
        assert spec.jitter == Jitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8)


def test_collapsed_state_has_the_stated_loss() -> None:
    method = build("dino")
    for head in (method.head, method.teacher["head"]):
        make_uniform_(head.prototypes)
    uniform = losses_of(method)

    method = build("dino")
    make_certain_(method.teacher["head"])
    check_stated(method, {"loss": uniform, "teacher_entropy": losses_of(method)})
