"""Transforms of targets with statistics of the data, and their losses, against float64 NumPy; on any split of a batch."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_helpers import check_stated

from ssl_pretrain.conformance import one_step
from ssl_pretrain.conformance.one_step import BATCH, after_step
from ssl_pretrain.errors import UserError
from ssl_pretrain.parts.fitted_targets import Clusters, Fitted, Whitener
from ssl_pretrain.parts.hadamard import hadamard
from ssl_pretrain.parts.targets import distances, spread
from ssl_pretrain.pretext import Losses

STEPS, PATCHES = 3, 9


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 36, 96, 108, 192, 384, 768, 1152, 1664])
def test_hadamard_matrices_are_orthogonal_and_flat(n: int) -> None:
    found = hadamard(n).numpy()
    np.testing.assert_allclose(np.abs(found), 1 / math.sqrt(n), rtol=1e-12)
    np.testing.assert_allclose(found @ found.T, np.eye(n), atol=1e-10)


@pytest.mark.parametrize("n", [3, 27, 50, 100])
def test_without_a_hadamard_matrix_it_is_a_rotation(n: int) -> None:
    found = hadamard(n).numpy()
    np.testing.assert_allclose(found @ found.T, np.eye(n), atol=1e-10)
    np.testing.assert_array_equal(found, hadamard(n).numpy())


def some_features(width: int) -> np.ndarray:
    """(STEPS, BATCH, PATCHES, D): correlated channels with very different means and variances."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(STEPS, BATCH, PATCHES, width)) @ rng.normal(size=(width, width))
    return mixed * np.logspace(-1, 1, width) + 100 * rng.normal(size=width)


def learned(
    fitted: Fitted,
    features: np.ndarray,
    micro_batches: int = 1,
    skipped: int = -1,
    first: int = 0,
    rank: int | None = None,
) -> Fitted:
    """After a step of each batch from `first` on, in so many parts; the losses of one step may not have been finite. rank:
    with this half of each batch, as one of two processes."""
    own = torch.arange(BATCH) if rank is None else torch.arange(BATCH).chunk(2)[rank]
    for number, batch in enumerate(features[first:], start=first):
        parts = torch.tensor(batch, dtype=torch.float32)[own].chunk(micro_batches)
        rows = own.chunk(micro_batches)
        steps = [one_step.step(slice(int(r[0]), int(r[-1]) + 1), number=number, noise=number) for r in rows]
        carried = [fitted.carry(part, step) for part, step in zip(parts, steps, strict=True)]
        steps[-1].carried = {name: torch.cat([each[name] for each in carried]) for name in carried[0]}
        if number == skipped:
            steps[-1].ok = torch.zeros((), dtype=torch.bool)
            steps[-1].carried = {
                n: v * (torch.nan if v.is_floating_point() else 1) for n, v in steps[-1].carried.items()
            }
        fitted.after_step(steps[-1])
    return fitted


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("skipped", [-1, 0, 1])
def test_standardised_features_against_numpy(micro_batches: int, skipped: int) -> None:
    features = some_features(5)
    used = [i for i in range(STEPS) if i != skipped]
    fitted = learned(Whitener(5, "standardise", BATCH * len(used)), features, micro_batches, skipped)
    rows = features[used].reshape(-1, 5)
    expected = (features[2] - rows.mean(0)) / rows.std(0)  # by the deviation: the variance is no divisor
    assert bool(fitted.ready)
    np.testing.assert_allclose(fitted(torch.tensor(features[2]).float()), expected, atol=2e-4)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("width", [4, 12, 5])
def test_phi_s_against_numpy(width: int, micro_batches: int) -> None:
    features = some_features(width)
    fitted = learned(Whitener(width, "phi_s", BATCH * STEPS), features, micro_batches)
    rows = features.reshape(-1, width)
    covariance = np.cov(rows.T, bias=True)
    found = fitted(torch.tensor(rows).float()).double().numpy()
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-3)
    moved = np.cov(found.T, bias=True)
    if width != 5:  # there is no Hadamard matrix of order 5
        np.testing.assert_allclose(moved.diagonal(), 1, rtol=1e-3)  # every channel has the same variance
    # A rotation and one scale: distances keep their proportions, and undoing H gives the principal components.
    matrix = fitted.transform.double().numpy()
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width) * width / np.trace(covariance), rtol=1e-4, atol=1e-7)
    components = np.cov((found @ hadamard(width).numpy()).T, bias=True)
    expected = np.linalg.eigvalsh(covariance) * width / np.trace(covariance)
    np.testing.assert_allclose(components, np.diag(expected), atol=2e-3)


def test_features_that_vary_in_one_channel_are_finite() -> None:
    features = np.zeros((1, BATCH, PATCHES, 4))
    features[..., 0] = np.random.default_rng(0).normal(size=features.shape[:-1])
    for kind in ("standardise", "phi_s"):
        fitted = learned(Whitener(4, kind, BATCH), features)
        assert bool(torch.isfinite(fitted(torch.tensor(features[0]))).all())
    flat = learned(Whitener(4, "phi_s", BATCH), features * 0)
    assert torch.equal(flat(torch.zeros(1, 4)), torch.zeros(1, 4))


def test_the_first_images_decide_and_no_later_ones() -> None:
    features = some_features(4)
    fitted = Whitener(4, "standardise", BATCH + 1)
    learned(fitted, features[:1])
    assert not bool(fitted.ready)
    given = torch.tensor(features[0]).float()
    assert torch.equal(fitted(given), given)  # no transform yet
    learned(fitted, features[1:2])
    assert bool(fitted.ready)
    before = {name: value.clone() for name, value in fitted.state_dict().items()}
    learned(fitted, features[2:])
    assert fitted.carry(given, one_step.step()) == {}
    assert all(torch.equal(value, before[name]) for name, value in fitted.state_dict().items())


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_clusters_are_running_means(micro_batches: int) -> None:
    """Four clouds: k-means finds them in the first batch, later batches move the centres to the means of all."""
    rng = np.random.default_rng(0)
    clouds = np.array([[0, 0], [20, 0], [0, 20], [20, 20]])
    of = rng.integers(0, 4, (STEPS, BATCH, PATCHES))
    features = clouds[of] + rng.normal(size=(STEPS, BATCH, PATCHES, 2))
    fitted = learned(Clusters(2, 8, BATCH * STEPS), features, micro_batches)
    ids = fitted(torch.tensor(features)).numpy()
    assert ids.shape == of.shape
    for cluster in np.unique(ids):
        assert len(np.unique(of[ids == cluster])) == 1  # no centre between two clouds
    np.testing.assert_allclose(fitted.counts.sum(), STEPS * BATCH * PATCHES)
    weighted = (fitted.centres * fitted.counts[:, None]).sum(0) / fitted.counts.sum()
    np.testing.assert_allclose(weighted, features.reshape(-1, 2).mean(0), rtol=1e-4)


def test_clusters_do_not_depend_on_the_split() -> None:
    features = some_features(3)
    one, four = (learned(Clusters(3, 5, BATCH * STEPS), features, parts) for parts in (1, 4))
    torch.testing.assert_close(one.centres, four.centres)
    assert torch.equal(one.counts, four.counts)


KINDS = ("standardise", "phi_s", "kmeans")
RANK = f"""
import sys
from importlib import import_module
sys.path.insert(0, {str(Path(__file__).parent)!r})
here = import_module({Path(__file__).stem!r})
from ssl_pretrain import distributed
import torch
with distributed.world() as world:
    features = here.some_features(12)
    found = {{k: here.learned(here.new(k), features, 2, rank=world.rank).state_dict() for k in here.KINDS}}
    torch.save(found, sys.argv[1] + str(world.rank))
"""


def new(kind: str) -> Fitted:
    images = BATCH * STEPS
    return Clusters(12, 5, images) if kind == "kmeans" else Whitener(12, kind, images)  # type: ignore[arg-type]


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    place = {"SSL_PRETRAIN_RENDEZVOUS": (tmp_path / "meet").as_uri(), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, tmp_path / "rank"],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    found = [torch.load(tmp_path / f"rank{rank}") for rank in (0, 1)]
    features = some_features(12)
    given = torch.tensor(features[0]).float()
    for kind in KINDS:
        assert all(torch.equal(found[0][kind][name], value) for name, value in found[1][kind].items())
        one, two = learned(new(kind), features), new(kind)
        two.load_state_dict(found[0][kind])
        assert bool(two.ready)
        if kind == "kmeans":
            assert (one(given) == two(given)).float().mean() > 0.99
        elif kind == "standardise":
            torch.testing.assert_close(two(given), one(given), rtol=1e-3, atol=1e-3)
        else:  # eigenvectors have no sign of their own: distances do not depend on it
            a, b = (torch.cdist(each(given)[0], each(given)[0]) for each in (one, two))
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_learns_the_same_bits(kind: str) -> None:
    features = some_features(12)
    whole, before = learned(new(kind), features), learned(new(kind), features[:2])
    after = new(kind)
    after.load_state_dict({name: value.clone() for name, value in before.state_dict().items()})
    learned(after, features, first=2)
    assert bool(after.ready)
    for name, value in whole.state_dict().items():
        assert torch.equal(after.state_dict()[name], value), name
    # And a run that is resumed later learns nothing more.
    last = new(kind)
    last.load_state_dict(whole.state_dict())
    learned(last, features)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in last.state_dict().items())


# ---- Losses


def test_kl_against_numpy() -> None:
    p, t = np.random.default_rng(0).normal(size=(2, 3, 4, 6)) * 2
    temperature = 1.7

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x / temperature)
        return e / e.sum(-1, keepdims=True)

    predicted = torch.tensor(p, requires_grad=True)
    found = distances(predicted, torch.tensor(t), "kl", temperature=temperature)
    expected = temperature**2 * (softmax(t) * np.log(softmax(t) / softmax(p))).sum(-1)
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), predicted)
    np.testing.assert_allclose(gradient, temperature * (softmax(p) - softmax(t)), atol=1e-5)
    constant = softmax(t).mean((0, 1))
    best = temperature**2 * (softmax(t) * np.log(softmax(t) / constant)).sum(-1).mean()
    assert spread(torch.tensor(t), "kl", temperature=temperature).item() == pytest.approx(best, rel=1e-5)


def test_cross_entropy_against_numpy() -> None:
    rng, codes, smoothing = np.random.default_rng(0), 5, 0.2
    p, ids = rng.normal(size=(3, 4, codes)), rng.integers(0, 3, (3, 4))
    wanted = (1 - smoothing) * np.eye(codes)[ids] + smoothing / codes
    log = p - np.log(np.exp(p).sum(-1, keepdims=True))
    predicted = torch.tensor(p, requires_grad=True)
    found = distances(predicted, torch.tensor(ids), "cross_entropy", smoothing=smoothing)
    np.testing.assert_allclose(found.detach(), -(wanted * log).sum(-1), rtol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), predicted)
    np.testing.assert_allclose(gradient, np.exp(log) - wanted, atol=1e-6)
    mean = wanted.mean((0, 1))
    best = -(wanted * np.log(mean)).sum(-1).mean()
    assert spread(torch.tensor(ids), "cross_entropy", smoothing=smoothing, codes=codes).item() == pytest.approx(best)


# ---- In the methods that use them


def test_featmim_predicts_ids_of_clusters() -> None:
    knobs: dict[str, Any] = {"target_norm": "kmeans", "loss": "cross_entropy", "label_smoothing": 0.1}
    method = one_step.build("featmim", **knobs)
    batch = one_step.batch(method)
    for number in range(2):  # 32 images
        step = one_step.step(number=number)
        losses = method(batch, step)
        assert losses.total.item() == 0
        after_step(method, step, losses.carry)
    losses = method(batch, one_step.step())
    assert losses.carry == {}
    losses.total.backward()
    assert float(method.head.weight.grad.abs().sum()) > 0
    assert method.head.out_features == 8
    ids = method.target(batch, (4, 4))
    assert ids.shape == (BATCH, 16)
    assert len(ids.unique()) > 4
    # Collapsed: the frequencies of the ids, whatever the patch. Nearly all patches are masked: see test_featmim.
    with torch.no_grad():
        method.head.weight.zero_()
        shares = torch.bincount(ids.flatten(), minlength=8) / ids.numel()
        method.head.bias.copy_((0.9 * shares + 0.1 / 8).log())
    method.config = replace(method.config, mask_ratio=0.99)
    many = [method(batch, one_step.step(noise=noise)).terms["relative"] for noise in range(40)]
    check_stated(method, {"relative": Losses(total=torch.zeros(()), terms={"relative": torch.stack(many).mean()})})


def test_mrmae_trains_by_pixels_until_the_transform_is_known() -> None:
    method = one_step.build("mrmae", target_norm="phi_s")
    batch = one_step.batch(method)
    for number in range(3):
        step = one_step.step(number=number)
        losses = method(batch, step)
        assert (losses.terms["mimic"].item() == 0) == (number < 2)
        assert losses.total.item() > 0
        after_step(method, step, losses.carry)
    found = method.target(batch, (4, 4)).flatten(0, 1).var(0, correction=0)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"target_norm": "kmeans"}, "--loss cross_entropy"),
        ({"loss": "cross_entropy"}, "--target-norm kmeans"),
        ({"target_norm": "kmeans", "loss": "cross_entropy", "morphings": 2}, "--morphings"),
        ({"target_images": 0}, "--target-images"),
        ({"loss": "kl", "temperature": 0.0}, "--temperature"),
    ],
)
def test_knobs_that_cannot_be(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        one_step.build("featmim", **knobs)
