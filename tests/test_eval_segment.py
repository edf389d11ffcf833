"""Segmentation: scores against scikit-learn and hand-made cases, what is learned and carried against float64 NumPy, which
files belong together, and every mismatch of images, masks and classes."""

import json
import math
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import COLOURS, scene, write
from sklearn import metrics as oracle
from small_encoders import small_encoder
from ssl_pretrain.eval import _dense, _foreground, _masks, _overlap, segment
from ssl_pretrain.eval._propagate import Walk, propagate
from ssl_pretrain.eval._task import Task
from ssl_pretrain.launch.evaluate import main

from ssl_pretrain.backbones.positions import Offsets
from ssl_pretrain.encoder import Encoder, save
from ssl_pretrain.errors import UserError
from ssl_pretrain.features import pixel_encoder

QUICK = ["--steps", "60", "--workers", "0", "--batch-size", "8"]


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """12 images to train and 5 to test on, each beside its mask."""
    for i in range(17):
        split = "train" if i < 12 else "test"
        write(tmp_path / "scenes", f"{split}/{i:02d}.png", f"{split}/{i:02d}.seg.png", i)
    return tmp_path / "scenes"


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    made = small_encoder(patch_size=4)
    save(tmp_path / "encoder", made)
    return tmp_path / "encoder"


@pytest.fixture
def run(tmp_path: Path, encoder: Path) -> Callable[..., dict[str, Any]]:
    def result(data: Path, *flags: str) -> dict[str, Any]:
        out = tmp_path / "out"
        assert main(["segment", "--encoder", str(encoder), "--data", str(data), "--out", str(out), *QUICK, *flags]) == 0
        return json.loads((out / "results.json").read_text())

    return result


@pytest.fixture
def refuse(
    encoder: Path, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)

    def said(data: Path, *flags: str) -> str:
        assert main(["segment", "--encoder", str(encoder), "--data", str(data), *QUICK, *flags]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    return said


def task_of(data: Path, config: segment.Config, encoder: Encoder | None = None) -> Task:
    opened = segment.open_data(str(data), None, None, config)
    return Task(
        encoder=encoder or small_encoder(patch_size=4),
        data=opened,
        device=torch.device("cpu"),
        batch_size=3,
        cache=False,
    )


# ---- Scores.


def test_iou_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    true = rng.integers(-1, 4, (6, 20, 30))  # class 4 is never there, but found
    found = np.where(rng.random(true.shape) < 0.6, true.clip(0), rng.integers(0, 5, true.shape))
    table = np.stack([_overlap.counts(f, t, 5) for f, t in zip(found, true, strict=True)])
    scores = _overlap.segmentation(table, list("abcde"), 0)
    known = true >= 0
    iou = oracle.jaccard_score(true[known], found[known], labels=[0, 1, 2, 3], average=None)
    assert scores["per_class_iou"] == pytest.approx(dict(zip("abcd", 100 * iou, strict=True)))
    assert scores["miou"] == pytest.approx(100 * iou.mean())
    assert scores["pixel_accuracy"] == pytest.approx(100 * oracle.accuracy_score(true[known], found[known]))
    matrix = oracle.confusion_matrix(true[known], found[known], labels=range(5))
    np.testing.assert_array_equal(table.sum(0), [matrix.diagonal(), matrix.sum(1), matrix.sum(0)])


def test_intervals_are_those_of_images_drawn_again() -> None:
    rng = np.random.default_rng(0)
    table = rng.integers(1, 50, (40, 3, 3))
    table[:, 1:] += table[:, :1]
    scores = _overlap.segmentation(table, list("abc"), 3)
    drawn = []
    for _ in range(2000):
        hits, true, found = table[rng.integers(0, 40, 40)].sum(0)
        drawn.append(100 * (hits / (true + found - hits)).mean())
    np.testing.assert_allclose(scores["miou_interval"], np.percentile(drawn, [2.5, 97.5]), atol=0.5)
    assert scores["miou_interval"][0] < scores["miou"] < scores["miou_interval"][1]
    again = _overlap.segmentation(table, list("abc"), 3)
    assert again == scores
    value, interval = _overlap.mean(np.array([0.5, 2.0]), np.array([1, 3]), 0)
    assert value == pytest.approx(100 * 2.5 / 4)
    assert interval == pytest.approx([50, 100 * 2 / 3])
    flat = table[:1].repeat(10, 0)
    assert np.ptp(_overlap.segmentation(flat, list("abc"), 0)["miou_interval"]) < 1e-9


def square(top: int, left: int, side: int = 20, shape: tuple[int, int] = (100, 120)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_region_similarity_of_squares() -> None:
    assert _overlap.region_similarity(square(10, 10), square(10, 10)) == 1
    assert _overlap.region_similarity(square(10, 10), square(10, 15)) == pytest.approx(20 * 15 / (20 * 25))
    assert _overlap.region_similarity(square(10, 10), square(50, 50)) == 0
    empty = np.zeros((100, 120), bool)
    assert _overlap.region_similarity(empty, empty) == 1
    assert _overlap.region_similarity(empty, square(10, 10)) == 0


def contour_pixels(mask: np.ndarray) -> np.ndarray:
    """Pixels with another value below, to the right, or below to the right, one by one."""
    h, w = mask.shape
    return np.array(
        [
            (y, x)
            for y in range(h)
            for x in range(w)
            if any(mask[y, x] != mask[min(y + a, h - 1), min(x + b, w - 1)] for a, b in ((1, 0), (0, 1), (1, 1)))
        ]
    )


@pytest.mark.parametrize("shift", [(0, 0), (0, 1), (2, 1), (0, 3), (6, 6), (50, 50)])
def test_contours_meet_within_the_tolerance(shift: tuple[int, int]) -> None:
    true = square(20, 20)
    found = square(20 + shift[0], 20 + shift[1], 18)
    ours, theirs = contour_pixels(found), contour_pixels(true)
    radius = math.ceil(0.008 * math.hypot(100, 120))
    assert radius == 2
    near = ((ours[:, None] - theirs) ** 2).sum(2) <= radius**2
    precision, recall = near.any(1).mean(), near.any(0).mean()
    expected = 2 * precision * recall / (precision + recall) if precision + recall else 0
    assert _overlap.contour_accuracy(found, true) == pytest.approx(expected)
    assert _overlap.contour_accuracy(true, found) == pytest.approx(expected)
    assert (expected == 0) == (shift == (50, 50))


def test_contours_by_hand() -> None:
    empty = np.zeros((100, 120), bool)
    assert _overlap.contour_accuracy(square(20, 20), square(20, 22)) == 1  # two pixels aside is within the tolerance
    assert 0 < _overlap.contour_accuracy(square(20, 20), square(20, 23)) < 1
    assert _overlap.contour_accuracy(empty, empty) == 1
    assert _overlap.contour_accuracy(empty, square(20, 20)) == 0
    assert _overlap.contour_accuracy(square(20, 20), empty) == 0


# ---- Patches and pixels.


def test_shares_count_the_pixels_of_each_patch() -> None:
    mask = np.random.default_rng(0).integers(-1, 3, (10, 9))
    shares = _dense.shares_of(mask, (4, 3), 3).reshape(4, 3, 3)
    sums = np.zeros((4, 3, 3))
    areas = np.zeros((4, 3, 1))
    for y in range(10):
        for x in range(9):
            areas[y * 4 // 10, x * 3 // 9] += 1
            if mask[y, x] >= 0:
                sums[y * 4 // 10, x * 3 // 9, mask[y, x]] += 1
    np.testing.assert_allclose(shares, sums / areas, rtol=1e-6)


def test_images_are_resized_as_a_whole(scenes: Path) -> None:
    task = task_of(scenes, segment.Config())
    source = task.data.test.source
    assert isinstance(source, _masks.Masked)
    (index, images), *_ = _dense.batches(task, task.data.test, [2, 0], (16, 24), [], "")
    assert index == [2, 0]
    whole = Image.open(scenes / source.pairs[2].image).resize((24, 16), Image.Resampling.BICUBIC)
    mean, std = (np.array(v) for v in (task.encoder.preprocessing.mean, task.encoder.preprocessing.std))
    expected = ((np.asarray(whole) / 255 - mean) / std).transpose(2, 0, 1)
    assert np.abs(images[0].numpy() - expected).max() < 0.05


def test_neighbours_vote_with_their_shares() -> None:
    rng = np.random.default_rng(0)
    bank, queries = rng.standard_normal((50, 6)), rng.standard_normal((2, 3, 4, 6))
    shares = rng.dirichlet(np.ones(3), 50)
    shares[:5] *= 0.5
    made = segment._Bank(torch.from_numpy(bank).float(), torch.from_numpy(shares).float(), np.arange(50))
    found = segment._neighbours(made, 7, 0.1)(torch.from_numpy(queries).float())
    assert found.shape == (2, 3, 4, 3)
    expected = np.zeros((24, 3))
    for number, query in enumerate(queries.reshape(-1, 6)):
        cosine = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        near = np.argsort(-cosine)[:7]
        weight = np.exp(cosine[near] / 0.1)
        expected[number] = weight @ shares[near] / weight.sum()
    np.testing.assert_allclose(found.numpy().reshape(-1, 3), expected, atol=2e-5)


def test_a_layer_finds_what_scikit_learn_finds(scenes: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x = 3 * rng.standard_normal((600, 5)) + 2
    y = (x @ rng.standard_normal((5, 3)) + rng.standard_normal((600, 3))).argmax(1)
    bank = segment._Bank(torch.from_numpy(x).float(), torch.eye(3)[y], np.arange(600) // 6)
    config = segment.Config(steps=600)
    good, wild = segment._train(task_of(scenes, config), config, bank, [0.1, 1e20], "")
    theirs = LogisticRegression(C=1e3, max_iter=2000).fit(x, y)
    found = good(torch.from_numpy(x).float()).softmax(1).numpy()
    np.testing.assert_allclose(found, theirs.predict_proba(x), atol=0.05)
    assert (good.finite, wild.finite) == (True, False)


# ---- Without labels.


def test_the_threshold_is_otsus() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 1, 60), rng.normal(4, 0.5, 25)])
    threshold = _foreground.otsu(values.reshape(5, 17))
    within = min(
        (values[values <= t].var() * (values <= t).sum() + values[values > t].var() * (values > t).sum())
        for t in np.sort(values)[:-1]
    )
    low, high = values[values <= threshold], values[values > threshold]
    assert low.var() * len(low) + high.var() * len(high) == pytest.approx(within)
    assert threshold not in values
    assert _foreground.otsu(np.full(4, 0.5)) == 0.5


def test_the_principal_component_has_a_border_that_scores_low() -> None:
    rng = np.random.default_rng(0)
    patches = rng.standard_normal((3, 6, 7, 5))
    patches[:, 2:4, 2:5] += [4, -3, 0, 0, 1]
    scores = _foreground.principal(torch.from_numpy(patches).float()).numpy()
    for image, found in zip(patches, scores, strict=True):
        rows = image.reshape(-1, 5) - image.reshape(-1, 5).mean(0)
        axis = np.linalg.eigh(rows.T @ rows)[1][:, -1]
        expected = (rows @ axis).reshape(6, 7)
        border = np.concatenate([expected[[0, -1]].ravel(), expected[1:-1, [0, -1]].ravel()])
        np.testing.assert_allclose(found, -np.sign(border.mean()) * expected, atol=1e-4)
        assert found[2:4, 2:5].mean() > found.mean()


@pytest.mark.parametrize(
    "options", [{}, {"positions": "rope", "registers": 2, "qk_norm": True}, {"positions": "relative", "registers": 1}]
)
def test_attention_is_that_of_the_last_block(options: dict[str, Any]) -> None:
    encoder = small_encoder(patch_size=4, **options)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    block, scores = encoder.backbone.blocks[-1], None
    with torch.no_grad():
        if options.get("positions") == "relative":
            block.attn.relative_position_bias_table.copy_(torch.randn(52, block.attn.heads))
            scores = Offsets.of((4, 4), (4, 4), 2).scores(block.attn.relative_position_bias_table)
        found = _foreground.attention(encoder, lambda: encoder(images))
        before = block.norm1(encoder(images, blocks=(-2,)).blocks[0])
        # With values that say which token they are of, attention is its own output.
        width = before.shape[2] // block.attn.heads
        heads = []
        length, prefix = before.shape[1], encoder.backbone.prefix_tokens
        rope = encoder.backbone._rope((4, 4), None, images.device)
        for start in range(0, length, width):
            values = torch.zeros(2, block.attn.heads, length, width)
            for token in range(start, min(start + width, length)):
                values[:, :, token, token - start] = 1
            heads.append(attended(block.attn, before, values, rope, scores))
        weights = torch.cat(heads, 3)[:, :, 0, prefix:length].mean(1)
    torch.testing.assert_close(found, weights.unflatten(1, (4, 4)))
    assert not any(module._forward_hooks for module in encoder.modules())


def attended(attention: Any, x: torch.Tensor, values: torch.Tensor, rope: Any, scores: Any) -> torch.Tensor:
    """(B, heads, L, d) that the block's own attention gives for other values."""
    from ssl_pretrain.backbones import vit

    q, k, _ = attention.qkv(x).unflatten(2, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:
        q, k = vit.rotate(q, *rope), vit.rotate(k, *rope)
    return vit.attend(q, k, values, scores)


# ---- Videos.

DINO = Walk(frames=7, top=5, radius=12, temperature=0.1)


def test_labels_follow_features_that_say_where_a_patch_went() -> None:
    rng = np.random.default_rng(0)
    ground, thing = rng.standard_normal((10, 12, 32)), rng.standard_normal((3, 3, 32))
    frames, masks = [], []
    for t in range(8):
        frame, mask = ground.copy(), np.zeros((10, 12), int)
        frame[t // 2 : t // 2 + 3, t : t + 3], mask[t // 2 : t // 2 + 3, t : t + 3] = thing, 1
        frames.append(torch.from_numpy(frame).float())
        masks.append(mask)
    first = torch.eye(2)[masks[0]]
    for top in (1, 5):
        carried = list(propagate(frames, first, replace(DINO, top=top, temperature=0.05)))
        assert len(carried) == 7
        for labels, mask in zip(carried, masks[1:], strict=True):
            np.testing.assert_array_equal(labels.argmax(2).numpy(), mask)
    still = list(propagate(frames, first, replace(DINO, radius=1, frames=1)))[-1]
    assert not np.array_equal(still.argmax(2).numpy(), masks[-1])  # the first frame's object is out of reach at once


def test_propagation_is_what_the_papers_write() -> None:
    rng = np.random.default_rng(0)
    frames = rng.standard_normal((6, 4, 5, 7))
    first = rng.dirichlet(np.ones(3), (4, 5))
    walk = Walk(frames=2, top=4, radius=1, temperature=0.2)
    found = list(propagate([torch.from_numpy(f) for f in frames], torch.from_numpy(first), walk))
    known = [first]
    for t in range(1, 6):
        context = [0, *range(max(1, t - 2), t)]
        labels = np.zeros((4, 5, 3))
        for y in range(4):
            for x in range(5):
                candidates = []
                for c in context:
                    for v in range(max(0, y - 1), min(4, y + 2)):
                        for u in range(max(0, x - 1), min(5, x + 2)):
                            a, b = frames[t, y, x], frames[c, v, u]
                            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                            candidates.append((math.exp(cosine / 0.2), known[c][v, u]))
                best = sorted(candidates, key=lambda one: -one[0])[:4]
                labels[y, x] = sum(weight * label for weight, label in best) / sum(weight for weight, _ in best)
        known.append(labels)
        np.testing.assert_allclose(found[t - 1].numpy(), labels, atol=1e-9)


# ---- Which files belong together.


def members(folder: Path) -> None:
    """Pack a folder into a tar beside it, and remove it."""
    with tarfile.open(folder.with_suffix(".tar"), "w") as archive:
        archive.add(folder, "")
    shutil.rmtree(folder)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{split}/{i}.png", "{split}/{i}.seg.png"),
        ("{split}/{i}.jpg", "{split}/{i}.png"),
        ("images/{split}/{i}.jpg", "masks/{split}/{i}.png"),
        ("{split}/images/a/{i}.png", "{split}/labels/a/{i}.tif"),
        ("ade/images/{split}/{i}.jpg", "ade/annotations/{split}/{i}.png"),
        ("images/{long}/{i}.jpg", "annotations/{long}/{i}.png"),
    ],
)
def test_layouts(tmp_path: Path, image: str, mask: str, packed: bool) -> None:
    if image.startswith("ade/"):
        tmp_path, image, mask = tmp_path / "inner", image[4:], mask[4:]
    for i in range(5):
        names = {"i": f"s.{i}" if "masks" in mask else i}
        names |= {"split": "train" if i < 3 else "val", "long": "training" if i < 3 else "validation"}
        write(tmp_path / "d", image.format(**names), mask.format(**names), i)
    data = tmp_path / "d"
    (data / "notes.txt").write_text("no image")
    if packed:
        members(data)
        data = data.with_suffix(".tar")
    found = _masks.find(str(data))
    test = "validation" if "{long}" in image else "val"
    assert found.splits == ["train", test]
    train, without = found.open("train")
    assert (len(train), without) == (3, 0)
    for i in range(3):
        np.testing.assert_array_equal(train.mask(i), scene(i)[1])
        image = _dense.decode(train[i], 3).astype(int)
        apart = [np.abs(image - scene(other)[0]).mean() for other in range(5)]
        assert np.argmin(apart) == i
    assert train.values == {0: 3, 1: 3, 2: 3}


def test_voc_and_davis_are_read_as_they_come(tmp_path: Path) -> None:
    voc = tmp_path / "VOC2012"
    for i in range(6):
        write(voc, f"JPEGImages/{i}.jpg", f"SegmentationClass/{i}.png", i)
        write(voc, f"JPEGImages/{i}.jpg", f"SegmentationObject/{i}.png", i)
    write(voc, "JPEGImages/9.jpg", "elsewhere/9.png", 9)
    (voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    (voc / "ImageSets" / "Segmentation" / "train.txt").write_text("0\n1\n2\n")
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text("4\n5\n9\n")
    found = _masks.find(str(voc))
    assert [(pair.image, pair.split) for pair in found.pairs] == [
        (f"JPEGImages/{i}.jpg", split) for i, split in zip((0, 1, 2, 4, 5), ["train"] * 3 + ["val"] * 2, strict=True)
    ]
    assert found.open("val")[1] == 1
    davis = tmp_path / "davis"
    for name in ("bear", "dog"):
        for i in range(3):
            write(davis, f"JPEGImages/480p/{name}/{i:05d}.jpg", f"Annotations/480p/{name}/{i:05d}.png", i)
    videos, _ = _masks.find(str(davis)).open(None)
    assert videos.folders() == {"480p/bear": [0, 1, 2], "480p/dog": [3, 4, 5]}


def test_cityscapes_is_read_as_it_comes(tmp_path: Path) -> None:
    for split, city, numbers in (("train", "aachen", (1, 2)), ("val", "ulm", (3,))):
        for n in numbers:
            name = f"{split}/{city}/{city}_{n:06d}_000019"
            for kind in ("color", "instanceIds", "labelIds", "labelTrainIds"):
                write(tmp_path, f"leftImg8bit/{name}_leftImg8bit.png", f"gtFine/{name}_gtFine_{kind}.png", n)
    (tmp_path / "gtFine/val/ulm/ulm_000003_000019_gtFine_labelTrainIds.png").unlink()
    found = _masks.find(str(tmp_path))
    assert found.splits == ["train", "val"]
    assert [pair.mask.rpartition("_")[2] for pair in found.pairs] == ["labelTrainIds.png"] * 2 + ["labelIds.png"]
    assert [pair.image.rpartition("_")[2] for pair in found.pairs] == ["leftImg8bit.png"] * 3
    assert not found.alone


def test_shards_named_after_splits(tmp_path: Path) -> None:
    for i, split in enumerate(("train", "train", "val")):
        write(tmp_path / "data" / f"d-{split}-00{i}", f"{i}.jpg", f"{i}.png", i)
        members(tmp_path / "data" / f"d-{split}-00{i}")
    found = _masks.find(str(tmp_path / "data"))
    assert [(pair.split, Path(pair.image).name) for pair in found.pairs] == [
        ("train", "0.jpg"),
        ("train", "1.jpg"),
        ("val", "2.jpg"),
    ]


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "1"])
def test_masks_are_class_numbers_in_any_depth(tmp_path: Path, mode: str) -> None:
    numbers = np.array([[0, 1], [1, 0]]) if mode == "1" else np.array([[0, 7], [200, 255]])
    image = Image.fromarray(numbers.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image.putpalette([3 * v % 256 for v in range(768)])
    if mode == "1":
        image = Image.fromarray(numbers.astype(bool))
    assert image.mode == mode
    image.save(tmp_path / "m.png")
    found = _masks.read_mask((tmp_path / "m.png").read_bytes(), "m.png")
    np.testing.assert_array_equal(found, numbers)
    assert found.dtype == np.int64


# ---- The evaluator.


def test_painted_scenes_are_segmented(scenes: Path, run: Callable) -> None:
    (scenes / "info.json").write_text(json.dumps({"classes": ["ground", {"index": 1, "name": "red"}, "blue"]}))
    result = run(scenes, "--k", "5", "1000000", "--image-size", "32", "48")
    metrics, protocol = result["metrics"], result["protocol"]
    assert metrics["miou"] > 60
    assert metrics["linear_miou"] > 60
    assert set(metrics["per_class_iou"]) == {"ground", "red", "blue"}
    assert metrics["miou"] == pytest.approx(np.mean(list(metrics["per_class_iou"].values())))
    assert metrics["n"] == protocol["test"]["images"] == 5
    assert (protocol["train"]["images"], protocol["test"]["split"]) == (12, "test")
    assert (protocol["image_size"], protocol["grid"], protocol["bank"]) == ([32, 48], [8, 12], 12 * 96)
    ways = [entry["setting"] for entry in result["all"]]
    assert ways[:2] == ["k 5", "k 1152"]
    assert ways[2].startswith(f"lr {protocol['sweep']['selected']:g}")
    assert result["all"][0]["miou"] == metrics["miou"] > result["all"][1]["miou"]
    assert 0 < result["baselines"]["random"]["miou"] <= 100
    assert "linear_miou" in result["baselines"]["random"]
    again = run(scenes, "--k", "5", "1000000", "--image-size", "32", "48", "--batch-size", "3", "--workers", "1")
    assert again["metrics"]["miou"] == pytest.approx(metrics["miou"], abs=0.2)


def test_what_is_learned_is_a_function_of_the_training_masks_alone(scenes: Path) -> None:
    config = segment.Config(steps=40, bank=300)
    first = segment.evaluate(task_of(scenes, config), config)
    assert first.protocol["bank"] <= 300
    for path in (scenes / "test").glob("*.seg.png"):
        mask = np.asarray(Image.open(path))
        Image.fromarray((mask + 1) % 3).save(path)
    other = segment.evaluate(task_of(scenes, config), config)
    assert other.protocol["sweep"] == first.protocol["sweep"]
    assert "1 held-out training images" in first.protocol["selection"]
    assert other.metrics["miou"] < first.metrics["miou"] - 20
    held: list[set[int]] = []
    asked: list[tuple[str, list[int]]] = []
    trained, scored = segment._train, segment._score

    def train(task: Task, config: segment.Config, bank: Any, *rest: Any) -> Any:
        held.append(set(range(12)) - set(bank.image.tolist()))
        return trained(task, config, bank, *rest)

    def score(task: Task, reader: Any, images: Any, rows: Any, *rest: Any) -> Any:
        asked.append((images.split, list(rows)))
        return scored(task, reader, images, rows, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment, "_train", train)
        patch.setattr(segment, "_score", score)
        segment.evaluate(task_of(scenes, config), replace(config, held_out=0.25))
    assert [len(left_out) for left_out in held] == [3, 0]  # chosen on what was not trained on; then trained on all
    assert asked == [("train", sorted(held[0])), ("test", list(range(5)))]


def test_unknown_pixels_count_nowhere(scenes: Path) -> None:
    config = segment.Config(task=("knn",), k=(3,))
    plain = segment.evaluate(task_of(scenes, config), config)
    for path in scenes.glob("*/*.seg.png"):
        mask = np.asarray(Image.open(path)).copy()
        mask[:, :24] = np.where(mask[:, :24] == 0, 77, mask[:, :24])
        mask[:, 24:] = np.where(mask[:, 24:] == 0, 255, mask[:, 24:])
        Image.fromarray(mask).save(path)
    few = replace(config, ignore_label=(77, 255))
    outcome = segment.evaluate(task_of(scenes, few), few)
    assert set(outcome.metrics["per_class_iou"]) == {"1", "2"}
    assert outcome.metrics["miou"] > plain.metrics["miou"]
    assert outcome.protocol["ignore_label"] == [77, 255]


def test_black_and_white_masks_are_of_two_classes(scenes: Path) -> None:
    for path in scenes.glob("*/*.seg.png"):
        mask = np.asarray(Image.open(path))
        Image.fromarray(((mask == 1) * 255).astype(np.uint8)).save(path)
    config = segment.Config(task=("knn", "foreground"), k=(3,))
    outcome = segment.evaluate(task_of(scenes, config), config)
    assert set(outcome.metrics["per_class_iou"]) == {"0", "255"}
    assert outcome.metrics["foreground_j"] > 0
    assert outcome.protocol["ignore_label"] == []


class Colours(torch.nn.Module):
    """The mean colour of each patch."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images, 4)


@pytest.fixture
def colours() -> Encoder:
    from ssl_pretrain.foreign import libraries

    how = small_encoder().preprocessing
    how = replace(how, crop=(32, 48), resize=32)
    backbone = libraries.Foreign(Colours(), libraries._read_module, "colours", (32, 48), 3)
    return Encoder(backbone, "colours", how, {})


def video(folder: Path, name: str, steps: int, objects: tuple[int, ...] = (1, 2)) -> None:
    """Boxes in red and blue on grey that move by a patch a frame."""
    for t in range(steps):
        mask = np.zeros((64, 96), np.uint8)
        for value in objects:
            top, left = (8, 8 + 8 * t) if value == 1 else (40, 64 - 8 * t)
            mask[top : top + 16, left : left + 16] = value
        for kind, array in (("JPEGImages", COLOURS[mask].astype(np.uint8)), ("Annotations", mask)):
            path = folder / kind / name / f"{t:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)


def test_objects_are_followed_through_a_video(tmp_path: Path, colours: Encoder) -> None:
    video(tmp_path / "v", "one", 6)
    video(tmp_path / "v", "two", 4, objects=(2,))
    video(tmp_path / "v", "nothing", 4, objects=())
    video(tmp_path / "v", "short", 2)
    video(tmp_path / "v", "broken", 3)
    for path in (tmp_path / "v" / "JPEGImages" / "broken").iterdir():
        path.write_bytes(b"no image")
    config = segment.Config(task=("propagate",), top=1, radius=3)
    task = task_of(tmp_path / "v", config, colours)
    outcome = segment.evaluate(task, config)
    metrics = outcome.metrics
    assert metrics["n"] == (6 - 2) + (4 - 2)
    assert metrics["sequences"] == 2
    assert metrics["j"] > 80  # bilinear corners of a box are round
    assert metrics["f"] > 80
    assert metrics["jf"] == pytest.approx((metrics["j"] + metrics["f"]) / 2)
    one, two = (metrics["per_sequence"][name] for name in ("one", "two"))
    assert metrics["j"] == pytest.approx((2 * one["j"] + two["j"]) / 3)  # the mean over objects
    assert metrics["findings"] == [
        "videos without an object in their first mask, or with fewer than 3 frames that can be read, left out: "
        "broken, nothing"
    ]
    assert outcome.protocol["propagate"]["left_out"] == ["broken", "nothing"]
    assert len(outcome.protocol["test"]["bad"]) == 3
    for path in (tmp_path / "v" / "Annotations" / "one").glob("*.png"):  # what is not scored changes nothing
        if path.stem == "00005":
            Image.fromarray(np.zeros((64, 96), np.uint8)).save(path)
    assert segment.evaluate(task_of(tmp_path / "v", config, colours), config).metrics == metrics
    path = tmp_path / "v" / "Annotations" / "two" / "00001.png"
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(path)
    assert segment.evaluate(task_of(tmp_path / "v", config, colours), config).metrics["j"] < metrics["j"]


def test_the_object_is_what_stands_out(tmp_path: Path, colours: Encoder) -> None:
    video(tmp_path / "v", "one", 5, objects=(1,))
    config = segment.Config(task=("foreground",))
    outcome = segment.evaluate(task_of(tmp_path / "v", config, colours), config)
    assert outcome.metrics["j"] > 80
    assert outcome.metrics["n"] == 5
    assert [entry["setting"] for entry in outcome.all] == ["pca"]
    assert outcome.protocol["foreground"]["mean of"] == "5 images"
    video(tmp_path / "v", "two", 3, objects=())
    parted = segment.evaluate(task_of(tmp_path / "v", config, colours), config)
    assert parted.metrics["j"] == pytest.approx(outcome.metrics["j"] / 2)  # two folders, one of which has J 0
    ours = segment.evaluate(task_of(tmp_path / "v", config), config)
    assert [entry["setting"] for entry in ours.all] == ["pca", "attention"]
    with pytest.raises(UserError, match="--maps attention"):
        segment.evaluate(
            task_of(tmp_path / "v", config, colours), segment.Config(task=("foreground",), maps=("attention",))
        )


def test_tasks_together_say_what_each_says(tmp_path: Path, run: Callable) -> None:
    video(tmp_path / "v", "one", 4)
    result = run(tmp_path / "v", "--task", "propagate", "foreground", "--image-size", "32", "--no-baselines")
    assert {"j", "f", "jf", "j_interval", "foreground_j", "foreground_j_interval"} <= set(result["metrics"])
    assert [entry["task"] for entry in result["all"]] == ["propagate", "foreground", "foreground"]
    assert "train" not in result["protocol"]


def test_what_cannot_be_read_is_left_out_and_listed(scenes: Path, run: Callable) -> None:
    (scenes / "train" / "03.png").write_bytes(b"no image")
    (scenes / "test" / "14.seg.png").write_bytes(b"no mask")
    (scenes / "test" / "15.seg.png").unlink()
    result = run(scenes, "--no-baselines")
    train, test = result["protocol"]["train"], result["protocol"]["test"]
    assert [Path(bad["name"]).name for bad in train["bad"]] == ["03.png"]
    assert [Path(bad["name"]).name for bad in test["bad"]] == ["14.png"]
    assert "its mask test/14.seg.png cannot be read" in test["bad"][0]["reason"]
    assert (train["images"], test["images"], test["unlabelled"], result["metrics"]["n"]) == (11, 3, 1, 3)
    assert result["metrics"]["findings"] == ["images of test without a mask, left out: 1"]


@pytest.mark.parametrize("task", ["knn", "foreground", "propagate"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_nothing_that_can_be_read(scenes: Path, refuse: Callable, task: str, split: str) -> None:
    for path in scenes.glob(f"{split}/??.png"):
        path.write_bytes(b"no image")
    flags = ["--task", task, *(() if task == "knn" else ("--test-split", split))]
    said = refuse(scenes, *flags)
    assert ("too few frames that can be read" if task == "propagate" else "not an image") in said


# ---- Mistakes.


def recolour(path: Path, mode: str) -> None:
    Image.open(path).convert(mode).save(path)


def test_masks_that_do_not_fit(scenes: Path, refuse: Callable) -> None:
    path = scenes / "train" / "04.seg.png"
    whole = Image.open(path).copy()
    whole.resize((24, 16)).save(path)
    assert "mask train/04.seg.png is 16 x 24 pixels (height x width) and its image train/04.png 32 x 48" in refuse(
        scenes
    )
    whole.convert("RGB").save(path)
    assert "mask train/04.seg.png holds colours (mode RGB), not class numbers" in refuse(scenes)
    whole.save(path, "JPEG")
    assert "is a JPEG file, and lossy compression changes class numbers" in refuse(scenes)


def test_classes_that_do_not_fit(scenes: Path, refuse: Callable) -> None:
    path = scenes / "test" / "13.seg.png"
    mask = np.asarray(Image.open(path)).copy()
    mask[:3] = 9
    Image.fromarray(mask).save(path)
    said = refuse(scenes)
    assert (
        "masks of split 'test' hold 1 class(es) that no mask of split 'train' has: 9 (the first in 1 of them)" in said
    )
    assert "--ignore-label 255 9" in said
    assert "are of one class, 1" in refuse(scenes, "--ignore-label", "0", "2", "9")
    assert "are unknown" in refuse(scenes, "--ignore-label", "0", "1", "2", "9")
    for each in (scenes / "test").glob("*.seg.png"):
        Image.fromarray(np.full((32, 48), 255, np.uint8)).save(each)
    assert "no pixel of the masks of split 'test' is known" in refuse(scenes)


def test_data_without_masks_or_splits(scenes: Path, tmp_path: Path, refuse: Callable) -> None:
    for path in scenes.glob("*/*.seg.png"):
        path.unlink()
    assert "holds 17 images and no masks: put X.seg.png" in refuse(scenes)
    write(tmp_path / "odd", "images/a.png", "masks/b.png", 0)
    assert "no mask is named as an image is (images/a.png, ...; masks/b.png, ...)" in refuse(tmp_path / "odd")
    for i in range(3):
        write(tmp_path / "flat", f"{i}.png", f"{i}.seg.png", i)
    assert "is not split into training and test images" in refuse(tmp_path / "flat")
    assert "no images with masks in a split 'train'" in refuse(
        tmp_path / "flat", "--train-split", "train", "--test-split", "test"
    )
    assert "take a single set of images: name it with --test-split train" in refuse(
        tmp_path / "flat", "--task", "foreground", "--train-split", "train"
    )
    assert "follow an object in" in refuse(tmp_path / "flat", "--task", "propagate", "--ignore-label", "1", "2")
    for path in (tmp_path / "flat").glob("*.seg.png"):
        path.write_bytes(b"")
    assert "none of 3 masks can be read" in refuse(tmp_path / "flat", "--task", "foreground")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image-size", "30", "32"], "--image-size 30 32 does not divide into patches of 4 x 4 pixels; 32 32 does"),
        (["--image-size", "4"], "gives 1 x 1 patches"),
        (["--image-size", "8", "8", "8"], "--image-size 8 8 8"),
        (["--task", "kmn"], "did you mean knn?"),
        (["--k", "0"], "--k is 0"),
        (["--bank", "0"], "--bank is 0"),
        (["--steps", "0"], "--steps is 0"),
        (["--temperature", "0"], "--temperature is 0.0"),
        (["--affinity-temperature", "-1"], "--affinity-temperature is -1.0"),
        (["--held-out", "1"], "--held-out is 1.0"),
        (["--lrs", "-1"], "--lrs -1.0"),
        (["--lrs", "1e20"], "every layer diverged at --lrs 1e+20"),
        (["--lrs", "1e38"], "--lrs 1e+38: learning rates must be above 0 and below 1e+30"),
        (["--test-split", "train"], "are both 'train'"),
    ],
)
def test_flags_that_cannot_be(scenes: Path, refuse: Callable, flags: list[str], message: str) -> None:
    assert message in refuse(scenes, *flags)


def test_encoders_without_patches(scenes: Path, colours: Encoder) -> None:
    config = segment.Config()
    with pytest.raises(UserError, match="gives 1 x 1 patches of an image of 16 x 16 pixels"):
        segment.evaluate(task_of(scenes, config, pixel_encoder((16, 16), 3)), config)
    fixed = colours.backbone.module
    colours.backbone.module = torch.nn.Sequential(fixed, torch.nn.Flatten(2), torch.nn.Linear(96, 4))
    with pytest.raises(UserError, match=r"does not take images of 16x16 pixels .*leave --image-size out"):
        segment.evaluate(task_of(scenes, config, colours), replace(config, image_size=(16,)))


# ---- Real images.


def some(archive: Path, folder: Path, wanted: Callable[[str], bool]) -> Path:
    with tarfile.open(archive) as opened:
        for member in opened:
            if member.isfile() and wanted(member.name):
                opened.extract(member, folder, filter="data")
    return folder


def test_camvid(shared_data: Path, tmp_path: Path, run: Callable) -> None:
    taken: dict[str, int] = {}

    def few(name: str) -> bool:
        split = name.partition("/")[0]
        taken[split] = taken.get(split, 0) + 1
        return taken[split] <= 16  # eight images and their masks

    data = some(shared_data / "camvid320" / "camvid320.tar", tmp_path / "camvid", few)
    shutil.copy(shared_data / "camvid320" / "info.json", data)
    result = run(data, "--ignore-label", "11", "--image-size", "60", "80", "--no-baselines")
    assert (result["protocol"]["train"]["images"], result["metrics"]["n"]) == (8, 8)
    assert {"Sky", "Road"} <= set(result["metrics"]["per_class_iou"])
    assert "Unlabelled" not in result["metrics"]["per_class_iou"]
    assert result["metrics"]["pixel_accuracy"] > 35
    assert result["metrics"]["per_class_iou"]["Sky"] > 40


def test_davis(shared_data: Path, tmp_path: Path, run: Callable) -> None:
    data = some(
        shared_data / "davis16val_240p" / "davis16val_240p.tar",
        tmp_path / "davis",
        lambda name: "/blackswan/" in name and Path(name).stem <= "00005",
    )
    result = run(data, "--task", "propagate", "foreground", "--image-size", "60", "108", "--no-baselines")
    assert result["metrics"]["n"] == 4
    assert result["metrics"]["j"] > 40  # a swan that hardly moves
    assert set(result["metrics"]["per_sequence"]) == {"240p/blackswan"}
