"""Loggers that hang, are slow or fail: a run waits for none of them, and reports what they did not get."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssl_pretrain import loggers
from ssl_pretrain.loop import logger_thread
from ssl_pretrain.loop import report as reports
from ssl_pretrain.loop.report import Report

LINE = {"loss": 1.0, "images_per_s": 1.0, "data_wait": 0.0}


class Held(loggers.Logger):
    """Waits in one of its calls until the test lets it go."""

    at = "metrics"
    go: threading.Event
    got: list[Any]

    def begin(self, out: Path, config: dict[str, Any], step: int) -> None:
        self._call("begin", step)

    def metrics(self, line: dict[str, Any]) -> None:
        self._call("metrics", line["step"])

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        self._call("picture", step)

    def end(self, state: str) -> None:
        self._call("end", state)

    def _call(self, name: str, what: Any) -> None:
        if name == self.at:
            self.go.wait(60)
        self.got.append((name, what))


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class as the only logger beside TensorBoard, whose calls go nowhere."""
    monkeypatch.setattr(Held, "go", threading.Event(), raising=False)
    monkeypatch.setattr(Held, "got", [], raising=False)
    quiet = type("Quiet", (loggers.Logger,), dict.fromkeys(("begin", "metrics", "end"), lambda *given: None))
    monkeypatch.setattr(loggers, "load", lambda name: Held if name == "held" else quiet)
    monkeypatch.setattr(reports, "SECONDS_TO_BEGIN", 10.0)
    monkeypatch.setattr(reports, "SECONDS_TO_END", 0.5)
    yield Held
    Held.go.set()
    for thread in threading.enumerate():
        if thread.name == "logger held":
            thread.join(10)


def report(out: Path) -> Report:
    return Report(out, step=0, steps=8, names=["held"])


def warnings(out: Path) -> str:
    return (out / "warnings.log").read_text() if (out / "warnings.log").exists() else ""


@pytest.mark.parametrize("at", ["begin", "metrics", "end"])
def test_a_logger_that_hangs_does_not_hold_up_a_run(at: str, held: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(held, "at", at)
    monkeypatch.setattr(reports, "SECONDS_TO_BEGIN", 0.5 if at == "begin" else 10.0)
    began = time.monotonic()
    one = report(tmp_path)
    for step in range(1, 9):
        one.metrics({"step": step, **LINE}, 0)
    one.close("finished")
    assert time.monotonic() - began < 5
    left = {"begin": 10, "metrics": 9, "end": 1}[at]  # calls, `end` among them
    assert f"the logger held has not ended in time: {left} calls were not finished" in warnings(tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 8


def test_what_a_slow_logger_has_no_room_for_is_counted(held: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(logger_thread, "MOST_CALLS", 3)
    monkeypatch.setattr(reports, "SECONDS_TO_END", 10.0)
    one = report(tmp_path)
    for step in range(1, 9):
        one.metrics({"step": step, **LINE}, 0)
        time.sleep(0.01)
    said = warnings(tmp_path)
    assert said.count("the logger held is too slow") == 1
    held.go.set()
    while len(held.got) < 4:
        time.sleep(0.01)
    one.metrics({"step": 9, **LINE}, 0)  # it has caught up
    one.close("finished")
    assert held.got == [("begin", 0), *[("metrics", step) for step in (1, 2, 3, 9)], ("end", "finished")]
    assert "the logger held was too slow: 6 calls were left out" in warnings(tmp_path)  # 5 lines and a warning


def test_pictures_that_wait_are_bounded_in_bytes(held: Any, tmp_path: Path, monkeypatch: Any) -> None:
    import numpy as np

    monkeypatch.setattr(logger_thread, "MOST_BYTES", 3 * 8 * 8 * 2)
    monkeypatch.setattr(held, "at", "picture")
    monkeypatch.setattr(reports, "SECONDS_TO_END", 10.0)
    one = report(tmp_path)
    for step in range(1, 5):
        one.picture("input", np.zeros((8, 8, 3), dtype=np.uint8), step)
    held.go.set()
    one.close("finished")
    assert held.got == [("begin", 0), ("picture", 1), ("picture", 2), ("end", "finished")]


def test_data_of_a_late_call_is_that_of_its_time(held: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(reports, "SECONDS_TO_END", 10.0)
    one = report(tmp_path)
    line = {"step": 1, **LINE}
    one.metrics(line, 0)
    line["step"] = 99
    held.go.set()
    one.close("finished")
    assert ("metrics", 1) in held.got


def test_a_failure_does_not_tell_a_secret(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "opensesame")
    said = logger_thread.without_secrets("GET http://me:word@host:1/x failed (opensesame): see http://docs.example/a@b")
    assert said == "GET http://...@host:1/x failed (...): see http://docs.example/a@b"
