"""`--aug fast`: the composed matrix against the exact operations where they must agree, moments where they may not, and
what decoding in a hurry changes."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, losses
from PIL import Image

from ssl_pretrain.data import colour, composed, decode
from ssl_pretrain.data.loader import Share, batches, to_batch
from ssl_pretrain.data.source import open_source
from ssl_pretrain.data.views import (
    BLUR_SIGMA,
    COLOUR_PARAMS,
    FACTORS,
    GRAYSCALE,
    JITTER,
    NOISE_KEY,
    NOISE_SIGMA,
    NOISE_SQUARE,
    ORDER,
    SOLARIZE,
    Jitter,
    ViewSpec,
    draw,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ALL = Jitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, p=1.0)
SPEC = ViewSpec(name="image", size=(24, 20), jitter=ALL, grayscale=0.2, blur=0.5, solarize=0.2, fast=True)


def rows(count: int, **settings: object) -> np.ndarray:
    """Rows of parameters that do nothing but what is asked for."""
    params = np.zeros((count, COLOUR_PARAMS), dtype=np.float32)
    params[:, FACTORS] = 1, 1, 1, 0
    params[:, ORDER] = 0, 1, 2, 3
    for place, value in settings.items():
        params[:, {"jitter": JITTER, "grey": GRAYSCALE, "sigma": BLUR_SIGMA, "solarize": SOLARIZE}[place]] = value
    return params


def grey_middle(count: int) -> torch.Tensor:
    """Images whose values no small change takes out of [0, 1]."""
    return torch.randint(110, 146, (count, 24, 20, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def exact(raw: torch.Tensor, params: np.ndarray, spec: ViewSpec = SPEC) -> torch.Tensor:
    return colour.finish(raw, params, spec, MEAN, STD)


def fast(raw: torch.Tensor, params: np.ndarray, spec: ViewSpec = SPEC) -> torch.Tensor:
    return composed.finish(raw, params, spec, MEAN, STD)


def test_without_clamping_and_hue_any_order_is_the_exact_one() -> None:
    rng = np.random.default_rng(0)
    params = rows(40, jitter=1)
    params[:, FACTORS] = np.stack([*rng.uniform(0.8, 1.2, (3, 40)), np.zeros(40)], axis=1)
    params[:, ORDER] = [rng.permutation(4) for _ in range(40)]
    params[30:, GRAYSCALE] = 1
    params[20:25, JITTER] = 0
    raw = grey_middle(40)
    torch.testing.assert_close(fast(raw, params), exact(raw, params), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(fast(raw, params), exact(raw, rows(40)), atol=0.05)


def test_whole_thirds_of_a_turn_and_grey_are_the_exact_hue() -> None:
    raw = torch.randint(0, 256, (6, 24, 20, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    raw[3:] = raw[3:, :, :, :1]
    params = rows(6, jitter=1)
    params[:, FACTORS] = [(1, 1, 1, turn) for turn in (1 / 3, -1 / 3, 0, 0.1, -0.2, 0.3)]
    wide = ViewSpec(name="image", size=(24, 20), jitter=Jitter(brightness=0, contrast=0, saturation=0, hue=0.5))
    torch.testing.assert_close(fast(raw, params, wide), exact(raw, params, wide), rtol=1e-4, atol=1e-4)


def test_a_small_turn_goes_the_same_way() -> None:
    raw = torch.randint(60, 190, (32, 24, 20, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    params = rows(32, jitter=1)
    params[:, FACTORS] = 1, 1, 1, 0.05
    still = exact(raw, rows(32))
    moved, wanted = fast(raw, params) - still, exact(raw, params) - still
    cosine = torch.nn.functional.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0)
    assert cosine > 0.75  # colours as strong as noise has; a photograph's are nearer


def test_blur_solarize_and_noise() -> None:
    raw = torch.randint(0, 256, (4, 24, 20, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    torch.testing.assert_close(fast(raw, rows(4)), exact(raw, rows(4)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast(raw, rows(4, solarize=1)), exact(raw, rows(4, solarize=1)), rtol=1e-5, atol=1e-5)
    noisy = rows(4)
    noisy[:, NOISE_SIGMA], noisy[:, NOISE_SQUARE], noisy[:, NOISE_KEY] = 0.3, (12, 10, 5), 7
    torch.testing.assert_close(fast(raw, noisy), exact(raw, noisy), rtol=1e-4, atol=1e-4)
    for sigma in (0.1, 0.7, 2.0):
        found = fast(raw, rows(4, sigma=sigma))
        # by definition, in float64: a kernel of 2 sigma each way on the normalised image, mirrored
        image = exact(raw, rows(4)).double().numpy()
        reach = int(np.ceil(2 * sigma))
        weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / np.float64(np.float32(sigma))) ** 2)
        weights /= weights.sum()
        for axis in (2, 3):
            padded = np.pad(image, [(reach, reach) if a == axis else (0, 0) for a in range(4)], mode="reflect")
            parts = [np.take(padded, range(k, k + image.shape[axis]), axis=axis) for k in range(2 * reach + 1)]
            image = sum(w * part for w, part in zip(weights, parts, strict=True))
        np.testing.assert_allclose(found.numpy(), image, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
    ],
)
def test_moments_are_those_of_the_exact_ones(device: str) -> None:
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (400, 3, 3, 3), dtype=np.uint8)
    raw = torch.from_numpy(np.stack([np.asarray(Image.fromarray(x).resize((20, 24))) for x in smooth]))
    simclr = ViewSpec(
        name="image", size=(24, 20), jitter=Jitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2), grayscale=0.2
    )
    params = np.stack([draw(simclr, np.random.default_rng(i), 24, 20).colour for i in range(400)])
    one, other = exact(raw, params, simclr), fast(raw.to(device), params, simclr).cpu()
    for statistic in (torch.mean, torch.std):
        a, b = (statistic(each.movedim(1, 0).flatten(1), 1) for each in (one, other))
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    assert float((one - other).abs().mean()) < 0.2  # of a standard deviation, of colours as strong as can be
    assert other.shape == (400, 3, 24, 20)
    assert other.is_contiguous()


def photograph(height: int = 300, width: int = 420, quality: int = 85) -> bytes:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    file = io.BytesIO()
    coarse.save(file, "JPEG", quality=quality)
    return file.getvalue()


@pytest.mark.skipif(decode.simplejpeg is None, reason="simplejpeg is not installed, and only it decodes in a hurry")
def test_decoding_in_a_hurry_changes_pixels_little() -> None:
    file = photograph(320, 448)
    picture = decode.Picture(file, 3)
    same, hurried = (picture.crop(20, 30, 200, 300, fast=fast).astype(int) for fast in (False, True))
    assert 0 < np.abs(same - hurried).mean() < 3
    whole = decode.decode(file, 3).astype(float)
    for by in (2, 4, 8):
        top, left, height, width = decode.shrink((20, 30, 200, 300), by)
        small = picture.crop(top, left, height, width, by=by)
        assert small.shape == (height, width, 3)
        assert (height, width) == pytest.approx((200 / by, 300 / by), abs=1)
        means = whole.reshape(320 // by, by, 448 // by, by, 3).mean((1, 3))
        assert np.abs(small - means[top : top + height, left : left + width]).mean() < 2


@pytest.mark.skipif(decode.simplejpeg is None, reason="simplejpeg is not installed, and only it decodes in a hurry")
def test_views_of_large_photographs_are_nearly_the_exact_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(photograph(600 + i, 900))
    (tmp_path / "grey.png").write_bytes(b"")  # replaced
    source = open_source(str(tmp_path), None)
    seen = {}
    asked: list[int] = []
    crop = decode.Picture.crop
    monkeypatch.setattr(
        decode.Picture, "crop", lambda self, *a, by=1, **k: asked.append(by) or crop(self, *a, by=by, **k)
    )
    for fast in (False, True):
        spec = ViewSpec(name="image", size=(64, 64), scale=(0.3, 1.0), fast=fast)
        (raw,) = batches(
            source, [spec], Share(4), seed=0, channels=3, start_step=0, stop_step=1, workers=0, policy="replace"
        )
        seen[fast] = to_batch(raw, [spec], MEAN, STD, torch.device("cpu"))
    assert asked[:4] == [1] * 4
    assert min(asked[4:]) >= 2
    assert torch.equal(seen[False].index, seen[True].index)
    assert torch.equal(seen[False].geometry["image"], seen[True].geometry["image"])
    assert float((seen[False].views["image"] - seen[True].views["image"]).abs().mean()) < 0.1


@pytest.mark.slow
def test_a_run_is_told_which(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    same = (
        "--method",
        "simclr",
        "--data",
        photos,
        "--steps",
        3,
        "--log-every",
        1,
        "--workers",
        0,
        *TINY[:10],
        "--hidden-dim",
        32,
    )
    pretrain(*same, "--out", tmp_path / "exact")
    pretrain(*same, "--out", tmp_path / "fast", "--aug", "fast")
    one, other = losses(tmp_path / "exact"), losses(tmp_path / "fast")
    assert one != other
    assert other == pytest.approx(one, rel=0.2)
    done = pretrain(*same, "--out", tmp_path / "exact", "--aug", "fast", "--steps", 4, code=2)
    assert "aug" in done.stderr
