"""What a run starts from: its images, its folder, the checkpoint that it continues from, its batches."""

from collections.abc import Generator, Mapping
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from .. import checkpoint, config, distributed, files
from ..config import Resolved, Run
from ..data.decode import allow_pixels
from ..data.loader import RawBatch, Share, batches
from ..data.names import canonical_split
from ..data.source import Source, open_source, splits
from ..data.subset import Subset, choose
from ..data.training import ALL, open_training
from ..data.views import ViewSpec
from ..distributed import World
from ..errors import UserError
from ..randomness import numpy_generator
from . import manifest, saver, start_state
from .guard import HELD_OUT, Guard
from .score import KnnScore
from .stages import Stage

SECONDS_FOR_LOCK = 15.0  # to wait for a run that has the folder and may be about to end


def open_data(run: Run, world: World) -> tuple[Source, Source | None]:
    """The images to train on, and those held out for the validation loss (None without --val-images): of a split for
    validation where there is one, else taken out of the training images, before --subset is. So runs on nested parts of the
    same images have the same images for validation."""
    allow_pixels(run.max_pixels)
    whole = open_training(run.data, run.train_split)
    source, held_out, taken = _hold_out(run, whole, world) if run.val_images else (whole, None, np.zeros(0, np.int64))
    return source if run.subset is None else choose(whole, run.subset, run.subset_seed, taken), held_out


def _hold_out(run: Run, source: Source, world: World) -> tuple[Source, Source, np.ndarray]:
    """The images that are left to train on, those that are held out, and the indices of those that were taken out."""
    trained_on = canonical_split(run.train_split or "train")
    validation_splits = [name for name in splits(run.data) if name.startswith("val") and name != trained_on]
    if run.train_split == ALL:
        validation_splits = []  # they are trained on
    pool = open_source(run.data, validation_splits[0]) if validation_splits else source
    if not world.size <= run.val_images < len(pool):
        raise UserError(
            f"--val-images is {run.val_images}; there are {len(pool)} images to hold out from, and {world.size} "
            f"process(es) to share them"
        )
    order = numpy_generator(run.seed, "held out").permutation(len(pool))
    held_out = Subset(pool, order[: run.val_images])
    if pool is not source:
        return source, held_out, order[:0]
    return Subset(source, order[run.val_images :]), held_out, order[: run.val_images]


def data_facts(run: Run, source: Source) -> dict[str, Any]:
    """What the manifest says of the images."""
    part = {} if run.subset is None else {"subset": run.subset, "subset_seed": run.subset_seed}
    return {"path": run.data, "images": len(source), "fingerprint": source.fingerprint, **part}


def schedule(run: Resolved) -> dict[str, Any]:
    """The arguments of `optim.schedules.learning_rate` that a run's flags give."""
    return {
        "peak": run.lr,
        "final": run.final_lr,
        "warmup": run.warmup_steps,
        "start": run.warmup_lr,
        "kind": run.schedule,
        "stretch": run.schedule_stretch,
        "cooldown": run.cooldown_steps,
        "shape": run.cooldown_shape,
        "milestones": run.milestones,
        "factor": run.step_factor,
    }


def find_start(
    run: Resolved, flags: Run, record: dict[str, Any], defaults: dict[str, Any], source: Source, run_lock: ExitStack
) -> int:
    """The step to start from: 0, or that of the newest whole checkpoint. For the first process.

    flags: the run as the user gave it; record: the flags as they are stored; defaults: theirs, for flags that the run's
    version did not have. The run folder is locked until `run_lock` is closed; where it was made here and is empty then, it
    is removed. Raises UserError where the folder holds another run or something else, or another process trains in it.
    """
    out = run.out
    made = [each for each in (out, *out.parents) if not each.exists()]
    files.make_folder(out)
    try:
        run_lock.enter_context(files.lock_folder(out, SECONDS_FOR_LOCK))
        run_lock.callback(_remove_unless_begun, made)
    except BlockingIOError:
        raise UserError(
            f"another process trains in {out} at this moment: wait for its end, or choose another --out"
        ) from None
    written = out / "config.yaml"
    if not written.exists():
        # Names with a dot are what a run leaves that was killed before it had begun.
        if any(not path.name.startswith(".") for path in out.iterdir()):
            raise UserError(f"--out {out} holds something else than a run: choose an empty or a new folder")
        return start_state.branch_step(run)
    before = {**defaults, **config.read_recorded(written)}
    known, count = manifest.images(out)
    allowed = config.CHANGEABLE | (config.LENGTH_KEYS if run.extend else frozenset())
    changed = config.differences(before, record, allowed)
    if flags.steps is None:  # what the user gave, in place of what follows from it
        steps = f"{config.length_flag(flags)}: {before.get('steps')} -> {run.steps} steps"
        changed = [steps if each.startswith("--steps: ") else each for each in changed]
    counts = [f"number of images: {count:,} -> {len(source):,}"] if count not in (None, len(source)) else []
    only_length = not config.differences(before, record, config.CHANGEABLE | config.LENGTH_KEYS)
    if known not in (None, source.fingerprint) and only_length:
        counts += ["the indices in --subset may have changed"] if isinstance(run.subset, str) else []
        raise UserError(
            f"the images in {run.data} are not those that the run in {out} began with "
            f"({'; '.join(changed + counts) or 'files came, went or changed'}): put them back, or choose another --out, "
            f"with --init-from {out} to start from this run's weights"
        )
    if changed:
        remedy = "repeat the old flags, or choose another --out"
        remedy += ", or add --extend to give this run another length" if only_length else ""
        raise UserError(f"{out} holds a run with other settings ({'; '.join(changed + counts)}): {remedy}")
    folder = saver.folder(run)
    checkpoint.clear(folder)
    reached = checkpoint.newest(folder) or start_state.branch_step(run)
    if reached > run.steps:
        length = config.length_flag(flags) + (f" ({run.steps} steps)" if flags.steps is None else "")
        raise UserError(
            f"the run in {out} has reached step {reached}, and {length} lies below: --extend makes a run longer; give at "
            f"least {reached} steps, or choose another --out"
        )
    return reached


def _remove_unless_begun(made: list[Path]) -> None:
    """Remove the folders that a command made which is refused before its run has begun: the run folder, and those above
    it. What is not empty stays."""
    with suppress(OSError):
        for folder in made:
            folder.rmdir()


def guard(run: Resolved, start: int, knn: Mapping[str, KnnScore], held_out: Source | None, world: World) -> Guard:
    """What judges the scores of the run, with what its checkpoint of step `start` knows of those before. A branch that
    begins at a later step than 0 has none yet: scores of the other run are not its own."""
    images = {group: score.fingerprint for group, score in knn.items()}
    if held_out is not None:
        images[HELD_OUT] = f"{len(held_out)} of {held_out.fingerprint}"
    folder = saver.folder(run)
    read = start > 0 and world.first and start in checkpoint.steps(folder)
    before = checkpoint.description(folder / f"step-{start:08d}") if read else {}
    return Guard(run, images, before.get("scores", {}))


def precision(run: Run, device: torch.device) -> Literal["fp32", "bf16"]:
    """The precision of the run; "auto" is mixed precision with bfloat16 where the device computes in it natively."""
    if run.precision != "auto":
        return run.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def stream(
    plan: list[Stage], start: int, source: Source, share: Share, run: Resolved, world: World
) -> Generator[tuple[tuple[ViewSpec, ...], RawBatch]]:
    """The micro-batches from step `start` to the run's end, each with the views of its stage."""
    for stage in plan:
        if start < stage.last:
            loader = batches(
                source,
                stage.specs,
                share,
                seed=run.seed,
                channels=run.in_chans,
                start_step=max(start, stage.first),
                stop_step=stage.last,
                workers=_workers(run, world),
                policy=run.bad_images,
                pin=world.device.type == "cuda",
            )
            with closing(loader):
                for raw in loader:
                    yield stage.specs, raw


def _workers(run: Run, world: World) -> int:
    """Loader processes: --workers, else the cores that training leaves free (on a CPU none are free, and one is enough)."""
    if run.workers is not None:
        return run.workers
    own_cores = max(1, distributed.cores() // world.local_size)  # more processes than cores is slow, but no mistake
    return max(1, min(16, own_cores - 1)) if world.device.type == "cuda" else min(1, own_cores - 1)
