"""A command that is refused leaves no run folder, and takes none away."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import TINY
from ssl_pretrain.launch.pretrain import main

SAME = ["--method", "mae", "--steps", "2", "--workers", "0", "--no-score", *TINY]
REFUSED = {
    "--metod mae": "--metod",
    "--method may": "'may'",
    "--data {folder}/none": "--data",
    "--config {folder}/none.yaml": "No such file",
    "--config no_recipe": "neither a recipe nor a file",
    "--steps 5 --epochs 2": "--steps and --epochs",
    "--batch-size 15 --accumulate 2": "--batch-size",
    "--image-size 33": "33",
    "--mask-ratio 1.5": "--mask-ratio",
    "--warmup-steps 5": "--warmup-steps 5",
    "--val-images 1000": "--val-images",
    "--knn-every 1": "--knn-every",
    "--train-split tset": "tset",
    "--logger tensorbord": "did you mean tensorboard?",
    "--init-from {folder}": "{folder}",
    "--init-from {folder}/none": "{folder}/none",
    "--mean 0.5 0.5": "--mean",
    "--partition p": "--launcher slurm",
    "--stages 2 --stages x": "--stages",
}


@pytest.mark.parametrize("argv", REFUSED)
def test_a_refused_command_leaves_nothing(
    argv: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    words = argv.format(folder=folder).split()
    assert main([*SAME, "--data", str(photos), "--out", str(tmp_path / "runs" / "one"), *words]) == 2
    assert REFUSED[argv].format(folder=folder) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_was_there_stays(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "one"
    out.mkdir(parents=True)
    same = [*SAME, "--data", str(photos), "--out", str(out)]
    assert main([*same, "--init-from", str(tmp_path)]) == 2
    assert out.is_dir()
    assert main(same) == 0
    assert main([*same, "--lr", "1"]) == 2
    assert yaml.safe_load((out / "config.yaml").read_text())["lr"] != 1
    assert (out / "encoder" / "config.json").exists()


@pytest.mark.slow
def test_of_several_processes(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    out = tmp_path / "runs" / "one"
    done = pretrain(*SAME, "--data", photos, "--out", out, "--nproc", 2, "--init-from", tmp_path, code=2)
    assert len(done.stderr.strip().splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []
