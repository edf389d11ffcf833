"""The loss curve on two processes is that on one up to rounding, which training magnifies: no more than it magnifies noise
of the size of a rounding error on the weights (docs/scale.md, "The same curve on any number of processes")."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, losses

FLAGS = (
    "--data fractals:classes=6,images=256 --encoder vit_micro --image-size 32 --patch-size 8 --depth 2 --batch-size 32 "
    "--steps 8 --warmup-steps 0 --log-every 1 --workers 0 --no-score --monitor-every 0 --picture-every 0 --precision fp32"
).split()
NOISE = 1e-7  # of each weight; the spacing of float32 is 0.6e-7 to 1.2e-7
FIRST = 1e-6  # relative difference of the losses at the first step, before any rounding error has been trained on
FLOOR, FACTOR = 1e-5, 10  # at any step: at most FLOOR, or FACTOR times the largest that the noise makes


def distances(found: dict[int, float], wanted: dict[int, float]) -> list[float]:
    assert list(found) == list(wanted) == list(range(1, 9))
    return [abs(found[step] - wanted[step]) / abs(wanted[step]) for step in wanted]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mae", "barlow", "simclr"])
def test_two_processes_differ_no_more_than_noise_of_rounding_size_does(
    method: str, tmp_path: Path, pretrain: Callable
) -> None:
    for name, noise in (("one", 0.0), ("noise", NOISE)):
        argv = [sys.executable, ROOT / "tests" / "loss_curves.py", tmp_path / name, noise, "--method", method, *FLAGS]
        subprocess.run(list(map(str, argv)), check=True, capture_output=True)
    pretrain("--method", method, *FLAGS, "--out", tmp_path / "two", "--nproc", 2)
    one, two, noise_curve = (losses(tmp_path / name) for name in ("one", "two", "noise"))
    found, control = distances(two, one), distances(noise_curve, one)
    assert any(control), "the noise was not added"
    assert found[0] <= FIRST
    assert max(found) <= max(FLOOR, FACTOR * max(control)), (found, control)
