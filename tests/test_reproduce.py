"""Recipes by their names, from the repository and from a wheel, and `reproduce` against a result that is known."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY
from ssl_pretrain.launch import paths, recipe_files, reproduce
from ssl_pretrain.launch.pretrain import main, read_command

from ssl_pretrain import __version__, plugins
from ssl_pretrain.errors import UserError

NAMES = [path.stem for path in sorted((ROOT / "recipes").glob("*.yaml"))]
FLAGS = dict(zip(TINY[::2], TINY[1::2], strict=True))


def test_a_name_is_the_file_of_the_recipe_from_anywhere(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    by_name = read_command(["--config", "mae_cifar10", "--data", str(photos)])
    by_path = read_command(["--config", str(ROOT / "recipes" / "mae_cifar10.yaml"), "--data", str(photos)])
    assert str(by_name[0].config) == "mae_cifar10"
    assert by_name[0].encoder == by_path[0].encoder == "vit_micro"
    assert by_name[1:] == by_path[1:]
    (tmp_path / "mae_cifar10").write_text("method: simclr\n")  # a file that is there is meant
    assert read_command(["--config", "mae_cifar10", "--data", str(photos)])[0].method == "simclr"
    for text, words in {
        "mae_cifar11": "--config: 'mae_cifar11' is neither a recipe nor a file; did you mean mae_cifar10?",
        "xyz": "'xyz' is neither a recipe nor a file; 'ssl-pretrain --config list' shows all recipes",
        "gone.yaml": "gone.yaml: No such file",
        "recipes/mae_cifar10": "recipes/mae_cifar10: No such file",
    }.items():
        with pytest.raises(UserError, match=words.replace("?", r"\?")):
            read_command(["--config", text])
    with pytest.raises(UserError, match=r"^ssl-pretrain reproduce: 'xyz' is neither"):
        reproduce.reproduce(["xyz"], lambda words: 0)


def test_a_name_stays_one_in_the_command_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", "mae_cifar10", "--out", "x"]
    assert paths.absolute_words(words, encoder_is_a_path=False)[:2] == ["--config", "mae_cifar10"]
    assert paths.absolute_words(["--config", "own.yaml"], encoder_is_a_path=False)[1] == str(tmp_path / "own.yaml")


@pytest.mark.parametrize("word", ["list", "help"])
def test_the_list_has_every_recipe_with_its_title_and_result(word: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["--config", word]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[1:]] == NAMES
    assert "SimCLR on CIFAR-10, small enough for one CPU core  [knn top1 43.3]\n" in said


@pytest.mark.parametrize("name", NAMES)
def test_a_header_has_a_title_and_a_result_that_can_be_compared(name: str) -> None:
    file = ROOT / "recipes" / f"{name}.yaml"
    assert 10 < len(recipe_files.title(file)) < 200
    record = recipe_files.recorded(file)
    assert (record is not None) == ('docs/results.md, "' in file.read_text())  # a table with its result
    if record is not None:
        assert record.evaluator in plugins.names("ssl_pretrain.eval")
        assert 0 < record.tolerance < record.value < 100
        table = (ROOT / "docs" / "results.md").read_text()
        assert f"| {name.removesuffix('_cifar10')} | {record.value} / " in table or f"| {record.value} (" in table


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """A recipe that trains within seconds, with a recorded result."""

    def write(record: str, **more: object) -> Path:
        flags = {name.strip("-").replace("-", "_"): yaml.safe_load(value) for name, value in FLAGS.items()}
        file = tmp_path / "mine.yaml"
        settings = yaml.safe_dump({"method": "mae", "steps": 2, "workers": 0, **flags, **more})
        file.write_text(f"# Mine, small. Not for use.\n# Command: none\n{record}\n{settings}")
        return file

    return write


def test_reproduce_compares_with_the_recorded_result(
    recipe: Callable, photos_in_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "val"):
        (data / split).symlink_to(photos_in_classes / "train")
    where = "where: 'here, today', minutes: 0.1, flags: [--log-every=1]"
    file = recipe(f"# Recorded: {{evaluator: knn, metric: top1, value: 50, tolerance: 50, {where}}}")
    words = ["reproduce", str(file), "--data", str(data), "--out", str(tmp_path / "run")]
    assert main(words) == 0
    said = capsys.readouterr().out
    measured = json.loads((tmp_path / "run" / "eval-knn" / "results.json").read_text())["metrics"]["top1"]
    for line in (
        f"recipe      {file}, knn top1",
        "recorded    50.00 (here, today; training took 0.1 minutes)",
        f"measured    {measured:.2f}\n",
        f"difference  {measured - 50:+.2f}",
        "tolerance   50.00",
        "result      reproduced\n",
    ):
        assert line in said
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2  # the recorded flags are used

    recipe(f"# Recorded: {{evaluator: knn, metric: top1, value: {measured + 3}, tolerance: 2.9, {where}}}")
    assert main([*words, "--stall-after", "0"]) == 1
    said = capsys.readouterr().out
    assert f"measured    {measured:.2f} (with --stall-after 0)" in said
    assert "difference  -3.00" in said
    assert "result      not reproduced" in said


def test_reproduce_trains_on_the_first_images_where_the_record_says_so(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    data = tmp_path / "data"
    data.mkdir()
    parquet.write_table(pyarrow.table({"label": np.arange(10)}), data / "train-00000-of-00001.parquet")
    folder = reproduce._first_images(data, 4, tmp_path / "runs" / "one")
    assert folder == tmp_path / "runs" / "one-images"
    assert parquet.read_table(folder / "train-00000-of-00001.parquet")["label"].to_pylist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="first 4 training images of a folder with train-"):
        reproduce._first_images(tmp_path, 4, tmp_path / "runs" / "two")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["mae_cifar10"], "the recipe needs its images: --data DIR"),
        (["mae_cifar10", "--data", "gone"], "--data: there is no gone"),
        (["mae_cifar"], "did you mean mae_cifar10?"),
        (["mae_imagenet1k_vit_base", "--data", "."], "records no result"),
        (["--data", "."], "name the recipe first"),
        (["mae_cifar10", "--data", ".", "--grid", "lr=1,2"], "without --grid"),
    ],
)
def test_what_reproduce_refuses(
    argv: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *argv]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{evaluator: knn", "is not YAML"),
        ("knn 45.6", "is no mapping"),
        ("{evaluator: knn, metric: top1, tolerance: 2, where: x}", "--value is needed"),
        ("{evaluator: knn, metric: top1, value: high, tolerance: 2, where: x}", "'high' is not a number"),
        ("{evaluatr: knn, metric: top1, value: 1, tolerance: 2, where: x}", "did you mean evaluator?"),
    ],
)
def test_a_record_that_cannot_be_read_is_named(record: str, words: str, recipe: Callable) -> None:
    file = recipe(f"# Recorded: {record}")
    with pytest.raises(UserError) as said:
        recipe_files.recorded(file)
    assert words in str(said.value)
    assert str(file) in str(said.value)


@pytest.mark.slow
def test_the_wheel_has_the_recipes_and_finds_them_by_name(tmp_path: Path) -> None:
    build = tmp_path / "source"  # a build writes into its tree
    shutil.copytree(
        ROOT, build, ignore=shutil.ignore_patterns(".git", "build", "*.egg-info", "tests", "docs", "__pycache__")
    )
    pip = [sys.executable, "-m", "pip"]
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", tmp_path, build],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    assert {path.stem for path in (site / "ssl_pretrain" / "recipes").glob("*.yaml")} == set(NAMES)
    elsewhere = {**os.environ, "PYTHONPATH": str(site)}
    ask = [sys.executable, "-m", "ssl_pretrain.launch.pretrain", "--config", "list"]
    done = subprocess.run(ask, cwd=tmp_path, env=elsewhere, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == NAMES
    where = "import ssl_pretrain.launch.recipe_files as r; print(r.path('mae_cifar10'))"
    done = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=elsewhere, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == site / "ssl_pretrain" / "recipes" / "mae_cifar10.yaml"


def test_the_citation_is_of_this_version() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= found.keys()
    assert (found["version"], found["title"], found["license"]) == (__version__, "ssl-pretrain", "Apache-2.0")
