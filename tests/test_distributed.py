"""What a process leaves behind when it has left the others.

gloo's threads release the tensors they moved, for which they need the interpreter; one that gets to it while the
interpreter is ending aborts the process ("terminate called without an active exception"). So no such thread may be left.

(With FSDP2 some are: torch's own caches hold the group. There the loop leaves them time instead.)
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

SCRIPT = """
import torch
from ssl_pretrain import distributed
from torch.nn.parallel import DistributedDataParallel

def use() -> None:
    with distributed.world():
        DistributedDataParallel(torch.nn.Linear(2, 2))(torch.ones(1, 2)).sum().backward()
"""
COMMAND = """
import sys
from ssl_pretrain.launch.pretrain import main

def use() -> None:
    assert main(sys.argv[1:]) == 0
"""
AFTER = """
import gc, pathlib
use()
gc.collect()
names = [(task / "comm").read_text().strip() for task in pathlib.Path("/proc/self/task").iterdir()]
print("LEFT", *[name for name in names if "gloo" in name])
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads a process's threads from Linux's /proc")
@pytest.mark.parametrize("use", [SCRIPT, COMMAND], ids=["script", "command"])
def test_no_thread_of_the_process_group_outlives_it(use: str, photos: Path, tmp_path: Path) -> None:
    flags = [
        "--method",
        "mae",
        "--data",
        photos,
        "--out",
        tmp_path / "run",
        "--steps",
        4,
        "--checkpoint-every",
        2,
        *TINY,
    ]
    flags += ["--workers", 0, "--no-score"]
    place = {"SSL_PRETRAIN_RENDEZVOUS": (tmp_path / "rendezvous").as_uri(), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", use + AFTER, *map(str, flags)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    assert [rank.communicate()[0].splitlines()[-1] for rank in ranks] == ["LEFT", "LEFT"]
