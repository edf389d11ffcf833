"""Starts a command as its flags say: in this process, as several processes, as a Slurm job, or as the runs of a grid."""

import os
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from ssl_pretrain import flags
from ssl_pretrain.distributed import environment
from ssl_pretrain.errors import UserError

from . import grid, paths
from .options import Launch, check, refuse_line_breaks


def start_processes_or_job(
    name: str, argv: list[str], launch: Launch, out: Path, parse: Callable[[list[str]], object]
) -> int | None:
    """Start the command `name` ("pretrain", "evaluate") as its flags say. Returns None if that is this process.

    out: the folder of its results; of a grid, the folder of its runs' folders. parse: reads the arguments of a run, or
    raises UserError for what is wrong with them. Returns the exit code. Raises UserError for flags that contradict one
    another, for combinations of a grid that `parse` refuses, and where Slurm refuses the job.
    """
    if environment.in_slurm_step():
        paths.check_submit_folder(out)
    if environment.find().size > 1 or "RANK" in os.environ:
        return None  # the processes are already started (torchrun, srun)
    check(launch)
    if launch.launcher == "slurm":
        refuse_line_breaks("--out", out)
        out = paths.absolute(out)
        argv = paths.absolute_words(argv, encoder_is_a_path=name == "evaluate")
        if name == "pretrain" and not launch.grid and flags.word(argv, "--out") is None:
            argv = [*argv, "--out", str(out)]
        if not launch.grid:
            parse(argv)
    points = grid.expand(launch.grid, argv, out) if launch.grid else []
    for point in points:
        try:
            parse(point.argv)
        except UserError as mistake:
            said = re.sub(r"^ssl-[\w -]+: ", "", str(mistake))  # the name of the command comes in front of it all
            raise UserError(f"--grid, {_words(point.settings)}: {said}") from None
    if launch.launcher == "slurm":
        return _submit(name, argv, launch, out, points)
    count = _gpus() or 1 if launch.nproc == "auto" else launch.nproc or 1
    from .processes import run_local

    module = f"ssl_pretrain.launch.{name}"
    if points:
        codes = []
        for number, point in enumerate(points):
            print(f"run {number} of {len(points)}: {_words(point.settings)}", flush=True)
            with grid.member(point):
                codes.append(run_local(module, point.argv, count))
            grid.ended(point, codes[-1])
            grid.summarize(points)
            if codes[-1] == 75:
                break  # stopped by the user, who means all runs
        print(grid.table(points))
        return next((code for code in codes if code), 0)
    return run_local(module, argv, count) if count > 1 else None


def _submit(name: str, argv: list[str], launch: Launch, out: Path, points: list[grid.Point]) -> int:
    from . import slurm  # submitit, only where it is needed

    folder = paths.absolute(launch.logs) if launch.logs else out.with_name(out.name + ".slurm")
    runs, at_once = grid.pick(launch.array, len(points)) if points else (None, 1)
    if points:
        words = slurm.command("grid", [name, str(out), *launch.grid, "--", *argv])
    else:
        words = slurm.command(name, argv)
    jobs = slurm.executor(launch, folder, out.name, runs, at_once)
    if launch.dry_run:
        print(slurm.script(jobs, words))
        if points:
            print(textwrap.indent(grid.table(points), "# "))
        return 0
    submitted = slurm.submit(jobs, words, runs)
    print(f"job {submitted.job}")
    for log in submitted.logs:
        print(f"log {log}")
    if points:
        print(grid.table(points))
    print(f"cancel: scancel {submitted.job}", flush=True)
    if not launch.wait:
        return 0
    try:
        code = slurm.follow(submitted, sys.stdout)
    except KeyboardInterrupt:
        print(f"\njob {submitted.job} goes on without you; scancel {submitted.job} ends it", file=sys.stderr)
        return 75
    if points:
        print(grid.table(points))
    return code


def _words(settings: dict[str, str]) -> str:
    return " ".join(f"--{name} {value}" for name, value in settings.items())


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
