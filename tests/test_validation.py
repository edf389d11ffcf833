"""The images held out for a validation loss: which they are, and that each of them counts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from ssl_pretrain.launch.pretrain import main

from ssl_pretrain.config import Run
from ssl_pretrain.distributed import World
from ssl_pretrain.errors import UserError
from ssl_pretrain.loop import probes, start

HERE = World(0, 1, 0, 1, torch.device("cpu"))


def folder(tmp_path: Path, photos: Path, **splits: int) -> Path:
    pictures = sorted(path for path in photos.rglob("*") if path.is_file())
    for split, count in splits.items():
        for i, picture in enumerate(pictures[:count]):
            (tmp_path / "data" / split / "a").mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, tmp_path / "data" / split / "a" / f"{split}-{i}{picture.suffix}")
    return tmp_path / "data"


def run(data: Path, **more: Any) -> Run:
    return Run(method="mae", data=str(data), **more)


def names(source: Any) -> set[str]:
    return {Path(source.name(i)).name for i in range(len(source))}


def test_they_come_from_a_split_for_validation(photos: Path, tmp_path: Path) -> None:
    data = folder(tmp_path, photos, train=12, val=8, test=9)
    source, held_out = start.open_data(run(data, val_images=5), HERE)
    assert len(source) == 12
    assert held_out is not None
    assert len(names(held_out)) == 5
    assert all(name.startswith("val-") for name in names(held_out))


def test_they_never_come_from_a_test_split(photos: Path, tmp_path: Path) -> None:
    data = folder(tmp_path, photos, train=12, test=9)
    source, held_out = start.open_data(run(data, val_images=5), HERE)
    assert held_out is not None
    assert len(names(source)) == 7
    assert len(names(held_out)) == 5
    assert not names(source) & names(held_out)
    assert all(name.startswith("train-") for name in names(source) | names(held_out))


def test_fewer_than_processes_are_refused(photos: Path, tmp_path: Path) -> None:
    data = folder(tmp_path, photos, train=12)
    with pytest.raises(UserError, match="--val-images is 3; there are 12 images to hold out from, and 4 process"):
        start.open_data(run(data, val_images=3), World(0, 4, 0, 4, HERE.device))
    with pytest.raises(UserError, match="--val-images is 12"):
        start.open_data(run(data, val_images=12), HERE)


@pytest.mark.parametrize(("held", "batch_size", "used"), [(10, 4, 9), (10, 8, 10), (12, 8, 12), (5, 8, 5), (3, 2, 3)])
def test_next_to_all_of_them_count(held: int, batch_size: int, used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one size, no larger than in training: fewer are left out than there are batches."""
    sizes: list[int] = []

    def batches(source: Any, specs: Any, share: Any, **_: Any) -> list[Any]:
        sizes.extend([share.batch_size] * (len(source) // share.batch_size))
        return []

    monkeypatch.setattr(probes, "fixed_batches", batches)

    class Settings:
        batch_size, seed, in_chans, bad_images, steps = 0, 0, 3, "replace", 10

    run: Any = Settings()
    run.batch_size = batch_size
    with pytest.raises(ZeroDivisionError):  # no batch was made here
        probes.validate(run, torch.nn.Identity(), range(held), (), None, HERE)  # type: ignore[arg-type]
    assert sum(sizes) == used
    assert max(sizes) <= batch_size


@pytest.mark.parametrize("method", ["mae", "simmim", "ijepa"])
def test_weights_that_do_not_change_have_the_same_loss_each_time(method: str, photos: Path, tmp_path: Path) -> None:
    """To the last bit, though training draws other views and masks in every step: at a learning rate of 0."""
    words = [
        "--method",
        method,
        "--data",
        str(photos),
        "--workers",
        "0",
        "--steps",
        "4",
        "--lr",
        "0",
        "--final-lr",
        "0",
    ]
    words += ["--val-images", "20", "--val-every", "1", "--log-every", "1", "--no-score"]
    words += [word for i, word in enumerate(TINY) if method == "mae" or "decoder" not in TINY[i - (i % 2)]]
    if method == "ijepa":
        words += ["--predictor-dim", "32", "--predictor-depth", "1", "--predictor-heads", "2"]

    def found(out: Path, *more: str) -> tuple[list[float], list[float]]:
        assert main([*words, "--out", str(out), *more]) == 0
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [line["val/loss"] for line in lines if "val/loss" in line], [
            line["loss"] for line in lines if "loss" in line
        ]

    losses, of_training = found(tmp_path / "run")
    assert len(losses) == len(of_training) == 4
    assert len(set(losses)) == 1
    assert len(set(of_training)) == 4
    assert found(tmp_path / "again", "--subset", "0.5")[0] == losses  # the same images and masks beside another part
