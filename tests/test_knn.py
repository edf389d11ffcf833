"""Neighbours and votes against scikit-learn and NumPy, the memory they take, and the protocol of `ssl-eval knn`."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pixel_tasks import pooled_features, split_task
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from small_encoders import small_encoder
from ssl_pretrain.eval import knn
from ssl_pretrain.eval._results import classification
from ssl_pretrain.eval._task import Data, Task
from synthetic_data import ArraySource, noisy_classes

from ssl_pretrain.errors import UserError
from ssl_pretrain.features import neighbours, rounded_products
from ssl_pretrain.features.neighbours import Vote, nearest, vote


def vectors(rows: int, dim: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32) * 3 + 0.2


def unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("k", [1, 7, 100, 333])
@pytest.mark.parametrize("tile", [(64, 128), (17, 50), (2048, 8192), (5, 1000)])
@pytest.mark.parametrize("rounded", [False, True])
def test_neighbours_are_those_of_scikit_learn(k: int, tile: tuple[int, int], rounded: bool) -> None:
    queries, bank = vectors(83, seed=1), vectors(1000, seed=2)
    similarity, index = nearest(torch.from_numpy(queries), bank, k, tile=tile, rounded=rounded)
    oracle = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(unit(bank))
    distance, wanted = oracle.kneighbors(unit(queries))
    # In another order only where float32 cannot tell two neighbours apart.
    exact = np.take_along_axis(unit(queries) @ unit(bank).T, index.numpy(), 1)
    np.testing.assert_allclose(exact, 1 - distance, atol=2e-7)
    assert (index.numpy() != wanted).mean() < 1e-3
    np.testing.assert_allclose(similarity.numpy(), 1 - distance, atol=2e-6)
    assert (similarity.dtype, index.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("tile", [(4, 16), (3, 7), (100, 1000)])
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
def test_of_equal_similarities_the_lower_index_comes_first(
    tile: tuple[int, int], exclude_self: bool, rounded: bool
) -> None:
    bank = np.eye(4, dtype=np.float32)[np.random.default_rng(0).integers(0, 3, 90)]  # copies of three unit vectors
    queries = bank if exclude_self else np.eye(4, dtype=np.float32)
    similarity, index = nearest(queries, bank, 40, exclude_self=exclude_self, tile=tile, rounded=rounded)
    exact = queries @ bank.T
    if exclude_self:
        np.fill_diagonal(exact, -np.inf)
    wanted = np.argsort(-exact, axis=1, kind="stable")[:, :40]
    np.testing.assert_array_equal(index.numpy(), wanted)
    np.testing.assert_array_equal(similarity.numpy(), np.take_along_axis(exact, wanted, 1))


@pytest.mark.parametrize("tile", [(7, 16), (64, 64), (50, 33)])
@pytest.mark.parametrize("rounded", [False, True])
def test_without_oneself(tile: tuple[int, int], rounded: bool) -> None:
    bank = vectors(211)
    _, index = nearest(bank, bank, 9, exclude_self=True, tile=tile, rounded=rounded)
    exact = unit(bank) @ unit(bank).T
    np.fill_diagonal(exact, -np.inf)
    np.testing.assert_array_equal(index.numpy(), np.argsort(-exact, axis=1)[:, :9])


@pytest.mark.parametrize("common", [0.0, 3.0, 300.0])
def test_rounded_products_find_what_float32_finds_however_alike_the_features(common: float) -> None:
    # With 300 in each channel all cosines are within 1e-4 of 1, which bfloat16 alone cannot tell apart.
    rng = np.random.default_rng(0)
    bank = (common + rng.standard_normal((6000, 48))).astype(np.float32)
    bank[4000:4300] = bank[100:400]
    queries = (common + rng.standard_normal((150, 48))).astype(np.float32)
    similarity, index = nearest(queries, bank, 10, tile=(64, 1024), rounded=True)
    wanted, places = nearest(queries, bank, 10, tile=(64, 1024), rounded=False)
    torch.testing.assert_close(similarity, wanted, rtol=0, atol=6e-7)
    exact = unit(queries) @ unit(bank).T
    ours, theirs = (np.take_along_axis(exact, found.numpy(), 1) for found in (index, places))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-7)
    if common < 300:  # there float32 itself cannot tell
        assert (index != places).float().mean() < 0.01


def test_rounded_products_leave_few_pairs_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = vectors(20_000, 64)
    taken = []
    whole = neighbours._single_products

    def counted(queries: torch.Tensor, columns: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        taken.append(len(place))
        return whole(queries, columns, place)

    monkeypatch.setattr(neighbours, "_single_products", counted)
    nearest(rows[:512], rows, 10, rounded=True)
    assert len(taken) == 3  # tiles
    assert sum(taken) < 150 * 512  # of 20,000 a row

    taken.clear()
    nearest(rows[:512] * 1e-4 + 1, rows * 1e-4 + 1, 10, rounded=True)
    assert not taken  # float32 throughout: bfloat16 tells these apart by nothing


@pytest.mark.parametrize(("width", "common", "scale"), [(3, 0.0, 1.0), (64, 2.0, 1.0), (700, 0.5, 0.1)])
def test_the_bound_on_a_rounded_product_holds(width: int, common: float, scale: float) -> None:
    rng = np.random.default_rng(1)
    left, right = (torch.from_numpy(unit(common + scale * rng.standard_normal((n, width)))).float() for n in (70, 900))
    here, there = rounded_products.queries(left, right.mean(0)), rounded_products.rows(right, right.mean(0))
    rough = (here.values @ there.values.T).float()
    exact = left.double() @ right.double().T - here.base[:, None].double() - there.base
    for column in range(0, 900, 7):
        # Whichever of the two is known, the other is no less than said.
        assert bool((rounded_products.lower_bound(rough[:, column], here, there) <= exact[:, column]).all())
        assert bool((rounded_products.lower_bound(exact[:, column].float(), here, there) <= rough[:, column]).all())
    loose = exact - torch.stack([rounded_products.lower_bound(rough[:, c], here, there) for c in range(900)], 1)
    assert loose.mean() < 0.15 * exact.std()  # and the bound is of use


def test_more_neighbours_than_there_are() -> None:
    bank = vectors(12)
    similarity, index = nearest(bank[:3], bank, 20)
    assert similarity.shape == index.shape == (3, 12)
    assert nearest(bank, bank, 20, exclude_self=True)[1].shape == (12, 11)
    for row in nearest(bank, bank, 20, exclude_self=True)[1].numpy():
        assert len(set(row)) == 11


def test_what_cannot_be_searched() -> None:
    bank = vectors(12)
    spoilt = bank.copy()
    spoilt[3, 2] = np.nan
    for queries, rows, k, keywords in (
        (bank, bank[:, :5], 3, {}),
        (bank, bank, 0, {}),
        (bank[:1], bank[:1], 1, {"exclude_self": True}),
        (bank[:3], bank, 1, {"exclude_self": True}),
        (bank, spoilt, 3, {}),
        (spoilt, bank, 3, {}),
    ):
        with pytest.raises(ValueError, match=r"must be|no \d|needs the bank|not finite"):
            nearest(queries, rows, k, **keywords)


def test_memory_mapped_features_of_half_precision(tmp_path: Path) -> None:
    bank = vectors(300).astype(np.float16)
    np.save(tmp_path / "bank.npy", bank)
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    _, index = nearest(mapped[:20], mapped, 5, tile=(8, 64))
    exact = unit(bank[:20]) @ unit(bank).T
    np.testing.assert_array_equal(index.numpy(), np.argsort(-exact, axis=1)[:, :5])


def test_the_whole_matrix_of_similarities_never_exists() -> None:
    # 20,000 x 20,000 floats are 1.5 GiB; a fresh process, because the peak of this one is not of this search alone
    code = """
import resource, torch
from ssl_pretrain.features.neighbours import nearest
rows = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0))
nearest(rows[:300], rows[:300], 10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nearest(rows, rows, 10, tile=(1024, 4096))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200 * 1024  # KiB


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_votes_are_those_of_scikit_learn(temperature: float) -> None:
    rng = np.random.default_rng(3)
    bank, queries, labels = vectors(500, 8), vectors(200, 8, seed=9), rng.integers(0, 6, 500)
    similarity, index = nearest(queries, bank, 50)
    for k in (1, 5, 20, 50):
        oracle = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
        ).fit(unit(bank), labels)
        scores = vote(similarity, index, torch.from_numpy(labels), 6, temperature, k)
        np.testing.assert_array_equal(scores.argmax(1).numpy(), oracle.predict(unit(queries)))
        shares = (scores / scores.sum(1, keepdim=True)).numpy()
        np.testing.assert_allclose(shares, oracle.predict_proba(unit(queries)), atol=1e-4)


@pytest.mark.parametrize(("kind", "weight"), [("cosine", lambda d: np.maximum(1 - d, 0)), ("uniform", np.ones_like)])
def test_other_votes_are_those_of_scikit_learn(kind: str, weight: Callable) -> None:
    rng = np.random.default_rng(3)
    bank, queries, labels = vectors(500, 8), vectors(200, 8, seed=9), rng.integers(0, 6, 500)
    similarity, index = nearest(queries, bank, 21)
    oracle = KNeighborsClassifier(21, metric="cosine", algorithm="brute", weights=weight).fit(unit(bank), labels)
    scores = vote(similarity, index, torch.from_numpy(labels), 6, 0.07, 21, kind)  # type: ignore[arg-type]
    np.testing.assert_array_equal(scores.argmax(1).numpy(), oracle.predict(unit(queries)))
    shares = (scores / scores.sum(1, keepdim=True)).numpy()
    np.testing.assert_allclose(shares, oracle.predict_proba(unit(queries)), atol=1e-6)


def test_cosines_below_zero_do_not_vote() -> None:
    scores = vote(
        torch.tensor([[0.2, -0.5, -0.6]]), torch.tensor([[0, 1, 2]]), torch.tensor([1, 0, 0]), 2, 1.0, 3, "cosine"
    )
    assert scores.tolist() == [[0.0, pytest.approx(0.2)]]


def test_a_low_temperature_stays_finite() -> None:
    similarity = torch.tensor([[0.9, 0.8, 0.8]])
    scores = vote(similarity, torch.tensor([[0, 1, 2]]), torch.tensor([1, 0, 0]), 2, 0.001)
    assert scores.tolist() == [[pytest.approx(0, abs=1e-37), 1.0]]
    assert scores[0, 0] > 0  # its neighbours have voted


# ---- The evaluator, on images whose pixels are the features.


@pytest.fixture
def task() -> Task:
    return split_task(noisy_classes(300, 1), noisy_classes(150, 2))


def test_every_setting_scores_what_scikit_learn_says(task: Task) -> None:
    outcome = knn.evaluate(task, knn.Config())
    train, test = pooled_features(task)
    labels = task.data.test.labels
    assert [(entry["feature"], entry["k"]) for entry in outcome.all] == [("pooled", k) for k in (20, 5, 10, 100)]
    for entry in outcome.all:
        oracle = KNeighborsClassifier(
            entry["k"], metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
        ).fit(train, task.data.train.labels)
        assert entry["top1"] == pytest.approx(100 * oracle.score(test, labels), abs=1e-9)
        shares = oracle.predict_proba(test)
        five = np.argsort(-shares, axis=1, kind="stable")[:, :5]
        hits = (five == labels[:, None]) & (np.take_along_axis(shares, five, 1) > 0)
        assert entry["top5"] == pytest.approx(100 * hits.any(1).mean(), abs=1e-9)
    first = outcome.all[0]
    assert (outcome.metrics["top1"], outcome.metrics["n"]) == (first["top1"], 150)
    assert 30 < first["top1"] < 100
    share = sum(outcome.metrics["per_class"][f"class {c}"] * (labels == c).sum() for c in range(7)) / 150
    assert share == pytest.approx(first["top1"])
    assert outcome.protocol["headline"] == "feature pooled, k 20"


def voted(train: ArraySource, test: ArraySource, features: list[np.ndarray], k: int, kind: str) -> list[list[int]]:
    """For each test image the classes that its k nearest vote for, most votes first: counted one neighbour at a time."""
    ranked = []
    for query in unit(features[1]):
        cosines = unit(features[0]) @ query
        votes: dict[int, float] = {}
        for row in sorted(range(len(cosines)), key=lambda row: -cosines[row])[:k]:
            weight = {"softmax": np.exp(cosines[row] / 0.07), "cosine": max(cosines[row], 0.0), "uniform": 1.0}[kind]
            if weight > 0:
                votes[int(train.labels[row])] = votes.get(int(train.labels[row]), 0.0) + weight
        ranked.append(sorted(votes, key=lambda label: (-votes[label], label)))
    return ranked


@pytest.mark.parametrize("kind", ["softmax", "cosine", "uniform"])
def test_a_class_without_a_vote_is_no_hit(kind: Vote) -> None:
    train, test = noisy_classes(300, 1), noisy_classes(150, 2)
    task = split_task(train, test)
    outcome = knn.evaluate(task, knn.Config(k=(1, 3, 20), votes=(kind,)))
    for entry in outcome.all:
        ranked = voted(train, test, pooled_features(task), entry["k"], kind)
        for most, metric in ((1, "top1"), (5, "top5")):
            hits = [label in classes[:most] for label, classes in zip(test.labels, ranked, strict=True)]
            assert entry[metric] == pytest.approx(100 * np.mean(hits), abs=1e-9)
    one = outcome.metrics
    assert (one["top5"], one["top5_interval"]) == (
        one["top1"],
        one["top1_interval"],
    )  # a single neighbour has one class
    if kind == "uniform":
        return  # many classes have equal votes, whose order is that of their numbers
    turned = split_task(*(ArraySource(side.images, (side.labels + 3) % 7) for side in (train, test)))
    renamed = knn.evaluate(turned, knn.Config(k=(1, 3, 20), votes=(kind,)))
    assert [entry["top5"] for entry in renamed.all] == [entry["top5"] for entry in outcome.all]


def test_an_image_none_of_whose_neighbours_votes_has_no_class() -> None:
    """All cosines are negative: by a cosine vote no class is found, not the first one."""
    ranked = knn._rank(
        vote(torch.tensor([[-0.1, -0.2]]), torch.tensor([[0, 1]]), torch.tensor([0, 1]), 7, 1.0, 2, "cosine")
    )
    assert ranked.tolist() == [[-1] * 5]
    scores = classification(ranked.numpy(), np.array([0]), ("a", "b"))
    assert (scores["top1"], scores["top5"], scores["per_class"], scores["per_class_f1"]) == (
        0,
        0,
        {"a": 0.0},
        {"a": 0.0},
    )


def test_the_choice_is_by_leave_one_out_and_never_by_the_test_labels(task: Task) -> None:
    config = knn.Config(k=(1, 3, 9, 250), select="train")
    outcome = knn.evaluate(task, config)
    train, _ = pooled_features(task)
    labels = task.data.train.labels
    exact = unit(train) @ unit(train).T
    np.fill_diagonal(exact, -np.inf)
    order = np.argsort(-exact, axis=1)
    wanted = {}
    for k in config.k:
        scores = np.zeros((300, 7))
        for row in range(300):
            for column in order[row, :k]:
                scores[row, labels[column]] += np.exp(exact[row, column] / 0.07)
        wanted[k] = 100 * (scores.argmax(1) == labels).mean()
    found = {entry["k"]: entry["top1"] for entry in outcome.protocol["leave_one_out"]}
    assert found == pytest.approx(wanted)
    assert outcome.protocol["headline"] == f"feature pooled, k {max(wanted, key=wanted.__getitem__)}"

    poisoned = ArraySource(task.data.test.source.images, (task.data.test.labels + 1) % 7)
    other = knn.evaluate(split_task(noisy_classes(300, 1), poisoned), config)
    assert other.protocol["headline"] == outcome.protocol["headline"]
    assert other.metrics["top1"] != outcome.metrics["top1"]


def test_votes_and_blocks_are_swept_with_k(task: Task) -> None:
    config = knn.Config(k=(1, 20), votes=("uniform", "softmax"), select="train")
    outcome = knn.evaluate(task, config)
    assert [(entry["k"], entry["vote"]) for entry in outcome.all] == [
        (k, kind) for k in (1, 20) for kind in ("uniform", "softmax")
    ]
    assert outcome.all[0]["top1"] == outcome.all[1]["top1"]  # of one neighbour it matters not how it votes
    assert outcome.all[2]["top1"] != outcome.all[3]["top1"]
    assert len(outcome.protocol["leave_one_out"]) == 4
    fixed = knn.evaluate(task, replace(config, k=(20,), select="fixed"))
    assert fixed.protocol["headline"] == "feature pooled, k 20, uniform vote"
    assert fixed.metrics["top1"] == outcome.all[2]["top1"]

    deep = replace(task, encoder=small_encoder())
    names = [entry["feature"] for entry in knn.evaluate(deep, knn.Config(k=(5,), last_blocks=3)).all]
    assert names == ["pooled", "cls", "mean", "cls@-2", "mean@-2", "cls@-3", "mean@-3"]
    with pytest.raises(UserError, match="--last-blocks is 4; this encoder gives features of its last 3"):
        knn.evaluate(deep, knn.Config(last_blocks=4))
    assert len(knn.evaluate(task, knn.Config(k=(5,), last_blocks=4)).all) == 1  # pixels, as a baseline, have none


def test_few_images_and_few_classes() -> None:
    outcome = knn.evaluate(split_task(noisy_classes(8, 1, 2), noisy_classes(1, 2, 2), classes=2), knn.Config())
    assert sorted(entry["k"] for entry in outcome.all) == [5, 8]
    assert (outcome.metrics["n"], outcome.metrics["top5"]) == (1, 100.0)


def test_classes_are_the_same_by_name_and_images_without_label_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.zeros((6, 8, 8, 3), np.uint8)
    sides = {
        "train": ArraySource(images, np.array([2, 0, -1, 1, 1, 0]), ("ant", "bee", "cow")),
        "test": ArraySource(images[:4], np.array([0, 1, -1, 0]), ("cow", "ant")),
    }
    monkeypatch.setattr("ssl_pretrain.eval._task.open_source", lambda name, split: sides[split])
    data = Data.open("insects", "train", "test")
    assert data.classes == ("ant", "bee", "cow")
    assert data.train.labels.tolist() == [2, 0, 1, 1, 0]
    assert data.test.labels.tolist() == [2, 0, 2]
    assert (data.train.unlabelled, data.test.unlabelled) == (1, 1)
    assert [data.test.source.name(i) for i in range(3)] == ["0", "1", "3"]

    sides["test"] = ArraySource(images[:2], np.array([2, 4]))  # numbers only, and 4 is none of the three
    with pytest.raises(UserError, match=r"1 images of split 'test' are of 1 class\(es\).* has: 4"):
        Data.open("insects", "train", "test")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (knn.Config(k=(20, 0)), "--k is 20 0"),
        (knn.Config(k=()), "--k"),
        (knn.Config(temperature=0.0), "--temperature is 0"),
        (knn.Config(votes=()), "--votes"),
        (knn.Config(features=("poled",)), "did you mean pooled"),
    ],
)
def test_knobs_out_of_range(task: Task, config: knn.Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        knn.evaluate(task, config)
