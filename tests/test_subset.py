"""--subset: which images it takes, that smaller parts lie in larger ones, that a run continues with its own part only."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, losses
from ssl_pretrain.launch.pretrain import main, read_command

from ssl_pretrain import checkpoint
from ssl_pretrain.config import Run
from ssl_pretrain.data.source import Source, open_source
from ssl_pretrain.data.subset import Subset, choose
from ssl_pretrain.distributed import World
from ssl_pretrain.errors import UserError
from ssl_pretrain.loop import start

HERE = World(0, 1, 0, 1, torch.device("cpu"))
NONE = np.zeros(0, np.int64)
FRACTALS = "fractals:classes=5,images=200"


def opened(data: str = FRACTALS, **more: Any) -> tuple[Source, Source | None]:
    return start.open_data(Run(method="mae", data=data, **more), HERE)


def names(source: Source | None) -> list[str]:
    assert source is not None
    return [source.name(i) for i in range(len(source))]


@pytest.mark.parametrize("seed", [0, 1])
def test_smaller_parts_lie_in_larger_ones(seed: int) -> None:
    whole = names(opened()[0])
    parts = [names(opened(subset=asked, subset_seed=seed)[0]) for asked in (0.01, 0.1, 50, 0.5, 199, 1)]
    assert [len(part) for part in parts] == [2, 20, 50, 100, 199, 200]
    for small, large in zip(parts, [*parts[1:], whole], strict=True):
        assert set(small) <= set(large)
        assert small == sorted(small, key=whole.index)  # in the data's order
    assert parts[-1] == whole


def test_the_part_depends_on_its_own_seed_only_and_is_drawn_evenly() -> None:
    part = names(opened(subset=0.1, seed=0)[0])
    assert names(opened(subset=0.1, seed=5)[0]) == part
    assert names(opened(subset=0.1, subset_seed=1)[0]) != part
    source = open_source("fractals:classes=2,images=10", "train")
    counts = sum(np.bincount(choose(source, 3, seed, NONE).indices, minlength=10) for seed in range(400))
    assert counts.sum() == 1200
    assert abs(counts - 120).max() < 5 * np.sqrt(400 * 0.3 * 0.7)


def test_it_is_the_same_on_every_machine_and_version() -> None:
    assert choose(open_source(FRACTALS, "train"), 3, 0, NONE).indices.tolist() == [45, 75, 193]


def test_the_images_for_validation_are_the_same_for_every_part_and_in_none() -> None:
    whole, held = opened(val_images=40)
    for asked in (0.1, 0.5, 1):
        part, also_held = opened(subset=asked, val_images=40)
        assert names(also_held) == names(held)
        assert set(names(part)) <= set(names(whole))
        assert len(part) == asked * 160
    assert set(names(opened(subset=0.1, val_images=40)[0])) <= set(names(opened(subset=0.2, val_images=40)[0]))


def test_a_part_brings_its_labels_and_its_images() -> None:
    source = open_source(FRACTALS, "train")
    part = choose(source, 0.25, 0, NONE)
    assert isinstance(part, Subset)
    assert part.labels is not None
    assert source.labels is not None
    assert part.labels.tolist() == source.labels[part.indices].tolist()
    assert np.array_equal(part[7], source[int(part.indices[7])])
    assert part.description.startswith("50 of 200 images: --subset 0.25 ")


def test_a_file_lists_the_images(tmp_path: Path) -> None:
    chosen = [7, 4, 150]
    np.save(tmp_path / "part.npy", np.array(chosen, np.uint16))
    (tmp_path / "part.txt").write_text("\n".join(map(str, chosen)) + "\n")
    whole = names(opened()[0])
    for file in ("part.npy", "part.txt"):
        part, _ = opened(subset=str(tmp_path / file))
        assert names(part) == [whole[i] for i in sorted(chosen)]
        assert part.description.startswith("3 of 200 images")
    _, held = opened(val_images=20)
    assert isinstance(held, Subset)
    np.save(tmp_path / "more.npy", np.array([*held.indices[:3], *chosen]))
    assert not set(held.indices) & set(chosen)  # else this test has to choose others
    assert names(opened(subset=str(tmp_path / "more.npy"), val_images=20)[0]) == [whole[i] for i in sorted(chosen)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("1\n200\n", "names image 200: the 200 images have the indices 0 to 199"),
        ("-1 5", "names image -1"),
        ("3 4 3", "names image 3 twice"),
        ("", "must be a list of whole numbers"),
        ("a.jpg", "holds no list of indices"),
        ("1.5", "holds no list of indices"),
        ("99999999999999999999", "holds no list of indices"),
        (np.zeros((2, 2), np.int64), r"int64 \(2, 2\)"),
        (np.array([0.5]), "float64"),
        (np.array([None]), "holds no list of indices"),  # of Python objects, which are not read
        (None, "No such file.*a share"),
    ],
)
def test_a_file_that_is_no_list_gets_one_line(content: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / ("part.npy" if isinstance(content, np.ndarray) else "part.txt")
    if isinstance(content, np.ndarray):
        np.save(file, content, allow_pickle=True)
    elif content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        opened(subset=str(file))
    assert "\n" not in str(caught.value)


def test_more_images_than_there_are_and_none_left() -> None:
    with pytest.raises(UserError, match="--subset 201: there are 200 images to train on"):
        opened(subset=201)
    with pytest.raises(UserError, match="--subset 190: there are 180 images"):
        opened(subset=190, val_images=20)


def test_the_fingerprint_says_which_images_they_are(tmp_path: Path) -> None:
    known = {
        opened(**more)[0].fingerprint
        for more in ({}, {"subset": 0.1}, {"subset": 0.2}, {"subset_seed": 1, "subset": 0.1})
    }
    assert len(known) == 4
    np.save(tmp_path / "part.npy", opened(subset=0.1)[0].indices)  # type: ignore[attr-defined]
    assert opened(subset=str(tmp_path / "part.npy"))[0].fingerprint in known  # the same images


def test_flags_and_yaml_take_numbers_and_files(tmp_path: Path) -> None:
    for text, value in (("0.1", 0.1), ("2000", 2000), ("ids.npy", "ids.npy")):
        assert read_command(["--method", "mae", "--subset", text])[0].subset == value
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"method: mae\nsubset: {text}\n")
        assert read_command(["--config", str(recipe)])[0].subset == value


def test_a_run_on_a_part_continues_with_it_and_with_no_other(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, part = tmp_path / "run", tmp_path / "part.txt"
    held = opened(str(photos), val_images=16)[1]
    assert isinstance(held, Subset)
    free = sorted({*range(96)} - {*held.indices.tolist()})
    part.write_text("\n".join(map(str, [*free[:40], *held.indices[:5]])))
    same = [
        "--method",
        "mae",
        "--data",
        str(photos),
        "--out",
        str(out),
        "--workers",
        "0",
        "--log-every",
        "1",
        "--no-score",
    ]
    same += ["--epochs", "2", "--checkpoint-every", "2", "--val-images", "16", "--val-every", "3", *TINY]
    assert main([*same, "--subset", str(part)]) == 0
    said = capsys.readouterr()
    assert f"40 of 80 images: --subset {part}" in said.out + said.err
    facts, recorded = (
        json.loads((out / "manifest.json").read_text())["data"],
        yaml.safe_load((out / "config.yaml").read_text()),
    )
    assert (facts["images"], facts["subset"], recorded["subset"]) == (40, str(part), str(part))
    steps = 5  # epochs are passes over the part
    assert recorded["steps"] == steps == max(losses(out))
    curve, folder = losses(out), out / "checkpoints"
    last = checkpoint.load(folder, steps)["method"]
    last = {name: value.clone() for name, value in last.items()}
    shutil.rmtree(folder / f"step-{steps:08d}")
    assert main([*same, "--subset", str(part)]) == 0
    assert losses(out) == curve
    assert all(torch.equal(value, last[name]) for name, value in checkpoint.load(folder, steps)["method"].items())
    capsys.readouterr()

    def refused(*words: str) -> str:
        assert main([*same, *words]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert f"--subset: {part} -> 0.5" in refused("--subset", "0.5")
    part.write_text("\n".join(map(str, free[40:])))
    assert "the indices in --subset may have changed" in refused("--subset", str(part))
