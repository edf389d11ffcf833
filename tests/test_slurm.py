"""The launcher on a real Slurm (tests/slurm/): placement, requeue after every disturbance, and the same bits after it.

Needs root and Debian's slurmctld, slurmd, slurm-client and munge, which .ci/run installs; skipped with the reason where
they are not there.
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, command, losses
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssl_pretrain import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

LAB = ROOT / "tests" / "slurm"
STEPS = 240
SAME = ["--method", "mae", "--steps", STEPS, "--log-every", 1, "--checkpoint-every", 20, *TINY]
SAME += ["--workers", 0, "--no-score"]
TWO_NODES = ["--nodes", 2, "--nproc", 1]
ONE_NODE = ["--nodes", 1, "--nproc", 2]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which commands reach a Slurm of two nodes with two cores each."""
    wanted = ("slurmctld", "slurmd", "sbatch", "munged")
    missing = [name for name in wanted if shutil.which(name) is None and not Path("/usr/sbin", name).exists()]
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} not installed (.ci/run installs them)")
    if os.geteuid() != 0:
        pytest.skip("the test's Slurm needs root")
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    base = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    base |= {"SLURM_LAB": str(folder), "OMP_NUM_THREADS": "1", "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    up = subprocess.run([LAB / "up.sh", "2", "2"], capture_output=True, text=True, env=base, check=False)
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        yield {**base, "SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        subprocess.run([LAB / "down.sh"], env=base, check=False)


class Job:
    """A submitted run: its number, its folder, and what a test does to it."""

    def __init__(self, lab: dict[str, str], photos: Path, out: Path, *flags: object) -> None:
        argv = command("pretrain", *SAME, "--data", photos, "--out", out, "--launcher", "slurm", "--time", 30, *flags)
        done = subprocess.run(argv, capture_output=True, text=True, env=lab, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        found = re.search(r"^job (\d+)$", done.stdout, re.MULTILINE)
        assert found
        self.lab, self.out, self.id = lab, out, found[1]
        self.log = out.with_name(out.name + ".slurm") / f"{self.id}_0_log.out"

    def slurm(self, *words: object, check: bool = True) -> str:
        return subprocess.run(
            list(map(str, words)), capture_output=True, text=True, env=self.lab, check=check
        ).stdout  # fmt: skip

    def facts(self) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.slurm("scontrol", "show", "job", self.id)))

    def seconds(self) -> float:
        """How long it has been running."""
        return time.time() - time.mktime(time.strptime(self.facts()["StartTime"], "%Y-%m-%dT%H:%M:%S"))

    def manifest(self) -> dict:
        try:
            return json.loads((self.out / "manifest.json").read_text())
        except FileNotFoundError:
            return {}

    def wait_for(self, what: Callable[[], bool], seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < until, f"{self.facts()}\n{self.log.read_text() if self.log.exists() else ''}"
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            return self.manifest().get("state") == "running" and max(losses(self.out), default=0) >= step

        self.wait_for(lambda: (self.out / "metrics.jsonl").exists() and reached())

    def wait_for_restart(self, number: int) -> None:
        """Until it is in the queue again, then without the two minutes that Slurm lets a requeued job wait."""
        self.wait_for(lambda: self.facts()["Restarts"] == str(number))
        self.wait_for(lambda: self.facts()["JobState"] == "PENDING")
        # In those minutes all of the first start ends: its srun, which would now end the second's step, and Slurm's own
        # keeper of its script, whose word that the script has ended would now be taken for the second's.
        self.wait_for(lambda: not self.left())
        self.slurm("scontrol", "update", f"JobId={self.id}", "StartTime=now")

    def left(self) -> list[str]:
        """What of this job still runs: srun processes and Slurm's keepers of its steps."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # gone meanwhile
                name = (process / "comm").read_text().strip()
                if name == "srun":
                    words = (process / "environ").read_bytes().split(b"\0")
                    found += [process.name] if f"SLURM_JOB_ID={self.id}".encode() in words else []
                elif name == "slurmstepd":
                    keeps = re.search(rb"\[(\d+)\.", (process / "cmdline").read_bytes())
                    found += [process.name] if keeps is None or keeps[1].decode() == self.id else []
        return found

    def wait_for_end(self) -> None:
        self.wait_for(lambda: self.facts()["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"))


def state(out: Path) -> dict:
    return checkpoint.load(out / "checkpoints", STEPS)


def assert_same_run(disturbed: Path, undisturbed: Path) -> None:
    """The same bits, and every step once in metrics.jsonl and in TensorBoard."""
    a, b = state(disturbed), state(undisturbed)
    for part in ("method", "optimizer"):
        assert a[part].keys() == b[part].keys()
        for name, value in a[part].items():
            assert torch.equal(value, b[part][name]), name
    assert losses(disturbed) == losses(undisturbed)
    lines = [json.loads(line) for line in (disturbed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    board = EventAccumulator(str(disturbed / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, STEPS + 1))
    assert json.loads((disturbed / "manifest.json").read_text())["state"] == "finished"


@pytest.fixture(scope="module")
def undisturbed(lab: dict[str, str], photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two nodes with one task each that nothing happened to, followed with --wait."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    argv = command("pretrain", *SAME, "--data", photos, "--out", out, "--launcher", "slurm", "--time", 30, *TWO_NODES,
                   "--cpus-per-task", 1, "--comment", "two words", "--wait")  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, env=lab, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^job \d+$", done.stdout, re.MULTILINE)
    log = re.search(r"^log (\S+)$", done.stdout, re.MULTILINE)
    assert log
    assert Path(log[1]).read_text() in done.stdout  # all of it was followed
    assert f"step {STEPS}/{STEPS}" in done.stdout
    return out


def test_two_nodes_give_the_losses_of_one_process(
    undisturbed: Path, photos: Path, tmp_path: Path, pretrain: Callable
) -> None:
    pretrain(*SAME, "--data", photos, "--out", tmp_path / "one")
    one, two = losses(tmp_path / "one"), losses(undisturbed)
    assert len(one) == STEPS
    assert two == pytest.approx(one, rel=1e-4)
    facts = json.loads((undisturbed / "manifest.json").read_text())
    assert facts["launches"][0]["processes"] == 2
    assert facts["state"] == "finished"


def test_signals_and_requeue_on_one_node_with_two_tasks(
    lab: dict[str, str], undisturbed: Path, photos: Path, tmp_path: Path
) -> None:
    job = Job(lab, photos, tmp_path / "run", *ONE_NODE)
    stops = (
        ("scancel", "--signal=USR2", job.id),
        ("scontrol", "requeue", job.id),
        ("scancel", "--signal=TERM", job.id),
    )
    for number, stop in enumerate(stops, 1):
        job.wait_for_step(40 * number)
        job.slurm(*stop)
        job.wait_for_restart(number)
        reached = max(losses(job.out))
        assert reached < STEPS
        assert checkpoint.newest(job.out / "checkpoints") == reached, "a completed step was lost"
        said = job.manifest()["state"]
        done = rf"requeued \(restart {number} of at most 100\)" if stop[0] == "scancel" else "left to Slurm"
        # Slurm signals the tasks one after the other: at the step's exchange only the second one may have its signal.
        assert re.match(rf"preempted: SIG(USR2|TERM)( to process 1)? at step {reached}; {done}", said), said
    job.wait_for_end()
    assert job.facts()["JobState"] == "COMPLETED"
    assert len(job.manifest()["launches"]) == 4
    assert_same_run(job.out, undisturbed)


def test_preemption_by_a_partition_of_higher_priority(
    lab: dict[str, str], undisturbed: Path, photos: Path, tmp_path: Path
) -> None:
    job = Job(lab, photos, tmp_path / "run", *TWO_NODES, "--partition", "scavenge")
    job.wait_for_step(30)
    job.slurm("scancel", "--signal=STOP", job.id)  # it shall not end meanwhile; Slurm wakes what it preempts
    job.slurm("sbatch", "--partition=main", "--nodes=2", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=true")
    job.wait_for_restart(1)
    assert checkpoint.newest(job.out / "checkpoints") == max(losses(job.out))
    job.wait_for_end()
    assert job.facts()["JobState"] == "COMPLETED"
    assert_same_run(job.out, undisturbed)


def test_a_crashed_node(lab: dict[str, str], undisturbed: Path, photos: Path, tmp_path: Path) -> None:
    job = Job(lab, photos, tmp_path / "run", *TWO_NODES)
    job.wait_for_step(50)
    job.slurm(LAB / "crash.sh", "n2")
    try:
        job.wait_for(lambda: job.facts()["Restarts"] == "1")
    finally:
        job.slurm(LAB / "revive.sh", "n2")
    job.wait_for_restart(1)
    job.wait_for_end()
    assert job.facts()["JobState"] == "COMPLETED"
    assert job.manifest()["launches"][1]["step"] % 20 == 0  # from the last checkpoint, not from scratch
    assert job.manifest()["launches"][1]["step"] > 0
    assert_same_run(job.out, undisturbed)


def test_the_time_limit_of_a_script_of_ones_own(
    lab: dict[str, str], undisturbed: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = map(str, command("pretrain", *SAME, "--data", photos, "--out", out, "--stop-before", 15))
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nsrun --open-mode=append " + " ".join(words) + "\n")
    flags = ["--nodes=1", "--ntasks-per-node=2", "--time=1", "--requeue", "--open-mode=append"]
    patient = {**lab, "SSL_PRETRAIN_TIMEOUT": "120"}  # asleep for half a minute, exchanges would time out
    said = subprocess.run(["sbatch", *flags, f"--output={tmp_path}/log", script], capture_output=True, text=True,
                          env=patient, check=True).stdout  # fmt: skip
    job = Job.__new__(Job)
    job.lab, job.out, job.id, job.log = lab, out, said.split()[-1], tmp_path / "log"
    job.wait_for_step(30)
    job.slurm("scancel", "--signal=STOP", job.id)  # it shall last, asleep, until 15 seconds before its minute is over
    job.wait_for(lambda: job.seconds() >= 46)
    job.slurm("scancel", "--signal=CONT", job.id)
    job.wait_for_restart(1)
    assert re.match(r"preempted: the time limit at step \d+; requeued", job.manifest()["state"])
    assert checkpoint.newest(out / "checkpoints") == max(losses(out))
    job.slurm("scontrol", "update", f"JobId={job.id}", "TimeLimit=10")
    job.wait_for_end()
    assert job.facts()["JobState"] == "COMPLETED"
    assert_same_run(out, undisturbed)


def test_no_more_requeues_than_allowed_and_none_of_a_cancelled_job(
    lab: dict[str, str], photos: Path, tmp_path: Path
) -> None:
    job = Job(lab, photos, tmp_path / "once", *ONE_NODE, "--max-requeues", 0)
    job.wait_for_step(5)
    job.slurm("scancel", "--signal=USR2", job.id)
    job.wait_for_end()
    assert job.facts()["ExitCode"] == "75:0"
    assert job.manifest()["state"].endswith("; not requeued: --max-requeues 0 is used up")
    job = Job(lab, photos, tmp_path / "cancelled", *ONE_NODE)
    job.wait_for_step(5)
    job.slurm("scancel", job.id)
    job.wait_for_end()
    time.sleep(2)
    assert job.facts()["JobState"] == "CANCELLED"
    assert checkpoint.newest(job.out / "checkpoints") == max(losses(job.out))


def test_a_grid_is_an_array_with_one_folder_each_and_a_table(lab: dict[str, str], photos: Path, tmp_path: Path) -> None:
    few = [flag if flag != STEPS else 3 for flag in SAME]
    argv = command("pretrain", *few, "--data", photos, "--out", tmp_path / "grid", "--launcher", "slurm", "--time", 5,
                   "--grid", "lr=1e-3,1e-4", "seed=0,1")  # fmt: skip
    done = subprocess.run([*argv, "--array", "0,3%1", "--wait"], capture_output=True, text=True, env=lab, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in (tmp_path / "grid").iterdir()) == [
        "lr=1e-3,seed=0",
        "lr=1e-4,seed=1",
        "summary.txt",
    ]
    rows = (tmp_path / "grid" / "summary.txt").read_text().splitlines()
    assert done.stdout.endswith("\n".join(rows) + "\n")
    assert [row.split()[3] for row in rows] == ["state", "finished", "-", "-", "finished"]
    loss = losses(tmp_path / "grid" / "lr=1e-4,seed=1")[3]
    assert f"loss {loss:.4g}" in rows[4]
    script = subprocess.run(
        [*argv, "--array", "2", "--dry-run"], capture_output=True, text=True, env=lab, check=True
    ).stdout
    subprocess.run(["sbatch", "--wait"], input=script, text=True, env=lab, check=True)  # by hand, of another run
    rows = (tmp_path / "grid" / "summary.txt").read_text().splitlines()
    assert [row.split()[3] for row in rows] == ["state", "finished", "-", "finished", "finished"]


def test_a_percent_sign_in_the_run_folder_is_no_pattern(lab: dict[str, str], photos: Path, tmp_path: Path) -> None:
    few = [flag if flag != STEPS else 2 for flag in SAME]
    out = tmp_path / "50%jobs" / "run"
    argv = command(
        "pretrain", *few, "--data", photos, "--out", out, "--launcher", "slurm", "--time", 5, *ONE_NODE, "--wait"
    )
    done = subprocess.run(argv, capture_output=True, text=True, env=lab, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout  # the log that was followed is the one that Slurm wrote
    assert sorted(path.name for path in tmp_path.iterdir()) == ["50%jobs"]
    logs = sorted(
        re.sub(r"\d+", "N", path.name, count=1) for path in (tmp_path / "50%jobs" / "run.slurm").glob("*log*")
    )
    assert logs == ["N_0_log.out", "N_1_log.out"]


def test_a_job_whose_submit_folder_the_node_lacks_is_refused_there(
    lab: dict[str, str], photos: Path, tmp_path: Path
) -> None:
    few = [flag if flag != STEPS else 2 for flag in SAME]
    here = tmp_path / "here"
    here.mkdir()
    argv = command("pretrain", *few, "--data", photos, "--out", "runs/mae", "--logs", tmp_path / "logs", "--launcher",
                   "slurm", "--time", 5, *ONE_NODE, "--slurm", "hold")  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, env=lab, check=False, cwd=here)
    assert done.returncode == 0, done.stdout + done.stderr
    job = Job.__new__(Job)
    job.lab, job.out, job.id = lab, here / "runs" / "mae", done.stdout.split()[1]
    job.log = tmp_path / "logs" / f"{job.id}_0_log.out"
    here.rename(tmp_path / "gone")
    job.slurm("scontrol", "release", job.id)
    job.wait_for_end()
    assert (job.facts()["JobState"], job.facts()["ExitCode"]) == ("FAILED", "2:0")
    assert f"not in {here}, where it was submitted, which this node lacks" in job.log.read_text()
    assert not list(tmp_path.rglob("metrics.jsonl"))
    assert not Path("/tmp/runs/mae").exists()  # where Slurm starts what has no folder


def test_an_evaluation_in_less_time_than_a_run_needs_for_saving(
    lab: dict[str, str], undisturbed: Path, tmp_path: Path
) -> None:
    argv = command("evaluate", "knn", "--encoder", undisturbed, "--data", "fractals", "--out", tmp_path / "knn",
                   "--workers", 0, "--launcher", "slurm", "--time", 2, *ONE_NODE, "--wait")  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, env=lab, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    script = next((tmp_path / "knn.slurm").glob("*submission*.sh"))
    assert "signal" not in script.read_text()
    top1 = json.loads((tmp_path / "knn" / "results.json").read_text())["metrics"]["top1"]
    assert f"{top1:.1f}" in done.stdout


def test_a_task_that_does_not_come_is_named(lab: dict[str, str], photos: Path, tmp_path: Path) -> None:
    words = " ".join(map(str, command("pretrain", *SAME, "--data", photos, "--out", tmp_path / "run")))
    script = f"if [ $SLURM_PROCID = 1 ]; then exec sleep 30; else exec {words}; fi"
    began = time.monotonic()
    done = subprocess.run(
        ["srun", "--nodes=2", "--ntasks=2", "--wait=1", "bash", "-c", script],
        capture_output=True, text=True, env={**lab, "SSL_PRETRAIN_TIMEOUT": "5"}, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "rank 1 of 2 did not come within 5 s (nodes: n[1-2])" in done.stderr
    assert time.monotonic() - began < 60
