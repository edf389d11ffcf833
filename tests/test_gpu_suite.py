"""The GPU suite, tried where there is no GPU: it ends, and writes what it says it measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def suite(*flags: object) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "benchmarks.gpu", *map(str, flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=env, check=False)


def test_rows_loop_and_table(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    small = ["--device", "cpu", "--image-size", 32, "--batch-size", 4, "--encoders", "vit_micro", "--ways", "eager"]
    done = suite(*small, "--methods", "mae", "simclr", "--out", out)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert [(row["method"], row["batch"], row["compiled"]) for row in report["steps"]] == [
        ("mae", 4, False),
        ("simclr", 4, False),
    ]
    for row in report["steps"]:
        assert row["images_per_s"] > 0
        assert 0 < row["share_of_matmul"] < 2  # a small product is a noisy ceiling
    (loop,) = report["loops"]
    assert loop["method"] == "mae"
    assert 0 < loop["of_bare_step"] < 10
    assert report["not_run"] == []
    assert report["ceilings"]["matmul_flops"] > 1e8
    assert "| simclr | vit_micro | eager | 4 |" in out.with_suffix(".md").read_text()


def test_what_the_time_does_not_reach_is_named(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    done = suite("--device", "cpu", "--minutes", 0, "--methods", "mae", "--encoders", "vit_micro", "--out", out)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["steps"] == []
    assert report["not_run"] == ["mae vit_micro eager", "mae vit_micro compiled", "loop mae vit_micro"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_try_it() -> None:
    done = suite()
    assert done.returncode == 2
    assert "--device cpu" in done.stderr
