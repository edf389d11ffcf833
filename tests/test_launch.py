"""Placement, job scripts, mistakes in launch flags, grids, stop requests and the roll call; no Slurm is needed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY, command, losses
from PIL import Image
from ssl_pretrain.launch import grid, job, requeue
from ssl_pretrain.launch.options import Launch, check, minutes
from ssl_pretrain.launch.pretrain import main as pretrain_main
from ssl_pretrain.launch.slurm import Submitted, follow

from ssl_pretrain.distributed import environment, processes
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
    assert f"-m ssl_pretrain.launch.job --from {os.getcwd()} pretrain {' '.join(flags[:3])}" in step
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
    assert done.stderr.count("ssl-pretrain: ") == 1
    assert not list(tmp_path.iterdir())


def test_an_evaluation_takes_the_same_flags(evaluate: Callable, tmp_path: Path) -> None:
    more = "--launcher slurm --time 30 --partition p --mem 8G --dry-run".split()
    said = evaluate("knn", "--encoder", "pixels", "--data", "fractals", "--out", tmp_path / "e", *more).stdout
    assert "#SBATCH --partition=p" in said
    assert f"-m ssl_pretrain.launch.job --from {os.getcwd()} evaluate knn --encoder pixels" in said
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


RELATIVE = "--method mae --data photos --config run.yaml --out=runs/mae --launcher slurm --time 30".split()


def job_script(folder: Path, *argv: object) -> str:
    """What `ssl-pretrain ARGV --dry-run` prints in a folder that holds photos/ and run.yaml."""
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16)).save(folder / "photos" / "grey.png")
    (folder / "run.yaml").write_text("steps: 1\n")
    done = subprocess.run(
        command("pretrain", *argv, "--dry-run"), cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_script(script: str, bin_folder: Path, cwd: Path, **environ: str) -> subprocess.CompletedProcess:
    """The job script with a srun that runs its command once, in a folder of one's choice."""
    srun = bin_folder / "srun"
    srun.write_text(f'#!/bin/sh\nwhile [ "$1" != {sys.executable} ]; do shift; done\nexec "$@"\n')
    srun.chmod(0o755)
    task = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", **environ}
    return subprocess.run(["bash"], input=script, cwd=cwd, capture_output=True, text=True, env=task, check=False)


def test_a_job_knows_its_paths_and_runs_in_no_other_folder_than_it_was_submitted_from(tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = job_script(here, *RELATIVE)
    for word in (f"--data {here}/photos", f"--config {here}/run.yaml", f"--out={here}/runs/mae"):
        assert word in script
    assert f"#SBATCH --chdir={here}" in script.splitlines()
    assert f"#SBATCH --output={here}/runs/mae.slurm/%j_0_log.out" in script.splitlines()
    done = run_script(script, tmp_path, elsewhere)
    assert done.returncode == 2
    assert f"has started the job in {elsewhere} and not in {here}, where it was submitted" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(elsewhere.iterdir())
    here.rename(tmp_path / "gone")  # the node lacks it, and Slurm starts the job in a temporary folder
    done = run_script(script, tmp_path, elsewhere)
    assert done.returncode == 2
    assert f"not in {here}, where it was submitted, which this node lacks" in done.stderr
    assert not list(elsewhere.iterdir())
    assert not here.exists()


def test_a_job_without_out_has_an_absolute_one(tmp_path: Path) -> None:
    script = job_script(tmp_path, *[word for word in RELATIVE if not word.startswith("--out")])
    assert f"--out {tmp_path}/runs/mae-photos" in script


def test_a_script_of_ones_own_is_not_run_into_a_temporary_folder(tmp_path: Path, pretrain: Callable) -> None:
    """srun in a job whose submit folder the node lacks: Slurm has put the task in another one."""
    step = {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    step |= {"SLURM_SUBMIT_DIR": str(tmp_path / "gone"), "SLURM_STEP_TASKS_PER_NODE": "1"}
    done = pretrain("--method", "mae", "--out", "not-to-be-made", code=2, **step)
    assert f"lacks {tmp_path}/gone, where the job was submitted" in done.stderr
    assert "give --out as an absolute path" in done.stderr
    assert not Path("not-to-be-made").exists()


def test_a_percent_sign_in_a_path_is_no_pattern_of_slurms(tmp_path: Path) -> None:
    script = job_script(tmp_path, *RELATIVE[:4], *RELATIVE[-4:], "--out", "50%jobs/a b")
    assert f"#SBATCH --output='{tmp_path}/50%%jobs/a b.slurm/%j_0_log.out'" in script
    assert f"--output '{tmp_path}/50%%jobs/a b.slurm/%j_%t_log.out'" in script
    assert f"--out '{tmp_path}/50%jobs/a b'" in script
    assert f"mkdir -p '{tmp_path}/50%jobs/a b.slurm'" in script
    script = job_script(tmp_path, *RELATIVE, "--logs", "%x")
    assert f"#SBATCH --output={tmp_path}/%%x/%j_0_log.out" in script


@pytest.mark.parametrize(
    "flags",
    [
        ["--comment", "two\nlines"], ["--partition", "p\n#SBATCH --mail-type=ALL"], ["--account", "a\r"],
        ["--slurm", "reservation=x\ny"], ["--mem", "1G\n"], ["--out", "a\nb"], ["--logs", "a\nb"], ["--exclude", "n\0"],
    ],
    ids=lambda flags: flags[0],
)  # fmt: skip
def test_a_line_break_gets_into_no_job_script(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = [
        "--method",
        "mae",
        "--launcher",
        "slurm",
        "--time",
        "30",
        "--dry-run",
        "--out",
        str(tmp_path / "run"),
        *flags,
    ]
    assert pretrain_main(argv) == 2
    said = capsys.readouterr()
    assert f"{flags[0]} " in said.err
    assert "holds a line break or control character" in said.err
    assert not said.out


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


@pytest.mark.parametrize("launcher", [[], ["--launcher", "slurm", "--time", "30", "--dry-run"]], ids=["here", "slurm"])
@pytest.mark.parametrize(
    ("axis", "words"),
    [
        ("decoder-heads=4,5", ["--grid, --decoder-heads 5:", "--decoder-dim 128 must be a multiple"]),
        ("patch-size=4,5", ["--grid, --patch-size 5:", "32"]),
        ("warmup-steps=1,9", ["--grid, --warmup-steps 9:", "do not fit into 8 steps"]),
        ("accumulate=2,3", ["--grid, --accumulate 3:"]),
    ],
)
def test_combinations_are_checked_before_any_begins(
    axis: str, words: list[str], launcher: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = ["--method", "mae", "--steps", "8", "--out", str(tmp_path / "grid"), "--grid", axis, *launcher]
    assert pretrain_main(argv) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert len(said.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_table_says_why_a_run_did_not_begin(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A mistake that only the run itself can find: its folder holds something else."""
    out = tmp_path / "grid"
    (out / "seed=1").mkdir(parents=True)
    (out / "seed=1" / "notes.txt").write_text("mine")
    argv = ["--method", "simmim", "--data", str(photos), "--steps", "1", "--workers", "0", "--no-score"]
    argv += TINY[: TINY.index("--decoder-dim")]
    points = grid.expand(("seed=0,1",), argv, out)
    for number, code in ((1, 2), (0, 0)):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        assert job.main(["--from", os.getcwd(), "grid", "pretrain", str(out), "seed=0,1", "--", *argv]) == code
    rows = (out / "summary.txt").read_text().splitlines()
    assert rows == grid.table(points).splitlines()
    assert rows[1].split()[:4] == ["0", "0", "finished", "1"]
    assert rows[2].split()[:4] == ["1", "1", "mistake", "-"]
    assert "holds something else than a run" in rows[2]
    (out / "seed=1" / "notes.txt").unlink()  # corrected, it runs, and the table forgets
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert job.main(["--from", os.getcwd(), "grid", "pretrain", str(out), "seed=0,1", "--", *argv]) == 0
    assert grid.table(points).splitlines()[2].split()[:4] == ["1", "1", "finished", "1"]
    assert sorted(path.name for path in out.iterdir()) == ["seed=0", "seed=1", "summary.txt"]

    def broken(*_: object, **__: object) -> None:
        raise ValueError("no such thing")

    shutil.rmtree(out / "seed=1")
    monkeypatch.setattr("ssl_pretrain.launch.pretrain._main", broken)
    with pytest.raises(ValueError, match="no such thing"):
        job.main(["--from", os.getcwd(), "grid", "pretrain", str(out), "seed=0,1", "--", *argv])
    assert "1 1 failed - ValueError: no such thing" in " ".join(grid.table(points).splitlines()[2].split())
    assert grid.NOTE not in os.environ


@pytest.mark.slow
def test_a_local_grid_says_why_a_run_did_not_begin(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    out = tmp_path / "grid"
    (out / "seed=1").mkdir(parents=True)
    (out / "seed=1" / "notes.txt").write_text("mine")
    same = ["--data", photos, "--steps", 1, "--workers", 0, *TINY, "--no-score"]
    done = pretrain("--method", "mae", "--grid", "seed=0,1", "--out", out, *same, code=2)
    rows = done.stdout.splitlines()[-3:]
    assert rows[1].split()[2] == "finished"
    assert rows[2].split()[2] == "mistake"
    assert "holds something else than a run" in rows[2]


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


def test_a_requeued_job_waits_for_little_more_than_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_PRETRAIN_TIMEOUT", raising=False)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert processes.roll_call_patience().total_seconds() == 600  # a process that Slurm has not started
    for name, value in {**STEP, "SLURM_JOB_END_TIME": str(int(time.time()) + 100_000)}.items():
        monkeypatch.setenv(name, value)
    waits = processes.roll_call_patience().total_seconds()
    assert 60 <= waits <= 80  # the first process; the others half as long again
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert processes.roll_call_patience().total_seconds() == 600
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SSL_PRETRAIN_TIMEOUT", "33")
    assert processes.roll_call_patience().total_seconds() == 33


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_requeued_job_that_misses_a_process_ends_with_75_within_two_minutes(
    rank: int, photos: Path, tmp_path: Path
) -> None:
    """One of two tasks on two nodes comes back; a scontrol that says the job runs and takes the request."""
    out = tmp_path / "run"
    out.mkdir()
    manifest.end(out, "preempted: lost a process; requeued (restart 1 of at most 100)", launches=[{"step": 0}])
    step = {
        **STEP,
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(rank),
    }
    step |= {"SLURM_STEP_NODELIST": "localhost,localhost", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    step |= {"SLURM_RESTART_COUNT": "1", "SLURM_JOB_END_TIME": str(int(time.time()) + 100_000)}
    step |= {"PATH": fake_slurm(tmp_path, "JobState=RUNNING BatchFlag=1"), "MASTER_PORT": str(free_port())}
    began = time.monotonic()
    argv = command("pretrain", "--method", "mae", "--data", photos, "--out", out, "--steps", 2, "--workers", 0, *TINY)
    done = subprocess.run(argv, env={**os.environ, **step}, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 75, done.stderr
    assert time.monotonic() - began < 120
    assert f"rank {1 - rank} of 2" in done.stderr
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "requeue 41234"


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
