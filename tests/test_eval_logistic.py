"""Logistic regression against scikit-learn on the same features: the minimum, the predictions, the sweep, few labels."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from pixel_tasks import pooled_features, split_task
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import classification_report, f1_score
from ssl_pretrain.eval import logistic
from ssl_pretrain.eval._intervals import bootstrap, by_class, wilson
from ssl_pretrain.eval._logistic_regression import Rotation, path
from ssl_pretrain.eval._results import classification
from ssl_pretrain.eval.linear import hold_out
from synthetic_data import ArraySource, noisy_classes

from ssl_pretrain.errors import UserError

FEW = logistic.Config(c_range=(1e-4, 1e2), c_count=4)


def sample(n: int = 400, width: int = 20, classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of overlapping classes whose directions have very different variance, far from the origin."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.choice(classes, n - classes, p=np.arange(1, classes + 1) / 15)])
    rows = 0.7 * rng.standard_normal((classes, width))[labels] + rng.standard_normal((n, width))
    turn = np.linalg.qr(rng.standard_normal((width, width)))[0]
    return rows * np.geomspace(5, 0.01, width) @ turn + 3, labels


def minimum(rows: np.ndarray, labels: np.ndarray, c: float) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its tolerance cannot be reached
        return LogisticRegression(C=c, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(rows, labels)


def objective(weight: np.ndarray, bias: np.ndarray, rows: np.ndarray, labels: np.ndarray, c: float) -> float:
    logits = rows.astype(np.float64) @ weight.T + bias
    logits -= logits.max(1, keepdims=True)
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(rows)), labels]
    return float(loss.mean() + (weight**2).sum() / (2 * c * len(rows)))


@pytest.mark.parametrize(("n", "width"), [(400, 20), (30, 50)])  # more rows than floats, and fewer
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_minimum_is_that_of_scikit_learn(n: int, width: int, dtype: type) -> None:
    rows, labels = sample(n, width)
    rows = rows.astype(dtype)
    rotation = Rotation(rows)
    cs = [1e-2, 10.0, 1.0]
    fits = list(
        path(rotation(rows), torch.from_numpy(labels), 5, [1 / (c * n) for c in cs], rotation.variance, tolerance=1e-15)
    )
    assert [fit.penalty for fit in fits] == sorted((1 / (c * n) for c in cs), reverse=True)
    for c, fit in zip(sorted(cs), fits, strict=True):
        oracle = minimum(rows.astype(np.float64), labels, c)
        weight, bias = (value.numpy() for value in rotation.original(fit))
        best = objective(oracle.coef_, oracle.intercept_, rows, labels, c)
        precision = 1e-9 if dtype is np.float64 else 1e-6
        assert objective(weight, bias, rows, labels, c) == pytest.approx(best, abs=precision)
        assert fit.objective == pytest.approx(best, abs=precision)
        asked, _ = sample(300, width, seed=1)
        logits = asked @ weight.T + bias
        np.testing.assert_array_equal(logits.argmax(1), oracle.predict(asked))
        if dtype is np.float64:
            shares = np.exp(logits - logits.max(1, keepdims=True))
            shares /= shares.sum(1, keepdims=True)
            np.testing.assert_allclose(shares, oracle.predict_proba(asked), atol=1e-6)


def test_the_default_tolerance_ends_no_higher_than_scikit_learns_in_fewer_steps() -> None:
    rows, labels = sample(2000, 40)
    for c in (0.01, 1.0):
        rotation = Rotation(rows)
        fit = next(path(rotation(rows), torch.from_numpy(labels), 5, [1 / (c * 2000)], rotation.variance))
        theirs = LogisticRegression(C=c, max_iter=5000).fit(rows, labels)
        assert fit.objective <= objective(theirs.coef_, theirs.intercept_, rows, labels, c) * (1 + 2e-5)
        assert fit.iterations < theirs.n_iter_[0]


def test_a_path_takes_fewer_steps_than_each_alone() -> None:
    rows, labels = sample(1000, 30)
    rotation = Rotation(rows)
    turned, y = rotation(rows), torch.from_numpy(labels)
    penalties = list(np.geomspace(1e-6, 1, 30))
    together = list(path(turned, y, 5, penalties, rotation.variance))
    alone = [next(path(turned, y, 5, [p], rotation.variance)) for p in sorted(penalties, reverse=True)]
    assert sum(fit.iterations for fit in together) < 0.7 * sum(fit.iterations for fit in alone)
    for one, other in zip(together, alone, strict=True):
        assert one.objective == pytest.approx(other.objective, rel=5e-4)


def test_directions_without_variance_and_classes_without_rows() -> None:
    rows, labels = sample(100, 6)
    rows = np.concatenate([rows, rows[:, :2], np.ones((100, 1))], 1)
    rotation = Rotation(rows)
    assert len(rotation.variance) == 6
    fit = next(path(rotation(rows), torch.from_numpy(labels), 7, [1e-3], rotation.variance))
    weight, bias = (value.numpy() for value in rotation.original(fit))
    assert np.isfinite(weight).all()
    assert set((rows @ weight.T + bias).argmax(1)) <= set(range(5))
    flat = np.ones((4, 3))
    rotation = Rotation(flat)
    fit = next(path(rotation(flat), torch.tensor([0, 1, 1, 1]), 2, [1.0], rotation.variance))
    assert (rotation.original(fit)[1].softmax(0)).tolist() == pytest.approx([0.25, 0.75], abs=1e-3)


def test_the_sweep_chooses_as_scikit_learn_would_and_tests_once() -> None:
    task = split_task(noisy_classes(400, 1), noisy_classes(200, 2))
    outcome = logistic.evaluate(task, FEW)
    train, test = (rows.astype(np.float64) for rows in pooled_features(task))
    labels = task.data.train.labels
    fit, held = hold_out(labels, 0.1, 0)
    assert [entry["C"] for entry in outcome.all] == pytest.approx([1e-4, 1e-2, 1, 100])
    for entry in outcome.all:
        oracle = minimum(train[fit], labels[fit], entry["C"])
        assert entry["top1"] == pytest.approx(100 * oracle.score(train[held], labels[held]), abs=2.6)  # one of 41
        loss = -oracle.predict_log_proba(train[held])[np.arange(len(held)), labels[held]].mean()
        assert entry["loss"] == pytest.approx(loss, rel=0.02)
    best = outcome.protocol["selected"]
    assert best["top1"] == max(entry["top1"] for entry in outcome.all)
    oracle = minimum(train, labels, best["C"])
    assert outcome.metrics["top1"] == pytest.approx(100 * oracle.score(test, task.data.test.labels), abs=0.6)
    assert outcome.metrics["top1_interval"][0] < outcome.metrics["top1"] < outcome.metrics["top1_interval"][1]

    poisoned = ArraySource(task.data.test.source.images, (task.data.test.labels + 1) % 7)
    other = logistic.evaluate(split_task(noisy_classes(400, 1), poisoned), FEW)
    assert other.all == outcome.all
    assert other.metrics["top1"] < outcome.metrics["top1"]


def test_few_labels() -> None:
    labels = np.repeat([0, 1, 2], [200, 50, 3])
    for budget, sizes in (("1", [1, 1, 1]), ("5", [5, 5, 3]), ("10%", [20, 5, 1]), ("1%", [2, 1, 1])):
        chosen = logistic.draw(labels, budget, 0, 0)
        assert np.bincount(labels[chosen]).tolist() == sizes
        assert len(set(chosen)) == sum(sizes)
        np.testing.assert_array_equal(chosen, logistic.draw(labels, budget, 0, 0))
        assert not np.array_equal(chosen, logistic.draw(labels, budget, 0, 1))

    task = split_task(noisy_classes(300, 1, noise=200), noisy_classes(150, 2, noise=200))
    outcome = logistic.evaluate(task, replace(FEW, budgets=("1", "5", "50%"), draws=3))
    few = outcome.metrics["few_labels"]
    assert [row["images"] for row in few] == [7, 35, pytest.approx(150, abs=5)]
    assert few[0]["top1"] < few[1]["top1"] < few[2]["top1"] <= 100
    assert few[0]["C"] == [1.0] * 3  # nothing to choose it on
    train, test = pooled_features(task)
    for row in few:
        assert row["top1"] == pytest.approx(np.mean(row["draws"]))
        assert row["spread"] == pytest.approx(np.std(row["draws"], ddof=1))
    chosen = logistic.draw(task.data.train.labels, "1", 0, 2)
    oracle = minimum(train[chosen].astype(np.float64), task.data.train.labels[chosen], 1.0)
    assert few[0]["draws"][2] == pytest.approx(100 * oracle.score(test, task.data.test.labels), abs=0.7)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (logistic.Config(c_range=(0, 1)), "--c-range 0 1"),
        (logistic.Config(c_count=0), "--c-count 0"),
        (logistic.Config(held_out=1.0), "--held-out is 1"),
        (logistic.Config(draws=0), "--draws is 0"),
        (logistic.Config(budgets=("0",)), "--budgets 0"),
        (logistic.Config(budgets=("1.5",)), "--budgets 1.5"),
        (logistic.Config(budgets=("120%",)), "--budgets 120%"),
        (logistic.Config(budgets=("ten",)), "--budgets ten"),
        (logistic.Config(features=("poled",)), "did you mean pooled"),
    ],
)
def test_knobs_out_of_range(config: logistic.Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        logistic.evaluate(split_task(noisy_classes(30, 1), noisy_classes(10, 2)), config)


def test_one_image_of_each_class_is_too_few_to_choose_on() -> None:
    train = ArraySource(noisy_classes(7, 1).images, np.arange(7))
    with pytest.raises(UserError, match="use knn"):
        logistic.evaluate(split_task(train, noisy_classes(10, 2)), FEW)


def test_a_single_test_image_and_features_of_length_one() -> None:
    task = split_task(noisy_classes(60, 1, 2), noisy_classes(1, 2, 2), classes=2)
    metrics = logistic.evaluate(task, replace(FEW, normalise="l2")).metrics
    assert metrics["n"] == 1
    assert metrics["top1"] in (0, 100)
    assert metrics["top1_interval"][1] - metrics["top1_interval"][0] > 50


# ---- What every classification reports.


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (7, 7), (1, 1), (3, 10), (9500, 10_000)])
def test_the_interval_of_a_share(hits: int, n: int) -> None:
    oracle = binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx([100 * oracle.low, 100 * oracle.high], abs=1e-9)


def test_the_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).exponential(2.0, 2000)
    low, high = bootstrap(values, 0)
    half = 1.96 * values.std() / np.sqrt(2000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    assert bootstrap(values, 0) == [low, high] != bootstrap(values, 1)


def test_the_classes_one_by_one_as_scikit_learn_counts_them() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(4, 300, p=[0.7, 0.2, 0.1, 0.0])
    ranked = np.stack([rng.permutation(4) for _ in labels])
    ranked[:, 0] = np.where(rng.random(300) < 0.5, labels, ranked[:, 0])
    names = ("a", "b", "c", "never")
    found = by_class(ranked[:, 0], labels, names)
    oracle = classification_report(labels, ranked[:, 0], output_dict=True, zero_division=0)
    assert list(found) == ["a", "b", "c"]
    for c, name in enumerate(found):
        wanted = oracle[str(c)]
        assert found[name] == pytest.approx(
            {"n": wanted["support"], **{key: 100 * wanted[out] for key, out in
             (("recall", "recall"), ("precision", "precision"), ("f1", "f1-score"))}}
        )  # fmt: skip
    metrics = classification(ranked, labels, names)
    assert metrics["macro_f1"] == pytest.approx(100 * f1_score(labels, ranked[:, 0], average="macro", labels=[0, 1, 2]))
    assert metrics["balanced"] == pytest.approx(np.mean(list(metrics["per_class"].values())))
    assert metrics["per_class_n"] == {name: row["n"] for name, row in found.items()}
