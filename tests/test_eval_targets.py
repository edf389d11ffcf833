"""`ssl-eval targets`: scores and models against scikit-learn, the CSV file, and the command on real files."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pixel_tasks import split_task
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, r2_score
from small_encoders import small_encoder
from ssl_pretrain.eval import targets
from ssl_pretrain.eval._targets import Targets
from ssl_pretrain.launch.evaluate import main
from synthetic_data import noisy_classes

from ssl_pretrain import encoder as exported
from ssl_pretrain.encoder import Encoder
from ssl_pretrain.errors import UserError


def test_scores_against_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 5, 300):
        positive = rng.random(n) < 0.3
        positive[0] = True
        for scores in (rng.normal(size=n), rng.integers(0, 4, n).astype(float)):  # without and with ties
            found = targets.average_precision(scores, positive)
            assert found == pytest.approx(average_precision_score(positive, scores), abs=1e-12)
    values, predicted = rng.normal(size=50), rng.normal(size=50)
    assert targets.r2(predicted, values) == pytest.approx(r2_score(values, predicted), abs=1e-12)


def test_models_against_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    rows, others = rng.normal(size=(80, 7)) * np.arange(1, 8), rng.normal(size=(30, 7))
    task = split_task(noisy_classes(4, 1), noisy_classes(4, 2))
    numbers = rows @ rng.normal(size=7) + rng.normal(size=80) + 5
    labels = (numbers > 4).astype(float)
    penalties = (1e-3, 0.1)
    ridge = targets._numbers(task, rows, numbers, others, penalties)
    more = np.concatenate(
        [rng.normal(size=(20, 7)) + 3, rows]
    )  # the axes are of images that this label does not know, too
    odds = targets._RotatedFeatures(more, others, task).log_odds(np.arange(20, 100), labels, penalties, None)
    for i, penalty in enumerate(penalties):
        wanted = Ridge(alpha=penalty * 80).fit(rows, numbers).predict(others)
        np.testing.assert_allclose(ridge[i], wanted, rtol=1e-8)
        # two columns of a softmax share one binary penalty: half each
        model = LogisticRegression(C=2 / (penalty * 80), tol=1e-10, max_iter=10000).fit(rows, labels)
        np.testing.assert_allclose(odds[i], model.decision_function(others), rtol=2e-2, atol=2e-2)
    assert targets._loss(odds[1], np.ones(30), True) == pytest.approx(np.log(1 + np.exp(-odds[1])).mean())


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Grey images whose brightness is a number to predict, and two labels that follow from it; a CSV file of them."""
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    lines = []
    for split, count in (("train", 60), ("val", 30)):
        for i in range(count):
            level = int(rng.integers(20, 236))
            folder = tmp_path / "photos" / split / ("even" if i % 2 else "odd")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(level + rng.normal(0, 5, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{split}{i}.png")
            name = f"{split}/{folder.name}/{split}{i}.png"
            lines.append(
                {
                    "file": name,
                    "level": level,
                    "bright": int(level > 128),
                    "dark": "" if i % 5 == 0 else int(level < 80),
                }
            )
    write(tmp_path / "targets.csv", lines)
    made = small_encoder(depth=2)
    exported.save(
        tmp_path / "run" / "encoder", Encoder(made.backbone, made.name, made.preprocessing, {"method": "mae"})
    )
    return tmp_path


def write(path: Path, lines: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)


def read(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def run(desk: Path, *flags: object) -> tuple[int, dict]:
    argv = ["targets", "--encoder", desk / "run", "--data", desk / "photos", "--targets", desk / "targets.csv"]
    code = main([*map(str, argv), "--out", str(desk / "out"), "--workers", "0", *map(str, flags)])
    path = desk / "out" / "results.json"
    return code, json.loads(path.read_text()) if path.exists() else {}


def test_the_command(photos: Path, capsys: pytest.CaptureFixture) -> None:
    code, found = run(photos)
    assert code == 0
    metrics, protocol = found["metrics"], found["protocol"]
    assert metrics["n"] == 30
    assert metrics["r2"] > 0.8  # brightness is what an untrained encoder keeps best
    assert metrics["map"] > 90
    assert metrics["map_interval"][0] <= metrics["map"] <= metrics["map_interval"][1]
    assert 0 < metrics["chance_map"] < 70
    by_name = {row["target"]: row for row in found["all"]}
    assert {name: row["kind"] for name, row in by_name.items()} == {
        "level": "number",
        "bright": "label",
        "dark": "label",
    }
    assert (by_name["level"]["train"], by_name["dark"]["train"]) == (60, 48)
    assert metrics["r2"] == pytest.approx(metrics["per_target"]["level"])
    assert metrics["map"] == pytest.approx(100 * (metrics["per_target"]["bright"] + metrics["per_target"]["dark"]) / 2)
    assert (protocol["train"]["split"], protocol["test"]["split"]) == ("train", "val")
    assert set(found["baselines"]) == {"random", "pixels"}
    assert "mAP %" in capsys.readouterr().out
    code, alone = run(photos, "--columns", "level", "--no-baselines")
    assert code == 0
    assert "map" not in alone["metrics"]
    assert alone["metrics"]["r2"] == pytest.approx(metrics["r2"])


def test_splits_from_the_file_and_lines_without_an_image(photos: Path) -> None:
    lines = read(photos / "targets.csv")
    flat = photos / "flat"
    flat.mkdir()
    for line in lines:
        (photos / "photos" / line["file"]).rename(flat / Path(line["file"]).name)
        line["split"] = "train" if line["file"].startswith("train") else "test"
        line["file"] = Path(line["file"]).name
    Image.new("RGB", (16, 16)).save(flat / "in-no-line.png")
    write(photos / "targets.csv", [*lines, {**lines[0], "file": "is-not-there.png"}])
    code, found = run(photos, "--data", flat, "--no-baselines")
    assert code == 0
    assert (found["protocol"]["train"]["images"], found["protocol"]["test"]["images"]) == (60, 30)
    assert found["metrics"]["r2"] > 0.8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda lines: [{**line, "file": "x" + line["file"]} for line in lines],
            "none of its files is among the images",
        ),
        (lambda lines: [*lines, lines[0]], "is also in line 2"),
        (lambda lines: [{**lines[0], "level": "bright"}, *lines[1:]], "line 2: level is 'bright', not a number"),
        (
            lambda lines: [{**line, "bright": 1} for line in lines],
            "target 'bright': 60 training images have a value, and",
        ),
        (lambda lines: [{**line, "dark": ""} for line in lines], "column 'dark' is empty"),
        (lambda lines: [{"name": line["file"], "level": 1} for line in lines], "no column 'file'"),
        (lambda lines: [{"file": line["file"]} for line in lines], "nothing to predict"),
    ],
)
def test_what_is_said_of_a_file_that_does_not_fit(
    change: Callable, said: str, photos: Path, capsys: pytest.CaptureFixture
) -> None:
    write(photos / "targets.csv", change(read(photos / "targets.csv")))
    code, found = run(photos)
    (line,) = capsys.readouterr().err.splitlines()
    assert (code, found) == (2, {})
    assert said in line


def test_what_is_said_of_flags(photos: Path, capsys: pytest.CaptureFixture) -> None:
    for flags, said in (
        (("--columns", "levl"), "--columns levl: "),
        (("--targets", "nowhere.csv"), "--targets nowhere.csv cannot be read: No such file"),
        (("--held-out", 1), "--held-out is 1.0"),
        (("--data", photos / "photos" / "train"), "no column 'split'"),
    ):
        code, _ = run(photos, *flags)
        assert code == 2
        assert said in capsys.readouterr().err
    table = Targets(["a.png"], None, ("t",), np.zeros((1, 1)), np.ones(1, bool))
    with pytest.raises(UserError, match="the name of 2 images: give their paths"):
        table.rows(["d/x/a.png", "d/y/a.png"], "d")
