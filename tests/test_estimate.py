"""How long a run takes is said at its start, and saying it changes no bit of the run."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import assert_same_bits, losses
from small_encoders import export
from ssl_pretrain.launch.pretrain import main

from ssl_pretrain import checkpoint, pretext
from ssl_pretrain.conformance.one_step import network_flags
from ssl_pretrain.loop import estimate
from ssl_pretrain.loop.estimate import Estimate, Speed, in_words
from ssl_pretrain.loop.signals import StopRequest

VIT = "--encoder vit_micro --patch-size 8 --depth 2".split()
DECODER = "--decoder-dim 32 --decoder-depth 1 --decoder-heads 2".split()
RUN = "--image-size 32 --batch-size 16 --workers 0 --no-score --monitor-every 0 --picture-every 0 --precision fp32".split()


def trained(out: Path, photos: Path, *words: str) -> dict[str, torch.Tensor]:
    """All state of a method after two steps."""
    assert main([*words, *RUN, "--steps", "2", "--data", str(photos), "--out", str(out)]) == 0
    found = checkpoint.load(out / "checkpoints", 2)["method"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "mae", *VIT, *DECODER, "--accumulate", "2"],
        [
            "--method",
            "byol",
            "--encoder",
            "resnet18",
            "--hidden-dim",
            "32",
        ],  # batch norm in the encoder and in the heads
        ["--method", "simclr", *VIT, "--hidden-dim", "32", "--accumulate", "2"],  # GradCache
    ],
)
def test_the_estimate_changes_no_bit(
    words: list[str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without = trained(tmp_path / "without", photos, *words)
    assert "estimated from" not in capsys.readouterr().err
    monkeypatch.setattr(estimate, "LONG_STEP", 0.0)
    monkeypatch.setattr(estimate, "HOUR", 1e-3)
    monkeypatch.setattr(estimate, "SMALL", {**estimate.SMALL, "image-size": 16})
    with_it = trained(tmp_path / "with", photos, *words)
    assert without.keys() == with_it.keys()
    assert all(torch.equal(without[name], with_it[name]) for name in without)
    said = capsys.readouterr().err
    assert re.search(
        r"estimated from \d+ images: [\d.e+]+ images/s, [\d.]+ s a step, "
        r"\d+ seconds? for 2 steps(, about [\d.]+ GiB of memory)?\n",
        said,
    )
    assert "to be done within an hour" in said


# A process of a run whose steps count as long; ARGUMENTS are those of `ssl-pretrain`.
LONG = """
import sys
from ssl_pretrain.launch.pretrain import main
from ssl_pretrain.loop import estimate

estimate.LONG_STEP = 0.0
MORE
sys.exit(main())
"""
FAILS = """
from ssl_pretrain import distributed

measure = estimate.Estimate._pass


def fails_on_one(self, *given):
    if self.world.rank == 1:
        raise RuntimeError("out of memory")
    return measure(self, *given)


estimate.Estimate._pass = fails_on_one
"""


def two_processes(out: Path, photos: Path, *words: str, more: str = "") -> tuple[dict[str, Any], str]:
    """The checkpoint after two steps, and what the first process said."""
    flags = [*words, *RUN, "--steps", "2", "--data", str(photos), "--out", str(out), "--log-every", "1"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LONG.replace("MORE", more), *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **places, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return checkpoint.load(out / "checkpoints", 2), said[0]


@pytest.mark.parametrize(
    ("words", "estimated"),
    [
        # Batch norm over both processes in encoder and heads, and a loss that gathers
        (["--method", "simclr", "--encoder", "resnet18", "--hidden-dim", "32"], True),
        pytest.param(["--method", "mae", *VIT, *DECODER, "--accumulate", "2"], True, marks=pytest.mark.slow),
        pytest.param(["--method", "mae", *VIT, *DECODER, "--parallel", "fsdp"], False, marks=pytest.mark.slow),
    ],
)
def test_two_processes_estimate_together_and_no_bit_changes(
    words: list[str], estimated: bool, photos: Path, tmp_path: Path, pretrain: Any
) -> None:
    flags = [*words, *RUN, "--steps", "2", "--data", photos, "--log-every", "1", "--out", tmp_path / "without"]
    assert not re.search("estimated from|no estimate", pretrain(*flags, "--nproc", "2").stderr)
    without: Any = checkpoint.load(tmp_path / "without" / "checkpoints", 2)
    with_it, said = two_processes(tmp_path / "with", photos, *words)
    assert losses(tmp_path / "without") == losses(tmp_path / "with")
    assert_same_bits(without, with_it)
    if estimated:
        assert re.search(
            r"estimated from \d+ images on each of 2 processes, without their communication: [\d.e+]+ ", said
        )
    else:
        assert "no estimate before the first step: with --parallel fsdp a process holds a part of the model" in said


def test_a_slice_that_fails_on_one_process_stops_none(photos: Path, tmp_path: Path) -> None:
    """The other one would wait for it in the loss, which gathers."""
    words = ["--method", "simclr", *VIT, "--hidden-dim", "32"]
    _, said = two_processes(tmp_path / "run", photos, *words, more=FAILS)
    assert "estimated" not in said


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's compiler
def test_a_compiled_run_is_estimated_without_compiling(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Graphs are counted in the place of being compiled, which takes a minute."""
    graphs: list[int] = []
    compile_block, measure = torch.nn.Module.compile, Estimate._measure

    def counted(graph: Any, _: Any) -> Any:
        graphs.append(1)
        return graph.forward

    def watched(self: Estimate, *given: Any) -> Any:
        try:
            return measure(self, *given)
        finally:
            assert graphs == []

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_block(self, backend=counted))
    without = trained(tmp_path / "without", photos, "--method", "mae", *VIT, *DECODER, "--compile")
    assert graphs
    graphs.clear()
    torch._dynamo.reset()
    monkeypatch.setattr(estimate, "LONG_STEP", 0.0)
    monkeypatch.setattr(Estimate, "_measure", watched)
    with_it = trained(tmp_path / "with", photos, "--method", "mae", *VIT, *DECODER, "--compile")
    assert graphs
    assert re.search(r"estimated from \d+ images, not compiled: ", capsys.readouterr().err)
    assert all(torch.equal(without[name], with_it[name]) for name in without)


def test_a_long_run_with_a_teacher_is_estimated(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shorter runs with other views would need views of the teacher, which only the run itself has."""
    words = ["--method", "featmim", "--encoder", "vit_micro", "--patch-size", "8", "--depth", "1"]
    words += ["--teacher", str(export(tmp_path / "teacher"))]
    monkeypatch.setattr(estimate, "LONG_STEP", 0.0)
    monkeypatch.setattr(estimate, "HOUR", 1e-3)
    monkeypatch.setattr(estimate, "SMALL", {**estimate.SMALL, "image-size": 16, "encoder": "vit_tiny"})
    monkeypatch.setattr(estimate, "_half", lambda side, stride: side // 2)
    trained(tmp_path / "run", photos, *words)
    assert "to be done within an hour" in capsys.readouterr().err


def test_flags_that_make_a_long_run_short(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an hour of 200 seconds, each line is a command's flags, and their time is what they say."""
    monkeypatch.setattr(estimate, "LONG_STEP", 0.0)
    monkeypatch.setattr(estimate, "HOUR", 200.0)
    monkeypatch.setattr(
        Estimate, "_measure", lambda self, method, specs, *_: (4, Speed(specs[0].size[0] / 64, 0.0, 1.0))
    )
    monkeypatch.setattr(estimate, "SMALL", {**estimate.SMALL, "image-size": 32})
    words = "--method mae --encoder vit_tiny --no-score --workers 0 --steps 40 --batch-size 16 "
    words += "--depth 1 --dim 12 --heads 1 --image-size 64"
    assert main([*words.split(), *DECODER, "--data", str(photos), "--out", str(tmp_path / "a")]) == 0
    # 1 second an image and 16 a step: 16 seconds a step, 640 for 40 steps; half of it for images of half the side.
    # So 200 seconds are 12 steps, or four epochs of the 96 small images.
    said = capsys.readouterr().err
    assert (
        "estimated from 4 images: 1 images/s, 16.0 s a step, 11 minutes for 40 steps, about 1.0 GiB of memory" in said
    )
    shorter = [line.strip() for line in said.partition("to be done within an hour")[2].splitlines()[1:4]]
    assert shorter == [
        "--steps 12   (3 minutes)",
        "--image-size 32 --epochs 4   (3 minutes)",
        "--encoder vit_micro --image-size 32 --patch-size 8 --batch-size 128 --lr 0.002 --epochs 4   (3 minutes)",
    ]


def test_a_run_with_a_frozen_network_is_measured_and_no_other(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "LONG_STEP", 0.0)
    monkeypatch.setattr(estimate, "HOUR", 1e-3)
    words = ["--method", "beit", *VIT, *RUN, "--image-size", "64", "--steps", "1", "--out", str(tmp_path / "run")]
    words += network_flags(pretext.load("beit"), {}, tmp_path)
    assert main([*words, "--data", str(photos)]) == 0
    assert "estimated from" in capsys.readouterr().err


def test_a_slice_that_fails_ends_no_run(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(estimate, "LONG_STEP", 0.0)
    monkeypatch.setattr(Estimate, "_pass", fails)
    trained(tmp_path / "a", photos, "--method", "mae", *VIT, *DECODER)
    assert "estimated" not in capsys.readouterr().err


def test_a_signal_ends_the_measurement(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = Estimate._measure

    def interrupted(self: Estimate, *given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, *given)

    monkeypatch.setattr(estimate, "LONG_STEP", 0.0)
    monkeypatch.setattr(Estimate, "_measure", interrupted)
    words = ["--method", "mae", *VIT, *DECODER, *RUN, "--steps", "2", "--data", str(photos)]
    assert main([*words, "--out", str(tmp_path / "a")]) == 75
    assert "estimated" not in capsys.readouterr().err


def begun(*, compiled: bool) -> tuple[Estimate, list[str]]:
    """The estimate of a run of 100 steps of 32 images, which has begun, and the lines that it says."""
    told: list[str] = []
    report: Any = SimpleNamespace(silent=False, say=told.append)
    run: Any = SimpleNamespace(steps=100, batch_size=32, compile=compiled)
    world: Any = SimpleNamespace(size=1, device=torch.device("cpu"))
    subject = Estimate(run, torch.nn.Linear(1, 1), None, [], world, report, StopRequest())  # type: ignore[arg-type]
    subject.begin(0, None)
    return subject, told


def test_real_steps_are_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step warms up (2 s), the next ones take 1 s each."""
    clock = iter([100.0, 102.0, 103.0, 103.0, 104.0, 105.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    subject, told = begun(compiled=False)
    for step in (1, 2, 3):
        subject.after(step)
    (line,) = told
    assert line.startswith("step 2/100  measured: 32 images/s, 2 minutes left")
    assert re.search(r", [\d.]+ GiB of memory so far$", line)


def test_the_step_that_compiles_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step takes 60 s, the next one 2 s."""
    clock = iter([100.0, 160.0, 162.0, 162.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    subject, told = begun(compiled=True)
    for step in (1, 2):
        subject.after(step)
    assert told[0].startswith("the first step also compiles the model")
    assert told[1].startswith("step 2/100  measured: 16 images/s, 3 minutes left")


def test_one_long_step_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 120.0, 120.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    told: list[str] = []
    run: Any = SimpleNamespace(steps=100, batch_size=32, compile=False)
    world: Any = SimpleNamespace(size=1, device=torch.device("cpu"))
    report: Any = SimpleNamespace(silent=False, say=told.append)
    subject = Estimate(run, torch.nn.Linear(1, 1), None, [], world, report, StopRequest())  # type: ignore[arg-type]
    subject.begin(0, None)
    subject.after(1)
    assert told[0].startswith("step 1/100  measured: 1.6 images/s, 33 minutes left")


def test_reading_beside_training() -> None:
    """10 images of 0.2 s of training and 0.1 s of reading."""
    speed = Speed(0.2, 0.1, 0.0)
    assert speed.step(10, workers=0, cores=2) == pytest.approx(3.0)  # one after the other
    assert speed.step(10, workers=1, cores=2) == pytest.approx(2.5)  # of the two cores one reads half of the time
    assert Speed(0.01, 0.1, 0.0).step(10, workers=2, cores=4) == pytest.approx(0.5)  # training waits for two readers


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (1.2, "1 second"),
        (41.4, "41 seconds"),
        (600, "10 minutes"),
        (89 * 60, "89 minutes"),
        (7500, "2 h 05 min"),
        (3 * 86400 + 4 * 3600, "3 days 4 h"),
    ],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
