"""`gather` and `mean` in a loss: the gradients' mean over two processes is the gradient of the global loss."""

import os
import subprocess
import sys
from pathlib import Path

import torch

LOSSES = """
import torch

def gathered(own, everyone):
    # A contrast: each own row against all rows. Mean over the own rows.
    return torch.logsumexp(own @ everyone.T, dim=1).mean()

def centred(own, mean):
    return (own - mean).pow(4).mean()

torch.manual_seed(0)
data = torch.randn(6, 3, dtype=torch.float64)
weight = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
"""
RANK = f"""{LOSSES}
import sys
from ssl_pretrain import distributed
with distributed.world() as world:
    rows = slice(3 * world.rank, 3 * world.rank + 3)
    found = {{}}
    for name in ("gathered", "centred"):
        own = data[rows] @ weight
        loss = gathered(own, distributed.gather(own)) if name == "gathered" else centred(own, distributed.mean(own.mean(0)))
        loss.backward()
        distributed.mean_gradients_([weight])
        found[name] = distributed.all_reduce_(loss.detach()) / world.size, weight.grad
        weight.grad = None
    torch.save(found, f"{{sys.argv[1]}}{{world.rank}}.pt")
"""


def test_gradients_through_gather_and_mean_are_those_of_one_process(tmp_path: Path) -> None:
    place = {"SSL_PRETRAIN_RENDEZVOUS": (tmp_path / "meet").as_uri(), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, tmp_path / "out"],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    one: dict = {}
    exec(LOSSES, one)
    rows = one["data"] @ one["weight"]
    for name, loss in (("gathered", one["gathered"](rows, rows)), ("centred", one["centred"](rows, rows.mean(0)))):
        (gradient,) = torch.autograd.grad(loss, one["weight"], retain_graph=True)
        for rank in (0, 1):
            found, found_gradient = torch.load(tmp_path / f"out{rank}.pt")[name]
            torch.testing.assert_close(found, loss.detach())
            torch.testing.assert_close(found_gradient, gradient)
