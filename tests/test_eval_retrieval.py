"""Retrieval against scikit-learn on the same features: recall, average precision, duplicates; the sheets of pictures."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pixel_tasks import unit_features, whole_task
from sklearn.metrics import average_precision_score
from sklearn.neighbors import NearestNeighbors
from ssl_pretrain.eval import retrieval
from synthetic_data import ArraySource, noisy_classes

from ssl_pretrain.errors import UserError


def test_recall_and_precision_are_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "SCORES", 5000)  # several blocks of queries
    task = whole_task(noisy_classes(160, 1, noise=200))
    labels = task.data.test.labels
    rows = unit_features(task).astype(np.float64)
    outcome = retrieval.evaluate(task, retrieval.Config(k=(1, 3, 5)))
    order = NearestNeighbors(n_neighbors=160, metric="cosine", algorithm="brute").fit(rows).kneighbors(rows)[1]
    order = np.stack([row[row != i] for i, row in enumerate(order)])
    for k in (1, 3, 5):
        recall = 100 * (labels[order[:, :k]] == labels[:, None]).any(1).mean()
        assert outcome.metrics[f"recall@{k}"] == pytest.approx(recall, abs=1e-6)
        low, high = outcome.metrics[f"recall@{k}_interval"]
        assert low < recall < high
    cosine = rows @ rows.T
    precision = []
    for i in range(160):
        others = np.arange(160) != i
        precision.append(average_precision_score(labels[others] == labels[i], cosine[i, others]))
    assert outcome.metrics["map"] == pytest.approx(100 * np.mean(precision), abs=1e-6)
    assert 20 < outcome.metrics["map"] < 90
    low, high = outcome.metrics["map_interval"]
    half = 196 * np.std(precision) / np.sqrt(160)
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)


def test_queries_that_have_nothing_to_find_are_left_out() -> None:
    images = noisy_classes(40, 1)
    labels = np.array([0] * 20 + [1] * 17 + [2, -1, -1])  # one alone in its class, two without a label
    task = whole_task(ArraySource(images.images, labels))
    outcome = retrieval.evaluate(task, retrieval.Config())
    assert (outcome.metrics["queries"], outcome.metrics["n"]) == (37, 40)
    some = retrieval.evaluate(task, retrieval.Config(queries=10))
    assert 7 <= some.metrics["queries"] <= 10
    assert some.protocol["queries_drawn"] == 10


def test_duplicates_and_sheets(tmp_path: Path) -> None:
    images = noisy_classes(30, 1)
    images.images[[20, 7]] = images.images[[3, 3]]
    images.images[11] = images.images[12] ^ 1
    task = dataclasses.replace(whole_task(images), out=tmp_path)
    outcome = retrieval.evaluate(task, retrieval.Config(duplicate=0.999, sheet=4))
    written = json.loads((tmp_path / "duplicates.json").read_text())
    assert [tuple(map(int, pair["images"])) for pair in written["nearest"]] == [(3, 7), (3, 20), (7, 20), (11, 12)]
    assert (written["pairs"], outcome.metrics["duplicates"]) == (4, 4)
    assert outcome.metrics["findings"] == [
        "5 of 30 images have a near duplicate (cosine of 0.999 or more): duplicates.json"
    ]
    step = retrieval.SIDE + 2 * retrieval.FRAME + retrieval.GAP
    with Image.open(tmp_path / "neighbours.png") as sheet:
        assert sheet.size == (9 * step + retrieval.GAP, 4 * step + retrieval.GAP)
        frames = [
            sheet.getpixel((retrieval.GAP + right * step + 1, retrieval.GAP + down * step + 1))
            for down in range(4) for right in range(9)
        ]  # fmt: skip
    rows = unit_features(task)
    cosine = rows @ rows.T
    np.fill_diagonal(cosine, -2)
    few = retrieval.numpy_generator(task.seed, "sheet").permutation(np.arange(30))[:4]
    labels = images.labels
    wanted = []
    for query in few:
        near = np.argsort(-cosine[query], kind="stable")[:8]
        wanted += [retrieval.QUERY] + [retrieval.RIGHT if labels[i] == labels[query] else retrieval.WRONG for i in near]
    assert frames == wanted
    assert {retrieval.RIGHT, retrieval.WRONG} < set(frames)
    with Image.open(tmp_path / "duplicates.png") as sheet:
        first, second = (
            np.asarray(sheet.crop((x, y, x + retrieval.SIDE, y + retrieval.SIDE)))
            for x in (retrieval.GAP + retrieval.FRAME, retrieval.GAP + retrieval.FRAME + step)
            for y in (retrieval.GAP + retrieval.FRAME,)
        )
        np.testing.assert_array_equal(first, second)
        assert first.std() > 5

    without = dataclasses.replace(whole_task(noisy_classes(30, 1)), out=tmp_path)
    outcome = retrieval.evaluate(without, retrieval.Config(duplicate=1.0, sheet=0))
    assert not list(tmp_path.iterdir())  # what the evaluation before wrote is no longer so
    assert "no two images" in outcome.metrics["findings"][0]


@pytest.mark.parametrize(
    ("count", "config", "message"),
    [
        (1, retrieval.Config(), "one image that can be read: nothing to retrieve"),
        (9, retrieval.Config(k=(0,)), "--k is 0"),
        (9, retrieval.Config(queries=0), "--queries 0"),
        (9, retrieval.Config(duplicate=2.0), "--duplicate is 2"),
        (9, retrieval.Config(features=("poled",)), "did you mean pooled"),
    ],
)
def test_what_cannot_be_retrieved(count: int, config: retrieval.Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        retrieval.evaluate(whole_task(noisy_classes(count, 1)), config)
