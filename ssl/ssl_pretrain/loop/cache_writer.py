"""Runs a frozen network over the stream of images of a run and stores its outputs (`teacher_cache.py` reads them).

The network sees the micro-batches that the run will make, so that its outputs are the same bits. Shapes: B images of a
micro-batch, L vectors of a row, D channels.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from .. import config, distributed, files, model_card, pretext
from ..backbones.quantizer import Quantizer
from ..config import Resolved, Run
from ..data import rows
from ..data.loader import Share, batches, to_batch
from ..data.rows import Kind, Layout
from ..data.source import Source
from ..data.views import ViewSpec
from ..distributed import World
from ..errors import UserError
from ..foreign.specs import Spec
from ..frozen import Frozen
from ..randomness import numpy_generator
from . import sizes, stages, teacher_cache
from . import start as run_start
from .networks import check_sizes, open_networks
from .teacher_cache import CODES, COMMAND, FORMAT, KIND, outputs_of

Store = Literal["float32", "float16", "bfloat16"]
PATIENCE = 5.0  # seconds to wait for another writer
# Largest relative difference of outputs that are computed again from those of the network, and of their rounding
TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}


@dataclass(frozen=True)
class _Work:
    """A network, its views among those of the run, and where its outputs go."""

    run: Resolved
    specs: tuple[ViewSpec, ...]
    views: list[ViewSpec]
    network: Frozen
    name: str
    folder: Path
    share: Share  # in the micro-batches of the run
    source: Source
    world: World


def write(
    flags: Run,
    knobs: Any,
    options: Any,
    *,
    store: Store,
    processes: int,
    check: int,
    say: Callable[[str], None],
    progress: Callable[[Iterator[int], int], Iterator[int]],
) -> bool:
    """Write the caches that the run with these settings names, or what of them is missing; whether all is well.

    store: type of the stored numbers; processes: of the run; check: compute this number of micro-batches again and compare
    them; progress: passes on the parts that are written, of so many. Raises UserError for a user's mistake, OSError where
    the disk has no room.
    """
    with distributed.world() as world:
        if world.size > 1:
            raise UserError(f"{COMMAND} runs in one process: --nproc says only in how many the run will be")
        method_class = pretext.load(flags.method)
        source, _ = run_start.open_data(flags, world)
        run = config.resolve(flags, method_class.recipe, len(source), run_start.precision(flags, world.device))
        knobs = sizes.sized(run, method_class, knobs, options, len(source))
        teacher_cache.check_read(run, method_class, knobs)
        if run.teacher_cache is None and run.tokenizer_cache is None:
            raise UserError("no cache is named: give --teacher-cache FOLDER (or --tokenizer-cache FOLDER)")
        uncached = dataclasses.replace(run, teacher_cache=None, tokenizer_cache=None)
        networks = open_networks(uncached, method_class, knobs, world)
        backbone, sights = sizes.outline(run, options), {name: network.sight for name, network in networks.items()}
        (stage,) = stages.plan(run, method_class, knobs, backbone.stride, sights, unit=backbone.unit)
        check_sizes(networks, stage.specs, run.teacher)
        share = Share(run.batch_size, run.accumulate * processes)
        fine = True
        for name, network in networks.items():
            place = teacher_cache.folder(run, name)
            if place is None:
                continue
            views = teacher_cache.seen_by(name, stage.specs, run)
            files.make_folder(place, teacher_cache.flag(name))
            work = _Work(run, stage.specs, views, network, name, place, share, source, world)
            try:
                with files.lock_folder(place, PATIENCE):
                    layout = _write(work, store, say, progress)
            except BlockingIOError:
                raise UserError(f"another process writes to {place} at this moment: wait for its end") from None
            fine &= _checked(work, layout, check, say)
        return fine


def _write(
    work: _Work, store: Store, say: Callable[[str], None], progress: Callable[[Iterator[int], int], Iterator[int]]
) -> Layout:
    layout, facts = _prepared(work, store)
    place, run, kind = work.folder, work.run, layout.fields[0][1]
    said = (
        f"{layout.count:,} images x {rows.in_units(layout.record.itemsize)} as {kind} = {rows.in_units(layout.total)}"
    )
    rows.clear(place)
    absent = rows.missing(place, layout)
    smaller = "choose another disk, fewer --steps" + (
        ", or --store float16 for half of it" if kind == "float32" else ""
    )
    need = rows.check_room(place, layout, smaller)
    free = rows.in_units(rows.free(place))
    say(f"{place}: outputs of {work.network.spec}, {said}; {rows.in_units(need)} to write, {free} free")
    rows.write_head(place, layout, facts)
    if (quantizer := work.network.quantizer) is not None:
        assert isinstance(quantizer, Quantizer)
        rows.write_array(place / CODES, quantizer.vectors().detach().float().cpu().numpy())
    steps = layout.part // run.batch_size
    for part in progress(iter(absent), len(absent)):
        first = part * steps
        last = first + len(layout.rows(part)) // run.batch_size
        rows.write_part(place, layout, part, _records(work, layout, first, last))
    return layout


def _prepared(work: _Work, store: Store) -> tuple[Layout, dict[str, Any]]:
    """The layout and the facts of the cache: of one that has begun, which gets longer where the run is longer, or new ones.

    Raises UserError where the folder holds something else, or a cache for another run.
    """
    place = work.folder
    now, facts = _described(work, store)
    if not (place / rows.HEAD).exists():
        if any(not path.name.startswith(".") for path in place.iterdir()):
            raise UserError(f"{place} holds something else than a {KIND}: choose an empty or a new folder")
        return now, facts
    before, known = rows.read_head(place, KIND)
    teacher_cache.check_depends(place, known, facts["depends"])
    for words in ("batch", "views", "versions"):
        value = facts[words]
        if known.get(words) != value:
            raise UserError(
                f"{place} was begun with other {words} ({known.get(words)}, now {value}): choose another folder, or remove "
                f"this one"
            )
    if known.get("pixels") != facts["pixels"] or before.fields != now.fields:
        stored = before.fields[0][1]
        raise UserError(
            f"{place} was begun with other images, or as {stored} instead of {now.fields[0][1]}: repeat --store {stored}, "
            f"or choose another folder"
        )
    if before.part % work.run.batch_size:
        raise UserError(f"{place} has parts of {before.part:,} images, which are no whole steps: choose another folder")
    return Layout(now.fields, max(before.count, now.count), before.part), facts


def _described(work: _Work, store: Store) -> tuple[Layout, dict[str, Any]]:
    """The layout and the facts of a new cache. The shapes come from one blank image."""
    run, network, views = work.run, work.network, work.views
    fields, described = [], {}
    for spec in views:
        with torch.no_grad():
            blank = torch.zeros(spec.count, 1, run.in_chans, *spec.size, device=work.world.device)
            found, outputs, grid = outputs_of(network, spec, blank if spec.count > 1 else blank[0])
        kind: Kind = store
        if outputs == ("ids",):
            assert network.quantizer is not None
            kind = "uint16" if network.quantizer.size <= 1 << 16 else "int32"
        fields.append((spec.name, kind, tuple(found.shape[1:])))
        patches = math.prod(grid) if {"patches", "ids"} & set(outputs) else 0
        described[spec.name] = {"outputs": list(outputs), "patches": patches, "grid": list(grid)}
    reads = views[0].reads
    assert reads is not None
    bytes_of_step = Layout(tuple(fields), 1, 1).record.itemsize * run.batch_size
    part = max(1, rows.PART_BYTES // bytes_of_step) * run.batch_size
    library = Spec.parse(network.spec) is not None
    depth = network.backbone.depth
    facts = {
        "kind": KIND,
        "format": FORMAT,
        "name": work.name,
        "network": {
            "spec": network.spec,
            "fingerprint": network.fingerprint,
            "weights": None if library else teacher_cache.weights_of(network.spec),
            "dim": network.dim,
            "depth": depth,
            "stride": list(network.sight.stride),
            "unit": list(network.sight.unit or network.sight.stride),
            "interpolation": network.sight.interpolation,
            "block": reads.block % depth,
            "origin": model_card.origin(network.spec),
        },
        "codes": None if network.quantizer is None else [network.quantizer.size, network.quantizer.width],
        "views": described,
        "depends": teacher_cache.depends(run, work.specs, views, work.source, network.fingerprint, depth),
        "pixels": teacher_cache.pixels(run, work.specs, views, work.source),
        "batch": {"--batch-size": run.batch_size, "micro-batch": work.share.micro_size},
        "versions": teacher_cache.versions(),
        "data": run.data,
    }
    return Layout(tuple(fields), run.steps * run.batch_size, part), facts


def _records(work: _Work, layout: Layout, first: int, last: int) -> Iterator[np.ndarray]:
    """The records of the steps first, ..., last - 1, one micro-batch after another."""
    run, device = work.run, work.world.device
    autocast = torch.autocast(device.type, torch.bfloat16) if run.precision == "bf16" else nullcontext()
    stream = batches(
        work.source, work.specs, work.share, seed=run.seed, channels=run.in_chans, start_step=first, stop_step=last,
        workers=run.workers or 0, policy=run.bad_images, pin=device.type == "cuda",
    )  # fmt: skip
    with closing(stream):
        for raw in stream:
            batch = to_batch(raw, work.specs, run.mean, run.std, device)
            record = np.empty(len(raw.index), layout.record)
            record["index"] = raw.index
            for number, spec in enumerate(work.views):
                with torch.no_grad(), autocast:
                    found, _, _ = outputs_of(work.network, spec, batch.views[spec.name])
                kind = layout.fields[number][1]
                try:
                    record[f"f{number}"] = rows.as_array(found, kind)
                except OverflowError as problem:
                    raise UserError(
                        f"{work.network.spec} gives values up to {problem}, which do not fit {kind}: use --store bfloat16 "
                        f"or float32 with another folder"
                    ) from None
            yield record


def _checked(work: _Work, layout: Layout, count: int, say: Callable[[str], None]) -> bool:
    """Compute some micro-batches again, drawn at random, and say the largest difference; whether it is small enough."""
    if not count:
        return True
    stored = rows.Rows(work.folder, layout, f"write it again with {COMMAND}")
    steps = numpy_generator(work.run.seed, "check").permutation(layout.count // work.run.batch_size)[:count]
    worst, worst_allowed = 0.0, TOLERANCE.get(layout.fields[0][1], 0.0)
    for step in steps.tolist():
        start = step * work.run.batch_size
        for record in _records(work, layout, step, step + 1):
            index = record["index"].copy()
            for number, (_, kind, _) in enumerate(layout.fields):
                now = rows.as_tensor(record[f"f{number}"].copy(), kind).double()
                before = stored.read(number, start, index).double()
                worst = max(worst, float((now - before).abs().max() / now.abs().max().clamp_min(1e-12)))
            start += len(index)
    fine = worst <= worst_allowed
    more = "" if fine else f", more than {worst_allowed:.0e}: write the cache again in another folder"
    say(
        f"computed {len(steps)} of {layout.count // work.run.batch_size:,} steps again: the largest difference is "
        f"{worst:.1e} of the largest value{more}"
    )
    return fine
