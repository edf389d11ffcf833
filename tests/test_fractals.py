"""Fractal images: the systems follow the paper, the points lie on the attractor, an image depends on its keys alone."""

import pickle
import subprocess
import sys
import time

import numpy as np
import pytest

from ssl_pretrain.data import fractals
from ssl_pretrain.data.fractals import FractalSource, System
from ssl_pretrain.data.source import evaluation_splits, open_source, pretraining_split
from ssl_pretrain.errors import UserError

TRIANGLE = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # corners of a Sierpinski gasket


def gasket(p) -> System:
    return System(np.repeat(0.5 * np.eye(2)[None], 3, axis=0), 0.5 * TRIANGLE, np.array(p))


@pytest.mark.parametrize("maps", [2, 3, 4])
def test_singular_values_are_in_the_papers_range(maps):
    rng = np.random.default_rng(0)
    drawn = np.stack([fractals.sample_singular_values(maps, rng) for _ in range(4000)])
    assert (drawn >= 0).all()
    assert (drawn <= 1).all()
    assert (drawn[:, :, 0] >= drawn[:, :, 1] - 1e-12).all()
    alpha = (drawn * [1, 2]).sum(axis=(1, 2))
    low, high = (5 + maps) / 2, (6 + maps) / 2
    assert alpha.min() > low - 1e-9
    assert alpha.max() < high + 1e-9
    assert abs(alpha.mean() - (low + high) / 2) < 0.02  # uniform: mean, and the spread of a uniform variable
    assert abs(alpha.std() - 0.5 / np.sqrt(12)) < 0.01
    assert drawn[:, 0].std(axis=0).min() > 0.05  # the values themselves vary


def test_systems_have_the_singular_values_that_were_drawn(monkeypatch):
    values = np.array([[0.9, 0.3], [0.8, 0.8], [0.6, 0.1]])
    monkeypatch.setattr(fractals, "MAPS", (3, 3))
    monkeypatch.setattr(fractals, "sample_singular_values", lambda *_: values)
    rng = np.random.default_rng(1)
    systems = [fractals.sample_system(rng) for _ in range(300)]
    for system in systems[:20]:
        np.testing.assert_allclose(np.linalg.svd(system.a, compute_uv=False), values, atol=1e-12)
        weights = np.maximum([0.27, 0.64, 0.06], fractals.MINIMAL_WEIGHT * 0.97)
        np.testing.assert_allclose(system.p, weights / weights.sum())
        assert (np.abs(system.b) <= 1).all()
    mirrored = np.mean([np.linalg.det(system.a) < 0 for system in systems])
    assert 0.4 < mirrored < 0.6
    directions = np.array([np.arctan2(*system.a[0, ::-1, 0]) for system in systems])  # where the x axis goes
    counts, _ = np.histogram(directions, bins=6, range=(-np.pi, np.pi))
    assert counts.min() > 20


def test_points_lie_on_the_attractor_and_are_spread_by_the_probabilities():
    p = np.array([0.6, 0.3, 0.1])
    points = fractals._chaos_game(gasket(p), 40_000, np.random.default_rng(2))
    # In the gasket, binary digits of x and y are never both 1, at any place.
    x, y = (np.floor(points[i].astype(np.float64) * 256 + 1e-4).clip(0, 255).astype(int) for i in (0, 1))
    assert np.mean((x & y) != 0) < 1e-3
    # Level by level, the share of a cell is the product of the probabilities of the maps that lead to it.
    first = np.where(y >= 128, 2, np.where(x >= 128, 1, 0))
    second = np.where(y & 64, 2, np.where(x & 64, 1, 0))
    shares = np.histogram2d(first, second, bins=3)[0] / points.shape[1]
    np.testing.assert_allclose(shares, np.outer(p, p), atol=0.02)
    # The colour coordinate is 1/2 of the last map's, plus 1/4 of that before, ...; the maps have 0, 1/2 and 1, so it
    # has the digits 0, 1/2, 1 where x and y have (0, 0), (1, 0), (0, 1): it is x / 2 + y. It forgets after 8 maps.
    np.testing.assert_allclose(points[2], 0.5 * points[0] + points[1], atol=2**-7)


@pytest.mark.parametrize("number", [2, 4, 8, 16, 17])  # from evenly used maps to one that is used nine times of ten
def test_points_agree_with_a_plain_chaos_game(number):
    """Against one point that moves by random maps, in float64."""
    system = fractals.system_of_class(0, number)
    rng = np.random.default_rng(3)
    xy, path = np.zeros(2), []
    for k in rng.choice(len(system.p), 20_000, p=system.p):
        xy = system.a[k] @ xy + system.b[k]
        path.append(xy)
    plain = np.array(path[100:]).T
    points = fractals._chaos_game(system, 60_000, np.random.default_rng(4))[:2]
    low, high = plain.min(axis=1), plain.max(axis=1)
    both = [np.histogram2d(*xy, bins=8, range=np.stack([low, high], 1))[0].ravel() for xy in (plain, points)]
    first, second = (counts / counts.sum() for counts in both)
    assert np.abs(first - second).sum() / 2 < 0.06  # total variation


def test_classes_are_contractive_and_not_degenerate_and_differ():
    for number in range(60):
        system = fractals.system_of_class(5, number)
        assert np.linalg.norm(system.a, 2, axis=(1, 2)).max() < 1
        varied = fractals._vary(system, np.random.default_rng(number))
        assert np.linalg.norm(varied.a, 2, axis=(1, 2)).max() < 1
        points = fractals._chaos_game(system, 5000, np.random.default_rng(number))[:2].T
        extent = np.ptp(points, axis=0)
        assert extent.min() > 0.15 * extent.max()
        cells = ((points - points.min(axis=0)) / extent.max() * 15.99).astype(int)
        assert 0.08 < len(np.unique(cells, axis=0)) / 256 < 0.95
    firsts = [fractals.system_of_class(5, n).b[0, 0] for n in range(60)]
    assert len(set(firsts)) == 60


def test_an_image_depends_on_seed_split_and_index_alone():
    data = "fractals:images=40,classes=5,size=24"
    source = open_source(data, "train")
    images = [source[i] for i in range(40)]
    assert all(image.shape == (24, 24, 3) and image.dtype == np.uint8 for image in images)
    assert len({image.tobytes() for image in images}) == 40
    again = pickle.loads(pickle.dumps(source))
    for i in (39, 3, 17):
        np.testing.assert_array_equal(again[i], images[i])
    longer = open_source("fractals:size=24,classes=5,images=80", "train")
    np.testing.assert_array_equal(longer[17], images[17])
    test, everything = open_source(data, "test"), open_source(data, None)
    assert (len(test), len(everything)) == (10, 50)
    np.testing.assert_array_equal(everything[39], images[39])
    np.testing.assert_array_equal(everything[43], test[3])
    assert not np.array_equal(test[3], images[3])
    assert not np.array_equal(open_source(data + ",seed=1", "train")[3], images[3])
    assert source.name(3) == "fractals:train:3"
    assert everything.name(43) == "fractals:test:3"
    for wrong in (-1, 40):
        with pytest.raises(IndexError):
            source[wrong]

    program = "import sys\nfrom ssl_pretrain.data.source import open_source\n"
    program += f"sys.stdout.buffer.write(open_source({data!r}, 'train')[7].tobytes())\n"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert other.stdout == images[7].tobytes()


def test_labels_and_fingerprint():
    train, test = open_source("fractals", "train"), open_source("fractals", "test")
    assert np.bincount(train.labels).tolist() == [205] * 16 + [204] * 4
    assert train.labels.dtype == np.int64
    assert train.classes == test.classes
    assert len(train.classes) == 20
    np.testing.assert_array_equal(train.multi_labels, np.eye(20, dtype=bool)[train.labels])
    assert train.fingerprint == open_source("fractals: classes=20, seed=0", "train").fingerprint
    others = [test, *(open_source(f"fractals:{o}", "train") for o in ("seed=1", "size=41", "images=5", "classes=21"))]
    assert len({train.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert (pretraining_split("fractals"), evaluation_splits("fractals")) == ("train", ("train", "test"))


def test_several_fractals_on_an_image(monkeypatch):
    source = open_source("fractals:instances=3,classes=4,images=3000,size=48", "train")
    marks = source.multi_labels
    assert marks.shape == (3000, 4)
    counts = marks.sum(axis=1)
    assert np.abs(np.bincount(counts, minlength=4)[1:] - 1000).max() < 120  # 1, 2 or 3, equally often
    assert marks[np.arange(3000), source.labels].all()
    np.testing.assert_allclose(marks.mean(axis=0), 0.5, atol=0.04)  # 2 of 4 classes on average, none preferred

    painted = []
    paint = fractals._paint
    monkeypatch.setattr(fractals, "_paint", lambda *a: painted.append((a[1], a[2])) or paint(*a))
    monkeypatch.setattr(fractals, "_vary", lambda system, _: system)
    index = int(np.flatnonzero(counts == 3)[0])
    source[index]
    systems = {id(fractals.system_of_class(0, c)): c for c in range(4)}
    classes = [systems[id(system)] for system, _ in painted]
    shares = [share for _, share in painted]
    assert sorted(classes) == np.flatnonzero(marks[index]).tolist()
    assert classes[int(np.argmax(shares))] == source.labels[index]


@pytest.mark.parametrize("size", [8, 33, 224])
def test_fractals_fill_their_share_of_any_size(size):
    system = fractals.system_of_class(0, 2)
    for seed in range(4):
        canvas = np.zeros((3, size, size), np.float32)
        fractals._paint(canvas, system, 0.8, False, np.random.default_rng(seed))
        rows, columns = (np.flatnonzero(canvas.max(axis=(0, axis)) > 0.05) for axis in (2, 1))
        longest = max(np.ptp(rows), np.ptp(columns)) + 1
        assert 0.8 * (size - 1) - 1 <= longest <= 0.8 * (size - 1) + 4  # smoothing adds a pixel on each side
        assert canvas.min() >= 0
        assert canvas.max() <= 1


@pytest.mark.parametrize(("data", "low", "high"), [("palettes=0", 0.15, 0.5), ("palettes=1", 0.5, 0.9)])
def test_raw_pixels_tell_something_of_the_class_but_not_all(data, low, high):
    """20 nearest neighbours by cosine similarity of centred pixels; a class's palette tells much of it."""
    splits = [open_source(f"fractals:images=2000,{data}", split) for split in ("train", "test")]
    features = []
    for source in splits:
        pixels = np.stack([source[i] for i in range(len(source))]).reshape(len(source), -1).astype(np.float32)
        pixels -= pixels.mean(axis=1, keepdims=True)
        features.append(pixels / np.linalg.norm(pixels, axis=1, keepdims=True))
    nearest = np.argsort(-(features[1] @ features[0].T), axis=1)[:, :20]
    votes = np.apply_along_axis(np.bincount, 1, splits[0].labels[nearest], minlength=20)
    accuracy = np.mean(votes.argmax(axis=1) == splits[1].labels)
    assert low < accuracy < high  # chance: 0.05


def test_opening_is_cheap_and_rendering_fast():
    begin = time.process_time()
    source = FractalSource("fractals:images=1000000,classes=1000", "train")
    for number in range(20):
        fractals.system_of_class(12345, number)
    assert time.process_time() - begin < 0.3
    for i in range(300):  # also finds the systems of these classes
        source[i]
    begin = time.process_time()
    for i in range(300):
        source[i]
    assert 300 / (time.process_time() - begin) > 500  # images/s; about 1,500 on a core that does nothing else


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("fractals:clases=3", "no option 'clases'; did you mean classes"),
        ("fractals:classes", "classes must be a whole number from 2 to"),
        ("fractals:size=4", "size must be a whole number from 8 to 2048"),
        ("fractals:seed=-1", "seed must be a whole number"),
        ("fractals:instances=5,classes=4", "at least as many classes"),
    ],
)
def test_mistaken_options(data, message):
    with pytest.raises(UserError, match=message):
        open_source(data, None)


def test_no_other_splits():
    with pytest.raises(UserError, match="it has train, test"):
        open_source("fractals", "val")
