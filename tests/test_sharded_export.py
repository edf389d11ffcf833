"""The export of a sharded run, made from its checkpoint's files while training goes on."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, command, metrics

from ssl_pretrain import checkpoint, encoder


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mae", "dino"])
def test_it_holds_what_the_checkpoint_holds(method: str, photos: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "run", list(TINY)
    if method == "dino":  # no decoder, and heads of its own
        cut = next(i for i, word in enumerate(plain) if str(word).startswith("--decoder"))
        plain = [*plain[:cut], "--prototypes", 64, "--hidden-dim", 32, "--bottleneck-dim", 16, "--local-views", 1]
    argv = command("pretrain", "--method", method, "--data", photos, "--out", out, "--steps", 100_000, "--log-every", 1,
                   "--checkpoint-every", 20, "--keep-last", 1000, "--nproc", 2, "--parallel", "fsdp", *plain)  # fmt: skip
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    written = out / "encoder" / "config.json"
    end = time.monotonic() + 120
    while process.poll() is None and not written.exists() and time.monotonic() < end:
        time.sleep(0.02)
    for rank in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(rank), signal.SIGKILL)  # the command itself gone, they would save and end
    said, _ = process.communicate()
    assert written.exists(), said
    exported = encoder.load(out / "encoder")
    step = json.loads(written.read_text())["lineage"]["step"]
    assert step % 20 == 0
    within = {"mae": "encoder.", "dino": "teacher.encoder."}[method]
    kept = checkpoint.load(out / "checkpoints", step)["method"]
    found = exported.backbone.state_dict()
    assert len(found) > 20
    for name, tensor in found.items():
        assert torch.equal(tensor, kept[within + name]), name
    assert all(0 <= line["checkpoint_wait"] <= 1 for line in metrics(out) if "loss" in line)
