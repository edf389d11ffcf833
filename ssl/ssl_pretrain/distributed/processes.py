"""The processes of a run: their ranks, start and end.

A process reads its rank from the environment (environment.py) and connects to the others (rendezvous.py).
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

# torch would import this later by itself. Its functions store the process group that exists at import as their default,
# and keep it with its threads until the interpreter exits, which may then abort. At this point there is no group yet.
import torch.distributed.nn

from ..errors import UserError
from . import collectives, environment, rendezvous

ROLL_CALL_AFTER_REQUEUE = timedelta(seconds=75)


@dataclass(frozen=True)
class World:
    """The ranks, sizes and device of this process in the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints messages."""
        return self.rank == 0


@contextmanager
def world(timeout: timedelta | None = None) -> Iterator[World]:
    """Connect to the other processes, if there are any, and disconnect at the end.

    timeout: limit for the rendezvous, and later for each collective (default: $SSL_PRETRAIN_TIMEOUT in seconds, else
    ten minutes, but at most half of the remaining time of a Slurm job; for the rendezvous of a requeued job little more
    than a minute, because a machine may be missing, and then the job must be requeued once more).
    Raises UserError if the environment has only some of torchrun's variables, or more processes than GPUs;
    rendezvous.MissingProcess if not all processes connect.
    """
    place = environment.find()
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if place.local_rank >= gpus and not (gpus == 1 and environment.in_slurm_step()):
            raise UserError(f"{place.local_size} processes on this machine but {gpus} GPUs: lower --nproc")
        device = torch.device("cuda", place.local_rank % gpus)  # with Slurm each process may see only its own GPU
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if place.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, cores() // place.local_size))
    world = World(place.rank, place.size, place.local_rank, place.local_size, device)
    if place.size == 1:
        yield world
        return
    roll_call = timeout or roll_call_patience()
    timeout = timeout or _patience()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=rendezvous.meet(place, roll_call),
        rank=place.rank,
        world_size=place.size,
        timeout=timeout,
    )
    try:
        yield world
    finally:
        collectives.cpu_group.cache_clear()
        dist.destroy_process_group()
        if device.type == "cpu":
            # FSDP2's caches keep gloo's threads. They need time to release their buffers before the interpreter exits.
            time.sleep(0.05)


def _patience() -> timedelta:
    if "SSL_PRETRAIN_TIMEOUT" in os.environ:
        return timedelta(seconds=float(os.environ["SSL_PRETRAIN_TIMEOUT"]))
    end = environment.end_of_job()
    left = math.inf if end is None else end - time.time()
    return timedelta(seconds=min(600.0, max(30.0, left / 2)))


def roll_call_patience() -> timedelta:
    """For how long the processes of a run wait for one another at its start. All of a requeued job have ended within two
    minutes where one does not come: those but the first wait half as long again."""
    requeued = environment.in_slurm_step() and environment.restarts() > 0
    if "SSL_PRETRAIN_TIMEOUT" in os.environ or not requeued:
        return _patience()
    return min(_patience(), ROLL_CALL_AFTER_REQUEUE)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
