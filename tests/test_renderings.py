"""Views of the same pixels: other renderings of a view, overlapping views, and features aligned between views."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_pretrain.data.loader import Share, batches, to_batch
from ssl_pretrain.data.source import Source
from ssl_pretrain.data.views import Jitter, Sight, ViewSpec, fitted
from ssl_pretrain.parts import align

SIDE = 128
UNIT = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
COLOURS = {"jitter": Jitter(p=1.0), "grayscale": 0.3, "blur": 0.5, "solarize": 0.3}


class Smooth(Source):
    """Images whose red and green are the row and the column, so that a pixel says where it comes from."""

    def __init__(self) -> None:
        rows, columns = np.mgrid[:SIDE, :SIDE]
        pixels = np.stack([2 * rows, 2 * columns, np.full_like(rows, 90)], -1).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        self.item = file.getvalue()
        self.labels, self.classes, self.fingerprint, self.description = None, None, "", ""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> bytes:
        return self.item

    def name(self, index: int) -> str:
        return str(index)


def batch_of(specs, count=32, seed=3):
    raw = next(
        batches(
            Smooth(), specs, Share(count), seed=seed, channels=3, start_step=0, stop_step=1, workers=0, policy="fail"
        )
    )
    return to_batch(raw, specs, *UNIT, torch.device("cpu"))


def test_rendering_of_the_same_size_is_the_same_view():
    first = ViewSpec(name="image", size=(32, 32), vflip=0.5, noise_patch=0.5, **COLOURS)
    specs = fitted((first, ViewSpec(name="again", of="image", size=(32, 32))), (32, 32), (8, 8))
    batch = batch_of(specs)
    assert torch.equal(batch.views["image"], batch.views["again"])
    assert torch.equal(batch.geometry["image"], batch.geometry["again"])


@pytest.mark.parametrize("fast", [False, True])
def test_rendering_of_another_size_shows_the_same_pixels(fast):
    first = ViewSpec(name="image", size=(64, 64), scale=(0.3, 1), vflip=0.5, **COLOURS)
    specs = fitted((first, ViewSpec(name="small", of="image", size=(32, 32))), (64, 64), (8, 8))
    batch = batch_of(tuple(replace(spec, fast=fast) for spec in specs))
    shrunk = torch.nn.functional.avg_pool2d(batch.views["image"], 2)
    small = batch.views["small"]
    solarized = (shrunk - small).abs().amax((1, 2, 3)) > 0.5  # a threshold is crossed by a pixel here and there
    close = (shrunk - small).abs().mean((1, 2, 3))
    assert close[~solarized].max() < 0.02
    assert solarized.sum() <= len(small) // 3
    # another draw is not close: the check would see a box, flip or colour of its own
    other = batch_of((replace(specs[1], of=None, name="other"),)).views["other"]
    assert (shrunk - other).abs().mean((1, 2, 3)).median() > 0.05


def test_clean_rendering_has_box_and_flips_and_no_colour():
    first = ViewSpec(name="image", size=(32, 32), vflip=0.5, **COLOURS)
    specs = fitted((first, ViewSpec(name="clean", of="image", size=(64, 64), clean=True)), (32, 32), (8, 8))
    batch = batch_of(specs)
    plain = replace(first, jitter=None, grayscale=0.0, blur=0.0, solarize=0.0)
    expected = batch_of((replace(plain, size=(64, 64)),)).views["image"]
    assert torch.equal(batch.views["clean"], expected)
    assert not torch.equal(batch.views["image"], batch_of((plain,)).views["image"])


def test_copies_are_rendered_each_as_its_own():
    first = ViewSpec(name="local", count=3, size=(16, 16), scale=(0.1, 0.4))
    batch = batch_of(fitted((first, ViewSpec(name="twin", of="local", count=3, size=(16, 16))), (16, 16), (8, 8)))
    assert torch.equal(batch.views["local"], batch.views["twin"])
    assert not torch.equal(batch.views["local"][0], batch.views["local"][1])


def test_view_for_a_network_has_as_many_of_its_patches():
    first = ViewSpec(name="image", size=(64, 96))
    twin = ViewSpec(name="teacher", of="image", size=(64, 96), network="teacher")
    double = ViewSpec(name="large", of="image", size=(128, 192), network="teacher")
    sights = {"teacher": Sight((14, 14), "bilinear")}
    _, seen, large = fitted((first, twin, double), (64, 96), (16, 16), sights)
    assert seen.size == (4 * 14, 6 * 14)
    assert seen.interpolation == "bilinear"
    assert large.size == (8 * 14, 12 * 14)


@pytest.mark.parametrize(
    "second",
    [
        ViewSpec(name="b", of="nobody", size=(32, 32)),
        ViewSpec(name="b", of="a", count=2, size=(32, 32)),
        ViewSpec(name="b", of="b", size=(32, 32)),
        ViewSpec(name="b", size=(32, 32), overlap=("nobody", 0.1)),
    ],
)
def test_view_that_refers_to_no_earlier_view_is_refused(second):
    with pytest.raises(ValueError, match=r"nobody|copies"):
        fitted((ViewSpec(name="a", size=(32, 32)), second), (32, 32), (8, 8))


def test_overlap():
    first = ViewSpec(name="a", size=(16, 16), scale=(0.05, 0.1), hflip=0.0)

    def shares(least: float | None) -> np.ndarray:
        overlap = None if least is None else ("a", least)
        specs = fitted((first, replace(first, name="b", overlap=overlap)), (16, 16), (8, 8))
        rows = [batch_of(specs, seed=seed).geometry for seed in range(4)]
        a, b = (torch.cat([row[name] for row in rows]).numpy() for name in "ab")
        height = np.minimum(a[:, 0] + a[:, 2], b[:, 0] + b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
        width = np.minimum(a[:, 1] + a[:, 3], b[:, 1] + b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
        return np.maximum(height, 0) * np.maximum(width, 0) / (b[:, 2] * b[:, 3])

    free, asked = shares(None), shares(0.01)
    assert (free < 0.01).mean() > 0.4  # else the test asks nothing
    # ten more tries: the share that finds none falls to about its eleventh power
    assert (asked < 0.01).mean() < 0.15


def oracle(maps, own, other, grid):
    """Bilinear samples by loops, float64, written from the definition of geometry."""
    (h, w, d), (rows, columns) = maps.shape, grid
    out, inside = np.zeros((rows * columns, d)), np.zeros(rows * columns, dtype=bool)
    for i in range(rows):
        for j in range(columns):
            y, x = (i + 0.5) / rows, (j + 0.5) / columns
            x, y = (1 - x if other[4] else x), (1 - y if other[5] else y)
            y, x = other[0] + y * other[2], other[1] + x * other[3]
            y, x = (y - own[0]) / own[2], (x - own[1]) / own[3]
            x, y = (1 - x if own[4] else x), (1 - y if own[5] else y)
            inside[i * columns + j] = 0 <= y <= 1 and 0 <= x <= 1
            y, x = min(max(y * h - 0.5, 0), h - 1), min(max(x * w - 0.5, 0), w - 1)
            top, left = min(int(y), max(h - 2, 0)), min(int(x), max(w - 2, 0))
            dy, dx = y - top, x - left
            low, right = min(top + 1, h - 1), min(left + 1, w - 1)
            out[i * columns + j] = (1 - dy) * ((1 - dx) * maps[top, left] + dx * maps[top, right]) + dy * (
                (1 - dx) * maps[low, left] + dx * maps[low, right]
            )
    return out, inside


def test_aligned_against_loops():
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((16, 5, 7, 3))
    boxes = rng.uniform(0.3, 0.9, (2, 16, 2))
    geometry = [
        np.concatenate([rng.uniform(0, 1 - box), box, rng.integers(0, 2, (16, 2))], axis=1).astype(np.float32)
        for box in boxes
    ]
    own, other = (torch.from_numpy(g) for g in geometry)
    found, inside = align.aligned(torch.from_numpy(maps), own, other, (4, 6))
    for b in range(16):
        expected, within = oracle(maps[b], *(g[b].astype(float) for g in geometry), (4, 6))
        np.testing.assert_allclose(found[b], expected, atol=2e-5)
        assert np.array_equal(inside[b], within)


def test_aligned_with_itself_is_the_map():
    maps = torch.randn(4, 6, 5, 3)
    geometry = torch.tensor([[0.1, 0.2, 0.5, 0.4, f, g] for f in (0, 1) for g in (0, 1)])
    found, inside = align.aligned(maps, geometry, geometry, (6, 5))
    torch.testing.assert_close(found, maps.flatten(1, 2), atol=1e-5, rtol=0)
    assert inside.all()


def test_aligned_finds_the_same_pixels_in_two_views():
    spec = ViewSpec(name="a", size=(64, 64), scale=(0.3, 1), vflip=0.5)
    batch = batch_of((spec, replace(spec, name="b")))
    maps = batch.views["a"].permute(0, 2, 3, 1)
    found, inside = align.aligned(maps, batch.geometry["a"], batch.geometry["b"], (64, 64))
    there = batch.views["b"].permute(0, 2, 3, 1).flatten(1, 2)
    assert inside.float().mean() > 0.3
    assert (found - there)[inside].abs().max() < 4 / 255


def test_resized_tokens_keep_a_smooth_map():
    rows = torch.linspace(0, 1, 8)[:, None].expand(8, 8)
    tokens = rows.reshape(1, 64, 1)
    assert align.resized(tokens, (8, 8), (8, 8)) is tokens
    expected = torch.nn.functional.interpolate(rows[None, None], size=(4, 4), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(align.resized(tokens, (8, 8), (4, 4)), expected)
