"""Before a run of several processes: is it the same program everywhere, on the devices it should have, and do all see the
run folder? In a second at the start of every such run; with more to see as `ssl-pretrain --preflight`.
"""

import importlib.metadata
import itertools
import os
import platform
import shutil
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import distributed, files
from ..distributed import World, cores
from ..errors import UserError
from .manifest import commit

BRIEF = 16  # MiB written at the start of a run
SAME = ("ssl-pretrain", "torch", "numpy")  # versions that must agree: with others the processes compute other things
TOLD = ("pillow", "safetensors", "simplejpeg")  # versions that had better agree
BUILT = ("python", "cuda", "commit")  # and what else had better
VISIBLE = 3.0  # seconds that a file may take to be seen on another machine
LINES = 32  # processes that get a line each
TRIAL = 64  # MiB written to measure the run folder, where nothing but that is asked for


@dataclass(frozen=True)
class Facts:
    """What one process says of itself."""

    rank: int
    host: str
    device: str
    cores: int
    versions: dict[str, str]
    sees: bool  # the run folder's file of the first process
    free: int  # bytes in the run folder
    speed: float | None  # bytes a second written to it, by one process of each machine
    trouble: str | None  # why it cannot be written


def check(world: World, out: Path, *, trial: int = BRIEF) -> list[Facts]:
    """Every process's facts, on every process. All must call it; `out` exists.

    trial: MiB that one process of each machine writes to the run folder, to measure it.

    Raises UserError, on all of them, where the run could not work: other versions of the program, CPUs beside GPUs, a run
    folder that not all see, a sum over the processes that comes out wrong.
    """
    token = out / f".preflight-{distributed.from_first(uuid.uuid4().hex)}"
    if world.first:
        token.touch()
    distributed.barrier()
    sees = _appears(token)
    speed, trouble = _write_speed(out, trial) if sees and world.local_rank == 0 else (None, None)
    facts = Facts(
        rank=world.rank,
        host=socket.gethostname(),
        device=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU",
        cores=cores(),
        versions={name: _version(name) for name in (*SAME, *TOLD)}
        | {"python": platform.python_version(), "cuda": str(torch.version.cuda), "commit": str(commit())},
        sees=sees,
        free=shutil.disk_usage(out).free if out.exists() else 0,
        speed=speed,
        trouble=trouble,
    )
    all_facts: list[Facts] = distributed.from_all(facts)
    total = torch.full((1024,), float(world.rank + 1), device=world.device)
    distributed.all_reduce_(total)
    expected = world.size * (world.size + 1) / 2
    wrong = [rank for rank, good in enumerate(distributed.from_all(bool((total == expected).all()))) if not good]
    distributed.barrier()
    if world.first:
        token.unlink(missing_ok=True)
    # A run that cannot write the trial may go on with what it has, and stops with a message where it must write.
    problems = _problems(all_facts, out, writes=trial == TRIAL)
    if wrong:
        problems.append(f"the sum over {world.size} processes came out wrong on rank {_some(wrong)}")
    if problems:
        mistake = UserError("; ".join(problems))
        mistake.reported_elsewhere = not world.first
        raise mistake
    return all_facts


def alone(out: Path) -> str:
    """`ssl-pretrain --preflight`: everything, and nothing but it. Returns the table. Raises UserError as `check`."""
    with distributed.world() as world:
        began = time.monotonic()
        files.make_folder(out)
        all_facts = check(world, out, trial=TRIAL)
        return table(all_facts, out, time.monotonic() - began)


def disagreements(all_facts: list[Facts]) -> list[str]:
    """What had better be the same everywhere and is not, a sentence each."""
    values = {name: {f.rank: f.versions[name] for f in all_facts} for name in (*TOLD, *BUILT)}
    values["the device"] = {f.rank: f.device for f in all_facts}
    return [
        f"{name} is not the same everywhere: {difference}"
        for name, each in values.items()
        if (difference := _differing(each))
    ]


def table(all_facts: list[Facts], out: Path, seconds: float) -> str:
    """The facts for a person to read: a line a process, or a line a machine where there are many."""
    rows = [("rank", "host", "device", "cores", "torch", "ssl-pretrain", "run folder")]
    lines_of = [(str(f.rank), f) for f in all_facts]
    if len(all_facts) > LINES:
        machines = [list(each) for _, each in itertools.groupby(all_facts, key=lambda f: f.host)]
        lines_of = [(f"{each[0].rank}-{each[-1].rank}", each[0]) for each in machines]
    for ranks, f in lines_of:
        speed = "" if f.speed is None else f", writes {f.speed / 2**20:.0f} MiB/s"
        speed = speed if f.trouble is None else f", cannot be written: {f.trouble}"
        folder = f"{f.free / 2**30:.1f} GiB free{speed}"
        rows.append((ranks, f.host, f.device, str(f.cores), f.versions["torch"], f.versions["ssl-pretrain"], folder))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"warning: {text}" for text in disagreements(all_facts)]
    count, hosts = len(all_facts), len({f.host for f in all_facts})
    lines.append(
        f"{count} process{'es' * (count != 1)} on {hosts} machine{'s' * (hosts != 1)} found one another: sums over all "
        f"processes are correct, and all see {out}; {seconds:.1f} s"
    )
    return "\n".join(lines)


def _problems(all_facts: list[Facts], out: Path, *, writes: bool = True) -> list[str]:
    found = []
    for name in SAME:
        if difference := _differing({f.rank: f.versions[name] for f in all_facts}):
            found.append(f"{name} is not the same everywhere ({difference}): install the same version on all machines")
    kinds = {f.rank: "CPU" if f.device == "CPU" else "GPU" for f in all_facts}
    if difference := _differing(kinds):
        found.append(f"some processes have a GPU and some have not ({difference})")
    found += [f"{out} cannot be written on {f.host}: {f.trouble}" for f in all_facts if f.trouble and writes]
    blind = [f for f in all_facts if not f.sees]
    if blind:
        hosts = ", ".join(sorted({f.host for f in blind}))
        found.append(
            f"{out} on {hosts} is not the folder that rank 0 sees: --out must be on a file system that all machines share"
        )
    return found


def _differing(values: dict[int, str]) -> str:
    """ "2.13.0 on rank 0, 1; 2.11.0 on rank 2", or nothing where all agree."""
    if len(set(values.values())) < 2:
        return ""
    by_value: dict[str, list[int]] = {}
    for rank, value in values.items():
        by_value.setdefault(value, []).append(rank)
    return "; ".join(f"{value} on rank {_some(ranks)}" for value, ranks in by_value.items())


def _some(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f", ... ({len(ranks)} in all)" if len(ranks) > 8 else "")


def _appears(token: Path) -> bool:
    until = time.monotonic() + VISIBLE
    while not token.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _write_speed(out: Path, trial: int) -> tuple[float | None, str | None]:
    """Bytes a second, to the disk; or what prevents it."""
    file = out / f".preflight-{socket.gethostname()}"
    block = os.urandom(1 << 20)
    began = time.monotonic()
    try:
        with open(file, "wb") as opened:
            for _ in range(trial):
                opened.write(block)
            opened.flush()
            os.fsync(opened.fileno())
        return trial * len(block) / (time.monotonic() - began), None
    except OSError as problem:
        return None, problem.strerror or str(problem)
    finally:
        file.unlink(missing_ok=True)
