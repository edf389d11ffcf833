"""SwAV against float64 NumPy written from the paper: assignments, swapped prediction, queue."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from method_helpers import check_stated, losses_of, make_constant_, make_uniform_
from ssl_pretrain.methods.swav import SwAV
from torch import nn

from ssl_pretrain import backbones
from ssl_pretrain.conformance import one_step
from ssl_pretrain.conformance.one_step import after_step
from ssl_pretrain.errors import UserError
from ssl_pretrain.pretext import Losses, Step

KERNELS = 360  # of a step: python tests/kernels.py swav
DEVICE_KERNELS = 384  # with the optimiser, on an accelerator: python tests/device.py swav

K, E, N, V = 7, 5, 12, 4
SMALL = {"prototypes": K, "embedding_dim": E, "hidden_dim": 16, "local_views": 2}


def build(**knobs: object) -> SwAV:
    torch.manual_seed(0)
    options = {**backbones.defaults("vit_micro"), "patch_size": 8, "depth": 1, **SwAV.recipe.encoder}
    encoder = backbones.build("vit_micro", image_size=(32, 32), **options)
    method = SwAV(encoder, SwAV.Config(**{**SMALL, **knobs}))
    method.projector = nn.Sequential()  # the test gives embeddings
    return method


def step(number: int = 3, ok: bool = True, rows: slice | torch.Tensor = slice(0, N)) -> Step:
    made = Step(step=number, total=10, noise=1, rows=rows, batch_size=N, device=torch.device("cpu"))
    made.ok = torch.tensor(ok)
    return made


def embeddings(views: int = V, seed: int = 0) -> np.ndarray:
    """(N, V, E), views of an image alike."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N, 1, E)) + 0.5 * rng.normal(size=(N, views, E))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def numpy_codes(scores: np.ndarray, epsilon: float, iterations: int = 3) -> np.ndarray:
    q = np.exp(scores / epsilon)
    for _ in range(iterations):
        q = q / q.sum(0, keepdims=True)
        q = q / q.sum(1, keepdims=True)
    return q


def numpy_loss(
    z: np.ndarray,
    prototypes: np.ndarray,
    codes: list[np.ndarray] | None = None,
    queue: np.ndarray | None = None,
    temperature: float = 0.1,
    epsilon: float = 0.05,
) -> tuple[float, list[np.ndarray]]:
    """One pair of views after the other; `codes` given are constants, so that differences are the gradient."""
    c = unit(prototypes)
    scores = [unit(z[:, v]) @ c.T for v in range(z.shape[1])]
    if codes is None:
        codes = []
        for v in (0, 1):
            both = scores[v] if queue is None else np.concatenate([scores[v], queue[v] @ c.T])
            codes.append(numpy_codes(both, epsilon)[: len(z)])
    total = 0.0
    for v in (0, 1):
        pairs = [s for s in range(z.shape[1]) if s != v]
        for s in pairs:
            logits = scores[s] / temperature
            log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            total += -(codes[v] * log_p).sum(1).mean() / len(pairs) / 2
    return total, codes


def loss_of(method: SwAV, z: torch.Tensor, number: int = 3) -> Losses:
    return method.loss({"pooled": z}, step(number))


@pytest.mark.parametrize("knobs", [{}, {"temperature": 0.2, "epsilon": 0.1}])
def test_loss_and_gradients_against_numpy(knobs: dict[str, float]) -> None:
    method, z = build(**knobs), embeddings()
    leaf = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    found = loss_of(method, leaf)
    prototypes = method.prototypes.weight.detach().double().numpy()
    expected, codes = numpy_loss(z, prototypes, **knobs)
    assert found.total.item() == pytest.approx(expected, rel=1e-5)
    entropy = -np.mean([(q * np.log(q)).sum(1).mean() for q in codes])
    assert found.terms["code_entropy"].item() == pytest.approx(entropy, rel=1e-4)
    found.total.backward()
    for array, grad in ((z, leaf.grad), (prototypes, method.prototypes.weight.grad)):
        assert grad is not None
        differences = np.empty_like(array)
        for place in np.ndindex(array.shape):
            moved = []
            for sign in (1, -1):
                other = array.copy()
                other[place] += sign * 1e-6
                arguments = (other, prototypes) if array is z else (z, other)
                moved.append(numpy_loss(*arguments, codes=codes, **knobs)[0])
            differences[place] = (moved[0] - moved[1]) / 2e-6
        np.testing.assert_allclose(grad.numpy(), differences, rtol=1e-3, atol=1e-3 * np.abs(differences).max())


def test_without_local_views_the_two_global_ones_swap() -> None:
    method, z = build(local_views=0), embeddings(2)
    found = loss_of(method, torch.tensor(z, dtype=torch.float32))
    expected, _ = numpy_loss(z, method.prototypes.weight.detach().double().numpy())
    assert found.total.item() == pytest.approx(expected, rel=1e-5)
    assert [spec.name for spec in SwAV.views(method.config, (32, 32))] == ["global"]


def test_more_sinkhorn_rounds_make_other_codes() -> None:
    scores = torch.tensor(np.random.default_rng(0).uniform(-1, 1, (2, N, K)), dtype=torch.float32)
    for iterations in (1, 3):
        found = build(sinkhorn_iterations=iterations).assign(scores)
        expected = [numpy_codes(s.astype(float), 0.05, iterations) for s in scores.numpy()]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-6)


def test_prototypes_stay_as_they_are_in_the_first_share_of_the_run() -> None:
    method = build(freeze_prototypes=0.3)
    for number, frozen in ((0, True), (2, True), (3, False)):
        method.zero_grad()
        loss_of(method, torch.tensor(embeddings(), dtype=torch.float32), number).total.backward()
        assert method.prototypes.weight.grad is not None
        assert (not method.prototypes.weight.grad.any()) == frozen


def test_the_queue_holds_the_newest_and_is_used_once_it_is_full() -> None:
    method = build(queue=20, queue_start=0.2)
    prototypes = method.prototypes.weight.detach().double().numpy()
    expected = np.zeros((2, 0, E))
    for number in range(6):
        z = embeddings(seed=number)
        full = expected.shape[1] == 20
        found = loss_of(method, torch.tensor(z, dtype=torch.float32), number)
        loss, _ = numpy_loss(z, prototypes, queue=expected if full else None)
        assert found.total.item() == pytest.approx(loss, rel=1e-4)
        assert full == (number >= 4)  # 12 of 20 places are filled by step 2, all of them by step 3
        if full:
            assert abs(loss - numpy_loss(z, prototypes)[0]) > 1e-3
        before = method.queue.clone()
        after_step(method, step(number, ok=False), found.carry)
        assert torch.equal(method.queue, before)  # a step that is not taken leaves no trace
        after_step(method, step(number), found.carry)
        if number >= 2:
            expected = np.concatenate([unit(z[:, :2]).transpose(1, 0, 2), expected], axis=1)[:, :20]
        held = method.queue.numpy()
        np.testing.assert_allclose(held[:, : expected.shape[1]], expected, rtol=1e-5, atol=1e-6)
        assert not held[:, expected.shape[1] :].any()


def test_the_queue_has_the_order_of_the_global_batch() -> None:
    """Processes and micro-batches interleave the rows; the oldest to leave the queue must be the same ones."""
    method, z = build(queue=8), torch.tensor(embeddings(), dtype=torch.float32)
    mixed = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    queues = []
    for rows in (torch.arange(N), mixed):
        here = step(rows=rows)
        method.queue.zero_()
        after_step(method, here, method.loss({"pooled": z[rows]}, here).carry)
        queues.append(method.queue.clone())
    assert torch.equal(*queues)


RANK = """
import sys, torch
from ssl_pretrain import backbones, distributed
from ssl_pretrain.methods.swav import SwAV
scores, queue, prototypes = torch.load(sys.argv[1])
options = {**backbones.defaults("vit_micro"), "patch_size": 8, "depth": 1}
knobs = {"prototypes": 7, "embedding_dim": 5, "hidden_dim": 16, "queue": 9}
with distributed.world() as here:
    method = SwAV(backbones.build("vit_micro", image_size=(32, 32), **options), SwAV.Config(**knobs))
    with torch.no_grad():
        method.prototypes.weight.copy_(prototypes)
    method.queue.copy_(queue)
    codes = method.assign(scores[:, here.rank * 6 : here.rank * 6 + 6])
    torch.save(codes, f"{sys.argv[2]}{here.rank}.pt")
"""


def test_two_processes_share_the_queue(tmp_path: Path) -> None:
    """An odd number of places, so that the processes hold unequal shares: each place counts once."""
    method = build(queue=9)
    rng = np.random.default_rng(0)
    scores, queue = rng.uniform(-1, 1, (2, N, K)), unit(rng.normal(size=(2, 9, E)))
    prototypes = method.prototypes.weight.detach().clone()
    given = (torch.tensor(scores).float(), torch.tensor(queue).float(), prototypes)
    torch.save(given, tmp_path / "in.pt")
    place = {"SSL_PRETRAIN_RENDEZVOUS": (tmp_path / "meet").as_uri(), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, tmp_path / "in.pt", tmp_path / "out"],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    found = torch.cat([torch.load(tmp_path / f"out{rank}.pt") for rank in (0, 1)], dim=1)
    c = unit(prototypes.double().numpy())
    expected = [numpy_codes(np.concatenate([scores[v], queue[v] @ c.T]), 0.05)[:N] for v in (0, 1)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-6)


def test_no_queue_carries_nothing() -> None:
    method = build()
    found = loss_of(method, torch.tensor(embeddings(), dtype=torch.float32))
    assert not found.carry
    after_step(method, step(), found.carry)


@pytest.mark.parametrize("queue", [0, 24])
def test_collapsed_state_has_the_stated_loss(queue: int) -> None:
    method = one_step.build("swav", queue=queue)
    make_constant_(method.encoder)
    for _ in range(2):  # fills the queue
        one_step.after_step(method, step(), losses_of(method).carry)
    assert method.queue.norm(dim=-1).sum() == pytest.approx(2 * queue)
    constant = losses_of(method)

    method = one_step.build("swav", queue=queue)
    make_uniform_(method.prototypes)
    check_stated(method, {"loss": losses_of(method), "code_entropy": constant})


def test_the_released_scales() -> None:
    config = SwAV.Config()
    large, small = SwAV.views(config, (224, 224))
    assert (large.count, large.size, large.scale) == (2, (224, 224), (0.14, 1.0))
    assert (small.count, small.size, small.scale) == (6, (96, 96), (0.05, 0.14))
    assert round(config.freeze_prototypes * 800 * 1_281_167 / 4096) == 313
    at_4096 = SwAV.recipe.lr * 4096 / SwAV.recipe.lr_batch
    assert (at_4096, SwAV.recipe.final_lr) == (4.8, 4.8e-3)


@pytest.mark.parametrize(
    "knobs", [{"prototypes": 1}, {"sinkhorn_iterations": 0}, {"queue": -1}, {"local_views": -1}, {"epsilon": 0.0}]
)
def test_knobs_out_of_range_are_refused(knobs: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(knobs)).replace("_", "-")):
        build(**knobs)
