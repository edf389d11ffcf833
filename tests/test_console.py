"""A run outlives its console: closed pipes, closed descriptors, terminals that are gone, a hang-up, nohup."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import TINY, command, losses, metrics
from ssl_pretrain.launch.console import lasting_console
from ssl_pretrain.launch.pretrain import main

STEPS = 20


def argv(photos: Path, out: Path, steps: int = STEPS) -> list[str]:
    return command("pretrain", "--method", "mae", "--data", photos, "--out", out, "--steps", steps, "--log-every", 1,
                   "--workers", 0, "--checkpoint-every", 7, "--no-score", *TINY)  # fmt: skip


def state(run: Path) -> str:
    return json.loads((run / "manifest.json").read_text())["state"]


def wait_for(process: subprocess.Popen, run: Path, step: int) -> None:
    while process.poll() is None and (not (run / "metrics.jsonl").exists() or len(metrics(run)) < step):
        pass
    assert process.poll() is None


def finished(run: Path, process: subprocess.Popen, steps: int = STEPS) -> None:
    assert process.wait(timeout=120) == 0
    assert state(run) == "finished"
    assert list(losses(run)) == list(range(1, steps + 1))  # every line is JSON: nothing was printed into the file


def test_the_reader_of_the_output_ends(photos: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(argv(photos, tmp_path / "run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # at once, as `| head -0` does
    process.stderr.readline()
    process.stderr.close()
    finished(tmp_path / "run", process)


def closed() -> None:
    for number in (0, 1, 2):
        os.close(number)


def test_started_with_closed_descriptors(photos: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(argv(photos, tmp_path / "run"), preexec_fn=closed)  # noqa: PLW1509 (no threads here)
    finished(tmp_path / "run", process)


def test_the_terminal_is_closed(photos: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(argv(photos, tmp_path / "run"), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.read(ours, 1)
    os.close(ours)
    finished(tmp_path / "run", process)


def test_a_hang_up_saves_and_ends_and_the_same_command_continues(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(argv(photos, out, 100_000), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(process, out, 3)
    process.send_signal(signal.SIGHUP)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    step = max(losses(out))
    assert f"stopped by SIGHUP after step {step}" in said
    assert state(out) == f"stopped: SIGHUP at step {step}"
    assert (out / "checkpoints" / f"step-{step:08d}").is_dir()


@pytest.mark.slow
def test_a_hang_up_of_two_processes(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen([*argv(photos, out, 100_000), "--nproc", "2"], stderr=subprocess.PIPE, text=True)
    wait_for(process, out, 3)
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    # The second process may get it a step before the first, and is named then.
    assert re.match(r"stopped: SIGHUP( to process 1)? at step", state(out))


def test_nohup_is_obeyed(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        argv(photos, out),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),  # noqa: PLW1509
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(process, out, 2)
    process.send_signal(signal.SIGHUP)
    finished(out, process)


def test_an_interruption_at_once_is_in_the_manifest(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt  # as the second Ctrl-C does

    monkeypatch.setattr("ssl_pretrain.train.to_batch", interrupted)
    assert main(argv(photos, tmp_path / "run")[3:]) == 75
    assert state(tmp_path / "run").startswith("failed: interrupted before it was saved")
    assert (
        "interrupted; the same command continues from the last checkpoint, if there is one" in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["data", "evaluate"])
def test_other_commands_too(name: str, photos: Path, tmp_path: Path) -> None:
    words = {"data": ("check", photos, "--out", tmp_path / "found.json"), "evaluate": ("--help",)}[name]
    for how in ({"preexec_fn": closed}, {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}):
        process = subprocess.Popen(command(name, *words), **how)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        assert process.wait(timeout=60) == 0
    if name == "data":
        assert json.loads((tmp_path / "found.json").read_text())["readable"] == 96


def test_names_that_the_console_cannot_show_are_escaped() -> None:
    code = "from ssl_pretrain.launch.console import lasting_console\nwith lasting_console('x'): print('caf\\udce9 \\u732b')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"caf\\udce9 \\u732b\n", b"")


def test_warnings_are_lines(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    import ssl_pretrain.data.source as own

    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with lasting_console("ssl-x"):
            for _ in range(2):
                warnings.warn_explicit("no cache\n here", UserWarning, str(own.__file__), 1)
            warnings.warn_explicit("please file an issue", UserWarning, os.__file__, 1)
    assert capsys.readouterr().err == "ssl-x: warning: no cache here\n"


def test_a_full_disk_behind_the_output_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    code = "from ssl_pretrain.launch.console import lasting_console\nwith lasting_console('x'): print('a' * 100_000)"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.stderr == b""
