"""Rows for loggers that keep what they once got: each is handed on once, whatever happens to the run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssl_pretrain.loggers._rows import Row, Rows


def start(out: Path, step: int, lines: list[dict[str, Any]], run: str = "one", end: bool = True) -> list[Row]:
    """What a start at `step` hands on that then logs these lines; `end`: it is not killed."""
    got: list[Row] = []
    rows = Rows(out, out / "note" / "continue.json")
    rows.begin(run, step, got.append)
    for line in lines:
        rows.metrics(line)
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    if end:
        rows.flush()
    return got


def steps(rows: list[Row]) -> list[int]:
    return [row.step for row in rows]


def lines(*steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": step / 10, "time": 1000.0 + step} for step in steps]


def cut(out: Path, step: int) -> None:
    """What the loop does to metrics.jsonl when it continues from a step."""
    kept = [line for line in (out / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= step]
    (out / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))


def test_a_row_holds_all_of_its_step_by_name(tmp_path: Path) -> None:
    got: list[Row] = []
    rows = Rows(tmp_path, tmp_path / "note.json")
    rows.begin("one", 0, got.append)
    rows.metrics({"step": 2, "loss": 0.5, "grad_norm": None, "time": 1e9})
    rows.scores("knn", {"top1": 50.0}, 2)
    rows.picture("a", np.zeros((1, 1, 3), np.uint8), 2)
    assert got == []
    rows.scores("knn", {"top1": 60.0}, 3)
    (row,) = got
    assert (row.step, row.time, row.numbers) == (2, 1e9, {"train/loss": 0.5, "knn/top1": 50.0})
    assert list(row.pictures) == ["a"]
    rows.flush()
    rows.flush()
    assert steps(got) == [2, 3]


def test_pictures_and_scores_before_the_first_step_are_handed_on_once(tmp_path: Path) -> None:
    for expected in ([0], []):
        got: list[Row] = []
        rows = Rows(tmp_path, tmp_path / "note.json")
        rows.begin("one", 0, got.append)
        rows.picture("views", np.zeros((1, 1, 3), np.uint8), 0)
        rows.scores("knn", {"top1": 50.0}, 0)
        rows.flush()
        assert steps(got) == expected


@pytest.mark.parametrize("reached", [4, 6])
def test_steps_that_are_run_again_are_not_handed_on_again(reached: int, tmp_path: Path) -> None:
    assert steps(start(tmp_path, 0, lines(2, 4, 6))) == [2, 4, 6]
    cut(tmp_path, reached)
    assert steps(start(tmp_path, reached, lines(*range(reached + 2, 11, 2)))) == [8, 10]


def test_a_row_that_a_killed_start_held_back_is_taken_from_the_file(tmp_path: Path) -> None:
    assert steps(start(tmp_path, 0, lines(2, 4), end=False)) == [2]
    (row, *_) = again = start(tmp_path, 4, lines(6))
    assert steps(again) == [4, 6]
    assert (row.time, row.numbers) == (1004.0, {"train/loss": 0.4})


def test_a_run_that_gets_the_logger_later_has_its_earlier_rows(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 2, "loss": 1}\n{"step": 2, "val/loss": 2}\n{"step": 8, "loss": 1}\n'
    )
    got = start(tmp_path, 4, lines(6))
    assert steps(got) == [2, 6]
    assert got[0].numbers == {"train/loss": 1, "val/loss": 2}


def test_another_run_of_the_server_gets_everything(tmp_path: Path) -> None:
    start(tmp_path, 0, lines(2, 4))
    assert steps(start(tmp_path, 4, lines(6), run="two")) == [2, 4, 6]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run": 3, "step": "x"}'])
def test_a_note_that_cannot_be_read_is_as_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "note").mkdir()
    (tmp_path / "note" / "continue.json").write_text(content)
    assert steps(start(tmp_path, 0, lines(2))) == [2]
