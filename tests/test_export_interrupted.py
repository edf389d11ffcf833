"""An export over an older one that is interrupted at any place leaves one that can be read."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_encoders import small_export

from ssl_pretrain import encoder

CODE = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from small_encoders import small_export
from ssl_pretrain import encoder
path, at = Path(sys.argv[1]), int(sys.argv[2])
encoder.save(path, small_export(1, lineage={"step": 1}))
calls = [0]
def die_at(real):
    def call(*args):
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), 9)
        return real(*args)
    return call
os.replace, os.fsync = die_at(os.replace), die_at(os.fsync)
encoder.save(path, small_export(2, lineage={"step": 2}))
"""


@pytest.mark.parametrize("at", range(1, 8))
def test_killed_before_each_sync_and_rename(at: int, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", CODE, str(tmp_path / "encoder"), str(at), str(Path(__file__).parent)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    found = encoder.load(tmp_path / "encoder")
    step = found.lineage["step"]
    assert step == (1 if at <= 2 else 2)  # weights are the first rename
    expected = small_export(step, lineage={"step": step}).backbone.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.backbone.state_dict().items())


def test_other_weights_under_a_description_are_refused(tmp_path: Path) -> None:
    encoder.save(tmp_path / "a", small_export(1, lineage={"step": 1}))
    encoder.save(tmp_path / "b", small_export(2, lineage={"step": 2}))
    from safetensors.torch import load_file, save_file

    save_file(load_file(tmp_path / "b" / "model.safetensors"), tmp_path / "a" / "model.safetensors")
    with pytest.raises(encoder.UserError, match="damaged or was replaced"):
        encoder.load(tmp_path / "a")
