"""Stored outputs of a frozen network, read in place of running it (`--teacher-cache`, `--tokenizer-cache`).

Views are functions of (seed, epoch, sample), and the order of samples of the seed. So the outputs for the run's stream of
images, place by place, can be stored once (`cache_writer.py`; after TinyViT, Wu et al., ECCV 2022, section 3.1). The
loader then gives a batch the stored rows in place of the network's view, and `Frozen` reads them: methods do not notice.
The network's weights are not loaded.

Shapes: n images, L vectors of a row, D channels.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import encoder
from ..backbones.stored import StoredCodes, StoredOutputs
from ..config import Resolved
from ..data.loader import Share, batches
from ..data.rows import Layout, Rows, bounded, missing, read_array, read_head
from ..data.source import Source
from ..data.subset import Subset
from ..data.views import Sight, StoredView, ViewSpec
from ..errors import UserError
from ..files import export_folder
from ..foreign.specs import Spec
from ..frozen import Frozen
from ..parts.targets import tap
from ..pretext import Method
from .stages import Stage

KIND = "teacher cache"
FORMAT = 1
CODES = "codes"  # the subfolder with a tokenizer's codebook
FLAG = {  # by the network's name
    **dict.fromkeys(("teacher", "teacher_run", "teacher_heads", "anchor"), "teacher_cache"),
    "tokenizer": "tokenizer_cache",
}
COMMAND = "ssl-data cache-teacher"
COMPARED = 4  # images whose views must still be those that the network saw
LIBRARIES = ("ssl-pretrain", "torch", "numpy", "pillow", "simplejpeg")  # that make views
_OTHER = ("name", "network", "reads", "stored", "count")  # of a ViewSpec: no part of what is seen, or in the shapes


def folder(run: Resolved, name: str) -> Path | None:
    """The cache that the run reads for the network of that name; None without one, as of teachers beside the first."""
    found: Path | None = getattr(run, FLAG[name]) if name in FLAG else None
    return found


def flag(name: str) -> str:
    """The flag of the cache of a network."""
    return "--" + FLAG[name].replace("_", "-")


def check_read(run: Resolved, method: type[Method], knobs: Any) -> None:
    """Raise UserError for a cache of a network that the method does not read with these knobs, or reads otherwise than by
    views, and for flags that a cache cannot serve."""
    wanted = [name for name in method.frozen(knobs) if name in FLAG]
    for name in ("teacher", "tokenizer"):
        if getattr(run, FLAG[name]) is None:
            continue
        if FLAG[name] not in {FLAG[each] for each in wanted}:
            raise UserError(
                f"{flag(name)} is given, and --method {run.method} with these flags reads no {name}: leave it out"
            )
        if run.val_images:
            raise UserError(
                f"{flag(name)} holds outputs for the training images, and --val-images needs the {name} itself: leave one "
                f"of them out"
            )
        if run.stages:
            raise UserError(
                f"{flag(name)} holds outputs for the same views in the whole run, and --stages changes them: leave one of "
                f"them out"
            )
        for each in wanted:
            if FLAG[each] == FLAG[name]:
                seen_by(each, method.views(knobs, run.image_size), run)


def opened(run: Resolved, name: str, place: Path, given: str | None) -> Frozen:
    """The network of that name as its cache stands in for it. given: what the run names as the network, if it does.

    Raises UserError for a folder that holds no such cache, or one of another network.
    """
    layout, facts = read_head(place, KIND)
    try:
        network = facts["network"]
        outputs = next(iter(facts["views"].values()))["outputs"]
        size = network["stride"]
        spec, fingerprint = str(network["spec"]), str(network["fingerprint"])
        stands_in = StoredOutputs(
            dim=int(network["dim"]),
            depth=int(network["depth"]),
            stride=(int(size[0]), int(size[1])),
            image_size=(run.image_size[0], run.image_size[1]),
            in_chans=run.in_chans,
            block=int(network["block"]),
            outputs=tuple(map(str, outputs)),
            kind=layout.fields[0][1],
            origin=dict(network["origin"]),
            grids={
                int(each["patches"]): (int(each["grid"][0]), int(each["grid"][1])) for each in facts["views"].values()
            },
        )
        unit = network.get("unit", size)  # caches of earlier versions have none
        sight = Sight(stands_in.stride, network["interpolation"], (int(unit[0]), int(unit[1])))
        shape = facts["codes"]
        if sight.interpolation not in ("bicubic", "bilinear") or facts["name"] not in FLAG or facts["format"] > FORMAT:
            raise ValueError("values that are not known")
        codes = None if shape is None else (int(shape[0]), int(shape[1]))
        bounded((stands_in.dim,), (stands_in.depth,), stands_in.stride, *([] if codes is None else [codes]))
    except (KeyError, TypeError, ValueError, IndexError, StopIteration) as problem:
        raise UserError(f"{place} is no whole {KIND} ({problem!r}): write it again with {COMMAND}") from None
    if FLAG[facts["name"]] != FLAG[name]:
        raise UserError(f"{flag(name)} {place} holds outputs of a {facts['name']}, not of a {name}")
    if given is not None and (found := _another(given, network)) is not None:
        raise UserError(f"{flag(name)} {place} holds outputs of {spec} ({fingerprint[:8]}), and this run names {found}")
    quantizer = None
    if codes is not None:
        quantizer = StoredCodes(read_array(place / CODES, "float32", codes, f"write the cache again with {COMMAND}"))
    same = run.mean, run.std
    return Frozen(stands_in, spec=spec, fingerprint=fingerprint, sight=sight, own=same, run=same, quantizer=quantizer)


def _another(given: str, network: Mapping[str, Any]) -> str | None:
    """What `given` names in words, if that is another network than the stored one; no weights are read."""
    if Spec.parse(given) is not None:
        return None if given == network["spec"] else given
    weights = weights_of(given)
    return None if weights == network.get("weights") else f"{given} (weights {weights[:8]})"


def weights_of(spec: str) -> str:
    """The hash of the weights of an export, from its description. Raises UserError if there is none."""
    for kind in ("encoder", "tokenizer"):
        try:
            return str(encoder.description(export_folder(Path(spec), kind))["weights"])
        except UserError:
            if kind == "tokenizer":
                raise
    raise AssertionError


def use(run: Resolved, plan: list[Stage], networks: Mapping[str, Frozen], source: Source) -> list[Stage]:
    """The stages of the run, in which the views of cached networks are read from the caches.

    Raises UserError where a cache is not whole, is too short, or was written for other images, views or settings.
    """
    for name, network in networks.items():
        place = folder(run, name)
        if not network.cached or place is None:
            continue
        layout, facts = read_head(place, KIND)
        (stage,) = plan
        views = seen_by(name, stage.specs, run)
        check_depends(
            place, facts, depends(run, stage.specs, views, source, network.fingerprint, network.backbone.depth)
        )
        check_pixels(place, facts, run, stage.specs, views, source)
        needed = run.steps * run.batch_size
        if layout.count < needed:
            raise UserError(
                f"{place} has outputs for {layout.count:,} images, and this run sees {needed:,}: {COMMAND} with the flags "
                f"of this run writes the rest"
            )
        if absent := missing(place, layout):
            raise UserError(
                f"{place} is not whole: {len(absent):,} of {layout.parts:,} parts are missing or cut off, the first is "
                f"{absent[0]:,}: {COMMAND} with the flags of this run writes them"
            )
        rows = Rows(place, layout, f"write the cache again with {COMMAND}")
        stored = {spec.name: StoredView(rows, _field(place, layout, facts, spec)) for spec in views}
        specs = tuple(dataclasses.replace(spec, stored=stored.get(spec.name, spec.stored)) for spec in stage.specs)
        plan = [dataclasses.replace(stage, specs=specs)]
    return plan


def _field(place: Path, layout: Layout, facts: Mapping[str, Any], spec: ViewSpec) -> int:
    """The field of a view, whose shape is that of the network's outputs."""
    for number, (name, _, shape) in enumerate(layout.fields):
        if name == spec.name and (described := facts["views"].get(name)):
            h, w = described["grid"]
            rows = described["patches"] + sum(word in described["outputs"] for word in ("pooled", "cls"))
            inner = (h, w) if described["outputs"] == ["ids"] else (rows, facts["network"]["dim"])
            if shape == (spec.count, *inner):
                return number
    raise UserError(
        f"{place} has no outputs of the right shape for the view {spec.name}: write it again with {COMMAND}"
    )


def outputs_of(network: Frozen, spec: ViewSpec, view: Tensor) -> tuple[Tensor, tuple[str, ...], tuple[int, int]]:
    """What a network gives for a view (B, C, H, W) or (count, B, C, H, W), as it is stored: (B, count, L, D), or (B, count,
    h, w) of ids; which outputs these are; and the grid."""
    reads = spec.reads
    assert reads is not None
    images = view.flatten(0, 1) if spec.count > 1 else view
    if reads.outputs == ("ids",):
        found = network.ids(images)
        outputs: tuple[str, ...] = reads.outputs
        grid = (found.shape[1], found.shape[2])
    else:
        if "pooled" in reads.outputs and network.pooled_dim != network.dim:
            raise UserError(
                f"{network.spec} gives a vector of {network.pooled_dim} channels for an image and of {network.dim} for a "
                f"patch, which a cache cannot hold together: run without --teacher-cache"
            )
        seen = tap(network, images, reads.block, reads.normed)
        there = {"pooled": seen.pooled[:, None], "patches": seen.patches}
        if seen.cls is not None:
            there["cls"] = seen.cls[:, None]
        outputs = tuple(word for word in ("pooled", "cls", "patches") if word in reads.outputs and word in there)
        found, grid = torch.cat([there[word].float() for word in outputs], dim=1), seen.grid
    return found.unflatten(0, (spec.count, -1)).transpose(0, 1), outputs, grid


def seen_by(name: str, specs: Iterable[ViewSpec], run: Resolved) -> list[ViewSpec]:
    """The views that a network sees. Raises UserError where its outputs cannot be stored."""
    views = [spec for spec in specs if spec.network == name]
    if not views or any(spec.reads is None for spec in views) or len({spec.reads for spec in views}) > 1:
        word = name.partition("_")[0]
        raise UserError(
            f"{flag(name)}: the outputs of the {word} cannot be stored for --method {run.method} with "
            f"these flags, which reads more than features of fixed views (weights, or pixels that are mixed on the "
            f"device): leave it out"
        )
    return views


def depends(
    run: Resolved, specs: Iterable[ViewSpec], views: list[ViewSpec], source: Source, fingerprint: str, depth: int
) -> dict[str, Any]:
    """What stored outputs depend on, as plain data, by words for people. specs: all views of the run; views: those that the
    network of that fingerprint and depth sees."""
    by_name = {spec.name: spec for spec in specs}
    reads = views[0].reads
    assert reads is not None
    found: dict[str, Any] = {
        "fingerprint of the images": _identity(source),
        "number of images": len(source),
        "fingerprint of the network": fingerprint,
    }
    for name in ("seed", "in_chans", "aug", "bad_images", "max_pixels", "mean", "std"):
        found["--" + name.replace("_", "-")] = getattr(run, name)
    if reads.outputs != ("ids",):  # which are computed in the precision of the weights
        found["--precision"] = run.precision
        found["block"] = reads.block % depth
        found["final norm"] = reads.normed
    found["outputs"] = reads.outputs
    related = dict.fromkeys(spec.name for spec in views)
    related |= dict.fromkeys(spec.overlap[0] for spec in views if spec.overlap is not None)
    # Decoding at a fraction of the size (--aug fast) depends on the crops of all views.
    for name in by_name if run.aug == "fast" else related:
        for key, value in dataclasses.asdict(by_name[name]).items():
            if key not in _OTHER:
                found[f"{key} of view {name}"] = value
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _identity(source: Source) -> str:
    """The fingerprint of the images, of a part of a source also of which images they are."""
    if not isinstance(source, Subset):
        return source.fingerprint
    chosen = hashlib.blake2b(np.ascontiguousarray(source.indices).tobytes(), digest_size=8).hexdigest()
    return f"{_identity(source.source)}/{chosen}"


def check_depends(place: Path, facts: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError for a cache that was written for something else, with both."""
    before = facts.get("depends")
    if not isinstance(before, dict):
        raise UserError(f"{place} is no whole {KIND}: write it again with {COMMAND}")
    unlike = [
        f"{words}: {before.get(words)} in the cache, {now.get(words)} in this run"
        for words in {**now, **before}
        if before.get(words) != now.get(words)
    ]
    if unlike:
        raise UserError(
            f"{place} was written for another run ({'; '.join(unlike[:3])}): repeat its flags, or write another cache with "
            f"{COMMAND}"
        )


def check_pixels(
    place: Path,
    facts: Mapping[str, Any],
    run: Resolved,
    specs: Iterable[ViewSpec],
    views: list[ViewSpec],
    source: Source,
) -> None:
    """Raise UserError where the first images of the run look otherwise than when the cache was written: other versions of
    the libraries that decode and resize, or files that changed."""
    if facts.get("pixels") != pixels(run, specs, views, source):
        before, now = facts.get("versions"), versions()
        before = before if isinstance(before, dict) else {}
        other = [f"{name} {before.get(name)} then, {now[name]} now" for name in now if before.get(name) != now[name]]
        why = ", ".join(other) or "files of the same names and sizes have other contents"
        raise UserError(
            f"{place}: the network saw other pixels than this run makes ({why}): write it again with {COMMAND}"
        )


def pixels(run: Resolved, specs: Iterable[ViewSpec], views: list[ViewSpec], source: Source) -> str:
    """Hex hash of what the network sees of the first images of the run."""
    plain = [dataclasses.replace(spec, stored=None) for spec in specs]
    first = batches(
        source, plain, Share(COMPARED), seed=run.seed, channels=run.in_chans, start_step=0, stop_step=1, workers=0,
        policy=run.bad_images,
    )  # fmt: skip
    with closing(first):
        raw = next(first)
    found = hashlib.blake2b(raw.index.tobytes(), digest_size=16)
    for spec in views:
        found.update(raw.views[spec.name].numpy().tobytes())
        found.update(raw.colour[spec.name].tobytes())
    return found.hexdigest()


def versions() -> dict[str, str | None]:
    """Versions of the libraries that make views; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
