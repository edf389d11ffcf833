"""Views: the crop's distribution, the resize, flips, geometry; colour against torchvision and a float64 oracle."""

import colorsys
import importlib
import math
from types import ModuleType

import numpy as np
import pytest
import torch
from oracles import import_torchvision
from PIL import Image
from scipy.ndimage import convolve1d
from scipy.stats import chi2, kstest

from ssl_pretrain.data import colour
from ssl_pretrain.data.views import (
    BLUR_SIGMA,
    COLOUR_PARAMS,
    FACTORS,
    GRAYSCALE,
    JITTER,
    ORDER,
    SOLARIZE,
    Jitter,
    ViewSpec,
    cut,
    draw,
    fitted,
    resize_and_crop,
)
from ssl_pretrain.randomness import numpy_generator

FULL = ViewSpec(
    name="full",
    size=(32, 40),
    jitter=Jitter(),
    grayscale=0.2,
    blur=0.5,
    solarize=0.2,
    vflip=0.5,
    interpolation="bilinear",
)


def smooth(height: int, width: int, channels: int = 3) -> np.ndarray:
    """A picture without fine detail, uint8 (height, width, channels)."""
    y, x = np.mgrid[:height, :width]
    planes = [127 + 120 * np.sin(x / (9 + c) + c) * np.cos(y / (11 - c / 2)) for c in range(channels)]
    return np.stack(planes, -1).astype(np.uint8)


def rngs(count: int) -> list[np.random.Generator]:
    return [numpy_generator(1, "test", i) for i in range(count)]


@pytest.fixture(scope="module")
def torchvision() -> ModuleType:
    """torchvision.transforms.v2.functional."""
    import_torchvision()
    return importlib.import_module("torchvision.transforms.v2.functional")


# ---- the crop


def test_area_and_ratio_follow_the_rule():
    """On an image so wide that no try fails: area uniform, log ratio uniform, place uniform (Kolmogorov-Smirnov)."""
    spec = ViewSpec(name="v", size=(8, 8), scale=(0.1, 0.3))
    side = 10_000
    boxes = np.array([draw(spec, rng, side, side).box for rng in rngs(3000)], dtype=float)
    top, left, height, width = boxes.T
    assert kstest((height * width / side**2 - 0.1) / 0.2, "uniform").pvalue > 1e-3
    log_ratio = np.log(width / height)
    assert kstest((log_ratio - math.log(3 / 4)) / math.log(16 / 9), "uniform").pvalue > 1e-3
    assert kstest((top + 0.5) / (side - height + 1), "uniform").pvalue > 1e-3
    assert kstest((left + 0.5) / (side - width + 1), "uniform").pvalue > 1e-3


def test_small_images_use_every_place_alike():
    spec = ViewSpec(name="v", size=(4, 4), scale=(0.25, 0.25), ratio=(1.0, 1.0))
    boxes = [draw(spec, rng, 8, 8).box for rng in rngs(5000)]
    assert {box[2:] for box in boxes} == {(4, 4)}
    counts = np.bincount([5 * top + left for top, left, _, _ in boxes], minlength=25)
    assert chi2.sf(((counts - 200) ** 2 / 200).sum(), 24) > 1e-3


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (10, 100, (0, 43, 10, 13)),  # too wide for any try: 4/3 of its height, in the middle
        (100, 10, (43, 0, 13, 10)),  # too tall: its width over 3/4
        (1, 1, (0, 0, 1, 1)),
    ],
)
def test_the_central_crop_where_ten_tries_fail(height: int, width: int, box: tuple[int, int, int, int]):
    spec = ViewSpec(name="v", size=(8, 8), scale=(0.9, 1.0))
    assert draw(spec, rngs(1)[0], height, width).box == box


def test_every_box_lies_inside_the_image():
    spec = ViewSpec(name="v", size=(8, 8), scale=(0.01, 1.0))
    for i, rng in enumerate(rngs(2000)):
        height, width = 1 + i % 37, 1 + i % 53
        top, left, h, w = draw(spec, rng, height, width).box
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert min(h, w) >= 1


# ---- the draws


def test_no_knob_shifts_the_draws_of_another():
    plain = ViewSpec(name="v", size=(8, 8), hflip=0.5)
    for rng_a, rng_b in zip(rngs(200), rngs(200), strict=True):
        a, b = draw(plain, rng_a, 90, 120), draw(FULL, rng_b, 90, 120)
        assert a.box == b.box
        assert a.hflip == b.hflip
        assert rng_a.random() == rng_b.random()  # both took as many numbers
        assert not a.colour.any()


def test_colour_parameters_are_distributed_as_declared():
    spec = ViewSpec(
        name="v", size=(8, 8), jitter=Jitter(hue=0.1, p=0.8), grayscale=0.2, blur=0.5, blur_sigma=(0.1, 2.0),
        solarize=0.1, hflip=0.3, vflip=0.6,
    )  # fmt: skip
    draws = [draw(spec, rng, 50, 50) for rng in rngs(4000)]
    rows = np.stack([d.colour for d in draws])
    assert rows.shape == (4000, COLOUR_PARAMS)
    shares = {
        0.8: rows[:, JITTER].mean(), 0.2: rows[:, GRAYSCALE].mean(), 0.5: (rows[:, BLUR_SIGMA] > 0).mean(),
        0.1: rows[:, SOLARIZE].mean(), 0.3: np.mean([d.hflip for d in draws]), 0.6: np.mean([d.vflip for d in draws]),
    }  # fmt: skip
    for p, share in shares.items():
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / 4000)
    for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        assert kstest((rows[:, FACTORS][:, column] - low) / (high - low), "uniform").pvalue > 1e-3
    sigma = rows[rows[:, BLUR_SIGMA] > 0, BLUR_SIGMA]
    assert kstest((sigma - 0.1) / 1.9, "uniform").pvalue > 1e-3
    orders, counts = np.unique(rows[:, ORDER], axis=0, return_counts=True)
    assert len(orders) == 24
    assert chi2.sf(((counts - 4000 / 24) ** 2 / (4000 / 24)).sum(), 23) > 1e-3


def test_factors_never_go_below_zero():
    spec = ViewSpec(name="v", size=(8, 8), jitter=Jitter(brightness=1.5, p=1.0))
    factors = np.array([draw(spec, rng, 9, 9).colour[FACTORS][0] for rng in rngs(1000)])
    assert factors.min() >= 0
    assert factors.max() > 2.4
    assert kstest(factors / 2.5, "uniform").pvalue > 1e-3


# ---- pixels


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_resize_is_pillows(interpolation: str, channels: int):
    image = smooth(150, 210, channels)
    spec = ViewSpec(name="v", size=(48, 64), interpolation=interpolation, hflip=0.0)  # type: ignore[arg-type]
    for rng in rngs(5):
        got = cut(image, spec, rng)
        height, width = np.array(image.shape[:2])
        top, left, h, w = np.rint(got.geometry[:4] * np.array([height, width, height, width])).astype(int)
        mode = {1: "L", 3: "RGB", 4: "CMYK"}[channels]
        whole = Image.fromarray(image.squeeze(), mode=mode) if channels != 3 else Image.fromarray(image)
        how = Image.Resampling[interpolation.upper()]
        expected = np.asarray(whole.crop((left, top, left + w, top + h)).resize((64, 48), how)).reshape(
            48, 64, channels
        )
        assert got.image.dtype == np.uint8
        assert np.abs(got.image.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("channels", [2, 5, 13])
def test_other_channel_counts_are_channel_by_channel(channels: int):
    image = smooth(60, 50, channels)
    spec = ViewSpec(name="v", size=(24, 24))
    got = cut(image, spec, rngs(1)[0]).image
    assert got.shape == (24, 24, channels)
    for c in range(channels):
        alone = cut(np.ascontiguousarray(image[..., c : c + 1]), spec, rngs(1)[0]).image[..., 0]
        assert np.abs(got[..., c].astype(int) - alone.astype(int)).max() <= 1


@pytest.mark.parametrize(("hflip", "vflip"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_flips(hflip: float, vflip: float):
    image = smooth(70, 90)
    straight = cut(image, ViewSpec(name="v", size=(30, 20), hflip=0.0), rngs(1)[0])
    flipped = cut(image, ViewSpec(name="v", size=(30, 20), hflip=hflip, vflip=vflip), rngs(1)[0])
    expected = straight.image[:: -1 if vflip else 1, :: -1 if hflip else 1]
    assert np.array_equal(flipped.image, expected)
    assert flipped.geometry.tolist() == [*straight.geometry[:4].tolist(), hflip, vflip]


def test_a_crop_of_the_views_own_size_is_copied_and_inputs_may_be_read_only_or_mirrored():
    image = smooth(40, 40)
    image.setflags(write=False)
    spec = ViewSpec(name="v", size=(40, 40), scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)
    assert np.array_equal(cut(image, spec, rngs(1)[0]).image, image)
    assert np.array_equal(cut(image[:, ::-1], spec, rngs(1)[0]).image, image[:, ::-1])


# ---- evaluation


@pytest.mark.parametrize(("height", "width"), [(100, 150), (150, 100), (97, 131), (64, 64), (33, 300)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resize_and_crop_is_torchvisions(height: int, width: int, interpolation: str, torchvision: ModuleType):
    image = smooth(height, width)
    how = torchvision.InterpolationMode[interpolation.upper()]
    expected = torchvision.center_crop(
        torchvision.resize(torch.from_numpy(image).permute(2, 0, 1), [64], interpolation=how, antialias=True), [56, 48]
    )
    got = resize_and_crop(image, 64, (56, 48), interpolation)  # type: ignore[arg-type]
    assert np.array_equal(got, expected.permute(1, 2, 0).numpy())


def test_resize_and_crop_enlarges_rather_than_pads():
    image = smooth(50, 100)
    got = resize_and_crop(image, 32, (32, 96))
    assert got.shape == (32, 96, 3)
    # 96 wide is 0.96 of the image, so all of it but two hundredths of its height is resized
    expected = np.asarray(Image.fromarray(image).resize((96, 48), Image.Resampling.BICUBIC))[8:40]
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1


# ---- colour


def row(order: tuple[int, ...] = (0, 1, 2, 3), **values: float) -> np.ndarray:
    """One row of parameters that does nothing, changed by `values`."""
    params = np.zeros(COLOUR_PARAMS, dtype=np.float32)
    params[FACTORS] = (1, 1, 1, 0)
    params[ORDER] = order
    for name, value in values.items():
        if name in ("brightness", "contrast", "saturation", "hue"):
            params[JITTER] = 1
            params[FACTORS][("brightness", "contrast", "saturation", "hue").index(name)] = value
        else:
            params[{"grayscale": GRAYSCALE, "sigma": BLUR_SIGMA, "solarize": SOLARIZE}[name]] = value
    return params


LUMA = np.array([0.2989, 0.587, 0.114]).reshape(3, 1, 1)


def oracle(image: np.ndarray, params: np.ndarray, spec: ViewSpec) -> np.ndarray:
    """Float64, one image (3, H, W), from the formulas; hue by the standard library's HSV."""
    image = image.astype(np.float64)
    if params[JITTER]:
        brightness, contrast, saturation, hue = params[FACTORS].astype(np.float64)
        for operation in params[ORDER].astype(int):
            grey = (LUMA * image).sum(0, keepdims=True)
            if operation == 0:
                image = brightness * image
            elif operation == 1:
                image = contrast * image + (1 - contrast) * grey.mean()
            elif operation == 2:
                image = saturation * image + (1 - saturation) * grey
            else:
                turned = np.empty_like(image)
                for y in range(image.shape[1]):
                    for x in range(image.shape[2]):
                        h, s, v = colorsys.rgb_to_hsv(*image[:, y, x])
                        turned[:, y, x] = colorsys.hsv_to_rgb((h + hue) % 1, s, v)
                image = turned
            image = image.clip(0, 1)
    if params[GRAYSCALE]:
        image = np.repeat((LUMA * image).sum(0, keepdims=True), 3, 0)
    if params[BLUR_SIGMA]:
        radius = min(math.ceil(3 * spec.blur_sigma[1]), image.shape[1] - 1)
        kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * float(params[BLUR_SIGMA]) ** 2))
        for axis in (1, 2):
            image = convolve1d(image, kernel / kernel.sum(), axis=axis, mode="mirror")
    if params[SOLARIZE]:
        image = np.where(image >= spec.solarize_threshold, 1 - image, image)
    return image


def test_colour_is_the_oracles_in_every_order():
    rng = np.random.default_rng(0)
    images = rng.random((26, 3, 16, 16))
    images[3] = images[3].mean(0)  # greys have no hue
    images[4, :, :8] = 0
    images[5, :, :8] = 1
    params = np.stack([draw(FULL, r, 50, 50).colour for r in rngs(26)])
    params[:20, JITTER] = 1
    images = images.astype(np.float32)
    got = colour.apply(torch.from_numpy(images.copy()), params, FULL).numpy()
    expected = np.stack([oracle(i, p, FULL) for i, p in zip(images, params, strict=True)])
    away = np.abs(got - expected)
    # a pixel within rounding of the threshold may fall on either side of it
    border = (params[:, SOLARIZE, None, None, None] > 0) & (np.minimum(got, 1 - got) > 0.5 - 1e-4)
    assert away[~border].max() < 2e-5
    assert border.mean() < 1e-3
    assert len(np.unique(params[:20, ORDER], axis=0)) > 8
    for column in (GRAYSCALE, BLUR_SIGMA, SOLARIZE):
        assert 0 < (params[:, column] > 0).mean() < 1


def test_each_operation_is_torchvisions(torchvision: ModuleType):
    images = torch.from_numpy(np.random.default_rng(3).random((1, 3, 24, 20), dtype=np.float32))
    spec = ViewSpec(name="v", size=(24, 20), jitter=Jitter(hue=0.5), grayscale=1, blur=1, solarize=1)
    for factor in (0.0, 0.3, 1.7):
        cases = {
            "brightness": torchvision.adjust_brightness(images, factor),
            "contrast": torchvision.adjust_contrast(images, factor),
            "saturation": torchvision.adjust_saturation(images, factor),
        }
        for name, expected in cases.items():
            got = colour.apply(images.clone(), row(**{name: factor})[None], spec)
            torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    for turn in (-0.5, -0.1, 0.23, 0.5):
        got = colour.apply(images.clone(), row(hue=turn)[None], spec)
        torch.testing.assert_close(got, torchvision.adjust_hue(images, turn), atol=5e-6, rtol=0)
    got = colour.apply(images.clone(), row(grayscale=1)[None], spec)
    torch.testing.assert_close(got, torchvision.rgb_to_grayscale(images, 3), atol=2e-6, rtol=0)
    got = colour.apply(images.clone(), row(solarize=1)[None], spec)
    torch.testing.assert_close(got, torchvision.solarize(images, 0.5))
    for sigma in (0.1, 0.9, 2.0):
        got = colour.apply(images.clone(), row(sigma=sigma)[None], spec)
        expected = torchvision.gaussian_blur(images, [13, 13], [sigma, sigma])
        torch.testing.assert_close(got, expected, atol=3e-6, rtol=0)


def test_samples_do_not_touch_each_other():
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    params = np.stack([draw(FULL, r, 50, 50).colour for r in rngs(6)])
    params[2] = row()
    together = colour.apply(images.clone(), params, FULL)
    for i in range(6):
        alone = colour.apply(images[i : i + 1].clone(), params[i : i + 1], FULL)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=0)
    assert torch.equal(together[2], images[2])


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_without_luma_there_is_no_hue_saturation_or_grayscale(channels: int):
    images = torch.rand(2, channels, 12, 12, generator=torch.Generator().manual_seed(0))
    params = np.stack([row(saturation=0.1, hue=0.3, grayscale=1)] * 2)
    spec = ViewSpec(name="v", size=(12, 12), jitter=Jitter(), grayscale=1.0)
    assert torch.equal(colour.apply(images.clone(), params, spec), images)
    got = colour.apply(images.clone(), np.stack([row(contrast=0.5, brightness=1.3)] * 2), spec)
    bright = (images.double() * 1.3).clamp(0, 1)
    expected = 0.5 * bright + 0.5 * bright.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=0)


def test_a_blur_wider_than_the_image():
    images = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    spec = ViewSpec(name="v", size=(4, 5), blur=1.0, blur_sigma=(1.0, 9.0))
    got = colour.apply(images.clone(), row(sigma=2.0)[None], spec)
    image = images[0].double().numpy()
    for axis, radius in ((1, 3), (2, 4)):
        kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / 8)
        image = convolve1d(image, kernel / kernel.sum(), axis=axis, mode="mirror")
    assert np.abs(got[0].numpy() - image).max() < 1e-6


@pytest.mark.parametrize("shape", [(2,), (3, 2)])
@pytest.mark.parametrize("spec", [ViewSpec(name="v", size=(16, 16)), FULL])
def test_finish_normalises(shape: tuple[int, ...], spec: ViewSpec):
    raw = np.random.default_rng(1).integers(0, 256, (*shape, 16, 18, 3), dtype=np.uint8)
    count = math.prod(shape)
    params = np.stack([draw(spec, r, 50, 50).colour for r in rngs(count)])
    params[:, SOLARIZE] = 0
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    got = colour.finish(torch.from_numpy(raw), params.reshape(*shape, -1), spec, mean, std)
    assert got.shape == (*shape, 3, 16, 18)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    flat = raw.reshape(count, 16, 18, 3).transpose(0, 3, 1, 2) / 255.0
    coloured = np.stack([oracle(i, p, spec) for i, p in zip(flat, params, strict=True)])
    expected = (coloured - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert np.abs(got.numpy().reshape(expected.shape) - expected).max() < 1e-4


def test_no_colour_no_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(colour, "apply", lambda *_: pytest.fail("colour was touched"))
    spec = ViewSpec(name="v", size=(4, 4), jitter=Jitter(p=0.0))
    raw = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    colour.finish(raw, np.zeros((2, COLOUR_PARAMS), np.float32), spec, (0.5,) * 3, (0.2,) * 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_same_without_waiting_for_it():
    params = np.stack([draw(FULL, r, 50, 50).colour for r in rngs(32)])
    params[:, SOLARIZE] = 0
    raw = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (32, 24, 20, 3), dtype=np.uint8))
    on_cpu = colour.finish(raw, params, FULL, (0.5,) * 3, (0.2,) * 3)
    on_gpu = raw.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = colour.finish(on_gpu, params, FULL, (0.5,) * 3, (0.2,) * 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.cpu(), on_cpu, atol=1e-4, rtol=0)


def test_small_views_are_brought_to_what_the_encoder_divides() -> None:
    specs = (
        ViewSpec(name="global", size=(224, 160)),
        ViewSpec(name="local", size=(98, 70)),
        ViewSpec(name="dot", size=(3, 3)),
    )
    found = fitted(specs, (224, 160), (16, 16))
    assert [s.size for s in found] == [(224, 160), (96, 64), (16, 16)]
    assert [s.size for s in fitted(specs, (224, 160), (14, 14))] == [(224, 160), (98, 70), (14, 14)]
    odd = (ViewSpec(name="image", size=(30, 30)),)
    assert fitted(odd, (30, 30), (16, 16)) == odd  # the run's own size is the user's to choose: the encoder will say


def test_a_blur_does_not_depend_on_what_else_is_in_the_batch() -> None:
    """Batches are cut differently by ranks and micro-batches, and the widest kernel of a batch is its largest sigma's."""
    spec = ViewSpec(name="v", size=(24, 20), blur=1.0)
    images = torch.rand(5, 3, 24, 20, generator=torch.Generator().manual_seed(3))
    params = np.stack([row(sigma=sigma) for sigma in (0.1, 0.4, 0.77, 1.3, 2.0)])
    together = colour.apply(images.clone(), params, spec)
    for i in range(5):
        assert torch.equal(colour.apply(images[i : i + 1].clone(), params[i : i + 1], spec)[0], together[i])
