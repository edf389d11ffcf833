"""Jobs on Slurm: submitit writes the script and submits it, the job runs the command itself, `--wait` follows its log.

The script starts the command as an ordinary Slurm step, not a pickled function: what `--dry-run` prints can be read and
submitted by hand, and no handler of signals stands between Slurm and the run.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, final

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from ssl_pretrain.distributed.environment import job_facts
from ssl_pretrain.errors import UserError
from ssl_pretrain.files import make_folder

from .options import Launch, minutes
from .paths import working_folder

GOING = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
    "SUSPENDED",
    "STOPPED",
}
PASSED_ON = ("mem", "partition", "account", "qos", "constraint", "exclude", "comment", "gpus_per_node", "cpus_per_task")


@final
class Jobs(SlurmExecutor):
    """submitit's executor, which can also write a script where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 1

    def script(self, command: str) -> str:
        """The job script that runs a shell command in every task."""
        return self._make_submission_file_text(command, "")

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        text = super()._make_submission_file_text(command, uid)
        # In the names of log files a percent sign begins a pattern (%j); one of the folder's own is written twice.
        text = text.replace(f"{self.folder}/%", f"{str(self.folder).replace('%', '%%')}/%")
        if self.parameters["signal_delay_s"] == 0:  # submitit always asks for a signal
            text = re.sub(r"^#SBATCH --signal=.*\n", "", text, flags=re.MULTILINE)
        return text

    def submit_command(self, command: str) -> str:
        """Submit that script; returns the job's number."""
        make_folder(self.folder, "--logs")
        # submitit would take %j in the folder's own name for the job's number.
        aside = self.folder / f".submission-{os.getpid()}.sh"
        aside.write_text(self.script(command))
        try:
            said = subprocess.run(["sbatch", str(aside)], capture_output=True, text=True, check=False)
            if said.returncode:
                raise FailedJobError(said.stderr or f"sbatch ended with exit code {said.returncode}")
            job = self._get_job_id_from_submission_command(said.stdout)
            aside.rename(self.folder / f"{job}_submission.sh")
        finally:
            aside.unlink(missing_ok=True)
        return job


@dataclass(frozen=True)
class Submitted:
    """A job in the queue."""

    job: str
    logs: tuple[Path, ...]  # of the first task; of each run of a grid


def executor(launch: Launch, folder: Path, name: str, runs: list[int] | None, at_once: int) -> Jobs:
    """Everything the flags say about the job; `runs` are the numbers of an array's tasks, `at_once` of which run at a time.

    With `stop_before` 0 Slurm sends no signal before the time limit. Raises UserError for a --slurm word that is no
    KEY=VALUE or that another flag sets.
    """
    tasks = launch.nproc if isinstance(launch.nproc, int) else launch.gpus_per_node or 1
    more: dict[str, Any] = {
        key: getattr(launch, key) for key in PASSED_ON if getattr(launch, key) is not None
    }  # as they are written: submitit would turn some into numbers
    more["requeue"] = True
    more["chdir"] = str(working_folder())  # also if the script is submitted by hand from another folder
    for word in launch.slurm:
        key, _, value = word.partition("=")
        key = key.strip("-").replace("-", "_")
        if key in PASSED_ON or key in (
            "nodes",
            "time",
            "array",
            "requeue",
            "signal",
            "output",
            "error",
            "chdir",
            "ntasks_per_node",
        ):
            raise UserError(f"--slurm {word}: the launcher sets this option itself; the flags are in --help")
        if not key:
            raise UserError(f"--slurm {word!r} is not KEY=VALUE")
        more[key] = value or True
    # srun does not inherit this one; and one failed task must not take down those that are about to requeue the job.
    step = ["--open-mode=append", "--kill-on-bad-exit=0"]
    step += [f"--cpus-per-task={launch.cpus_per_task}"] if launch.cpus_per_task else []
    jobs = Jobs(folder.resolve())
    jobs.update_parameters(
        job_name=name,
        time=minutes(launch.time or "0"),
        nodes=launch.nodes,
        ntasks_per_node=tasks,
        signal_delay_s=launch.stop_before,
        stderr_to_stdout=True,
        wckey=None,
        srun_args=step,
        additional_parameters=more,
    )
    if runs is not None:
        jobs.parameters["map_count"] = len(runs)
        more["array"] = ",".join(map(str, runs)) + f"%{at_once}"
    return jobs


def script(jobs: Jobs, words: list[str]) -> str:
    """The job script that runs `words` (the command and its arguments) in every task, to be read and submitted by hand."""
    folder = shlex.quote(str(jobs.folder))  # Slurm makes none, and a job without its log file fails without a word
    return jobs.script(shlex.join(words)) + f"\n# submitted by hand, it needs the folder of its logs: mkdir -p {folder}"


def submit(jobs: Jobs, words: list[str], runs: list[int] | None) -> Submitted:
    """Submit a job that runs `words` (the command and its arguments). Raises UserError where Slurm refuses it."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "--launcher slurm needs sbatch, which is not on this machine's PATH: log in where jobs are submitted, or leave "
            "the flag out to run here (--nproc auto uses all GPUs)"
        )
    try:
        job = jobs.submit_command(shlex.join(words))
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as problem:
        lines = [line for line in str(problem).splitlines() if line.startswith("sbatch:")] or str(problem).splitlines()
        raise UserError(f"Slurm refused the job: {' '.join(lines[-2:])}") from None
    folder = jobs.folder
    names = [f"{job}_0_log.out"] if runs is None else [f"{job}_{run}_0_log.out" for run in runs]
    return Submitted(job, tuple(folder / name for name in names))


def command(name: str, argv: list[str]) -> list[str]:
    """The words that run `name` ("pretrain", "evaluate", "grid") as the task of a job, in this folder and nowhere else."""
    return [sys.executable, "-u", "-m", "ssl_pretrain.launch.job", "--from", str(working_folder()), name, *argv]


def follow(submitted: Submitted, out: TextIO, pause: float = 2.0, patience: float = 60.0) -> int:
    """Copy the log to `out` while the job waits and runs, requeues included; returns its exit code.

    A job of several runs has the code of the first that failed. pause: seconds between looks; patience: for how many
    Slurm may have no answer. Raises KeyboardInterrupt, which leaves the job alone.
    """
    shown = [0] * len(submitted.logs)
    answered = time.monotonic()
    while True:
        facts = job_facts(submitted.job)  # before the log is read: the last lines come before the end
        for i, log in enumerate(submitted.logs):
            if log.exists():
                with open(log, "rb") as file:
                    file.seek(shown[i])
                    text = file.read()
                shown[i] += len(text)
                out.write(text.decode(errors="replace"))
        out.flush()
        if facts:
            answered = time.monotonic()
        elif time.monotonic() - answered > patience:
            out.write(f"Slurm does not know job {submitted.job} any more\n")
            return 1
        if facts and all(each.get("JobState") not in GOING for each in facts):
            codes = [_exit_code(each) for each in facts]
            return next((code for code in codes if code), 0)
        time.sleep(pause)


def _exit_code(facts: dict[str, str]) -> int:
    """The job's own code; 1 where a signal or Slurm ended it."""
    code = int(facts.get("ExitCode", "1:0").split(":")[0])
    return code or (0 if facts.get("JobState") == "COMPLETED" else 1)
