"""Batch norm over the global batch: torch's own in one process, and two processes against one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ssl_pretrain.distributed.batch_norm import BatchNorm1d, BatchNorm2d, couples_samples

RANK = """
import sys, torch
from ssl_pretrain import distributed
from ssl_pretrain.distributed.batch_norm import BatchNorm1d, BatchNorm2d
out, kind = sys.argv[1], sys.argv[2]
torch.manual_seed(0)
x = torch.randn(8, 5, 3, 2) * 3 + 100 if kind == "2d" else torch.randn(8, 5) * 3 + 100
weight = torch.randn_like(x)
with distributed.world() as here:
    norm = (BatchNorm2d if kind == "2d" else BatchNorm1d)(5)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 6.0))
    rows = slice(here.rank * 8 // here.size, (here.rank + 1) * 8 // here.size)
    mine = x[rows].clone().requires_grad_()
    y = norm(mine)
    (y * weight[rows]).sum().div(4).backward()   # each process: the sum over its rows; together the sum over all
    y = distributed.gather(y.detach())
    grad = distributed.gather(mine.grad)
    gain = distributed.all_reduce_(norm.weight.grad.clone())
    if here.rank == 0:
        torch.save({"y": y, "grad": grad, "gain": gain, **norm.state_dict()}, out)
"""


@pytest.mark.parametrize("kind", ["1d", "2d"])
def test_two_processes_give_what_torch_gives_for_all_rows(kind: str, tmp_path: Path) -> None:
    place = {"SSL_PRETRAIN_RENDEZVOUS": (tmp_path / "meet").as_uri(), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, tmp_path / "out.pt", kind],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    found = torch.load(tmp_path / "out.pt")
    torch.manual_seed(0)
    x = torch.randn(8, 5, 3, 2) * 3 + 100 if kind == "2d" else torch.randn(8, 5) * 3 + 100
    weight = torch.randn_like(x)
    x.requires_grad_()
    norm = (nn.BatchNorm2d if kind == "2d" else nn.BatchNorm1d)(5)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 6.0))
    y = norm(x)
    (y * weight).sum().div(4).backward()
    assert x.grad is not None
    assert norm.weight.grad is not None
    torch.testing.assert_close(found["y"], y.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["grad"], x.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["gain"], norm.weight.grad, rtol=1e-3, atol=1e-4)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(found[name], norm.state_dict()[name], rtol=1e-5, atol=1e-5)


OF_VISIBLE = """
import sys, torch
from ssl_pretrain import distributed
from ssl_pretrain.distributed.batch_norm import BatchNorm2d
torch.manual_seed(0)
x, weight = torch.randn(8, 5, 3, 2) * 3 + 100, torch.randn(8, 5, 3, 2)
visible = torch.rand(8, 1, 3, 2) < torch.linspace(0.2, 0.9, 8)[:, None, None, None]   # more in the second process
with distributed.world() as here:
    norm = BatchNorm2d(5)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 6.0))
    rows = slice(here.rank * 8 // here.size, (here.rank + 1) * 8 // here.size)
    mine = x[rows].clone().requires_grad_()
    y = norm(mine, visible[rows])
    (y * weight[rows]).sum().div(4).backward()
    y, grad = distributed.gather(y.detach()), distributed.gather(mine.grad)
    gain = distributed.all_reduce_(norm.weight.grad.clone())
    if here.rank == 0:
        torch.save({"y": y, "grad": grad, "gain": gain, **norm.state_dict()}, sys.argv[1])
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_visible_positions_are_those_that_torch_is_given(processes: int, tmp_path: Path) -> None:
    """As rows of a one-dimensional batch norm; the processes have different numbers of them."""
    place = {"SSL_PRETRAIN_RENDEZVOUS": (tmp_path / "meet").as_uri(), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", OF_VISIBLE, tmp_path / "out.pt"],
            env={**os.environ, **place, "WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]
    assert [rank.wait() for rank in ranks] == [0] * processes
    found = torch.load(tmp_path / "out.pt")
    torch.manual_seed(0)
    x, weight = torch.randn(8, 5, 3, 2) * 3 + 100, torch.randn(8, 5, 3, 2)
    visible = torch.rand(8, 1, 3, 2) < torch.linspace(0.2, 0.9, 8)[:, None, None, None]
    assert visible[:4].sum() != visible[4:].sum()
    x.requires_grad_()
    norm = nn.BatchNorm1d(5)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 6.0))
    here = visible[:, 0]
    y = norm(x.permute(0, 2, 3, 1)[here])
    (y * weight.permute(0, 2, 3, 1)[here]).sum().div(4).backward()
    assert x.grad is not None
    assert norm.weight.grad is not None
    ours = found["y"].permute(0, 2, 3, 1)
    torch.testing.assert_close(ours[here], y.detach(), rtol=1e-4, atol=1e-4)
    assert not ours[~here].any()
    torch.testing.assert_close(found["grad"], x.grad, rtol=1e-3, atol=1e-4)
    assert not found["grad"].permute(0, 2, 3, 1)[~here].any()
    torch.testing.assert_close(found["gain"], norm.weight.grad, rtol=1e-3, atol=1e-4)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(found[name], norm.state_dict()[name], rtol=1e-5, atol=1e-5)


def test_batch_norm_of_visible_positions_in_eval_mode_and_of_what_is_not_finite() -> None:
    norm = BatchNorm2d(4)
    draws = torch.Generator().manual_seed(0)
    x, visible = torch.randn(6, 4, 3, 3, generator=draws), torch.rand(6, 1, 3, 3, generator=draws) < 0.5
    norm(x + 2, visible)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    assert before["running_mean"].min() > 0.1
    norm(torch.full_like(x, torch.nan), visible)
    norm.eval()
    torch.testing.assert_close(norm(x, visible), norm(x) * visible)
    for name in ("running_mean", "running_var"):
        assert torch.equal(norm.state_dict()[name], before[name])


def test_one_process_is_torchs_own_with_torchs_names() -> None:
    ours, torchs = BatchNorm2d(4), nn.BatchNorm2d(4)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    x = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        torch.testing.assert_close(ours(x), torchs(x))
    ours.eval(), torchs.eval()
    torch.testing.assert_close(ours(x), torchs(x))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(ours.state_dict()[name], torchs.state_dict()[name])


def test_a_batch_that_is_not_finite_leaves_no_trace() -> None:
    norm = BatchNorm1d(3)
    norm(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm(torch.full((5, 3), float("nan")))
    for name in ("running_mean", "running_var"):
        assert torch.equal(norm.state_dict()[name], before[name])


def test_wrong_shapes_are_refused_and_coupling_is_known() -> None:
    with pytest.raises(ValueError, match="BatchNorm1d takes"):
        BatchNorm1d(3)(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="BatchNorm2d takes"):
        BatchNorm2d(3)(torch.zeros(2, 3))
    assert couples_samples(nn.Sequential(nn.Linear(2, 2), BatchNorm1d(2)))
    assert not couples_samples(nn.LayerNorm(2))
