"""What is looked at before a run of several processes."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY

from ssl_pretrain.loop import preflight
from ssl_pretrain.loop.preflight import Facts

VERSIONS = dict.fromkeys((*preflight.SAME, *preflight.TOLD, *preflight.BUILT), "1.0")
GOOD = [Facts(r, f"n{r // 2}", "CPU", 8, VERSIONS, True, 2**34, None, None) for r in range(4)]


def changed(rank: int, **facts: object) -> list[Facts]:
    return [dataclasses.replace(f, **facts) if f.rank == rank else f for f in GOOD]


def test_equal_processes_have_no_problem() -> None:
    assert preflight._problems(GOOD, Path("runs")) == []
    assert preflight.disagreements(GOOD) == []


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (
            {"versions": {**VERSIONS, "torch": "2.0"}},
            "torch is not the same everywhere (1.0 on rank 0, 1, 2; 2.0 on rank 3)",
        ),
        ({"versions": {**VERSIONS, "ssl-pretrain": "2.0"}}, "install the same version on all machines"),
        ({"device": "NVIDIA H200"}, "some processes have a GPU and some have not (CPU on rank 0, 1, 2; GPU on rank 3)"),
        ({"sees": False}, "runs on n1 is not the folder that rank 0 sees: --out must be on a file system"),
        ({"trouble": "No space left on device"}, "runs cannot be written on n1: No space left on device"),
    ],
)
def test_what_cannot_work_is_said(facts: dict, said: str) -> None:
    (problem,) = preflight._problems(changed(3, **facts), Path("runs"))
    assert said in problem


def test_what_had_better_agree_is_a_warning() -> None:
    everybody = changed(2, versions={**VERSIONS, "pillow": "not installed"})
    assert preflight._problems(everybody, Path("runs")) == []
    (text,) = preflight.disagreements(everybody)
    assert text == "pillow is not the same everywhere: 1.0 on rank 0, 1, 3; not installed on rank 2"
    assert f"warning: {text}" in preflight.table(everybody, Path("runs"), 0.1)


def test_another_checkout_or_another_gpu_is_a_warning() -> None:
    for facts in ({"versions": {**VERSIONS, "commit": "abc"}}, {"device": "NVIDIA H100"}):
        everybody = [dataclasses.replace(f, device="NVIDIA H200") for f in GOOD]
        everybody[1] = dataclasses.replace(everybody[1], **facts)
        assert preflight._problems(everybody, Path("runs")) == []
        (text,) = preflight.disagreements(everybody)
        assert text.endswith("on rank 1") or "on rank 1;" in text


def test_many_processes_are_a_line_a_machine() -> None:
    many = [dataclasses.replace(GOOD[0], rank=r, host=f"n{r // 8}") for r in range(64)]
    lines = preflight.table(many, Path("runs"), 0.1).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["0-7", "8-15", "16-23"]
    assert len(lines) == 1 + 8 + 1
    assert lines[-1].startswith("64 processes on 8 machines")


@pytest.mark.slow
def test_a_run_of_several_processes_begins_with_the_table(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    out = tmp_path / "run"
    done = pretrain("--method", "mae", "--data", photos, "--out", out, "--steps", 1, "--nproc", 2, *TINY)
    said = done.stderr
    assert re.search(r"^0 .*GiB free, writes \d+ MiB/s$", said, re.MULTILINE)
    assert re.search(r"^2 processes on 1 machine found one another: .*; (\d+\.\d) s$", said, re.MULTILINE)
    (launch,) = json.loads((out / "manifest.json").read_text())["launches"]
    assert len(launch["hosts"]) == 2


@pytest.mark.slow
def test_the_command_prints_a_line_a_process_and_leaves(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    out = tmp_path / "run"
    done = pretrain("--method", "mae", "--data", photos, "--out", out, "--nproc", 2, "--preflight", *TINY)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["rank", "0", "1"]
    assert re.search(r"GiB free, writes \d+ MiB/s", lines[1])  # by one process of the machine
    assert "writes" not in lines[2]
    assert "2 processes on 1 machine found one another: sums over all processes are correct, and all see" in lines[3]
    assert list(out.iterdir()) == []
    # the check at the start of every run is a second at most: here with the trial of the disk
    assert float(re.search(r"([\d.]+) s$", lines[3])[1]) < 5
