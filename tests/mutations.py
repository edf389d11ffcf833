"""Deliberate faults, and the tests that must find them.

    python tests/mutations.py [NAME ...]

For each mutation: put the fault into a copy of the package, run the tests that are named for it against the copy, and tell
which of them failed. A mutation that no test finds has SURVIVED: a test is missing. Exit code 1 if one survived, 2 if the
tests fail without any fault.

A mutation replaces a text that occurs exactly once in its file. tests/test_mutations.py checks that this still holds.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# As in setup.py: where the folders of the repository lie in the package
PACKAGE = {"ssl/ssl_pretrain": ".", "methods": "methods", "launch": "launch", "eval": "eval"}


@dataclass(frozen=True)
class Mutation:
    """A fault."""

    name: str
    file: str  # from the repository's root
    old: str
    new: str
    tests: tuple[str, ...]  # pytest ids below tests/, the first one that fails ends the run


@dataclass(frozen=True)
class Row:
    """What became of a mutation."""

    name: str
    caught_by: str | None
    seconds: float


def _core(name: str, file: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(name, f"ssl/ssl_pretrain/{file}", old, new, tests)


ORACLE = "test_loop_oracle.py::test_ten_steps_are_those_of_a_plain_loop"
ADAMW, TEACHER, SKIPPED = f"{ORACLE}[adamw]", f"{ORACLE}[adamw and a teacher]", f"{ORACLE}[adamw and skipped steps]"
SGD, LARS = f"{ORACLE}[sgd, accumulated]", f"{ORACLE}[lars, accumulated by GradCache]"
CONTINUED = "test_loop_oracle.py::test_so_are_those_of_a_run_that_continues_after_five"
COLLECTIVES = "test_collectives.py::test_gradients_through_gather_and_mean_are_those_of_one_process"
BYOL = f"{ORACLE}[sgd, accumulated by GradCache, and a teacher]"

MUTATIONS = [
    # ---- the loop
    _core(
        "learning rate one step late",
        "train.py",
        "lr = learning_rate(step_number, ",
        "lr = learning_rate(max(step_number - 1, 0), ",
        ADAMW,
    ),
    _core(
        "weight-decay schedule dropped",
        "train.py",
        "cosine(step_number / steps / run.schedule_stretch, run.weight_decay, run.final_weight_decay)",
        "run.weight_decay",
        ADAMW,
    ),
    _core("clipping ignored", "train.py", "if run.clip_grad is not None:", "if False:", SGD),
    _core("clipping of each parameter done globally", "train.py", "each=run.clip_each", "each=False", TEACHER),
    _core(
        "gradient not divided by the micro-batches",
        "train.py",
        "(losses.total / accumulate if accumulate > 1 else losses.total)",
        "losses.total",
        SGD,
    ),
    _core(
        "steps with infinite gradients are taken",
        "train.py",
        "((mean[0] + norm) * 0 != 0)",
        "(mean[0] * 0 != 0)",
        SKIPPED,
    ),
    _core("teachers move in skipped steps", "train.py", "step.ok = bad == 0", "step.ok = bad >= 0", BYOL),
    _core(
        "the same noise in every step",
        "loop/probes.py",
        'noise=key(run.seed, "step", number)',
        'noise=key(run.seed, "step", 0)',
        ADAMW,
    ),
    _core(
        "a continued run begins with the first images again",
        "loop/start.py",
        "start_step=max(start, stage.first)",
        "start_step=stage.first",
        CONTINUED,
    ),
    _core(
        "a continued run forgets the optimiser's state",
        "loop/saver.py",
        "optim.load_state_by_name(optimizer, state)",
        "pass",
        CONTINUED,
    ),
    _core(
        "a continued run forgets which steps were skipped",
        "loop/saver.py",
        "    return skipped\n",
        "    return 0\n",
        CONTINUED,
    ),
    _core(
        "each micro-batch gets the gradients of the first",
        "loop/grad_cache.py",
        "leaf.grad[start:stop]",
        "leaf.grad[: stop - start]",
        LARS,
    ),
    _core(
        "GradCache without the mean over processes",
        "loop/grad_cache.py",
        "    distributed.mean_gradients_(parameters)\n",
        "",
        "test_grad_cache.py::test_parts_on_two_processes_give_the_gradients_of_one",
    ),
    # ---- schedules and optimisers
    _core(
        "warm-up from 0",
        "optim/schedules.py",
        "(peak - start) * (step + 1) / warmup",
        "(peak - start) * step / warmup",
        ADAMW,
    ),
    _core("the warm-up's first rate ignored", "loop/start.py", '"start": run.warmup_lr,', '"start": 0.0,', BYOL),
    _core(
        "cooldown one step short", "optim/schedules.py", "left = steps - step\n", "left = steps - step - 1\n", TEACHER
    ),
    _core(
        "the cosine counts from the run's start",
        "optim/schedules.py",
        "(step - warmup) / max(1, steps * stretch - warmup)",
        "step / steps",
        ADAMW,
    ),
    _core("layer decay one block off", "optim/groups.py", "else groups + 1 - -", "else groups - -", ADAMW),
    _core("biases and norms decay", "optim/groups.py", "if parameter.ndim <= 1 or", "if parameter.ndim < 1 or", ADAMW),
    _core(
        "AdamW without bias correction",
        "optim/moments.py",
        "self.steps.add_(taken)",
        "self.steps.add_(taken * 1e6)",
        ADAMW,
    ),
    _core(
        "AdamW with its two decay rates swapped",
        "optim/adamw.py",
        'beta1=group["betas"][0], beta2=group["betas"][1]',
        'beta1=group["betas"][1], beta2=group["betas"][0]',
        ADAMW,
    ),
    _core(
        "found_inf ignored", "optim/optimizer.py", "optimizer.found_inf = bad", "optimizer.found_inf = 0 * bad", SKIPPED
    ),
    _core(
        "clipping scales up small gradients",
        "optim/optimizer.py",
        "torch._foreach_mul_(grads, (most / (norms.norm() + 1e-6)).clamp(max=1.0))",
        "torch._foreach_mul_(grads, most / (norms.norm() + 1e-6))",
        SGD,
    ),
    _core("LARS trust ratio inverted", "optim/lars.py", "TRUST * w_norms / g_norms", "TRUST * g_norms / w_norms", LARS),
    _core(
        "LARS trust ratio of the gradient without its decay",
        "optim/lars.py",
        "*torch._foreach_norm(g)]",
        "*torch._foreach_norm([p.grad for p in w])]",
        LARS,
    ),
    # ---- teachers
    _core(
        "EMA momentum swapped",
        "parts/ema_teacher.py",
        "weight = (1 - momentum) * ok",
        "weight = momentum * ok",
        TEACHER,
    ),
    _core(
        "EMA momentum constant",
        "parts/ema_teacher.py",
        "return end - (end - start) * (math.cos(math.pi * progress) + 1) / 2",
        "return start",
        TEACHER,
    ),
    # ---- exchanges between processes
    _core(
        "mean: sum in backward",
        "distributed/collectives.py",
        "return _mean_(grads[0].clone())",
        "return _mean_(grads[0].clone()) * dist.get_world_size()",
        COLLECTIVES,
    ),
    _core(
        "mean: backward without the reduction",
        "distributed/collectives.py",
        "return _mean_(grads[0].clone())",
        "return grads[0].clone()",
        COLLECTIVES,
    ),
    _core(
        "gather: backward without the reduction",
        "distributed/collectives.py",
        "        dist.all_reduce(total)\n",
        "",
        COLLECTIVES,
    ),
    _core(
        "batch norm: biased running variance",
        "distributed/batch_norm.py",
        "var * (n / max(n - 1, 1))",
        "var",
        "test_batch_norm.py::test_two_processes_give_what_torch_gives_for_all_rows[1d]",
    ),
    _core(
        "batch norm: variance without that between processes",
        "distributed/batch_norm.py",
        "(variances + (means - mean).square()).mean(0)",
        "variances.mean(0)",
        "test_batch_norm.py::test_two_processes_give_what_torch_gives_for_all_rows[1d]",
    ),
    _core(
        "Sinkhorn: columns of this process alone",
        "parts/sinkhorn.py",
        "columns += all_reduce_(sums).log_()",
        "columns += sums.log_()",
        "test_sinkhorn.py::test_two_processes_give_the_rows_of_one",
    ),
    # ---- data
    _core(
        "flips undone where there are none",
        "data/views.py",
        "1 - points, points)",
        "points, 1 - points)",
        "test_geometry.py::test_a_views_pixels_lie_where_its_geometry_says[png-exact]",
    ),
    _core(
        "geometry with its flips swapped",
        "data/views.py",
        "hflip, vflip), dtype",
        "vflip, hflip), dtype",
        "test_geometry.py::test_a_views_pixels_lie_where_its_geometry_says[png-exact]",
    ),
    _core(
        "a crop's offset without the last place",
        "data/views.py",
        "int(uniform[2 * _TRIES] * (height - h + 1))",
        "int(uniform[2 * _TRIES] * (height - h))",
        "test_views.py::test_small_images_use_every_place_alike",
    ),
    _core(
        "views do not depend on the sample",
        "data/loader.py",
        '"view", epoch, sample, spec.of or spec.name, copy',
        '"view", epoch, spec.of or spec.name, copy',
        "test_loader.py::test_a_batch_is_the_sampled_images_cut_by_their_own_keys",
    ),
    _core(
        "rows of a rank and of a micro-batch swapped",
        "data/loader.py",
        "(micro * self.world + self.rank) * self.micro_size",
        "(self.rank * self.accumulate + micro) * self.micro_size",
        "test_loader.py::test_however_it_is_shared_the_global_batch_is_the_same",
    ),
    _core(
        "stored outputs of other images are taken",
        "data/rows.py",
        'if not np.array_equal(records["index"], wanted):',
        "if False:",
        "test_teacher_cache.py::test_rows_across_parts_and_of_other_images",
    ),
    _core(
        "the stored class token is taken for a patch",
        "backbones/stored.py",
        "patches = tokens if cls is None else tokens[:, 1:]",
        "patches = tokens",
        "test_teacher_cache.py::test_an_anchor_reads_a_cache",
    ),
    _core(
        "the seam of two epochs one sample late",
        "data/sampler.py",
        "stop = min(count, (epoch + 1) * size - position)",
        "stop = min(count, (epoch + 1) * size - position + 1)",
        "test_sampler.py::test_the_stream_is_whole_epochs_in_orders_of_their_own",
    ),
    _core(
        "every epoch in the same order",
        "data/sampler.py",
        'key(seed, "order", epoch)',
        'key(seed, "order")',
        "test_sampler.py::test_the_stream_is_whole_epochs_in_orders_of_their_own",
    ),
    _core(
        "a JPEG decoded without the rows below the crop",
        "data/decode.py",
        "rows = bottom + _CONTEXT_ROWS",
        "rows = bottom",
        "test_decode.py::test_every_crop_is_the_crop_of_the_whole_image",
    ),
    # ---- encoders
    _core(
        "positions resized with height and width swapped",
        "backbones/positions.py",
        '"ih,jw,hwd->ijd"',
        '"ih,jw,hwd->jid"',
        "test_attention.py::test_resizing_is_bicubic_interpolation_and_passes_gradients",
    ),
    _core(
        "rotary positions: columns before rows",
        "backbones/positions.py",
        "torch.cat([y[:, None].expand(h, w, quarter), x.expand(h, w, quarter)], dim=2)",
        "torch.cat([x.expand(h, w, quarter), y[:, None].expand(h, w, quarter)], dim=2)",
        "test_attention.py::test_rotary_angles_and_rotation_are_the_formula",
    ),
    _core(
        "drop path without the scale of what stays",
        "backbones/drop_path.py",
        "return (noise >= rates) / (1 - rates)",
        "return (noise >= rates).to(rates)",
        "test_vit.py::test_drop_path_drops_each_samples_branches_and_keeps_the_expectation",
    ),
    # ---- checkpoints
    _core(
        "the oldest checkpoint is taken for the newest",
        "checkpoint/folder.py",
        "for step in reversed(steps(folder)):",
        "for step in steps(folder):",
        "test_checkpoint.py::test_round_trip_and_pruning",
    ),
    _core(
        "one checkpoint more is kept",
        "checkpoint/folder.py",
        "there[:-keep_last]",
        "there[: -keep_last - 1]",
        "test_checkpoint.py::test_round_trip_and_pruning",
    ),
    _core(
        "checksums are not compared",
        "checkpoint/folder.py",
        "if crc != recorded[name][1]:",
        "if False:",
        "test_checkpoint.py::test_a_damaged_newest_one_is_named_and_the_one_before_used",
    ),
    # ---- features, evaluation
    _core(
        "kNN temperature inverted",
        "features/neighbours.py",
        "((near - near[:, :1]) / temperature)",
        "((near - near[:, :1]) * temperature)",
        "test_knn.py::test_votes_are_those_of_scikit_learn",
    ),
    _core(
        "an image is its own neighbour",
        "features/neighbours.py",
        "if exclude_self and top -",
        "if False and top -",
        "test_knn.py::test_without_oneself",
    ),
    Mutation(
        "linear probe: features are not centred",
        "eval/linear.py",
        "(x - mean) / deviation",
        "x / deviation",
        ("test_linear.py::test_standardising_uses_the_training_rows_only",),
    ),
    Mutation(
        "linear probe: features are not normalised",
        "eval/linear.py",
        "(x - mean) / deviation",
        "x",
        ("test_linear.py::test_standardising_uses_the_training_rows_only",),
    ),
    # ---- a method
    Mutation(
        "DINO: centre added",
        "methods/dino.py",
        "(teacher - self.centre)",
        "(teacher + self.centre)",
        ("test_dino.py::test_loss_centre_and_teacher_of_two_steps",),
    ),
    Mutation(
        "DINO: centre of this process alone",
        "methods/dino.py",
        'distributed.mean(step.carried["teacher"].mean(0))',
        'step.carried["teacher"].mean(0)',
        ("test_contract.py::test_conformance[dino-two_processes_equal_one]",),
    ),
    _core(
        "DINO: pairs counted with a view and itself",
        "parts/self_distillation.py",
        "/ (s * t - t)",
        "/ (s * t)",
        "test_dino.py::test_cross_entropy_and_its_gradient_are_those_of_the_pairs",
    ),
]


def replaced(mutation: Mutation, text: str) -> str:
    """The file's text with the fault. Raises ValueError unless the text to replace occurs exactly once."""
    count = text.count(mutation.old)
    if count != 1:
        raise ValueError(f"{mutation.name}: {mutation.old!r} occurs {count} times in {mutation.file}, not once")
    return text.replace(mutation.old, mutation.new)


def check(mutations: Sequence[Mutation]) -> Iterator[Row]:
    """What became of each mutation. Raises RuntimeError where the tests fail without any."""
    with _copy() as folder:
        tests = tuple(dict.fromkeys(test for mutation in mutations for test in mutation.tests))
        failed, _ = _failed(folder, tests)
        if failed is not None:
            raise RuntimeError(f"{failed} fails without any fault")
        for mutation in mutations:
            file = folder / "ssl_pretrain" / _place(mutation.file)
            text = file.read_text()
            file.write_text(replaced(mutation, text))
            failed, seconds = _failed(folder, mutation.tests)
            file.write_text(text)
            yield Row(mutation.name, failed, seconds)


def _place(file: str) -> Path:
    """Where a file of the repository lies in the package."""
    top = next(top for top in PACKAGE if file.startswith(f"{top}/"))
    return Path(PACKAGE[top]) / file.removeprefix(f"{top}/")


@contextmanager
def _copy() -> Iterator[Path]:
    """A folder that holds a copy of the package."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        for top, place in PACKAGE.items():
            shutil.copytree(
                ROOT / top,
                Path(folder) / "ssl_pretrain" / place,
                ignore=shutil.ignore_patterns("__pycache__"),
                dirs_exist_ok=True,
            )
        yield Path(folder)


def _failed(folder: Path, tests: Sequence[str]) -> tuple[str | None, float]:
    """The first of the tests that fails against the copy in `folder`, and the seconds it took."""
    # Compiled files would be taken for those of a text of the same length and second.
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    source = subprocess.run(
        [sys.executable, "-c", "import ssl_pretrain; print(ssl_pretrain.__file__)"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    if not source.startswith(str(folder)):
        raise RuntimeError(f"the tests would run against {source.strip()}, not against the copy")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--show-capture=no", "--tb=no",
         "-m", "not slow", *(f"tests/{test}" for test in tests)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    seconds = time.monotonic() - began
    if done.returncode == 0:
        return None, seconds
    found = re.search(r"^FAILED tests/(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode != 1 or found is None:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return found[1], seconds


def main(names: list[str]) -> int:
    """Check the mutations of these names, or all of them."""
    by_name = {mutation.name: mutation for mutation in MUTATIONS}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        print(f"no mutation named {', '.join(unknown)}; there are:", *by_name, sep="\n  ")
        return 2
    survived = 0
    print("| mutation | seconds | | test |\n| --- | --- | --- | --- |", flush=True)
    try:
        for row in check([by_name[name] for name in names] or MUTATIONS):
            verdict = "SURVIVED" if row.caught_by is None else "CAUGHT"
            survived += row.caught_by is None
            print(f"| {row.name} | {row.seconds:.1f} | {verdict} | {row.caught_by or ''} |", flush=True)
    except RuntimeError as problem:
        print(problem)
        return 2
    print(f"{survived} survived")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
