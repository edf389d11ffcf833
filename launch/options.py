"""Flags of `ssl-pretrain` and `ssl-eval` that say where a command runs."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from ssl_pretrain.errors import UserError


@final
@dataclass(frozen=True, kw_only=True)
class Launch:
    """Where the command runs (docs/cluster.md)."""

    nproc: int | Literal["auto"] | None = None
    """Number of processes on each machine; auto: one per GPU, or one without a GPU (default: 1; with Slurm one for each
    of --gpus-per-node)."""
    launcher: Literal["local", "slurm"] = "local"
    """local: run on this machine; slurm: submit a Slurm job that runs the command."""
    grid: tuple[str, ...] = ()
    """Several runs: arguments FLAG=VALUE,VALUE,..., in all combinations; one after another, or a Slurm job array."""

    nodes: int = 1
    """Slurm: number of machines."""
    gpus_per_node: int | None = None
    """Slurm: number of GPUs of each machine, one for each process."""
    cpus_per_task: int | None = None
    """Slurm: number of CPU cores of each process; its loader workers run on them."""
    mem: str | None = None
    """Slurm: memory of each machine, like 64G."""
    time: str | None = None
    """Slurm: time limit of one job, like 90 (minutes), 24:00:00 or 2-00:00:00; a longer run is requeued."""
    partition: str | None = None
    """Slurm: partition, or several separated by commas."""
    account: str | None = None
    """Slurm: account that is charged."""
    qos: str | None = None
    """Slurm: quality of service."""
    constraint: str | None = None
    """Slurm: features that the machines must have."""
    exclude: str | None = None
    """Slurm: machines that must not be used."""
    comment: str | None = None
    """Slurm: comment."""
    array: str | None = None
    """Slurm, with --grid: which of its runs, and after % the largest number at a time: 0-3,7%2, or %2."""
    slurm: tuple[str, ...] = ()
    """Slurm: any other options of sbatch, KEY=VALUE or KEY, without dashes."""
    max_requeues: int = 100
    """Slurm, ssl-pretrain only: largest number of times that a stopped job is requeued."""
    stop_before: int = 120
    """Slurm, ssl-pretrain only: seconds before the time limit at which the run saves and is requeued."""
    logs: Path | None = None
    """Slurm: folder of job scripts and logs (default: next to the run's folder, with the suffix .slurm)."""
    wait: bool = False
    """Slurm: show the log until the job ends, and return its exit code."""
    dry_run: bool = False
    """Slurm: print the job script and submit nothing."""


# Flags that apply only to Slurm jobs. Without Slurm they are refused; otherwise nobody would notice the mistake.
SLURM_ONLY = tuple(
    "nodes gpus_per_node cpus_per_task mem time partition account qos constraint exclude comment array slurm logs wait "
    "dry_run".split()
)


def check(launch: Launch) -> None:
    """Raise UserError for flags that contradict one another."""
    for name, value in (("nproc", launch.nproc), ("nodes", launch.nodes), ("gpus-per-node", launch.gpus_per_node),
                        ("cpus-per-task", launch.cpus_per_task)):  # fmt: skip
        if isinstance(value, int) and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    if launch.max_requeues < 0 or launch.stop_before < 0:
        raise UserError("--max-requeues and --stop-before must be at least 0")
    if launch.launcher == "local":
        given = [name for name in SLURM_ONLY if getattr(launch, name) != getattr(Launch(), name)]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} needs --launcher slurm")
        return
    for field in dataclasses.fields(launch):
        value = getattr(launch, field.name)
        refuse_line_breaks(f"--{field.name.replace('_', '-')}", *(value if isinstance(value, tuple) else (value,)))
    if launch.time is None:
        raise UserError("--launcher slurm needs --time, the limit of one job, like --time 24:00:00")
    if launch.stop_before >= 60 * minutes(launch.time):
        raise UserError(f"--stop-before {launch.stop_before} seconds is not below --time {launch.time}")
    if launch.array is not None and not launch.grid:
        raise UserError("--array selects runs of a grid: it needs --grid")


def refuse_line_breaks(flag: str, *values: object) -> None:
    """Raise UserError where a value that goes into a job script holds a line break or another control character: Slurm
    reads its options line by line, and what follows a break would be a line of its own."""
    for value in values:
        if any(ord(letter) < 32 or ord(letter) == 127 for letter in str(value)):
            raise UserError(f"{flag} {str(value)!r} holds a line break or control character, which a job script cannot")


def minutes(text: str) -> int:
    """A time limit in Slurm's notation (M, M:S, H:M:S, D-H, D-H:M or D-H:M:S) in minutes, rounded up. Raises UserError
    for other texts."""
    found = re.fullmatch(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?|(?:(\d+):)?(\d+):(\d+)|(\d+))", text)
    if found is None:
        raise UserError(f"--time {text} is not a time: give minutes (90), H:M:S (24:00:00) or D-H:M:S (2-00:00:00)")
    days, hours, mins, secs, h, m, s, alone = (int(group or 0) for group in found.groups())
    seconds = ((days * 24 + hours + h) * 60 + mins + m + alone) * 60 + secs + s
    if seconds == 0:
        raise UserError("--time is 0; it must be above 0")
    return -(-seconds // 60)
