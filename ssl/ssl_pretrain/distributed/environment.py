"""The rank of a process within its run, read from environment variables.

Supported are torchrun's variables (`--nproc` sets them too), the step of a Slurm job (`srun`; also what submitit starts
on Slurm), and a job of submitit's local executor. A process that none of them started is a run with one process.
"""

import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class Place:
    """A process's ranks and sizes, and the address of the run's first process (None if the environment has none)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str | None = None
    port: int | None = None
    nodes: str = "this machine"


def find(environ: Mapping[str, str] = os.environ) -> Place:
    """The place of this process. Raises UserError if the environment has only some of torchrun's variables."""
    found = [name for name in TORCHRUN if name in environ]
    if found and len(found) < len(TORCHRUN):
        missing = ", ".join(sorted(set(TORCHRUN) - set(found)))
        raise UserError(f"the environment sets {', '.join(found)} but not {missing}: start with --nproc or torchrun")
    given_port = int(environ["MASTER_PORT"]) if "MASTER_PORT" in environ else None
    if found:
        rank, size, local = (int(environ[name]) for name in TORCHRUN)
        local_size = int(environ.get("LOCAL_WORLD_SIZE", size))
        return Place(rank, size, local, local_size, environ.get("MASTER_ADDR"), given_port)
    if in_slurm_step(environ):
        nodes = environ["SLURM_STEP_NODELIST"]
        return Place(
            rank=int(environ["SLURM_PROCID"]),
            size=int(environ["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environ["SLURM_LOCALID"]),
            local_size=_tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])],
            address=environ.get("MASTER_ADDR", first_host(nodes)),
            port=given_port or _port(int(environ["SLURM_JOB_ID"]) + int(environ.get("SLURM_STEP_ID", "0"))),
            nodes=nodes,
        )
    if "SUBMITIT_LOCAL_GLOBALID" in environ:
        rank, size, local = (int(environ[f"SUBMITIT_LOCAL_{name}"]) for name in ("GLOBALID", "NTASKS", "LOCALID"))
        port = given_port or _port(int(environ["SUBMITIT_LOCAL_JOB_ID"]))
        return Place(rank, size, local, size, "127.0.0.1", port)
    return Place()


def in_slurm_step(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `srun` started this process (batch scripts and shells of `salloc` are not steps)."""
    return "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ


def restarts(environ: Mapping[str, str] = os.environ) -> int:
    """How often Slurm has started this job again."""
    return int(environ.get("SLURM_RESTART_COUNT", "0"))


def slurm_job(environ: Mapping[str, str] = os.environ) -> str | None:
    """The name of this process's Slurm job: "12", or "12_3" in an array; None outside Slurm.

    The number alone is not enough for an array, because one of its tasks has the same number as the whole array.
    """
    if "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def job_facts(job: str) -> list[dict[str, str]]:
    """What `scontrol` reports about a job: one mapping (JobState, ExitCode, EndTime, ...), or one for each array task.

    Empty if scontrol is missing, does not answer within half a minute, or no longer knows the job.
    """
    try:
        command = ["scontrol", "show", "job", job, "--oneliner"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(re.findall(r"(?:^| )(\w+)=(\S*)", line)) for line in output.splitlines() if "JobId=" in line]


def end_of_job(environ: Mapping[str, str] = os.environ) -> float | None:
    """When this process's Slurm job reaches its time limit (seconds since 1970); None if it is not known."""
    if "SLURM_JOB_END_TIME" in environ:
        return float(environ["SLURM_JOB_END_TIME"])
    job = slurm_job(environ)
    for facts in job_facts(job) if job else []:
        try:
            return time.mktime(time.strptime(facts.get("EndTime", ""), "%Y-%m-%dT%H:%M:%S"))
        except ValueError:  # "Unknown": a partition without a limit
            return None
    return None


def first_host(nodes: str) -> str:
    """The first of a Slurm node list: "gpu[03-05,9]-ib,login" is "gpu03-ib"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise UserError(f"the environment's SLURM_STEP_NODELIST is {nodes!r}: it names no node")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's "2(x3),1" as [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def _port(number: int) -> int:
    """A port computed from a job's number, below the range that Linux assigns automatically."""
    return 10_000 + number % 20_000
