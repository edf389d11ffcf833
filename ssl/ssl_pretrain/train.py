"""The training loop of all methods, to be read from top to bottom.

The position in a run is one integer, the number of optimiser steps done. Data, views, noise and schedules are functions of
it and of the seed. So a checkpoint is the tensors and this integer, and a resumed run gives the same result.
"""

import dataclasses
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from . import backbones, config, distributed, files, optim, pretext, rates
from .config import Resolved, Run
from .data.loader import Share, to_batch
from .data.source import Source
from .distributed import World
from .distributed.batch_norm import couples_samples
from .errors import UserError
from .features.products import tf32
from .frozen import NONE, Frozen
from .loop import (
    grad_cache,
    manifest,
    parallel,
    preflight,
    sizes,
    stages,
    start_state,
    start_weights,
    teacher_cache,
    updates,
)
from .loop import start as run_start
from .loop.estimate import Estimate
from .loop.log import Log
from .loop.monitor import CollapseMonitor
from .loop.networks import check_sizes, check_unchanged, open_networks
from .loop.networks import facts as network_facts
from .loop.positions import move_positions
from .loop.probes import Probes, is_due, step_of
from .loop.report import Report
from .loop.saver import Saver, restore
from .loop.score import KnnScore
from .loop.signals import TIME_LIMIT, StopRequest
from .loop.watch import Watch
from .optim.schedules import cosine, learning_rate
from .pretext import Batch, Losses, Method, Step, WholeBatchMethod
from .randomness import key


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    out: Path
    step: int
    steps: int
    stopped: str | None  # the signal that stopped it, None where it ran to its end
    bad_images: int


class Diverged(Exception):
    """Too many consecutive steps were not finite. The message names the steps, the term and the checkpoint that is kept."""


def train(run: Run, knobs: Any, options: Any) -> Outcome:
    """Pretrain with these settings of the run, the method and the encoder. The same call with the same folder resumes.

    Raises UserError for a user's mistake, OSError if the run folder cannot be written (a full disk), Diverged.
    """
    with distributed.world() as world, StopRequest() as stop, ExitStack() as cleanup:
        return _train(run, knobs, options, world, stop, cleanup)


def _train(flags: Run, knobs: Any, options: Any, world: World, stop: StopRequest, cleanup: ExitStack) -> Outcome:
    method_class = pretext.load(flags.method)
    cleanup.enter_context(tf32(world.device))

    # ---- Data. The first process opens it first, so that an index is built once.
    def open_data() -> tuple[Source, Source | None, Resolved, dict[str, KnnScore]]:
        source, held_out = run_start.open_data(flags, world)
        run = config.resolve(flags, method_class.recipe, len(source), run_start.precision(flags, world.device))
        return source, held_out, run, KnnScore.while_training(run) if world.first else {}

    source, held_out, run, knn = distributed.on_all(open_data)
    steps, accumulate = run.steps, run.accumulate
    share = Share(run.batch_size, accumulate, world.rank, world.size)

    # ---- Sizes of the method's parts that are left open: this run's, or by the encoder and the number of images.
    knobs = sizes.decide(run, method_class, knobs, options, len(source), world)

    # ---- Networks that are read and never trained (a teacher, the start weights of an anchor).
    networks = distributed.on_all(lambda: open_networks(run, method_class, knobs, world))

    # ---- Where to start: this run's newest checkpoint, or step 0 with random weights or those of --init-from.
    record, defaults = config.plain(run, knobs, options), config.defaults(run, knobs, options)
    start = distributed.from_first(
        distributed.on_all(
            lambda: run_start.find_start(run, flags, record, defaults, source, cleanup) if world.first else 0
        )
    )
    distributed.on_all(lambda: check_unchanged(run, networks))
    began = time.monotonic()
    processes = preflight.check(world, run.out) if world.size > 1 else []
    process_table = preflight.table(processes, run.out, time.monotonic() - began) if processes else ""

    # ---- Model, parallelism and compilation. The optimiser sees the part of the parameters that this process holds.
    method, plan, notes = _build_method(run, method_class, knobs, options, len(source), start, world, networks)
    plan = distributed.on_all(lambda: teacher_cache.use(run, plan, networks, source))  # read in place of networks
    whole_batch = isinstance(method, WholeBatchMethod) and accumulate > 1
    wrapped = parallel.wrap(method, run, world)
    shards = parallel.Shards(method, world.device)
    rules = (*method.rates(), *rates.parse(run.rates), *updates.rates(run))
    rates.check(rules, (name for name, p in method.named_parameters() if p.requires_grad))
    groups = optim.parameter_groups(
        method,
        method.encoder,
        rule=method_class.recipe.decay,
        layer_decay=run.layer_decay,
        decay_blocks=run.layer_decay_blocks,
        matrices=run.optimizer == "muon",
        part=shards,
        rates=rules,
    )
    optimizer = optim.build(run.optimizer, groups, run.betas, shards.norms)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    skipped = restore(run, start, method, optimizer, shards) if start else 0
    mixed_precision = torch.autocast(world.device.type, torch.bfloat16) if run.precision == "bf16" else nullcontext()

    # ---- Files and reports. config.yaml is written first: it marks the folder as a run's.
    if world.first:
        files.write_text(run.out / "config.yaml", yaml.safe_dump(record, sort_keys=False))
    report = Report(run.out, step=start, steps=steps, silent=not world.first, names=run.logger, config=record)
    cleanup.enter_context(report)
    if world.first:
        facts: dict[str, Any] = {"networks": network_facts(networks)} if networks else {}
        manifest.begin(
            run.out,
            world=world,
            step=start,
            hosts=[each.host for each in processes],
            data=run_start.data_facts(run, source),
            **facts,
            **start_weights.facts(run),
        )
        trained = sum(p.numel() for p in method.parameters() if p.requires_grad) / 1e6
        report.say(f"{source.description}; {run.encoder} with {trained:.1f} M trained parameters; {run.out}")
        for note in (source.left_out.sentence() if source.left_out else "", process_table, *notes):
            if note:
                report.say(note)
        if start:
            report.say(start_state.branched(run, start) or f"continuing from step {start} of {steps}")
    guard = run_start.guard(run, start, knn, held_out, world)
    saver = Saver(run, method, optimizer, shards, world, start, network_facts(networks), guard)
    monitor = CollapseMonitor(method.collapsed(run.batch_size))
    probes = Probes(
        run, method, world, report, monitor, saver, knn, guard, source, held_out, plan[-1].specs, mixed_precision
    )
    loader = run_start.stream(plan, start, source, share, run, world)
    estimate = Estimate(run, method, source, plan, world, report, stop)
    estimate.begin(start, mixed_precision)
    log = Log(run, source, report, monitor, world, skipped, estimate)

    # ---- The loop.
    step_number, stopped = start, None
    began = time.perf_counter()
    if probes.at_start(start):
        saver.save(start, log.skipped, best=True)
    log.leave_out(time.perf_counter() - began)
    method.train()
    with closing(loader), Watch(run.out, world, run.stall_after, report.say_for_all) as watch:
        while step_number < steps:
            # -- decisions that all processes must take together, in one exchange
            signal = stop.signal
            stopping, writing = distributed.any_of(signal is not None, saver.busy)
            if stopping:
                signals = distributed.from_all(signal)
                named = (f"{each} to process {rank}" if rank else each for rank, each in enumerate(signals) if each)
                stopped = TIME_LIMIT if TIME_LIMIT in signals else next(named)
                break
            if not writing:
                saver.settle()

            # -- learning rate and weight decay of this step
            lr = learning_rate(step_number, steps=steps, **run_start.schedule(run))
            weight_decay = cosine(step_number / steps / run.schedule_stretch, run.weight_decay, run.final_weight_decay)
            optim.set_rates(optimizer, lr, weight_decay, step_number / steps)
            move_positions(method.encoder, key(run.seed, "positions", step_number))

            # -- forward and backward, micro-batch by micro-batch
            results: list[tuple[Tensor, Losses]] = []  # sample ids and losses of each forward
            parts: list[tuple[Batch, Step]] = []  # micro-batches whose loss is computed once for all (GradCache)
            for micro in range(accumulate):
                began = time.perf_counter()
                watch.at(step_number, "waiting for images")
                specs, raw = next(loader)
                watch.at(step_number, "the step")
                log.waited_for_data(time.perf_counter() - began)
                for failure in raw.failures:
                    report.bad_image(*failure)
                batch = to_batch(raw, specs, run.mean, run.std, world.device)
                step = step_of(run, step_number, share.rows(micro), world)
                began = time.perf_counter()
                probes.see(step_number + 1, share.rows(micro), batch, specs)
                log.leave_out(time.perf_counter() - began)
                last = micro == accumulate - 1
                if whole_batch:
                    parts.append((batch, step))
                    if last:
                        assert isinstance(method, WholeBatchMethod)
                        losses = grad_cache.backward(method, parts, mixed_precision, parameters)
                        results.append((torch.cat([part.index for part, _ in parts]), losses))
                    continue
                with parallel.last_backward(wrapped, last):
                    with mixed_precision:
                        losses = wrapped(batch, step)
                    (losses.total / accumulate if accumulate > 1 else losses.total).backward()
                results.append((batch.index, losses))
            values = [torch.stack([each.total.detach(), *each.terms.values()]) for _, each in results]
            mean = values[0] if len(values) == 1 else torch.stack(values).mean(0)

            # -- the optimiser's step: by all processes or by none, and only if loss and gradients are finite
            shards.take_gradients()
            norms = optim.gradient_norms(parameters, shards.norms)
            norm = torch.linalg.vector_norm(norms)
            bad = distributed.all_reduce_(((mean[0] + norm) * 0 != 0).float(), "max")
            if run.clip_grad is not None:
                optim.clip_(parameters, run.clip_grad, norms, each=run.clip_each)
            optim.step_unless(bad, optimizer)

            # -- state without gradients: EMA teachers, queues, centres
            step.ok = bad == 0
            step.carried = {name: torch.cat([each.carry[name] for _, each in results]) for name in losses.carry}
            method.after_step(step)
            for parameter in parameters:
                parameter.grad = None
            log.add(step_number, results, mean, bad, norm)
            step_number += 1
            estimate.after(step_number)

            # -- logging, scoring and saving; only here the host waits for the device
            watch.at(step_number, "logging, scoring and saving")
            if step_number % run.log_every == 0 or step_number == steps:
                log.write(step_number, lr, weight_decay, saver.seconds_blocked)
                saver.seconds_blocked = 0.0
                if log.bad_in_a_row >= run.bad_steps:
                    # Skipped steps change nothing, so this is the state before the first of them.
                    saver.save(step_number - log.bad_in_a_row, log.skipped, last=True)
                    raise Diverged(log.diverged(step_number))
            began = time.perf_counter()
            best = probes(step_number, specs)
            log.leave_out(time.perf_counter() - began)
            if best or is_due(step_number, run.checkpoint_every):
                saver.save(step_number, log.skipped, best=best)

    # ---- The end: after the last step, or after a signal between two steps.
    saver.settle(wait=True)
    not_exported = distributed.from_first(not (run.out / "encoder" / "config.json").exists())
    if saver.saved_step != step_number or not_exported:
        saver.save(step_number, log.skipped, last=True)
    bad_images, scores = 0, {"scores": guard.record} if guard.record else {}
    state = f"stopped: {stopped} at step {step_number}" if step_number < steps else "finished"
    if world.first:
        bad_images = report.merge_bad_images()
        facts = {"step": step_number, "steps": steps, "skipped_steps": log.skipped, "bad_images": bad_images, **scores}
        manifest.end(run.out, state, **facts)
    report.close(state)
    distributed.barrier()
    return Outcome(run.out, step_number, steps, stopped, bad_images)


def check_settings(flags: Run, knobs: Any, options: Any) -> None:
    """Open the data and build the model without memory for it, before a job is submitted or a grid begins.

    Raises UserError for missing data and for flags that contradict one another, as `train` would before the first step.
    What needs the weights (--init-from, --init-state), the run folder or other processes is not checked.
    """
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("meta"))
    method_class = pretext.load(flags.method)
    source, _ = run_start.open_data(flags, world)
    run = config.resolve(flags, method_class.recipe, len(source), "fp32")
    Share(run.batch_size, run.accumulate, world.rank, world.size)
    knobs = sizes.sized(run, method_class, knobs, options, len(source))
    networks = open_networks(run, method_class, knobs, world)
    # A method of another package may read values of its tensors in its constructor. Meta tensors have none.
    with torch.device("meta"), suppress(NotImplementedError, RuntimeError):
        no_weights = 1  # a step that a run continues from
        _build_method(run, method_class, knobs, options, len(source), no_weights, world, networks)


def _build_method(
    run: Resolved,
    method_class: type[Method],
    knobs: Any,
    options: Any,
    images: int,
    start: int,
    world: World,
    networks: Mapping[str, Frozen] = NONE,
) -> tuple[Method, list[stages.Stage], list[str]]:
    """The method on this process's device, the run's stages, and what is to be said about its start weights. Random weights
    depend only on the seed.

    Raises UserError for flags that contradict one another.
    """
    torch.manual_seed(key(run.seed, "init"))
    backbone = backbones.build(
        run.encoder, image_size=run.image_size, in_chans=run.in_chans, **dataclasses.asdict(options)
    )
    sights = {name: network.sight for name, network in networks.items()}
    plan = stages.plan(run, method_class, knobs, backbone.stride, sights, unit=backbone.unit)
    stages.check_sizes(run, options)
    for stage in plan:
        check_sizes(networks, stage.specs, run.teacher)
    method = method_class(backbone, knobs)
    if run.batch_size < method_class.least_batch:
        raise UserError(
            f"--batch-size {run.batch_size}: --method {run.method} compares the images of a batch with one another; give "
            f"at least {method_class.least_batch}"
        )
    if run.batch_size < 2 and couples_samples(method.encoder):
        raise UserError(
            f"--batch-size {run.batch_size}: --encoder {run.encoder} has batch norm, which compares the images of a batch "
            f"with one another; give at least 2"
        )
    sees_micro_batches = method.encoder if isinstance(method, WholeBatchMethod) else method
    if run.accumulate > 1 and couples_samples(sees_micro_batches):
        raise UserError(
            f"--accumulate {run.accumulate} would change the result: batch norm would see micro-batches instead of the "
            f"batch. Leave it at 1 with --method {run.method} --encoder {run.encoder}, or use more processes"
        )
    notes = [] if start else start_weights.load(run, method.encoder)
    notes += updates.add(run, method.encoder)
    method.prepare(images, networks)
    notes += [] if start else start_state.load(run, method)
    method.to(world.device)
    parallel.check(run, method, world)
    return method, plan, notes
