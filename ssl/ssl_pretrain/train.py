"""The training loop, for every method, read top to bottom.

Position in a run is one integer, the number of optimiser steps done. Data, views, noise and schedules are functions of it
(and of the seed), so a checkpoint is the tensors and that integer, and a continued run is the same run.
"""

import dataclasses
import math
import time
from collections.abc import Generator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn

from . import backbones, checkpoint, config, distributed, encoder, files, optim, pretext
from .config import Resolved, Run
from .data.loader import RawBatch, Share, batches, fixed_batches, to_batch
from .data.sampler import samples
from .data.source import Source, open_source, pretraining_split, splits
from .data.subset import Subset
from .data.views import ViewSpec
from .distributed import World
from .distributed.batch_norm import couples_samples
from .encoder import Encoder
from .errors import UserError
from .loop import grad_cache, manifest, parallel, preflight, stages
from .loop.monitor import CollapseMonitor, feature_statistics
from .loop.report import Report
from .loop.score import KnnScore
from .loop.signals import TIME_LIMIT, StopRequest
from .loop.watch import Watch
from .optim.schedules import cosine, learning_rate
from .pretext import Batch, Losses, Method, Step, WholeBatchMethod
from .randomness import key, numpy_generator

UNDER_WAY = 15.0  # seconds that a run is waited for which has the folder and may be about to end


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    out: Path
    step: int
    steps: int
    stopped: str | None  # the signal that stopped it, None where it ran to its end
    bad_images: int


class Diverged(Exception):
    """Too many steps in a row were not finite; the message says where, in which term, and what is kept."""


def train(run: Run, knobs: Any, options: Any) -> Outcome:
    """Pretrain as the run, the method's knobs and the encoder's options say; the same call on the same folder resumes.

    Raises UserError for a user's mistake, OSError where the run folder cannot be written (a full disk), Diverged.
    """
    with distributed.world() as world, StopRequest() as stop, ExitStack() as held:
        return _train(run, knobs, options, world, stop, held)


def _train(asked: Run, knobs: Any, options: Any, world: World, stop: StopRequest, held: ExitStack) -> Outcome:
    kind = pretext.load(asked.method)

    # ---- Data. The first process opens it first, so that an index is built once.
    def opened() -> tuple[Source, Source | None, Resolved, KnnScore | None]:
        source, held_out = _open_data(asked, world)
        run = config.resolve(asked, kind.recipe, len(source), _precision(asked, world.device))
        return source, held_out, run, KnnScore.of(run) if run.knn_every and world.first else None

    source, held_out, run, knn = distributed.on_all(opened)
    steps, batch_size, accumulate, out = run.steps, run.batch_size, run.accumulate, run.out
    share = Share(batch_size, accumulate, world.rank, world.size)
    normalisation = (run.mean, run.std)

    # ---- Where to start: this run's own checkpoint, or step 0 with random weights or another encoder's.
    record = config.plain(run, knobs, options)
    folder = out / "checkpoints"
    start = distributed.from_first(
        distributed.on_all(lambda: _find_start(run, record, source, folder, held) if world.first else 0)
    )
    began = time.monotonic()
    everybody = preflight.check(world, out) if world.size > 1 else []
    met = preflight.table(everybody, out, time.monotonic() - began) if everybody else ""

    # ---- Model. Its random weights are a function of the seed alone.
    torch.manual_seed(key(run.seed, "init"))
    backbone = backbones.build(
        run.encoder, image_size=run.image_size, in_chans=run.in_chans, **dataclasses.asdict(options)
    )
    plan = stages.plan(run, kind, knobs, backbone.stride)
    specs = plan[-1].specs
    method = kind(backbone, knobs)
    whole_batch = isinstance(method, WholeBatchMethod) and accumulate > 1
    if accumulate > 1 and couples_samples(method.encoder if whole_batch else method):
        raise UserError(
            f"--accumulate {accumulate} would change the result: batch norm would see micro-batches instead of the batch. "
            f"Leave it at 1 with --method {run.method} --encoder {run.encoder}, or use more processes"
        )
    if run.init_from is not None and not start:
        encoder.load_weights(run.init_from, method.encoder)
    method.prepare(len(source))
    method.to(world.device)
    parallel.check(run, method, world)
    preprocessing = encoder.Preprocessing.for_size(run.image_size, run.mean, run.std)

    # ---- Parallelism and compilation, put around the finished model; the optimiser sees this process's part of it.
    wrapped = parallel.wrap(method, run, world)
    shards = parallel.Shards(method, world.device)
    optimizer = optim.build(
        run.optimizer,
        optim.parameter_groups(
            method,
            rule=kind.recipe.decay,
            layer_decay=run.layer_decay,
            matrices=run.optimizer == "muon",
            part=shards,
        ),
        run.betas,
        shards.norms,
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    skipped = 0
    if start:
        kept = checkpoint.Reader(folder, start)
        entries = {name: (shape, dtype) for (part, name), shape, dtype in kept.entries() if part == "optimizer"}
        state = optim.empty_state(optimizer, entries, method)
        into = {"method": method.state_dict(), "optimizer": shards.entries(state, method)}
        skipped = kept.read(into)["skipped"]
        optim.load_state_by_name(optimizer, state)
        del kept, into, state
    if world.first:  # before anything else, for this makes the folder a run's
        files.write_text(out / "config.yaml", yaml.safe_dump(record, sort_keys=False))
    report = Report(out, step=start, steps=steps, silent=not world.first)
    if world.first:
        data_facts = {"path": run.data, "images": len(source), "fingerprint": source.fingerprint}
        manifest.begin(out, world=world, step=start, data=data_facts, hosts=[facts.host for facts in everybody])
        trained = _millions([p for p in method.parameters() if p.requires_grad])
        report.say(f"{source.description}; {run.encoder} with {trained} trained parameters; {out}")
        if met:
            report.say(met)
        if start:
            report.say(f"continuing from step {start} of {steps}")
    autocast = torch.autocast(world.device.type, torch.bfloat16) if run.precision == "bf16" else nullcontext()

    # ---- Saving. Training waits only while the state is copied; it is written behind its back, then named.
    writer = checkpoint.Writer(folder, sharded=parallel.is_sharded(method))

    begun = exporting = False  # whether a checkpoint, or an export from one, is on its way, on all processes alike
    within = parallel.name_of(method.exported(), method)
    from_files = False  # whether the export of what is begun comes from the checkpoint's files
    lineage: dict[str, Any] = {}
    blocked = 0.0  # seconds that training waited for saving, since the last log
    copy: Encoder | None = None

    def made() -> Encoder | None:
        """Where the first process puts a copy of the encoder, whole and in host memory."""
        nonlocal copy
        if world.first and copy is None:
            copy = Encoder(encoder.another(run.encoder, method.exported()), run.encoder, preprocessing, {})
        return copy

    def copied() -> Encoder | None:
        """The encoder as it is now, whatever training does to the original; for the first process, but all must ask."""
        copy = made()
        parallel.copy_whole(method.exported(), None if copy is None else copy.backbone)
        return copy

    def save(step: int, *, last: bool = False) -> None:
        """Begin to write a checkpoint and the export of the state after `step` steps; the last one without copying it."""
        nonlocal begun, blocked, from_files, lineage
        settle(wait=True)
        asked_at = time.perf_counter()
        # To gather what is sharded would hold up all processes for longer than to copy the parts does.
        from_files = writer.sharded and not last and within is not None
        exported = None
        if last and not writer.sharded:
            exported = Encoder(method.exported(), run.encoder, preprocessing, {}) if world.first else None
        elif not from_files:
            exported = copied()
        optimizer_state = shards.entries(optim.state_by_name(optimizer), method)
        lineage = {
            "method": run.method, "data": run.data, "step": step, "images_seen": step * batch_size, "seed": run.seed
        }  # fmt: skip

        def export() -> None:
            if exported is not None:
                exported.lineage = lineage
                encoder.save(out / "encoder", exported)

        writer.begin(step, {"method": method.state_dict(), "optimizer": optimizer_state, "skipped": skipped}, export,
                     copy=not last)  # fmt: skip
        begun = True
        blocked += time.perf_counter() - asked_at
        if last:
            settle(wait=True)

    def export_written() -> None:
        """The export of a sharded run, from the files of its checkpoint."""
        exported = made()
        assert exported is not None
        tensors = {f"method/{within}{name}": tensor for name, tensor in exported.backbone.state_dict().items()}
        checkpoint.Reader(folder, lineage["step"]).read_some(tensors)
        exported.lineage = lineage
        encoder.save(out / "encoder", exported)

    def settle(*, wait: bool = False) -> None:
        """See what is begun through, with `wait` to its last end; raises OSError on all processes where one could not
        write."""
        nonlocal begun, exporting, blocked
        while begun or exporting:
            asked_at = time.perf_counter()
            writer.wait()
            (failed,) = distributed.any_of(writer.problem is not None)
            if begun and not failed:
                writer.publish(keep_last=run.keep_last, keep_every=run.keep_every)
                (failed,) = distributed.any_of(writer.problem is not None)
            exporting, begun = begun and from_files and not failed, False
            if failed:
                raise next(problem for problem in distributed.from_all(writer.problem) if problem)
            if exporting and world.first:
                writer.follow(export_written)
            blocked += time.perf_counter() - asked_at
            if not wait:
                return

    # ---- The loop.
    monitor = CollapseMonitor(method.collapsed(batch_size))
    loader = _stream(plan, start, source, share, run, world)
    pending: list[Tensor] = []  # one row a step since the last log: not finite?, gradient norm, loss, its terms
    sample_losses: list[tuple[int, Tensor, Tensor]] = []  # step, sample ids, their losses
    names: list[str] = []
    bad_in_a_row = 0
    step_number = start
    waited, blocked, since, seen_at = 0.0, 0.0, time.perf_counter(), start
    method.train()
    saved, stopped = start, None
    with closing(loader), Watch(out, world, run.stall_after, report.warn) as watch:
        while step_number < steps:
            # -- what the processes have to agree on, in one exchange
            asked_to = stop.signal
            stopping, writing = distributed.any_of(asked_to is not None, writer.busy)
            if stopping:
                of_all = distributed.from_all(asked_to)
                named = (f"{each} to process {rank}" if rank else each for rank, each in enumerate(of_all) if each)
                stopped = TIME_LIMIT if TIME_LIMIT in of_all else next(named)
                break
            if not writing:
                settle()

            # -- one optimiser step
            lr = learning_rate(
                step_number,
                steps=steps,
                peak=run.lr,
                final=run.final_lr,
                warmup=run.warmup_steps,
                kind=run.schedule,
                cooldown=run.cooldown_steps,
            )
            weight_decay = cosine(step_number / steps, run.weight_decay, run.final_weight_decay)
            optim.set_rates(optimizer, lr, weight_decay)
            results: list[tuple[Tensor, Losses]] = []  # sample ids and losses of each forward
            parts: list[tuple[Batch, Step]] = []  # micro-batches that wait for one loss of all of them
            for micro in range(accumulate):
                began = time.perf_counter()
                watch.at(step_number, "waiting for images")
                seen, raw = next(loader)
                watch.at(step_number, "the step")
                waited += time.perf_counter() - began
                for failure in raw.failures:
                    report.bad_image(*failure)
                batch = to_batch(raw, seen, *normalisation, world.device)
                step = _step(run, step_number, share.rows(micro), world)
                last = micro == accumulate - 1
                if whole_batch:
                    parts.append((batch, step))
                    if last:
                        assert isinstance(method, WholeBatchMethod)
                        losses = grad_cache.backward(method, parts, autocast, parameters)
                        results.append((torch.cat([part.index for part, _ in parts]), losses))
                    continue
                with parallel.last_backward(wrapped, last):
                    with autocast:
                        losses = wrapped(batch, step)
                    (losses.total / accumulate if accumulate > 1 else losses.total).backward()
                results.append((batch.index, losses))
            values = [torch.stack([each.total.detach(), *each.terms.values()]) for _, each in results]
            mean = values[0] if len(values) == 1 else torch.stack(values).mean(0)
            sample_losses += [
                (step_number, index, each.per_sample) for index, each in results if each.per_sample is not None
            ]
            shards.take_gradients()
            norms = optim.gradient_norms(parameters, shards.norms)
            norm = torch.linalg.vector_norm(norms)
            # A step is taken by all processes or by none, and only if everything in it is finite.
            bad = distributed.all_reduce_(((mean[0] + norm) * 0 != 0).float(), "max")
            if run.clip_grad is not None:
                optim.clip_(parameters, run.clip_grad, norms, each=run.clip_each)
            optim.step_unless(bad, optimizer)
            step.ok = bad == 0
            step.carried = {name: torch.cat([each.carry[name] for _, each in results]) for name in losses.carry}
            method.after_step(step)
            for parameter in parameters:
                parameter.grad = None
            pending.append(torch.cat([torch.stack([bad, norm]), mean]))
            names = list(losses.terms)
            step_number += 1

            # -- now and then; the host waits for the device only in here
            watch.at(step_number, "logging, scoring and saving")
            if step_number % run.log_every == 0 or step_number == steps:
                table = torch.stack(pending)
                table[:, 2:] = distributed.all_reduce_(table[:, 2:].contiguous()) / world.size
                table = table.cpu()
                pending.clear()
                good = table[:, 0] == 0
                if not bool(good.all()):
                    bad_steps = [step_number - len(table) + i for i in range(len(table)) if not good[i]]
                    skipped += len(bad_steps)
                    suspects = [
                        i
                        for n, index, each in sample_losses
                        if n in bad_steps
                        for i in index[~each.isfinite()].tolist()
                    ]
                    suspects = sorted({i for found in distributed.from_all(suspects) for i in found})
                    report.warn(_bad_step_text(run, bad_steps, table[~good], names, source, suspects))
                sample_losses.clear()
                trailing = len(table) if not bool(good.any()) else int(good.flip(0).float().argmax())
                bad_in_a_row = trailing + (bad_in_a_row if trailing == len(table) else 0)
                if bad_in_a_row >= run.bad_steps:
                    # Nothing was changed since the first of them: this is the state in which it happened.
                    save(step_number - bad_in_a_row, last=True)
                    raise Diverged(
                        f"{bad_in_a_row} steps in a row were not finite ({run.bad_steps} allowed, --bad-steps), from step "
                        f"{step_number - bad_in_a_row}; the weights before it are kept in {folder}. "
                        f"Lower --lr, lengthen --warmup-steps or set --clip-grad, with another --out"
                    )
                shown = table[good].mean(0) if bool(good.any()) else table.mean(0)
                now = time.perf_counter()
                speed = (step_number - seen_at) / (now - since)
                line = {
                    "step": step_number,
                    "loss": float(shown[2]),
                    **{name: float(value) for name, value in zip(names, shown[3:], strict=True)},
                    "grad_norm": float(shown[1]),
                    "lr": lr,
                    "weight_decay": weight_decay,
                    "images_per_s": speed * batch_size,
                    "data_wait": min(1.0, waited / (now - since)),
                    "checkpoint_wait": min(1.0, blocked / (now - since)),
                    "epoch": step_number * batch_size / len(source),
                    "skipped": skipped,
                    "bad_images": report.count_bad_images(),
                    "time": time.time(),
                }
                report.metrics({k: _json_number(v) for k, v in line.items()}, (steps - step_number) / speed)
                for warning in monitor.losses(line, warm=step_number > max(run.warmup_steps, steps // 20)):
                    report.warn(warning)
                waited, blocked, since, seen_at = 0.0, 0.0, time.perf_counter(), step_number
            looked_up = time.perf_counter()
            if _due(step_number, run.monitor_every):
                images = batch.views[seen[0].name]
                images = images[0] if seen[0].count > 1 else images
                with parallel.gathered(method):
                    spreads = feature_statistics(_features(method, images[:256], autocast))
                report.scores("features", spreads, step_number)
                for warning in monitor.features(spreads):
                    report.warn(warning)
            if _due(step_number, run.picture_every) and (world.first or writer.sharded):
                views = {s.name: batch.views[s.name][:8] for s in seen if s.count == 1}
                few = dataclasses.replace(batch, views=views, index=batch.index[:8])
                with torch.no_grad(), autocast, parallel.gathered(method):
                    rows = slice(0, len(few.index))
                    shown_pictures = method.pictures(few, _step(run, step_number, rows, world))
                if world.first:
                    report.pictures(shown_pictures, run.mean, run.std, step_number)
            if held_out is not None and (_due(step_number, run.val_every) or step_number == steps):
                with parallel.gathered(method):
                    scores = _validate(run, method, held_out, specs, autocast, world, steps)
                report.scores("val", scores, step_number)
            if _due(step_number, run.knn_every):
                writer.wait()  # for it holds the copy
                probe = copied()
                if knn is not None and probe is not None:
                    report.scores("knn", {"top1": knn(probe.to(world.device).eval())}, step_number)
                    probe.cpu()
                distributed.barrier()
            since += time.perf_counter() - looked_up  # the speed is that of training
            if _due(step_number, run.checkpoint_every):
                save(step_number)
                saved = step_number

    # ---- The end: by the last step, or by a signal between two steps.
    settle(wait=True)
    if saved != step_number or distributed.from_first(not (out / "encoder" / "config.json").exists()):
        save(step_number, last=True)
    bad_images = 0
    if world.first:
        bad_images = report.merge_bad_images()
        state_text = f"stopped: {stopped} at step {step_number}" if step_number < steps else "finished"
        manifest.end(out, state_text, step=step_number, steps=steps, skipped_steps=skipped, bad_images=bad_images)
    report.close()
    distributed.barrier()
    return Outcome(out, step_number, steps, stopped, bad_images)


def _stream(
    plan: list[stages.Stage], start: int, source: Source, share: Share, run: Resolved, world: World
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


def _open_data(run: Run, world: World) -> tuple[Source, Source | None]:
    """The images to train on, and those held out for the validation loss (None where none are wanted): of a split for
    validation where there is one, else taken out of the training images."""
    split = pretraining_split(run.data)
    source = open_source(run.data, split)
    if run.val_images == 0:
        return source, None
    of_validation = [name for name in splits(run.data) if name != split and name.startswith("val")]
    pool = open_source(run.data, of_validation[0]) if of_validation else source
    if not world.size <= run.val_images < len(pool):
        raise UserError(
            f"--val-images is {run.val_images}; there are {len(pool)} images to hold out from, and {world.size} "
            f"process(es) to share them"
        )
    order = numpy_generator(run.seed, "held out").permutation(len(pool))
    held_out = Subset(pool, order[: run.val_images])
    if pool is source:
        source = Subset(source, order[run.val_images :])
    return source, held_out


def _find_start(run: Resolved, record: dict[str, Any], source: Source, folder: Path, held: ExitStack) -> int:
    """The step to start from: 0, or that of the newest whole checkpoint. Refuses to continue another run, or one that is
    under way; until `run_lock` is left nobody else can."""
    out = run.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"--out {out} cannot be made: {problem.strerror}") from None
    try:
        held.enter_context(files.lock_folder(out, UNDER_WAY))
    except BlockingIOError:
        raise UserError(
            f"another process trains in {out} at this moment: wait for its end, or choose another --out"
        ) from None
    written = out / "config.yaml"
    if not written.exists():
        # Names with a dot are what a run leaves that was killed before it had begun.
        if any(not path.name.startswith(".") for path in out.iterdir()):
            raise UserError(f"--out {out} holds something else than a run: choose an empty or a new folder")
        return 0
    before = config.read_recorded(written)
    allowed = config.CHANGEABLE | (config.LENGTH_KEYS if run.extend else frozenset())
    changed = config.differences(before, record, allowed)
    if changed:
        remedy = "repeat the old flags, or choose another --out"
        if not config.differences(before, record, config.CHANGEABLE | config.LENGTH_KEYS):
            remedy += ", or add --extend to give this run another length"
        raise UserError(f"{out} holds a run with other settings ({'; '.join(changed)}): {remedy}")
    known = manifest.read(out).get("data", {}).get("fingerprint")
    if known not in (None, source.fingerprint):
        raise UserError(
            f"the images in {run.data} are not those that the run in {out} began with: choose another --out"
        )
    checkpoint.clear(folder)
    return checkpoint.newest(folder) or 0


def _step(run: Resolved, number: int, rows: slice, world: World) -> Step:
    return Step(
        step=number,
        total=run.steps,
        noise=key(run.seed, "step", number),
        rows=rows,
        batch_size=run.batch_size,
        device=world.device,
    )


def _validate(
    run: Resolved, method: Method, held_out: Source, specs: Any, autocast: Any, world: World, steps: int
) -> dict[str, float]:
    """The mean loss over the held-out images, always with the same views and the same noise."""
    # Batches of one size, no larger than in training, that leave out fewer images than they are.
    batches_needed = math.ceil(len(held_out) / run.batch_size)
    each = max(1, len(held_out) // (batches_needed * world.size)) * world.size
    share = Share(each, 1, world.rank, world.size)
    total, count = torch.zeros((), device=world.device), 0
    method.eval()
    with torch.no_grad():
        for raw in fixed_batches(held_out, specs, share, seed=run.seed, channels=run.in_chans, policy=run.bad_images):
            step = Step(
                step=steps - 1,
                total=steps,
                noise=key(run.seed, "validation", raw.step),
                rows=share.rows(0),
                batch_size=share.batch_size,
                device=world.device,
            )
            with autocast:
                total += method(to_batch(raw, specs, run.mean, run.std, world.device), step).total
            count += 1
    method.train()
    return {"loss": float(distributed.all_reduce_(total)) / (count * world.size)}


def _features(method: Method, images: Tensor, autocast: Any) -> Tensor:
    """The exported encoder's vectors (n, D) of a few images, as an evaluator would see them."""
    exported = method.exported()
    exported.eval()
    with torch.no_grad(), autocast:
        pooled = exported(images).pooled
    method.train()
    return pooled.float()


def _bad_step_text(
    run: Resolved, bad: list[int], table: Tensor, names: list[str], source: Source, suspects: list[int]
) -> str:
    """Which steps were skipped, for which term, and on which images (all of the first such step where none is known)."""
    columns = ["gradient norm", "loss", *names]
    terms = [name for i, name in enumerate(columns) if not bool(torch.isfinite(table[:, 1 + i]).all())]
    ids = suspects or samples(bad[0] * run.batch_size, run.batch_size, len(source), run.seed)[1].tolist()
    return (
        f"skipped step {_some(bad)}: not finite: {', '.join(terms) or 'the loss of another process'}; "
        f"sample ids {_some(ids)}"
    )


def _some(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (f", ... ({len(values)} in all)" if len(values) > 8 else "")


def _precision(run: Run, device: torch.device) -> Literal["fp32", "bf16"]:
    """What "auto" means here: bf16 where the device computes in it natively."""
    if run.precision != "auto":
        return run.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def _workers(run: Run, world: World) -> int:
    """Loader processes: as asked, else those cores that training leaves free (on a CPU it leaves none, one is enough)."""
    if run.workers is not None:
        return run.workers
    mine = max(1, distributed.cores() // world.local_size)  # more processes than cores is slow, but no mistake
    return max(1, min(16, mine - 1)) if world.device.type == "cuda" else min(1, mine - 1)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _millions(parameters: list[nn.Parameter]) -> str:
    return f"{sum(p.numel() for p in parameters) / 1e6:.1f} M"


def _json_number(value: Any) -> Any:
    """JSON has no NaN: None stands for it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
