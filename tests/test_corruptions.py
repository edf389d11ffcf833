"""Corruptions: what each does to an image against closed forms and other libraries; strength, chance, channels."""

import colorsys
import io
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from PIL import Image, ImageEnhance
from scipy.ndimage import convolve, gaussian_filter

from ssl_pretrain.data import corruptions
from ssl_pretrain.data.corruptions import FAMILIES, NAMES, SEVERITIES, STRENGTHS, corrupt, usable
from ssl_pretrain.data.decode import decode
from ssl_pretrain.data.source import open_source
from ssl_pretrain.data.views import resize_and_crop
from ssl_pretrain.errors import UserError

CHANCE = {"gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "motion_blur", "glass_blur", "snow", "fog",
          "elastic_transform"}  # fmt: skip
SCALED = (*FAMILIES["blur"], "snow", "fog", "elastic_transform")  # their lengths go with the image's side


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def flat(value: int, side: int = 256, channels: int = 1) -> np.ndarray:
    return np.full((side, side, channels), value, np.uint8)


def ramp(side: int = 256) -> np.ndarray:
    """Each column's value is its number."""
    return np.broadcast_to(np.arange(side, dtype=np.uint8)[None, :, None], (side, side, 1)).copy()


def scene(seed: int, side: int) -> np.ndarray:
    """A smooth picture with a few hard edges, the same one at every size."""
    pixels = np.asarray(picture(seed, (side, side))).copy()
    for top, left, size, value in (rng(seed).random((6, 4)) * (0.8, 0.8, 0.3, 255)).tolist():
        size = max(1, round(size * side))
        pixels[round(top * side) :, round(left * side) :][:size, :size] = value
    return pixels


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other).mean())


# ---- What holds for all of them.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(24, 40, 3), (33, 17, 1), (25, 24, 5), (1, 1, 3)])
def test_an_image_of_the_same_kind_a_function_of_the_generator(name: str, shape: tuple[int, ...]) -> None:
    image = rng(1).integers(0, 256, shape, np.uint8)
    kept = image.copy()
    if name not in usable(shape[2]):
        with pytest.raises(UserError, match=rf"{name} needs images of .*3 channels, and these have {shape[2]}"):
            corrupt(image, name, 3, rng(0))
        return
    found = corrupt(image, name, 3, rng(0))
    assert (found.shape, found.dtype) == (image.shape, np.uint8)
    np.testing.assert_array_equal(image, kept)
    assert not np.shares_memory(found, image)
    np.testing.assert_array_equal(found, corrupt(image, name, 3, rng(0)))
    if shape[0] > 1:
        assert not np.array_equal(found, image)
        assert np.array_equal(found, corrupt(image, name, 3, rng(7))) == (name not in CHANCE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [32, 96])
def test_each_severity_changes_more_than_the_one_before(name: str, side: int) -> None:
    images = [scene(seed, side) for seed in range(12)]
    far = [np.mean([difference(corrupt(x, name, s, rng(i, s)), x) for i, x in enumerate(images)]) for s in SEVERITIES]
    assert far[0] > 0.3
    assert (np.diff(far) > 0).all(), far


@pytest.mark.parametrize(("data", "side", "count"), [("cifar10_lossless5k", 32, 40), ("imagenette160", 160, 5)])
def test_also_on_photographs(data: str, side: int, count: int, shared_data: Path) -> None:
    source = open_source(str(shared_data / data), None)
    items = (source[i * (len(source) // count)] for i in range(count))
    images = [resize_and_crop(decode(item, 3), side, (side, side)) for item in items]
    for name in NAMES:
        far = [
            np.mean([difference(corrupt(x, name, s, rng(i, s)), x) for i, x in enumerate(images)]) for s in SEVERITIES
        ]
        assert far[0] > 0.8, name
        assert (np.diff(far) > 0).all(), (name, far)


@pytest.mark.parametrize("name", SCALED)
def test_small_and_large_images_are_corrupted_alike(name: str) -> None:
    def change(side: int) -> float:
        return float(np.mean([difference(corrupt(x, name, 4, rng(i)), x) for i, x in enumerate(scenes[side])]))

    scenes = {side: [scene(seed, side) for seed in range(12)] for side in (48, 144)}
    assert change(48) == pytest.approx(change(144), rel=0.3)


def test_names_severities_and_channels_that_there_are_not() -> None:
    image = flat(100, 8, 3)
    with pytest.raises(UserError, match="unknown corruption 'gausian_noise'; did you mean gaussian_noise"):
        corrupt(image, "gausian_noise", 1, rng(0))
    for severity in (0, 6):
        with pytest.raises(UserError, match=rf"severity {severity} of fog: severities are 1 \(mild\) to 5"):
            corrupt(image, "fog", severity, rng(0))
    assert sorted(NAMES) == sorted(STRENGTHS)
    assert usable(3) == NAMES
    assert set(NAMES) - set(usable(1)) == {"saturate"}
    assert set(NAMES) - set(usable(4)) == {"saturate", "jpeg_compression"}


# ---- Noise.


def above(x: float) -> float:
    """The share of a standard normal distribution above x."""
    return math.erfc(x / math.sqrt(2)) / 2


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_noise_has_its_deviation(severity: int) -> None:
    sigma = STRENGTHS["gaussian_noise"][severity - 1]
    found = corrupt(flat(128), "gaussian_noise", severity, rng(0)) / 255
    for level in (64, 160, 254):  # also where much is clipped, what is not has the normal distribution
        assert (found > (level + 0.5) / 255).mean() == pytest.approx(
            above(((level + 0.5) - 128) / 255 / sigma), abs=0.006
        )
    if severity <= 2:
        assert found.std() == pytest.approx(sigma, rel=0.015)


@pytest.mark.parametrize("severity", [1, 2, 3])
@pytest.mark.parametrize("value", [51, 102])
def test_shot_noise_has_the_variance_of_photons(severity: int, value: int) -> None:
    photons = STRENGTHS["shot_noise"][severity - 1]
    found = corrupt(flat(value), "shot_noise", severity, rng(0)) / 255
    assert found.mean() == pytest.approx(value / 255, rel=0.01)
    assert found.var() == pytest.approx(value / 255 / photons, rel=0.03)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_hits_its_share(severity: int) -> None:
    share = STRENGTHS["impulse_noise"][severity - 1]
    found = corrupt(flat(77, channels=3), "impulse_noise", severity, rng(0))
    assert set(np.unique(found)) == {0, 77, 255}
    assert (found == 0).mean() == pytest.approx(share / 2, rel=0.05)
    assert (found == 255).mean() == pytest.approx(share / 2, rel=0.05)


def test_speckle_noise_goes_with_the_value() -> None:
    for value in (40, 80):
        found = corrupt(flat(value), "speckle_noise", 2, rng(0)) / 255
        assert found.std() == pytest.approx(STRENGTHS["speckle_noise"][1] * value / 255, rel=0.02)
    assert not corrupt(flat(0), "speckle_noise", 5, rng(0)).any()


# ---- Blur.


@pytest.mark.parametrize("name", FAMILIES["blur"])
def test_a_blur_leaves_a_flat_image_alone(name: str) -> None:
    image = flat(93, 40, 3)
    np.testing.assert_array_equal(corrupt(image, name, 5, rng(0)), image)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_blur_is_that_of_scipy(severity: int) -> None:
    image = rng(0).integers(0, 256, (50, 60, 3), np.uint8)
    sigma = STRENGTHS["gaussian_blur"][severity - 1] * 50
    reach = math.ceil(4 * sigma)
    wanted = gaussian_filter(image.astype(float), sigma, radius=reach, axes=(0, 1), mode="reflect")
    assert np.abs(corrupt(image, "gaussian_blur", severity, rng(0)) - wanted).max() <= 0.501


@pytest.mark.parametrize("reach", [0, 2, 30])
def test_convolution_is_that_of_scipy(reach: int) -> None:
    x, kernel = rng(0).random((21, 34, 2)), rng(1).random((2 * reach + 1, 2 * reach + 1))
    kernel /= kernel.sum()
    wanted = np.stack([convolve(x[:, :, c], kernel, mode="reflect") for c in range(2)], axis=2)
    np.testing.assert_allclose(corruptions._convolved(x, kernel), wanted, atol=1e-12)


@pytest.mark.parametrize("radius", [0.7, 1.6, 9.3])
def test_the_disk_of_a_defocus_has_its_radius(radius: float) -> None:
    kernel = corruptions._disk(radius)
    assert kernel.sum() == pytest.approx(1)
    edge = len(kernel) / 2
    points = rng(0).uniform(-edge, edge, (2, 1_000_000))
    points = points[:, np.hypot(*points) <= radius]
    shares, _, _ = np.histogram2d(*points, len(kernel), [[-edge, edge]] * 2)
    np.testing.assert_allclose(kernel, shares / shares.sum(), atol=0.01)
    image = np.zeros((61, 61, 1), np.uint8)
    image[30, 30] = 255
    found = corrupt(image, "defocus_blur", 4, rng(0))[:, :, 0]
    held = np.argwhere(found)
    assert np.hypot(*(held - 30).T).max() <= 0.042 * 61 + 1


@pytest.mark.parametrize("angle", [0.0, 0.5, math.pi / 2, 2.5])
@pytest.mark.parametrize("length", [2.3, 11.0])
def test_the_line_of_a_motion_has_its_length_and_angle(length: float, angle: float) -> None:
    kernel = corruptions._line(length, angle)
    at = np.arange(len(kernel)) - len(kernel) // 2
    along = at[:, None] * math.sin(angle) + at * math.cos(angle)
    across = at * math.sin(angle) - at[:, None] * math.cos(angle)
    assert kernel.sum() == pytest.approx(1)
    assert (kernel * along).sum() == pytest.approx(0, abs=1e-9)
    # of a segment L^2 / 12; sharing out among pixels adds at most 1 / 4 each way
    assert length**2 / 12 <= (kernel * along**2).sum() <= 1.2 * length**2 / 12 + 0.5
    assert (kernel * across**2).sum() <= 0.5


def test_a_zoom_blur_is_the_mean_of_magnifications() -> None:
    found = corrupt(ramp(), "zoom_blur", 5, rng(0))[128, :, 0].astype(float)
    slope = np.mean(1 / np.linspace(1, STRENGTHS["zoom_blur"][4], corruptions.ZOOMS))
    inside = np.arange(10, 246)  # at the rim the edge is magnified too
    np.testing.assert_allclose(found[inside], 127.5 + slope * (inside - 127.5), atol=0.6)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_glass_moves_each_pixel_by_itself_within_its_reach(severity: int) -> None:
    reach = STRENGTHS["glass_blur"][severity - 1] * 256
    moved = (corrupt(ramp(), "glass_blur", severity, rng(0)).astype(float) - ramp())[:, 20:-20]
    assert np.abs(moved).max() <= reach + 0.5
    assert moved.std() == pytest.approx(reach / math.sqrt(3), rel=0.03)  # uniform
    assert abs(np.corrcoef(moved[:, :-1].ravel(), moved[:, 1:].ravel())[0, 1]) < 0.02


# ---- Weather.


@pytest.mark.parametrize("severity", SEVERITIES)
def test_fog_mixes_in_a_plasma_of_the_whole_range(severity: int) -> None:
    weight = STRENGTHS["fog"][severity - 1]
    on_black, on_white = (corrupt(flat(v, 128), "fog", severity, rng(0)).astype(float) for v in (0, 255))
    assert (on_black.min(), on_black.max()) == (0, round(255 * weight / (1 + weight)))
    np.testing.assert_allclose(on_white - on_black, 255 / (1 + weight), atol=1.01)
    fog = on_black[:, :, 0] / on_black.max()
    assert np.abs(np.diff(fog, axis=1)).mean() < 0.1 < np.abs(fog[:, 64:] - fog[:, :64]).mean()  # smooth, and not flat


def test_a_plasma_is_as_large_as_wanted() -> None:
    for side in (1, 2, 33, 64):
        field = corruptions._plasma(side, rng(side))
        assert len(field) >= side
        assert field.min() == 0
        assert field.max() == (side > 1)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_snow_adds_its_share_of_flakes(severity: int) -> None:
    share = STRENGTHS["snow"][severity - 1]
    found = np.stack([corrupt(flat(0, 80), "snow", severity, rng(i)) for i in range(8)]) / 255
    ground = corruptions.WHITENING * share * 0.5  # of black, half of white is half-way to the palest
    assert found.min() == pytest.approx(ground, abs=0.5 / 255)
    assert found.mean() == pytest.approx(ground + 2 * share, rel=0.25)
    assert found.max() > 0.3


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_raises_the_value_of_hsv(severity: int) -> None:
    added = STRENGTHS["brightness"][severity - 1]
    image = rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    image[0, 0] = 0
    found = corrupt(image, "brightness", severity, rng(0))
    for old, new in zip(image.reshape(-1, 3) / 255, found.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*old)
        wanted = colorsys.hsv_to_rgb(hue, saturation, min(value + added, 1))
        assert np.abs(new - 255 * np.array(wanted)).max() <= 0.501
    grey = ramp()
    assert np.abs(corrupt(grey, "brightness", severity, rng(0)) - (grey + 255 * added).clip(0, 255)).max() <= 0.501


# ---- Digital.


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_shrinks_each_channel_to_its_mean(severity: int) -> None:
    image = rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    mean = image.astype(float).mean((0, 1))
    wanted = mean + STRENGTHS["contrast"][severity - 1] * (image - mean)
    assert np.abs(corrupt(image, "contrast", severity, rng(0)) - wanted).max() <= 0.501


@pytest.mark.parametrize("severity", SEVERITIES)
def test_saturation_is_that_of_pillow(severity: int) -> None:
    image = rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    factor = STRENGTHS["saturate"][severity - 1]
    wanted = np.asarray(ImageEnhance.Color(Image.fromarray(image)).enhance(factor)).astype(float)
    # Pillow rounds its grey, which the factor enlarges
    assert np.abs(corrupt(image, "saturate", severity, rng(0)) - wanted).max() <= 0.5 * factor + 1.01


@pytest.mark.parametrize("severity", SEVERITIES)
def test_elastic_displacement_has_its_size_and_is_smooth(severity: int) -> None:
    size = STRENGTHS["elastic_transform"][severity - 1] * 256
    moved = [corrupt(ramp(), "elastic_transform", severity, rng(i)).astype(float) - ramp() for i in range(4)]
    inside = np.stack(moved)[:, :, 30:-30, 0]
    assert math.sqrt((inside**2).mean()) == pytest.approx(size, rel=0.25)
    assert np.abs(np.diff(inside, axis=1)).mean() < 0.15 * size


@pytest.mark.parametrize(("severity", "block"), [(5, 4), (3, None), (1, None)])
def test_pixelate_makes_blocks_of_their_mean(severity: int, block: int | None) -> None:
    image = rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    found = corrupt(image, "pixelate", severity, rng(0))
    share = STRENGTHS["pixelate"][severity - 1]
    assert len(np.unique(found.reshape(-1, 3), axis=0)) <= int(40 * share) * int(60 * share)
    if block:
        blocks = found.reshape(10, 4, 15, 4, 3)
        assert (blocks == blocks[:, :1, :, :1]).all()
        assert np.abs(blocks[:, 0, :, 0] - image.reshape(10, 4, 15, 4, 3).mean((1, 3))).max() <= 1


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows_at_that_quality(severity: int, channels: int) -> None:
    image = scene(3, 40)[:, :, :channels]
    file = io.BytesIO()
    picture = Image.fromarray(image if channels == 3 else image[:, :, 0])
    picture.save(file, format="JPEG", quality=(25, 18, 15, 10, 7)[severity - 1])
    wanted = np.asarray(Image.open(file)).reshape(image.shape)
    np.testing.assert_array_equal(corrupt(image, "jpeg_compression", severity, rng(0)), wanted)
