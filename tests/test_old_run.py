"""A run that an earlier version began goes on: tests/old_run is a run folder of version 0.1.0 as it was before the core was
reorganised (commit 1bde188), stopped after 3 of its 6 steps; expected.safetensors holds the weights that that version ended
with. It was made by the command below."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file

from ssl_pretrain import checkpoint, encoder

OLD = ROOT / "tests" / "old_run"
COMMAND = (
    "--method mae --data fractals:classes=4,images=64 --out run --encoder vit_micro --dim 16 --heads 1 --depth 1 "
    "--patch-size 8 --image-size 32 --batch-size 8 --steps 6 --checkpoint-every 3 --log-every 1 --decoder-dim 16 "
    "--decoder-depth 1 --decoder-heads 1 --monitor-every 0 --picture-every 0 --precision fp32 --workers 0 --no-score "
    "--lr 1e-3 --recompute"
)


def test_a_run_of_an_earlier_version_resumes_and_ends_with_its_weights(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(OLD, run)
    (run / "expected.safetensors").unlink()
    old_config = yaml.safe_load((run / "config.yaml").read_text())
    old_lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    done = subprocess.run(
        [sys.executable, "-m", "ssl_pretrain.launch.pretrain", *COMMAND.split()],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "continuing from step 3 of 6" in done.stderr
    found, expected = checkpoint.load(run / "checkpoints", 6)["method"], load_file(OLD / "expected.safetensors")
    assert {f"method/{name}" for name in found} == set(expected)
    for name, value in found.items():  # bit-identical on one machine; another one rounds otherwise
        torch.testing.assert_close(value, expected[f"method/{name}"], rtol=1e-5, atol=1e-6)
    new_config = yaml.safe_load((run / "config.yaml").read_text())
    # Flags may be added; each flag that there was keeps its key and its value.
    assert {key: new_config.get(key) for key in old_config} == old_config
    new_lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in new_lines] == [1, 2, 3, 4, 5, 6]
    for old, new in zip(old_lines, new_lines, strict=True):
        assert set(old) <= set(new)
        assert abs(old["loss"] - new["loss"]) < 1e-5
    assert encoder.load(run).backbone.dim == 16
