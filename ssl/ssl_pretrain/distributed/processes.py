"""The processes of a run: which one this is, how they start, and how they end.

A process learns its place from the environment (environment.py) and finds the others (rendezvous.py).
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

# What torch would import later by itself. Its functions take the process group that stands at that moment as their default
# and so keep it, threads and all, until the interpreter ends, which may abort then. Here there is no group yet.
import torch.distributed.nn

from ..errors import UserError
from . import collectives, environment, rendezvous


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0


@contextmanager
def world(timeout: timedelta | None = None) -> Iterator[World]:
    """Join the other processes, if there are any, and leave them at the end.

    timeout: what the roll call, and later any exchange, may take (default: $SSL_PRETRAIN_TIMEOUT in seconds, else ten
    minutes, but no more than half of what is left of a Slurm job's time).
    Raises UserError where the environment names only half of what torchrun sets, or more processes than GPUs;
    rendezvous.MissingProcess where not all processes come.
    """
    place = environment.find()
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if place.local_rank >= gpus and not (gpus == 1 and environment.in_slurm_step()):
            raise UserError(f"{place.local_size} processes on this machine but {gpus} GPUs: lower --nproc")
        device = torch.device("cuda", place.local_rank % gpus)  # Slurm may show each process its own GPU only
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if place.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, cores() // place.local_size))
    world = World(place.rank, place.size, place.local_rank, place.local_size, device)
    if place.size == 1:
        yield world
        return
    timeout = timeout or _patience()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=rendezvous.meet(place, timeout),
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
            # Caches of FSDP2 keep gloo's threads. Time for them to release what they moved while there is an interpreter.
            time.sleep(0.05)


def _patience() -> timedelta:
    if "SSL_PRETRAIN_TIMEOUT" in os.environ:
        return timedelta(seconds=float(os.environ["SSL_PRETRAIN_TIMEOUT"]))
    end = environment.end_of_job()
    left = math.inf if end is None else end - time.time()
    return timedelta(seconds=min(600.0, max(30.0, left / 2)))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
