"""The mlflow logger with its database in the run folder, read with plain SQL."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, metrics
from PIL import Image

pytest.importorskip("mlflow", reason="mlflow is not installed")
pytest.importorskip("sqlalchemy", reason="sqlalchemy, which mlflow needs for a database, is not installed")
SECRETS = {
    "MLFLOW_TRACKING_USERNAME": "someone-unmistakable",
    "MLFLOW_TRACKING_PASSWORD": "password-unmistakable",
    "MLFLOW_TRACKING_TOKEN": "token-unmistakable",
}
SMALL = ["--method", "mae", "--log-every", 2, "--workers", 0, "--no-score", *TINY]
SEEN = ["--monitor-every", 3, "--picture-every", 4, "--val-images", 8, "--val-every", 3]


def rows(out: Path, query: str) -> list[Any]:
    with sqlite3.connect(out / "mlflow.db") as database:
        return database.execute(query).fetchall()


def curve(out: Path, name: str) -> list[tuple[int, float]]:
    return rows(out, f"select step, value from metrics where key = '{name}' order by step, timestamp")


def test_curves_scores_flags_and_pictures_are_in_the_database_and_a_continued_run_adds_what_is_new(
    photos: Path, tmp_path: Path, pretrain: Callable
) -> None:
    out = tmp_path / "run"
    same = [*SMALL, *SEEN, "--data", photos, "--out", out, "--logger", "mlflow", "--checkpoint-every", 4]
    pretrain(*same, "--steps", 6, **SECRETS)
    for name in ("loss", "lr", "images_per_s"):
        expected = [(line["step"], pytest.approx(line[name])) for line in metrics(out) if name in line]
        assert curve(out, f"train/{name}") == expected
        assert len(expected) == 3
    assert [step for step, _ in curve(out, "val/loss")] == [3, 6]
    assert [step for step, _ in curve(out, "features/feature_rank")] == [3, 6]
    flags = dict(rows(out, "select key, value from params"))
    assert (flags["method"], flags["steps"], flags["mask_ratio"]) == ("mae", "6", "0.75")
    pictures = list((out / "mlflow").rglob("*.png"))
    assert len(pictures) == 3 * 6  # of steps 0, 4 and 6; 6 kinds
    (own,) = (path for path in pictures if path.name.startswith("input") and "step+4+" in path.name)
    with Image.open(own) as picture:
        assert picture.size == (8 * 96 + 7 * 2, 3 * 96 + 2 * 2)
    assert rows(out, "select status, user_id, name from runs") == [("FINISHED", "unknown", "run")]
    assert {key for (key,) in rows(out, "select key from tags")} <= {"mlflow.runName", "state", "mlflow.loggedImages"}

    # Back to step 4, as after a kill: the steps up to 6 are run again and are not logged again.
    for folder in (out / "checkpoints").glob("step-00000006*"):
        folder.rename(tmp_path / folder.name)
    pretrain(*same, "--steps", 8, "--extend", **SECRETS)
    assert [step for step, _ in curve(out, "train/loss")] == [2, 4, 6, 8]
    assert [step for step, _ in curve(out, "val/loss")] == [3, 6, 8]
    assert rows(out, "select status from runs") == [("FINISHED",)]
    assert len([*(out / "mlflow").rglob("*.png")]) == 4 * 6  # of step 8, too

    for path in out.rglob("*"):
        if path.is_file():
            assert b"unmistakable" not in path.read_bytes(), path


def test_a_server_that_is_not_there_does_not_end_the_run(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    done = pretrain(
        *SMALL, "--data", photos, "--out", tmp_path / "run", "--steps", 2, "--logger", "mlflow",
        MLFLOW_TRACKING_URI="http://someone:unmistakable@127.0.0.1:9", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
    )  # fmt: skip
    assert done.stderr.count("the logger mlflow failed and is left out") == 1
    assert len(metrics(tmp_path / "run")) == 1
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert b"unmistakable" not in path.read_bytes(), path
