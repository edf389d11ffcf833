"""The sizes of a method's parts that the flags leave open, decided once: by `Method.sizes` for a new run, by its folder for
one that resumes. So a change of the rule changes no run that has begun."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

import torch

from .. import backbones, config, distributed
from ..config import Run
from ..distributed import World
from ..errors import UserError
from ..flags import check, stored_name
from ..pretext import Method


def decide(run: Run, method_class: type[Method], knobs: Any, options: Any, images: int, world: World) -> Any:
    """The knobs of a run with every size decided, the same on all processes. `run.out` is the run's folder.

    Raises UserError for options that do not fit, and where the folder's config.yaml cannot be read.
    """
    if not _left_open(knobs):
        return knobs
    out = config.folder(run)
    found = distributed.from_first(distributed.on_all(lambda: _recorded(knobs, out) if world.first else {}))
    return sized(run, method_class, dataclasses.replace(knobs, **found), options, images)


def sized(run: Run, method_class: type[Method], knobs: Any, options: Any, images: int | None) -> Any:
    """The knobs with every size that is None decided by `Method.sizes`, for the encoder `run.encoder` with these options
    and so many training images (None: not known). Given knobs stay. The encoder takes no memory.

    Raises UserError for options that do not fit.
    """
    if not _left_open(knobs):
        return knobs
    size = (run.image_size[0], run.image_size[-1])
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        encoder = backbones.build(run.encoder, image_size=size, in_chans=run.in_chans, **dataclasses.asdict(options))
    return method_class.sized(knobs, encoder, images)


def _left_open(knobs: Any) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(knobs) if getattr(knobs, field.name) is None]


def _recorded(knobs: Any, out: Path) -> dict[str, Any]:
    """The values that the run in a folder has for the knobs that are left open; none for a new run."""
    if not (out / "config.yaml").exists():
        return {}
    written, hints, found = config.read_recorded(out / "config.yaml"), typing.get_type_hints(type(knobs)), {}
    for field in _left_open(knobs):
        value = written.get(stored_name(field))
        try:
            check(value, hints[field.name])
        except ValueError as problem:
            raise UserError(
                f"{out / 'config.yaml'} is not what the run wrote ({field.name}: {problem}): put it back as it was, or "
                f"choose another --out"
            ) from None
        found[field.name] = value
    return found
