"""Soft labels, mixup, CutMix and random erasing against NumPy; RandAugment's operations against torchvision's."""

import importlib
import math
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import picture
from oracles import import_torchvision

from ssl_pretrain.data import mix, randaugment
from ssl_pretrain.data.mix import Mix
from ssl_pretrain.data.randaugment import OPERATIONS, Plan
from ssl_pretrain.randomness import numpy_generator

FILL = (0.2, 0.6, 0.8)  # whole values of 255
MOVING = ("rotate", "shear x", "shear y", "translate x", "translate y")


def test_soft_labels_and_their_cross_entropy() -> None:
    labels = np.array([2, 0, 1, 2])
    wanted = np.full((4, 5), 0.1 / 5)
    wanted[np.arange(4), labels] += 0.9
    found = mix.soft_labels(torch.from_numpy(labels), 5, 0.1)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-7)
    logits = np.random.default_rng(0).standard_normal((4, 5))
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    loss = mix.soft_cross_entropy(torch.from_numpy(logits).float(), found)
    assert loss.item() == pytest.approx(-(wanted * log_p).sum(1).mean(), abs=1e-6)
    plain = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).float(), torch.from_numpy(labels), label_smoothing=0.1
    )
    assert loss.item() == pytest.approx(plain.item(), abs=1e-6)


def batch(size: tuple[int, int] = (12, 20), count: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    targets = rng.random((count, 3))
    return rng.standard_normal((count, 3, *size)), targets / targets.sum(1, keepdims=True)


def test_mixup_is_a_weighted_mean_with_the_reversed_batch() -> None:
    images, targets = batch()
    found = mix.apply(torch.from_numpy(images), torch.from_numpy(targets), Mix(0.3))
    np.testing.assert_allclose(found[0].numpy(), 0.3 * images + 0.7 * images[::-1], atol=1e-12)
    np.testing.assert_allclose(found[1].numpy(), 0.3 * targets + 0.7 * targets[::-1], atol=1e-12)


def test_cutmix_replaces_a_box_and_its_share_of_the_label() -> None:
    images, targets = batch()
    drawn = next(
        one for seed in range(99) if (one := mix.draw(numpy_generator(seed), (12, 20), mixup=0, cutmix=1.0)) and one.box
    )
    found = mix.apply(torch.from_numpy(images), torch.from_numpy(targets), drawn)
    top, left, bottom, right = drawn.box
    wanted = images.copy()
    for row in range(5):
        for y in range(top, bottom):
            for x in range(left, right):
                wanted[row, :, y, x] = images[4 - row, :, y, x]
    np.testing.assert_array_equal(found[0].numpy(), wanted)
    share = 1 - (bottom - top) * (right - left) / 240
    assert drawn.share == pytest.approx(share)
    np.testing.assert_allclose(found[1].numpy(), share * targets + (1 - share) * targets[::-1], atol=1e-12)


def test_what_is_drawn() -> None:
    def draws(**alphas: float) -> list[Mix | None]:
        return [mix.draw(numpy_generator("x", i), (32, 32), **alphas) for i in range(2000)]

    assert draws(mixup=0, cutmix=0) == [None] * 2000
    mixups, both, cuts = (draws(mixup=a, cutmix=b) for a, b in ((0.8, 0), (0.8, 1.0), (0, 1.0)))
    assert all(one.box is None for one in mixups)
    assert all(one.box is not None for one in cuts)
    assert np.mean([one.box is None for one in both]) == pytest.approx(0.5, abs=0.04)
    shares = np.array([one.share for one in mixups])  # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1))
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * 2.6), rel=0.08)
    boxes = np.array([one.box for one in cuts])
    assert boxes.min() >= 0
    assert boxes.max() <= 32
    assert (boxes[:, 0] <= boxes[:, 2]).all()
    # without the image's border, half the pixels would go on average; some of every box lies outside
    assert 0.5 < np.mean([one.share for one in cuts]) < 0.75


# ---- RandAugment.


def pictures(count: int = 4, size: tuple[int, int] = (24, 31)) -> torch.Tensor:
    """uint8 (B, 3, H, W): a smooth colour field with noise of another strength in each."""
    rng = np.random.default_rng(7)
    fields = [
        np.asarray(picture(i, size)).astype(float) + 6 * i * rng.standard_normal((*size, 3)) for i in range(count)
    ]
    return torch.from_numpy(np.stack(fields).clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


def oracle(functional: ModuleType, name: str, image: torch.Tensor, s: float, fill: tuple = FILL) -> torch.Tensor:
    """What torchvision makes of an image (3, H, W) at the strength in [-1, 1] that stands for such an argument."""
    factor, (_, height, width) = max(0.1, 1 + 0.9 * s), image.shape
    bilinear = importlib.import_module("torchvision.transforms").InterpolationMode.BILINEAR
    how = {"interpolation": bilinear, "fill": [255 * f for f in fill]}

    def affine(translate: tuple[float, float] = (0, 0), angle: float = 0, shear: tuple[float, float] = (0, 0)):
        # shears are about the first pixel's corner
        about = [0.0, 0.0] if any(shear) else None
        return functional.affine(
            image, angle, list(translate), 1.0, [math.degrees(math.atan(v)) for v in shear], center=about, **how
        )

    return {
        "auto contrast": lambda: functional.autocontrast(image),
        "equalize": lambda: functional.equalize(image),
        "invert": lambda: functional.invert(image),
        "rotate": lambda: affine(angle=30 * s),
        "posterize": lambda: functional.posterize(image, max(1, 4 - int(4 * abs(s)))),
        "solarize": lambda: functional.solarize(image, 256 - int(256 * abs(s))),
        "solarize add": lambda: torch.where(
            image < 128, (image.int() + int(110 * abs(s))).clamp(max=255), image
        ).byte(),
        "colour": lambda: functional.adjust_saturation(image, factor),
        "contrast": lambda: functional.adjust_contrast(image, factor),
        "brightness": lambda: functional.adjust_brightness(image, factor),
        "sharpness": lambda: functional.adjust_sharpness(image, factor),
        "shear x": lambda: affine(shear=(0.3 * s, 0)),
        "shear y": lambda: affine(shear=(0, 0.3 * s)),
        "translate x": lambda: affine(translate=(-0.45 * width * s, 0)),
        "translate y": lambda: affine(translate=(0, -0.45 * height * s)),
    }[name]()


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions(name: str) -> None:
    import_torchvision()
    functional = importlib.import_module("torchvision.transforms.v2.functional")
    images, outside = pictures(), 255 * torch.tensor(FILL).view(1, 3, 1, 1)
    strengths = torch.tensor([-0.95, -0.3, 0.52, 0.9]).view(4, 1, 1, 1)
    found = OPERATIONS[name](images, strengths, outside)
    assert (found.dtype, found.shape) == (torch.uint8, images.shape)
    moved = 0.0
    for image, one, s in zip(images, found, strengths.flatten().tolist(), strict=True):
        wanted = oracle(functional, name, image, s)
        moved += float((wanted.int() - image.int()).abs().float().mean())
        difference = (one.int() - wanted.int()).abs()
        if name in MOVING:  # pixels on the border itself, half inside, torchvision mixes with the fill twice
            inside = oracle(functional, name, torch.full_like(image, 255), s, fill=(0.0, 0.0, 0.0))
            difference = difference[inside == 255]
            assert difference.numel() > 0.4 * image.numel()
        # torchvision cuts off what we round, and rounds the luma first
        assert difference.max() <= (2 if name == "colour" else 1)
    assert moved > 1


def test_shifts_by_whole_pixels_are_exact() -> None:
    image, outside = pictures(1, (20, 40)), 255 * torch.tensor(FILL).view(1, 3, 1, 1)
    found = OPERATIONS["translate x"](image, torch.full((1, 1, 1, 1), 0.5), outside)  # 0.45 * 40 * 0.5 = 9 pixels
    assert torch.equal(found[..., :31], image[..., 9:])
    assert torch.equal(found[..., 31:], outside.byte().expand(1, 3, 20, 9))
    found = OPERATIONS["translate y"](image, torch.full((1, 1, 1, 1), -1.0), outside)
    assert torch.equal(found[:, :, 9:], image[:, :, :11])


def test_flat_images_and_other_channels() -> None:
    strengths = torch.full((2, 1, 1, 1), 0.9)
    for channels in (1, 3, 5):
        flat = torch.full((2, channels, 9, 9), 77, dtype=torch.uint8)
        outside = torch.full((1, channels, 1, 1), 77.0)
        for name, operation in OPERATIONS.items():
            found = operation(flat, strengths, outside)
            assert (found.amin((1, 2, 3)) == found.amax((1, 2, 3))).all(), name
    grey = pictures()[:, :1]
    assert torch.equal(OPERATIONS["colour"](grey, torch.full((4, 1, 1, 1), 0.9), torch.zeros(1, 1, 1, 1)), grey)


def plan(count: int, magnitude: float = 9.0, erase: float = 0.25, seed: int = 0, epoch: int = 0) -> Plan:
    samples = np.arange(count)
    return randaugment.draw(seed, np.full(count, epoch), samples, (32, 48), magnitude=magnitude, erase=erase)


def test_what_is_planned() -> None:
    drawn = plan(4000)
    assert (drawn.operations < 0).mean() == pytest.approx(0.5, abs=0.02)
    counts = np.bincount(drawn.operations[drawn.operations >= 0], minlength=15)
    assert len(counts) == 15
    assert counts.min() > 0.8 * counts.mean()
    magnitudes = 10 * np.abs(drawn.strengths)
    assert magnitudes.mean() == pytest.approx(9, abs=0.03)
    assert magnitudes.std() == pytest.approx(0.5, abs=0.03)
    assert magnitudes.max() == 10
    assert (drawn.strengths > 0).mean() == pytest.approx(0.5, abs=0.02)
    erased = drawn.boxes[drawn.boxes[:, 2] > 0]
    assert len(erased) / 4000 == pytest.approx(0.25, abs=0.02)
    areas, ratios = erased[:, 2] * erased[:, 3] / (32 * 48), erased[:, 2] / erased[:, 3]
    assert 0.015 < areas.min() < 0.03
    assert 0.3 < areas.max() < 0.35
    assert 0.2 < ratios.min() < 0.4
    assert (erased[:, 0] + erased[:, 2]).max() <= 32
    assert (erased[:, 1] + erased[:, 3]).max() <= 48
    none = plan(50, magnitude=0, erase=0)
    assert (none.operations == -1).all()
    assert not none.boxes.any()


def test_an_images_plan_hangs_on_seed_epoch_and_sample_only() -> None:
    whole, some = plan(40), np.array([7, 3, 21])
    part = randaugment.draw(0, np.zeros(3, np.int64), some, (32, 48), magnitude=9.0, erase=0.25)
    for name in ("operations", "strengths", "boxes", "noise"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[some])
    for other in (plan(40, seed=1), plan(40, epoch=1)):
        assert not np.array_equal(other.operations, whole.operations)


def test_a_batch_is_augmented_image_by_image() -> None:
    images = pictures(30, (32, 48)).permute(0, 2, 3, 1)
    before, drawn = images.clone(), plan(30)
    found = randaugment.apply(images, drawn, FILL)
    assert torch.equal(images, before)
    outside = 255 * torch.tensor(FILL).view(1, 3, 1, 1)
    for row, image in enumerate(images):
        wanted = image.permute(2, 0, 1)[None]
        for place, s in zip(drawn.operations[row], drawn.strengths[row], strict=True):
            if place >= 0:
                wanted = list(OPERATIONS.values())[place](wanted, torch.tensor(s).float().view(1, 1, 1, 1), outside)
        assert (found[row].permute(2, 0, 1).int() - wanted[0].int()).abs().max() <= 1
    assert randaugment.apply(images, plan(30, magnitude=0), FILL) is images


def test_erased_boxes_hold_normal_noise_and_nothing_else_changes() -> None:
    images = torch.full((200, 3, 32, 48), 9.0)
    drawn = plan(200)
    found = randaugment.erase_(images.clone(), drawn)
    assert torch.equal(found, randaugment.erase_(images.clone(), drawn))
    inside = torch.zeros(200, 32, 48, dtype=torch.bool)
    for row, (top, left, height, width) in enumerate(drawn.boxes):
        inside[row, top : top + height, left : left + width] = True
    noise = found.permute(0, 2, 3, 1)[inside]
    assert (found.permute(0, 2, 3, 1)[~inside] == 9).all()
    assert noise.mean().abs() < 0.02
    assert abs(noise.std() - 1) < 0.02
    rows = np.flatnonzero(drawn.boxes[:, 2])[:2]
    first = [found[row, 0][inside[row]][:5] for row in rows]
    assert not torch.equal(*first)
