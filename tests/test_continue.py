"""Recipes of continued pretraining: they start from weights, train the heads first, and resume exactly."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metrics
from torch import Tensor

from ssl_pretrain import checkpoint, encoder

TINY = {
    "continue_mae": ["--decoder-dim", "32", "--decoder-depth", "1", "--decoder-heads", "2"],
    "continue_dino": ["--hidden-dim", "32", "--bottleneck-dim", "16", "--prototypes", "24", "--local-views", "1"],
    "continue_dinov2": ["--hidden-dim", "32", "--bottleneck-dim", "16", "--prototypes", "24", "--local-views", "1"],
}
# 20 steps: the encoder stands still in the first one and moves from the third on
SHORT = ["--steps", "20", "--batch-size", "8", "--no-score", "--picture-every", "0", "--monitor-every", "0"]
SHORT += ["--checkpoint-every", "1", "--keep-last", "50", "--log-every", "1", "--workers", "0"]


@pytest.fixture(scope="module")
def start(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run whose weights the others continue."""
    from ssl_pretrain.launch.pretrain import main

    out = tmp_path_factory.mktemp("continue") / "start"
    argv = ["--method", "mae", "--encoder", "vit_micro", "--image-size", "32", "--patch-size", "8", "--depth", "2"]
    argv += [*TINY["continue_mae"], "--steps", "2", "--batch-size", "8", "--no-score", "--picture-every", "0"]
    assert main([*argv, "--workers", "0", "--data", str(photos), "--out", str(out)]) == 0
    return out


def state(run: Path, step: int) -> dict[str, Tensor]:
    return checkpoint.load(run / "checkpoints", step)["method"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TINY)
def test_heads_first_and_resumed_in_the_middle(
    recipe: str, start: Path, photos: Path, tmp_path: Path, pretrain: Callable[..., Any]
) -> None:
    command = ["--config", recipe, "--init-from", start, "--data", photos, *SHORT, *TINY[recipe]]
    pretrain(*command, "--out", tmp_path / "whole")
    first, last = state(tmp_path / "whole", 1), state(tmp_path / "whole", 20)
    begun = encoder.load(start).backbone.state_dict()
    for name, weight in begun.items():
        assert torch.equal(first[f"encoder.{name}"], weight), f"{name} moved while the heads warm up"
    moved = [name for name, weight in begun.items() if not torch.equal(last[f"encoder.{name}"], weight)]
    assert len(moved) > len(begun) / 2
    heads = [name for name in first if name.startswith(("head", "decoder")) and not name.endswith("bias")]
    assert any(not torch.equal(first[name], last[name]) for name in heads)
    lines = [line for line in metrics(tmp_path / "whole") if "anchor" in line]
    assert len(lines) == 20
    assert max(line["anchor"] for line in lines[10:]) > 1e-6  # it acts once the encoder moves

    # killed after the first step, in the middle of the warm-up of the heads
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for folder in (tmp_path / "killed" / "checkpoints").iterdir():
        if int(folder.name.split("-")[1]) > 1:
            shutil.rmtree(folder)
    done = pretrain(*command, "--out", tmp_path / "killed")
    assert "continuing from step 1 of 20" in done.stderr
    again = state(tmp_path / "killed", 20)
    assert all(torch.equal(value, again[name]) for name, value in last.items())
    before, after = (encoder.load(tmp_path / run).fingerprint for run in ("whole", "killed"))
    assert before == after
