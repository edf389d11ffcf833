"""A Slurm job that must stop or that lost a process: it is requeued, or it ends with a clear message."""

import signal
import subprocess
import time
from pathlib import Path

import torch.distributed as dist

from ssl_pretrain.distributed import environment
from ssl_pretrain.distributed.environment import Place
from ssl_pretrain.loop import manifest
from ssl_pretrain.loop.watch import LostProcess

# Raised by an exchange if the other process has ended; gloo has no exception type for this.
LOST = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "Timed out waiting",
        "Socket closed", "not reachable")  # fmt: skip


def deadline(margin: float) -> float | None:
    """When a run has to stop so as to save before its job's time limit; None without one.

    A job shorter than twice the margin keeps a quarter of its time for saving, so that every job gets something done.
    """
    end = environment.end_of_job()
    return None if end is None else end - min(margin, max(0.0, end - time.time()) / 4)


def lost_a_process(problem: BaseException) -> bool:
    """Whether an exception means that another process of the run has ended, and not that this one failed."""
    return isinstance(problem, dist.DistError | LostProcess) or (
        isinstance(problem, RuntimeError) and any(word in str(problem) for word in LOST)
    )


def plain(problem: BaseException) -> str:
    """An exception in one line; of an exchange that broke off, without the library's words."""
    if isinstance(problem, LostProcess) or not lost_a_process(problem):
        text = " ".join(str(problem).split())
        return text if isinstance(problem, LostProcess) else f"{type(problem).__name__}: {text}"
    return "an exchange with another process broke off, which is gone or cannot be reached"


def preempted(out: Path, place: Place, stopped: str, step: int, limit: int) -> str | None:
    """Requeue the job of a run that has stopped and saved; returns what was done, in words for the user.

    Every process calls this once all have saved. The first requeues; None on the others.
    """
    if place.rank == 0:
        return _requeue(out, f"{stopped} at step {step}", limit)
    # A task that ends before the first has spoken to Slurm may end the job, where the cluster is set to do so.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(5)
    return None


def crashed(out: Path, place: Place, before: list[int], limit: int) -> str | None:
    """Requeue the job of a run that lost a process; returns what was done.

    before: the steps that the run's earlier starts began at. None where the run should end as failed: outside Slurm,
    where it had not begun, where a process has said that it failed by itself, or where this start began at the step of
    the one before, so that another one would get no further.
    """
    if not environment.in_slurm_step():
        return None
    time.sleep(3 if place.rank == 0 else 10)  # for a process at fault to say so, and for the first process to requeue
    starts = manifest.starts(out)
    hopeless = len(starts) == len(before) or (len(starts) > 1 and starts[-1] == starts[-2])
    if hopeless or manifest.read(out).get("state", "").startswith("failed"):
        return None
    if place.local_rank > 0:
        return "left to the first process of this machine"
    return _requeue(out, "lost a process", limit)


def missed(out: Path, place: Place, before: str, limit: int) -> str | None:
    """Requeue the job of a run that was to go on and did not meet all its processes; returns what was done.

    before: the state that the run's folder was found in. None where the run should end as failed: a job's first start,
    whose mistake another one would repeat, and the second start in a row that missed some.
    """
    missing = "not all processes came"
    if not restarted() or before.startswith(f"preempted: {missing}"):
        return None
    if place.local_rank > 0:
        return "left to the first process of this machine"
    return _requeue(out, missing, limit)


def restarted() -> bool:
    """Whether this is a job that Slurm has started before."""
    return environment.in_slurm_step() and environment.restarts() > 0


def _requeue(out: Path, why: str, limit: int) -> str:
    """Ask Slurm to requeue this job; returns what came of it, which the manifest says too."""
    restarts = environment.restarts()
    job = environment.slurm_job() or ""
    facts = next(iter(environment.job_facts(job)), {})
    asking = False
    if restarts >= limit:
        done = f"not requeued: --max-requeues {limit} is used up"
    elif facts.get("BatchFlag") == "0":
        done = "not requeued: the job has no script that Slurm could start again (sbatch, or --launcher slurm)"
    elif facts and facts.get("JobState") != "RUNNING":
        # Being preempted, requeued or cancelled by others it is in their hands: cancelled, it must stay so.
        done = f"left to Slurm, which says {facts.get('JobState')}"
    else:
        done, asking = f"requeued (restart {restarts + 1} of at most {limit})", True
    manifest.end(out, f"preempted: {why}; {done}")  # before Slurm ends this process
    if asking:
        try:
            subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError) as problem:
            done = f"not requeued: {(getattr(problem, 'stderr', None) or str(problem)).strip()}"
            manifest.end(out, f"preempted: {why}; {done}")
    return done
