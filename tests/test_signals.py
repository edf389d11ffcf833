"""A stopping signal is acknowledged when it comes."""

import os
import signal

import pytest

from ssl_pretrain.loop.signals import StopRequest


def test_ctrl_c_is_acknowledged_at_once_and_a_second_one_ends(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        said = capfd.readouterr().err
        assert said.startswith("SIGINT: stopping after this step, then the run is saved")
        assert "Ctrl-C again ends at once" in said
        assert stop.signal == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert capfd.readouterr().err == ""


def test_other_signals_are_acknowledged_once(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("SIGTERM: stopping")
    assert "Ctrl-C" not in said


def test_of_several_processes_the_first_one_tells(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == "SIGTERM"
    assert capfd.readouterr().err == ""
