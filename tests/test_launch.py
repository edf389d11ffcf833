"""Placement, job scripts, mistakes in launch flags, grids, stop requests and the roll call; no Slurm is needed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY, command, losses
from ssl_pretrain.launch import grid, requeue
from ssl_pretrain.launch.options import Launch, check, minutes
from ssl_pretrain.launch.slurm import Submitted, follow

from ssl_pretrain.distributed import environment
from ssl_pretrain.distributed.environment import Place
from ssl_pretrain.errors import UserError
from ssl_pretrain.loop import manifest
from ssl_pretrain.loop.signals import StopRequest

STEP = {
    "SLURM_JOB_ID": "41234",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "gpu[03-05,9]-ib",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h",
            "MASTER_PORT": "29500"}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, Place()),
        (TORCHRUN, Place(3, 8, 1, 2, "h", 29500)),
        (STEP, Place(5, 7, 1, 2, "gpu03-ib", 10_000 + 41_236 % 20_000, "gpu[03-05,9]-ib")),
        ({**STEP, **TORCHRUN}, Place(3, 8, 1, 2, "h", 29500)),  # torchrun inside a step
        ({**STEP, "MASTER_PORT": "77", "MASTER_ADDR": "x"}, Place(5, 7, 1, 2, "x", 77, "gpu[03-05,9]-ib")),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, Place()),  # a batch script is no step
        (
            {"SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_LOCALID": "1",
             "SUBMITIT_LOCAL_JOB_ID": "123"},
            Place(1, 2, 1, 2, "127.0.0.1", 10_123),
        ),
    ],
)  # fmt: skip
def test_a_process_finds_its_place(environ: dict[str, str], place: Place) -> None:
    assert environment.find(environ) == place


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[2,4-7]", "n2"), ("login,n[1-2]", "login"), ("r[1-2]c[3-4],x", "r1c3"), ("a-1,b", "a-1")],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert environment.first_host(nodes) == first


def test_half_an_environment_is_a_mistake_and_an_array_has_its_own_job_name() -> None:
    with pytest.raises(UserError, match="RANK but not LOCAL_RANK, WORLD_SIZE"):
        environment.find({"RANK": "0"})
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}
    assert environment.slurm_job(array) == "9_3"
    assert environment.slurm_job({"SLURM_JOB_ID": "9"}) == "9"
    assert environment.slurm_job({}) is None
    assert environment.end_of_job({"SLURM_JOB_END_TIME": "1700000000"}) == 1_700_000_000.0
    assert environment.end_of_job({}) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("1:30", 2), ("24:00:00", 1440), ("2-00", 2880), ("1-12:30", 2190), ("1-00:00:01", 1441), ("0:01", 1)],
)
def test_time_limits_in_slurms_notation(text: str, expected: int) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"launcher": "slurm"}, "--time"),
        ({"launcher": "slurm", "time": "a day"}, "--time a day is not a time"),
        ({"launcher": "slurm", "time": "0"}, "--time is 0"),
        ({"launcher": "slurm", "time": "2"}, "--stop-before 120"),
        ({"launcher": "slurm", "time": "90", "array": "0-1"}, "it needs --grid"),
        ({"launcher": "slurm", "time": "90", "nodes": 0}, "--nodes is 0"),
        ({"nproc": 0}, "--nproc is 0"),
        ({"partition": "p"}, "--partition needs --launcher slurm"),
        ({"gpus_per_node": 8}, "--gpus-per-node needs --launcher slurm"),
        ({"dry_run": True}, "--dry-run needs --launcher slurm"),
        ({"max_requeues": -1}, "at least 0"),
    ],
)
def test_flags_that_contradict_one_another(flags: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(Launch(**flags))


def test_a_dry_run_prints_the_whole_script(pretrain: Callable, tmp_path: Path) -> None:
    flags = (
        "--method mae --launcher slurm --nodes 2 --gpus-per-node 8 --cpus-per-task 6 --mem 64G --time 24:00:00 "
        "--partition a,b --account lab --qos high --constraint h100 --exclude n[1-3] --slurm exclusive reservation=x"
    ).split()
    said = pretrain(*flags, "--comment", "a b", "--out", tmp_path / "run", "--dry-run", PATH=os.devnull).stdout
    lines = said.splitlines()
    for option in (
        "nodes=2", "gpus-per-node=8", "ntasks-per-node=8", "cpus-per-task=6", "mem=64G", "time=1440", "partition=a,b",
        "account=lab", "qos=high", "constraint=h100", "exclude='n[1-3]'", "comment='a b'", "exclusive", "reservation=x",
        "requeue", "signal=USR2@120", "open-mode=append", f"output={tmp_path}/run.slurm/%j_0_log.out",
    ):  # fmt: skip
        assert f"#SBATCH --{option}" in lines, option
    assert not any("wckey" in line or "--error" in line for line in lines)
    step = next(line for line in lines if line.startswith("srun "))
    assert "--open-mode=append" in step
    assert "--cpus-per-task=6" in step  # srun does not inherit it
    assert f"-m ssl_pretrain.launch.job pretrain {' '.join(flags[:3])}" in step
    assert lines[-1] == f"# submitted by hand, it needs the folder of its logs: mkdir -p {tmp_path}/run.slurm"
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run.slurm").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--launcher", "slrum"], ["'slrum'", "did you mean slurm?"]),
        (["--launcher", "slurm", "--time", "90", "--partion", "p"], ["--partion", "did you mean --partition?"]),
        (["--launcher", "slurm", "--time", "90"], ["sbatch", "--nproc auto"]),
        (["--launcher", "slurm", "--time", "90", "--slurm", "mem=3G"], ["--slurm mem=3G", "launcher sets"]),
        (["--nproc", "some"], ["'some' is not a whole number or auto"]),
        (["--grid", "lr"], ["--grid lr", "FLAG=VALUE"]),
        (["--grid", "lr=1e-3,x"], ["--grid, --lr x:", "'x' is not a number"]),
        (["--grid", "encoder=vit_micro,vit_mikro"], ["vit_mikro", "did you mean vit_micro?"]),
    ],
)
def test_mistakes_get_one_line_and_nothing_is_started(
    argv: list[str], words: list[str], pretrain: Callable, tmp_path: Path
) -> None:
    done = pretrain("--method", "mae", "--out", tmp_path / "run", *argv, code=2, PATH=os.devnull)
    assert all(word in done.stderr for word in words), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_evaluation_takes_the_same_flags(evaluate: Callable, tmp_path: Path) -> None:
    more = "--launcher slurm --time 30 --partition p --mem 8G --dry-run".split()
    said = evaluate("knn", "--encoder", "pixels", "--data", "fractals", "--out", tmp_path / "e", *more).stdout
    assert "#SBATCH --partition=p" in said
    assert "-m ssl_pretrain.launch.job evaluate knn --encoder pixels" in said
    assert "signal" not in said  # an evaluation cannot save and continue: one would only end it early
    done = subprocess.run(command("evaluate", "finetune", "--encoder", "random", "--data", "fractals", "--nproc", 2),
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert "finetune runs in one process" in done.stderr


@pytest.mark.parametrize("grid", [[], ["--grid", "k=5,10"]])
def test_an_evaluation_may_use_all_of_its_time(grid: list[str], evaluate: Callable, tmp_path: Path) -> None:
    knn = ["knn", "--encoder", "pixels", "--data", "fractals", "--out", tmp_path / "e", "--launcher", "slurm", *grid]
    said = evaluate(*knn, "--time", 1, "--dry-run").stdout  # less than --stop-before
    assert "#SBATCH --time=1" in said
    assert "signal" not in said


@pytest.mark.parametrize(
    "argv",
    [
        ["knn", "--encoder", "pixels", "--data", "fractals", "--stop-before", "60"],
        ["suite", "--list", "none.yaml", "--max-requeues=1"],
    ],
)
def test_an_evaluation_takes_no_flags_of_continuing(argv: list[str], evaluate: Callable) -> None:
    said = evaluate(*argv, "--launcher", "slurm", "--time", 30, "--dry-run", code=2).stderr
    assert re.fullmatch(
        r"ssl-eval: --(stop-before|max-requeues) goes with ssl-pretrain: .* give it enough --time\n", said
    )


def test_the_script_of_a_grid_holds_all_that_its_jobs_need(evaluate: Callable, tmp_path: Path) -> None:
    knn = ["knn", "--encoder", "pixels", "--data", "fractals", "--out", tmp_path / "g", "--grid", "k=5,10", "seed=0,1"]
    script = evaluate(*knn, "--launcher", "slurm", "--time", 30, "--dry-run").stdout
    assert not list(tmp_path.iterdir())
    srun = tmp_path / "srun"
    srun.write_text(f'#!/bin/sh\nwhile [ "$1" != {sys.executable} ]; do shift; done\nexec "$@"\n')
    srun.chmod(0o755)
    task = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "2"}
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, env=task, check=False)
    assert done.returncode == 0, done.stderr  # the table at its end is no part of it
    assert json.loads((tmp_path / "g" / "k=10,seed=0" / "results.json").read_text())["protocol"]["k"] == [10]
    rows = (tmp_path / "g" / "summary.txt").read_text().splitlines()
    assert [row.split()[3] for row in rows] == ["state", "-", "-", "finished", "-"]


def test_a_grid_is_every_combination_with_a_folder_each() -> None:
    points = grid.expand(("lr=1e-4,3e-4", "data=a/b,c"), ["--method", "mae"], Path("g"))
    assert [point.settings for point in points] == [
        {"lr": "1e-4", "data": "a/b"}, {"lr": "1e-4", "data": "c"},
        {"lr": "3e-4", "data": "a/b"}, {"lr": "3e-4", "data": "c"},
    ]  # fmt: skip
    assert points[0].out == "g/lr=1e-4,data=a_b"
    assert points[0].argv == ["--method", "mae", "--lr", "1e-4", "--data", "a/b", "--out", "g/lr=1e-4,data=a_b"]
    for words, message in (
        (("lr=1,1",), "twice"), (("lr=1", "lr=2"), "twice"), (("out=a,b",), "cannot vary"), (("lr=1,",), "FLAG=VALUE"),
        (("data=a/b,a_b",), "same folder"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            grid.expand(words, [], Path("g"))


@pytest.mark.parametrize(
    ("spec", "picked"),
    [(None, ([0, 1, 2, 3], 4)), ("%2", ([0, 1, 2, 3], 2)), ("1,3", ([1, 3], 2)), ("2-3,0%1", ([0, 2, 3], 1))],
)
def test_the_runs_that_array_picks(spec: str | None, picked: tuple) -> None:
    assert grid.pick(spec, 4) == picked


@pytest.mark.parametrize("spec", ["4", "0-4", "x", "3-1", "%0", "1-"])
def test_an_array_that_is_none(spec: str) -> None:
    with pytest.raises(UserError, match=f"--array {spec}"):
        grid.pick(spec, 4)


@pytest.mark.slow
def test_a_local_grid_runs_in_turn_and_ends_with_a_table(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    both = [flag for i, flag in enumerate(TINY) if "decoder" not in flag + TINY[i - 1]]  # flags that both methods have
    both += ["--data", str(photos), "--steps", "2", "--log-every", "1", "--workers", "0"]
    done = pretrain("--grid", "method=mae,simmim", "--out", tmp_path, *both)
    rows = done.stdout.splitlines()[-3:]
    assert (tmp_path / "summary.txt").read_text().splitlines() == rows
    assert rows[0].split() == ["run", "method", "state", "step", "result", "folder"]
    for number, method in enumerate(("mae", "simmim")):
        folder = tmp_path / f"method={method}"
        shown = f"{losses(folder)[2]:.4g}"
        assert rows[number + 1].split() == [str(number), method, "finished", "2", "loss", shown, str(folder)]


def test_the_lines_of_a_run_at_work_are_read_without_the_last_half(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert losses(tmp_path) == {1: 2.5}
    (tmp_path / "metrics.jsonl").write_text("")
    assert losses(tmp_path) == {}


def test_stop_requests_keep_what_came_before_and_a_deadline() -> None:
    with StopRequest(deadline=time.time() + 3600) as outer:
        os.kill(os.getpid(), signal.SIGUSR2)
        with StopRequest() as inner:
            assert inner.signal == "SIGUSR2"
            assert inner.deadline == outer.deadline
    with StopRequest(deadline=time.time() + 0.2), StopRequest() as inner:
        assert inner.signal is None
        time.sleep(0.25)
        assert inner.signal == "the time limit"


def test_the_deadline_leaves_a_short_job_three_quarters_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now) + 10_000))
    assert requeue.deadline(120) == pytest.approx(now + 9_880, abs=2)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now) + 100))
    assert requeue.deadline(120) == pytest.approx(now + 75, abs=2)
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert requeue.deadline(120) is None


LATE = """
import os, sys, time
from ssl_pretrain.launch.pretrain import main
from ssl_pretrain.loop.signals import StopRequest
with StopRequest(time.time() + (1000 if os.environ["RANK"] == "0" else 0)):
    sys.exit(main(sys.argv[1:]))
"""


def test_a_time_limit_that_another_process_is_first_to_see_is_called_so(photos: Path, tmp_path: Path) -> None:
    same = [*TINY, "--method", "mae", "--data", photos, "--out", tmp_path / "run", "--steps", 500, "--workers", 0]
    place = {"SSL_PRETRAIN_RENDEZVOUS": (tmp_path / "meet").as_uri(), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LATE, *map(str, same)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        rank.wait(timeout=120)
    assert manifest.read(tmp_path / "run")["state"] == "stopped: the time limit at step 0"


def fake_slurm(folder: Path, facts: str) -> str:
    """A PATH with a scontrol that answers `facts` and notes what it is asked for in `asked`."""
    script = folder / "scontrol"
    script.write_text(f"#!/bin/sh\necho \"$@\" >>{folder}/asked\n[ $1 = show ] && echo 'JobId=7 {facts}'\nexit 0\n")
    script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("facts", "restarts", "said", "asked"),
    [
        ("JobState=RUNNING BatchFlag=1", 2, "requeued (restart 3 of at most 3)", True),
        ("JobState=RUNNING BatchFlag=1", 3, "not requeued: --max-requeues 3 is used up", False),
        ("JobState=COMPLETING BatchFlag=1", 0, "left to Slurm, which says COMPLETING", False),
        ("JobState=RUNNING BatchFlag=0", 0, "not requeued: the job has no script", False),
    ],
)
def test_who_is_requeued(
    facts: str, restarts: int, said: str, asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", fake_slurm(tmp_path, facts))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    done = requeue.preempted(tmp_path, Place(0, 2), "SIGTERM", 12, 3)
    assert done is not None
    assert done.startswith(said)
    assert manifest.read(tmp_path)["state"] == f"preempted: SIGTERM at step 12; {done}"
    assert ("requeue 7" in (tmp_path / "asked").read_text().splitlines()) == asked


def test_a_crash_is_requeued_only_where_another_start_may_get_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", fake_slurm(tmp_path, "JobState=RUNNING BatchFlag=1"))
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def crash(starts: list[int], before: list[int], state: str = "running") -> str | None:
        manifest.end(tmp_path, state, launches=[{"step": step} for step in starts])
        return requeue.crashed(tmp_path, Place(0, 2), before, 100)

    assert crash([0, 40], [0]) == "requeued (restart 1 of at most 100)"
    assert crash([0], []) == "requeued (restart 1 of at most 100)"
    assert crash([0, 40, 40], [0, 40]) is None  # two starts got nowhere
    assert crash([0, 40], [0, 40]) is None  # it had not begun
    assert crash([0, 40], [0], "failed: process 1 of 2: ValueError") is None


def test_a_start_that_misses_a_process_is_requeued_once_if_it_was_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", fake_slurm(tmp_path, "JobState=RUNNING BatchFlag=1"))
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    stopped = "preempted: SIGTERM at step 12; requeued (restart 1 of at most 100)"
    manifest.end(tmp_path, stopped)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert requeue.missed(tmp_path, Place(0, 2), stopped, 100) is None  # its first start
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for _ in range(2):  # each machine asks
        assert requeue.missed(tmp_path, Place(0, 2), stopped, 100) == "requeued (restart 2 of at most 100)"
    state = manifest.read(tmp_path)["state"]
    assert state.startswith("preempted: not all processes came; requeued")
    assert requeue.missed(tmp_path, Place(0, 2), state, 100) is None  # twice in a row
    assert requeue.missed(tmp_path, Place(0, 2), stopped, 1) == "not requeued: --max-requeues 1 is used up"


def test_follow_copies_the_log_once_and_returns_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", fake_slurm(tmp_path, "JobState=FAILED ExitCode=75:0"))
    (tmp_path / "log").write_text("one\ntwo\n")
    with open(tmp_path / "seen", "w") as out:
        assert follow(Submitted("7", (tmp_path / "log", tmp_path / "none")), out, pause=0) == 75
    assert (tmp_path / "seen").read_text() == "one\ntwo\n"
    fake_slurm(tmp_path, "JobState=CANCELLED ExitCode=0:15")
    with open(tmp_path / "seen", "w") as out:
        assert follow(Submitted("7", ()), out, pause=0) == 1


CALL = """
import sys
from datetime import timedelta
from ssl_pretrain.distributed.environment import Place
from ssl_pretrain.distributed.rendezvous import MissingProcess, meet
rank, size, port, seconds = map(int, sys.argv[1:])
try:
    store = meet(Place(rank, size, rank, size, "127.0.0.1", port, "n[1-3]"), timedelta(seconds=seconds))
except MissingProcess as missing:
    sys.exit(str(missing))
store.add("done", 1)
while store.add("done", 0) < size:
    pass
"""


def roll_call(ranks: list[int], size: int, port: int, seconds: int) -> list[tuple[int, str]]:
    argv = [[sys.executable, "-c", CALL, *map(str, (rank, size, port, seconds))] for rank in ranks]
    processes = [subprocess.Popen(each, stderr=subprocess.PIPE, text=True) for each in argv]
    said = [process.communicate(timeout=60)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("came", "words"), [([0, 2], "rank 1 of 3 did"), ([0], "rank 1, 2 of 3 did"), ([1], "rank 0 of 3, ")]
)
def test_a_roll_call_names_who_is_missing_on_all_who_came(came: list[int], words: str) -> None:
    began = time.monotonic()
    for code, said in roll_call(came, 3, free_port(), 6):
        assert code == 1, said
        assert words in said
        assert "did not come within 6 s (nodes: n[1-3])" in said
    assert time.monotonic() - began < 40


def test_a_roll_call_with_everybody() -> None:
    assert [code for code, _ in roll_call([1, 0], 2, free_port(), 30)] == [0, 0]
