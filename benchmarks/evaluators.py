"""Searches and fits of the evaluators compared with scikit-learn and faiss: CPU seconds and extra memory, one thread.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/evaluators.py [--rows knn sweep] [--repeats 3]

Rows: `knn`, 10,000 queries on 50,000 x 384, 20 neighbours (faiss if installed); `logistic`, one fit of 20,000 x 384 in
10 classes, with scikit-learn's tolerance lowered until its objective is not higher than ours; `sweep`, 30 penalties of
the same; `heads`, 30 linear classifiers with different learning rates, 500 steps of 512 rows; `kmeans`, 50 clusters of
20,000 x 384, the same number of starts. Variants alternate `repeats` times, and the median is reported. Extra memory is
the growth of the peak resident memory of a process that runs only this, after its data is created.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

NEIGHBOURS, CLUSTERS, CLASSES, PENALTIES = 20, 50, 10, 30
C = 0.1
STEPS, LRS = 500, [float(lr) for lr in np.geomspace(1e-4, 0.1, 30)]


def data(row: str) -> Any:
    """What a row's contestants are given."""
    rng = np.random.default_rng(0)
    if row == "knn":
        centres = 0.5 * rng.standard_normal((100, 384))
        return [
            (centres[rng.integers(0, 100, n)] + rng.standard_normal((n, 384))).astype(np.float32)
            for n in (10_000, 50_000)
        ]
    labels = rng.integers(0, CLASSES, 20_000)
    rows = 0.4 * rng.standard_normal((CLASSES, 384))[labels] + rng.standard_normal((20_000, 384))
    turn = np.linalg.qr(rng.standard_normal((384, 384)))[0]
    return [(rows * 3 * np.exp(-np.arange(384) / 60) @ turn + 0.5).astype(np.float32), labels]


def contestants(row: str) -> dict[str, Callable[..., Any]]:
    """By name what each does with the data, ours first."""
    import torch
    from sklearn.cluster import KMeans
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import NearestNeighbors
    from ssl_pretrain.eval._logistic_regression import Rotation, path
    from ssl_pretrain.eval.linear import Heads

    from ssl_pretrain.features.kmeans import kmeans
    from ssl_pretrain.features.neighbours import nearest

    torch.set_num_threads(1)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def theirs(metric: str) -> Callable:
        def search(queries: np.ndarray, bank: np.ndarray) -> Any:
            model = NearestNeighbors(n_neighbors=NEIGHBOURS, metric=metric, algorithm="brute")
            return model.fit(unit(bank)).kneighbors(unit(queries))[1]

        return search

    def fits(cs: list[float]) -> Callable:
        def fit(rows: np.ndarray, labels: np.ndarray) -> list[float]:
            rotation = Rotation(rows)
            penalties = [1 / (c * len(rows)) for c in cs]
            found = path(rotation(rows), torch.from_numpy(labels), CLASSES, penalties, rotation.variance)
            return [one.objective for one in found]

        return fit

    def logistic(cs: list[float], tolerance: float) -> Callable:
        def fit(rows: np.ndarray, labels: np.ndarray) -> list[float]:
            values = []
            for c in cs:
                model = LogisticRegression(C=c, tol=tolerance, max_iter=5000).fit(rows, labels)
                weight, bias = model.coef_.astype(np.float64), model.intercept_
                logits = rows @ weight.T + bias
                logits -= logits.max(1, keepdims=True)
                loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(rows)), labels]
                values.append(float(loss.mean() + (weight**2).sum() / (2 * c * len(rows))))
            return values

        return fit

    def heads(groups: list[list[float]]) -> Callable:
        def train(rows: np.ndarray, labels: np.ndarray) -> list[float]:
            x, y = torch.from_numpy(rows), torch.from_numpy(labels)
            losses = []
            for lrs in groups:
                made = torch.Generator().manual_seed(0)
                group = Heads(x.shape[1], CLASSES, lrs, weight_decay=0.0, generator=made, device=torch.device("cpu"))
                rng = np.random.default_rng(0)
                for step in range(STEPS):
                    chosen = torch.from_numpy(rng.integers(0, len(x), min(512, len(x))))
                    group.step(x[chosen], y[chosen], 1 - step / STEPS)
                log_p = group.logits(x).log_softmax(2)
                losses += (-log_p[torch.arange(len(x)), :, y].mean(0)).tolist()
            return losses

        return train

    def modules(rows: np.ndarray, labels: np.ndarray) -> list[float]:
        x, y = torch.from_numpy(rows), torch.from_numpy(labels)
        losses = []
        for lr in LRS:
            torch.manual_seed(0)
            layer = torch.nn.Linear(x.shape[1], CLASSES)
            optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
            rng = np.random.default_rng(0)
            for step in range(STEPS):
                chosen = torch.from_numpy(rng.integers(0, len(x), min(512, len(x))))
                optimizer.param_groups[0]["lr"] = lr * (1 - step / STEPS)
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(layer(x[chosen]), y[chosen]).backward()
                optimizer.step()
            with torch.no_grad():
                losses.append(float(torch.nn.functional.cross_entropy(layer(x), y)))
        return losses

    sweep = [float(c) for c in np.geomspace(1e-6, 1e-1, PENALTIES)]
    match row:
        case "knn":
            named = {
                "ssl-pretrain": lambda q, b: nearest(q, b, NEIGHBOURS)[1].numpy(),
                "scikit-learn, euclidean": theirs("euclidean"),
                "scikit-learn, cosine": theirs("cosine"),
            }
            try:
                import faiss

                faiss.omp_set_num_threads(1)

                def flat(queries: np.ndarray, bank: np.ndarray) -> Any:
                    index = faiss.IndexFlatIP(bank.shape[1])
                    index.add(unit(bank))
                    return index.search(unit(queries), NEIGHBOURS)[1]

                named["faiss, flat"] = flat
            except ImportError:
                print("faiss is not installed: no row of it", file=sys.stderr)
            return named
        case "logistic":
            names = {f"scikit-learn, tol {tolerance:g}": logistic([C], tolerance) for tolerance in (1e-4, 1e-5, 3e-6)}
            return {"ssl-pretrain": fits([C]), **names}
        case "sweep":
            return {"ssl-pretrain": fits(sweep), "scikit-learn, tol 1e-05": logistic(sweep, 1e-5)}
        case "heads":
            each = "the same, one after another"
            return {
                "ssl-pretrain": heads([LRS]),
                each: heads([[lr] for lr in LRS]),
                "nn.Linear and torch's SGD": modules,
            }
        case _:
            return {
                "ssl-pretrain": lambda x, _: kmeans(torch.from_numpy(x), CLUSTERS, seed=0, starts=2).inertia,
                "scikit-learn": lambda x, _: KMeans(CLUSTERS, n_init=2, random_state=0).fit(x).inertia_,
            }


def alone(row: str, name: str) -> None:
    """Run one contestant in this process; print its CPU seconds and the growth of the resident peak in MiB, and, where
    there is one, the mean objective it reached."""
    warnings.simplefilter("ignore")
    given = data(row)
    run = contestants(row)[name]
    run(*(part[:200] for part in given))  # what is loaded and built at the first call is no part of it
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    result = run(*given)
    seconds = time.process_time() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(seconds, grown, 0.0 if row == "knn" else float(np.mean(result)))


def main() -> None:
    """Measure and print a table, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["knn", "logistic", "sweep", "heads", "kmeans"]
    parser.add_argument("--rows", nargs="+", default=every, choices=every)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alone", nargs=2, metavar=("ROW", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        return alone(*options.alone)
    print("| row | who | CPU seconds | times ours | extra MiB | objective |\n| --- | --- | --- | --- | --- | --- |")
    for row in options.rows:
        names = list(contestants(row))
        measured: dict[str, list[list[float]]] = {name: [] for name in names}
        for _ in range(options.repeats):
            for name in names:
                done = subprocess.run(
                    [sys.executable, __file__, "--alone", row, name], capture_output=True, text=True, check=False
                )
                if done.returncode:
                    sys.exit(done.stderr)
                measured[name].append([float(word) for word in done.stdout.split()])
        ours = statistics.median(run[0] for run in measured[names[0]])
        for name, runs in measured.items():
            seconds, grown, value = (statistics.median(column) for column in zip(*runs, strict=True))
            reached = f"{value:.6g}" if value else ""
            print(f"| {row} | {name} | {seconds:.2f} | {seconds / ours:.2f} | {grown:.0f} | {reached} |", flush=True)
    return None


if __name__ == "__main__":
    main()
