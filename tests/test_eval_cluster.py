"""Clusters and their scores against scikit-learn and SciPy on the same features; what is done without labels."""

import numpy as np
import pytest
import torch
from pixel_tasks import unit_features, whole_task
from scipy.optimize import linear_sum_assignment
from sklearn import metrics as oracle
from sklearn.cluster import AgglomerativeClustering, KMeans
from ssl_pretrain.eval import cluster
from ssl_pretrain.eval._agreement import agreement, silhouette
from ssl_pretrain.eval._assignment import assignment
from ssl_pretrain.eval._ward import ward
from synthetic_data import ArraySource, noisy_classes

from ssl_pretrain.errors import UserError
from ssl_pretrain.features.kmeans import kmeans, lloyd, seeds
from ssl_pretrain.randomness import numpy_generator


def blobs(n: int = 600, classes: int = 6, width: int = 10, noise: float = 1.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (2 * rng.standard_normal((classes, width)))[rng.integers(0, classes, n)] + noise * rng.standard_normal(
        (n, width)
    )


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (40, 40), (3, 9), (9, 3), (60, 45)])
@pytest.mark.parametrize("kind", ["counts", "floats", "ties"])
def test_the_assignment_is_the_best(shape: tuple[int, int], kind: str) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        gain = {
            "counts": rng.integers(0, 50, shape),
            "floats": rng.normal(size=shape),
            "ties": rng.integers(0, 2, shape),
        }
        pairs = assignment(gain[kind])
        rows = np.flatnonzero(pairs >= 0)
        assert len(rows) == len(set(pairs[rows])) == min(shape)
        best = gain[kind][linear_sum_assignment(gain[kind], maximize=True)].sum()
        assert gain[kind][rows, pairs[rows]].sum() == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize(
    ("k", "c", "n"), [(5, 5, 300), (30, 4, 300), (1, 6, 50), (6, 1, 50), (1, 1, 9), (9, 9, 9), (40, 30, 50)]
)
def test_agreement_is_what_scikit_learn_says(k: int, c: int, n: int) -> None:
    for seed, share in ((0, 0.0), (1, 0.6), (2, 1.0)):
        rng = np.random.default_rng(seed)
        classes = rng.permutation(np.arange(n) % c) * 3
        clusters = np.where(rng.random(n) < share, classes, 100 + rng.permutation(np.arange(n) % k))
        found = agreement(clusters, classes)
        assert found["nmi"] == pytest.approx(oracle.normalized_mutual_info_score(classes, clusters), abs=1e-9)
        assert found["ami"] == pytest.approx(oracle.adjusted_mutual_info_score(classes, clusters), abs=1e-9)
        assert found["ari"] == pytest.approx(oracle.adjusted_rand_score(classes, clusters), abs=1e-9)
        table = oracle.cluster.contingency_matrix(classes, clusters)
        hits = table[linear_sum_assignment(table, maximize=True)].sum()
        assert found["accuracy"] == pytest.approx(100 * hits / n)
        assert found["accuracy_interval"][0] <= found["accuracy"] <= found["accuracy_interval"][1]


def test_the_silhouette_is_scikit_learns() -> None:
    rows = blobs(2100)
    clusters = KMeans(6, n_init=1, random_state=0).fit_predict(rows)
    clusters[:2] = 6, 7  # two alone
    assert silhouette(torch.from_numpy(rows), clusters) == pytest.approx(
        oracle.silhouette_score(rows, clusters), abs=1e-6
    )
    assert silhouette(torch.from_numpy(rows[:5]), np.zeros(5, int)) is None
    assert silhouette(torch.from_numpy(rows[:5]), np.arange(5)) is None


def test_lloyd_from_the_same_centres_goes_where_scikit_learn_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_pretrain.features.kmeans.CHUNK", 100)
    rows = blobs(noise=2.0)
    start = rows[:6]
    theirs = KMeans(6, init=start, n_init=1, tol=0, algorithm="lloyd").fit(rows)
    ours = lloyd(torch.from_numpy(rows), torch.from_numpy(start), 300, 0.0)
    np.testing.assert_array_equal(ours.assigned.numpy(), theirs.labels_)
    np.testing.assert_allclose(ours.centres.numpy(), theirs.cluster_centers_, atol=1e-9)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-9)


def test_the_best_start_is_as_good_as_scikit_learns_and_a_function_of_the_seed() -> None:
    rows = (blobs(noise=2.0) + 1000).astype(np.float32)  # an offset that eats the digits of a square
    theirs = KMeans(6, n_init=10, random_state=0).fit(rows.astype(np.float64))
    ours = kmeans(torch.from_numpy(rows), 6, seed=0)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=0.003)
    direct = ((rows - ours.centres.numpy()[ours.assigned.numpy()]).astype(np.float64) ** 2).sum()
    assert ours.inertia == pytest.approx(direct, rel=1e-3)
    again = kmeans(torch.from_numpy(rows), 6, seed=0)
    assert torch.equal(again.assigned, ours.assigned)


def test_seeds_lie_in_different_blobs_and_no_cluster_is_empty() -> None:
    rows = torch.from_numpy(blobs(noise=0.01))
    for start in range(10):
        centres = seeds(rows, 6, numpy_generator(start))
        assert float(torch.cdist(centres, centres).add(9 * torch.eye(6)).min()) > 0.5
    copies = torch.zeros(8, 3)
    copies[:2] = 1.0
    assert kmeans(copies, 8, seed=0, starts=1).inertia == 0
    far = lloyd(rows, torch.cat([rows[:2], torch.full((4, 10), 1e3, dtype=rows.dtype)]), 50, 0.0)
    assert torch.bincount(far.assigned, minlength=6).min() > 0
    with pytest.raises(ValueError, match="9 clusters of 8 rows"):
        kmeans(copies, 9, seed=0)


@pytest.mark.parametrize("k", [1, 2, 6, 50, 300])
def test_ward_is_scikit_learns(k: int) -> None:
    rows = blobs(300, noise=1.5)
    theirs = AgglomerativeClustering(k, linkage="ward").fit_predict(rows)
    assert oracle.adjusted_rand_score(ward(rows, k), theirs) == 1
    assert set(ward(rows, k)) == set(range(k))


def test_ward_of_copies_ends() -> None:
    found = ward(np.repeat(np.eye(3), 20, axis=0), 3)
    assert len(set(found)) == 3
    np.testing.assert_array_equal(found, np.repeat(found[::20], 20))


def test_the_evaluator_scores_what_scikit_learn_says_of_its_clusters() -> None:
    task = whole_task(noisy_classes(300, 1, noise=150))
    outcome = cluster.evaluate(task, cluster.Config(starts=20))
    rows, labels = unit_features(task), task.data.test.labels
    theirs = KMeans(7, n_init=20, random_state=0).fit_predict(rows)
    assert outcome.metrics["nmi"] == pytest.approx(oracle.normalized_mutual_info_score(labels, theirs), abs=0.05)
    assert outcome.metrics["silhouette"] == pytest.approx(oracle.silhouette_score(rows, theirs), abs=0.01)
    tree = AgglomerativeClustering(7).fit_predict(rows.astype(np.float64))
    assert outcome.all[1]["algorithm"] == "ward"
    assert outcome.all[1]["ami"] == pytest.approx(oracle.adjusted_mutual_info_score(labels, tree), abs=1e-6)
    assert outcome.metrics["accuracy"] > 50
    shuffled = ArraySource(task.data.test.source.images, np.random.default_rng(0).permutation(labels))
    other = cluster.evaluate(whole_task(shuffled), cluster.Config(starts=20))
    assert other.metrics["silhouette"] == outcome.metrics["silhouette"]  # labels take no part in the clustering
    assert abs(other.metrics["ami"]) < 0.05


def test_without_labels_the_silhouette_chooses() -> None:
    images = noisy_classes(200, 1, classes=5, noise=20)
    labels, images.labels = images.labels, None
    outcome = cluster.evaluate(whole_task(images, 0), cluster.Config())
    assert {"nmi", "accuracy"}.isdisjoint(outcome.metrics)
    first = [entry for entry in outcome.all if entry["algorithm"] == "kmeans"]
    assert [entry["clusters"] for entry in first] == [2, 5, 10, 20, 50, 100]
    assert outcome.metrics["clusters"] == 5
    assert outcome.metrics["silhouette"] == max(entry["silhouette"] for entry in first)
    partly = ArraySource(images.images, np.where(np.arange(200) < 100, labels, -1))
    scored = cluster.evaluate(whole_task(partly), cluster.Config())
    assert (scored.protocol["labelled"], scored.metrics["n"], scored.metrics["accuracy"]) == (100, 200, 100.0)


@pytest.mark.parametrize(
    ("count", "config", "message"),
    [
        (1, cluster.Config(), r"--clusters 2: at least 2 and at most the images, which are 1"),
        (20, cluster.Config(clusters=(30,)), "--clusters 30"),
        (20, cluster.Config(clusters=(1,)), "--clusters 1"),
        (20, cluster.Config(starts=0), "--starts is 0"),
        (20, cluster.Config(features=("poled",)), "did you mean pooled"),
    ],
)
def test_what_cannot_be_clustered(count: int, config: cluster.Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cluster.evaluate(whole_task(noisy_classes(count, 1)), config)
