"""Losses and the teacher's update compared with other libraries: CPU time and peak extra memory, on one thread.

    python benchmarks/losses.py [--rows dino nt-xent sigreg ema] [--rounds 7]

Other libraries are measured if they are installed: `pip install --no-deps lightly==1.6.0`, `pip install
stable-pretraining==0.1.8`. "formula" is the literal equation, differentiated by autograd. A loss is measured with its
backward pass to the embeddings or logits. The variants of a row alternate in one process and are compared by CPU time.
Memory is what a process that runs one variant once needs in addition to its inputs.
"""

import argparse
import ctypes
import importlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain import backbones
from ssl_pretrain.parts.ema_teacher import ema_copy, ema_update_
from ssl_pretrain.parts.nt_xent import contrast
from ssl_pretrain.parts.self_distillation import cross_entropy_of_pairs
from ssl_pretrain.parts.sigreg import END, KNOTS, sigreg

OURS, FORMULA, LIGHTLY, STABLE = "ssl-pretrain", "formula", "lightly", "stable-pretraining"
Run = Callable[[], object]


def peer(module: str, name: str) -> Any:
    """Something of another library, or None where it is not installed."""
    if not hasattr(torch.ops.torchvision, "nms"):
        # torchvision on a CPU build of torch wants its operators declared
        library = peer.__dict__.setdefault("library", torch.library.Library("torchvision", "DEF"))
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


def trained(loss: Callable[..., Tensor], *inputs: Tensor) -> Run:
    """The loss and its gradient with respect to the inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs]

    def run() -> Tensor:
        for x in leaves:
            x.grad = None
        total = loss(*leaves)
        total.backward()
        return total.detach()

    return run


def dino(generator: torch.Generator, wanted: list[str]) -> dict[str, Run]:
    """DINO cross-entropy, 32 images x 10 crops x 65,536 prototypes, with the teacher's centred softmax"""
    k, cold, warm = 65536, 0.04, 0.1
    student = 0.3 * torch.randn(10, 32, k, generator=generator)
    teacher = 0.3 * torch.randn(2, 32, k, generator=generator)
    centre = torch.zeros(k)

    def assigned() -> Tensor:
        return torch.softmax((teacher - centre) / cold, dim=-1)

    def formula(student: Tensor) -> Tensor:
        logs, q = torch.log_softmax(student / warm, -1), assigned()
        pairs = [-(q[t] * logs[s]).sum(-1).mean() for t in range(2) for s in range(10) if s != t]
        return torch.stack(pairs).mean()

    runs = {}
    if OURS in wanted:
        runs[OURS] = trained(lambda x: cross_entropy_of_pairs(x, assigned(), warm)[0].mean(), student)
    if FORMULA in wanted:
        runs[FORMULA] = trained(formula, student)
    if LIGHTLY in wanted and (loss := peer("lightly.loss", "DINOLoss")):
        measured = loss(output_dim=k, teacher_temp=cold, student_temp=warm)
        runs[LIGHTLY] = trained(lambda *x: measured(list(teacher), list(x), teacher_temp=cold), *student)
    if STABLE in wanted and (loss := peer("stable_pretraining.losses", "DINOv1Loss")):
        other = loss(temperature_student=warm)
        runs[STABLE] = trained(lambda x: other(x, assigned()), student)
    return runs


def nt_xent(generator: torch.Generator, wanted: list[str]) -> dict[str, Run]:
    """NT-Xent, 2 x 2,048 embeddings of 128 channels"""
    first, second = torch.randn(2, 2048, 128, generator=generator)
    temperature = 0.1

    def formula(first: Tensor, second: Tensor) -> Tensor:
        z = torch.nn.functional.normalize(torch.cat([first, second]), dim=1)
        scores = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
        return torch.nn.functional.cross_entropy(scores, torch.arange(len(z)).roll(len(first)))

    runs = {}
    if OURS in wanted:
        runs[OURS] = trained(lambda a, b: contrast(a, b, temperature).mean(), first, second)
    if FORMULA in wanted:
        runs[FORMULA] = trained(formula, first, second)
    if LIGHTLY in wanted and (loss := peer("lightly.loss", "NTXentLoss")):
        runs[LIGHTLY] = trained(loss(temperature=temperature), first, second)
    if STABLE in wanted and (loss := peer("stable_pretraining.losses", "NTXEntLoss")):
        runs[STABLE] = trained(loss(temperature=temperature), first, second)
    return runs


def sigreg_row(generator: torch.Generator, wanted: list[str]) -> dict[str, Run]:
    """SIGReg, 2,048 vectors of 512 channels along 1,024 directions, 17 knots"""
    vectors = 1.1 * torch.randn(2048, 512, generator=generator)
    directions = torch.randn(512, 1024, generator=generator)

    def formula(z: Tensor) -> Tensor:
        t = torch.linspace(0, END, KNOTS)[:, None]
        phi = torch.exp(-t.square() / 2)
        angles = (z @ (directions / directions.norm(dim=0)))[:, None] * t  # (N, K, S)
        distance = (angles.cos().mean(0) - phi).square() + angles.sin().mean(0).square()
        return len(z) * 2 * torch.trapezoid(phi * distance, t[:, 0], dim=0).mean()

    runs = {}
    if OURS in wanted:
        runs[OURS] = trained(lambda z: sigreg(z, directions), vectors)
    if FORMULA in wanted:
        runs[FORMULA] = trained(formula, vectors)
    if LIGHTLY in wanted and (loss := peer("lightly.loss", "SIGReg")):
        runs[LIGHTLY] = trained(loss(knots=KNOTS, t_max=END, num_vectors=1024), vectors)  # draws its own directions
    return runs


def ema(generator: torch.Generator, wanted: list[str]) -> dict[str, Run]:
    """Teacher's step of a ViT-S/16, 21.7 M parameters"""
    student = backbones.build("vit_small", image_size=(224, 224), patch_size=16)
    teacher, ok = ema_copy(student), torch.tensor(True)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=generator))

    @torch.no_grad()
    def formula() -> None:
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
            t.mul_(0.99).add_((1 - 0.99) * s)

    runs: dict[str, Run] = {}
    if OURS in wanted:
        runs[OURS] = lambda: ema_update_(teacher, student, 0.99, ok)
    if FORMULA in wanted:
        runs[FORMULA] = formula
    if LIGHTLY in wanted and (update := peer("lightly.models.utils", "update_momentum")):
        runs[LIGHTLY] = lambda: update(student, teacher, 0.99)
    return runs


# What each row measures, and who has it; ours first.
ROWS = {
    "dino": (dino, (OURS, LIGHTLY, STABLE, FORMULA)),
    "nt-xent": (nt_xent, (OURS, LIGHTLY, STABLE, FORMULA)),
    "sigreg": (sigreg_row, (OURS, LIGHTLY, FORMULA)),
    "ema": (ema, (OURS, LIGHTLY, FORMULA)),
}


def milliseconds(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """CPU time of each variant in every round, after one that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if number:
                taken[name].append(1e3 * (time.process_time() - start))
    return taken


def status(field: str) -> float:
    """A memory field of this process (Linux), in MB."""
    return int(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024 / 1e6


def extra_memory(row: str, name: str) -> float:
    """MB that the variant needs at its peak beyond what stands before it, of the process that asks."""
    make, _ = ROWS[row]
    run = make(torch.Generator().manual_seed(0), [name])[name]
    (torch.ones(8, 8) @ torch.ones(8, 8)).sum()  # the libraries' own memory
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def asked(row: str, name: str) -> str:
    """`extra_memory` of a process of its own, or a dash where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return "-"
    argv = [sys.executable, __file__, "--memory", row, name]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="how often each variant runs (default: %(default)s)")
    parser.add_argument("--memory", nargs=2, metavar=("ROW", "VARIANT"), help="only its extra memory, in MB")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print(round(extra_memory(*options.memory)))
        return
    print(f"torch {torch.__version__}, {options.rounds} rounds, CPU time of one thread: median\n")
    print("| | | ms | time over ours | extra MB |\n| --- | --- | --- | --- | --- |")
    for row in options.rows:
        make, names = ROWS[row]
        runs = make(torch.Generator().manual_seed(0), list(names))
        taken = milliseconds(runs, options.rounds)
        for i, name in enumerate(names):
            title = (make.__doc__ or "") if i == 0 else ""
            if name not in runs:
                print(f"| {title} | {name} | not installed | | |", flush=True)
                continue
            # a ratio a round, for the rounds differ by what else the machine does
            ratio = statistics.median(a / b for a, b in zip(taken[name], taken[OURS], strict=True))
            median = statistics.median(taken[name])
            print(f"| {title} | {name} | {median:.1f} | {ratio:.2f} | {asked(row, name)} |", flush=True)


if __name__ == "__main__":
    main()
