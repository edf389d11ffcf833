"""The sizes of a method's parts that the flags leave open, decided once: by `Method.sizes` for a new run, by its folder for
one that resumes. So a change of the rule changes no run that has begun."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

import torch

from .. import backbones, config, distributed
from ..backbones.backbone import Backbone
from ..config import Run
from ..distributed import World
from ..errors import UserError
from ..flags import check, stored_name
from ..pretext import Method


def decide(run: Run, method_class: type[Method], knobs: Any, options: Any, images: int, world: World) -> Any:
    """The knobs of a run with every size decided, the same on all processes.

    Raises UserError for options that do not fit, and where the config.yaml of the run's folder cannot be read.
    """
    if all(getattr(knobs, field.name) is not None for field in dataclasses.fields(knobs)):
        return knobs
    encoder = outline(run, options)
    left_open = [name for name in method_class.sizes(knobs, encoder, images) if getattr(knobs, name) is None]
    found = distributed.on_all(lambda: _recorded(knobs, left_open, config.folder(run)) if world.first else {})
    return method_class.sized(dataclasses.replace(knobs, **distributed.from_first(found)), encoder, images)


def sized(run: Run, method_class: type[Method], knobs: Any, options: Any, images: int | None) -> Any:
    """The knobs with every size that is None decided by `Method.sizes`, for the encoder `run.encoder` with these options
    and so many training images (None: not known). Given knobs stay. The encoder takes no memory.

    Raises UserError for options that do not fit.
    """
    return method_class.sized(knobs, outline(run, options), images)


def outline(run: Run, options: Any) -> Backbone:
    """The encoder, without weights."""
    size = (run.image_size[0], run.image_size[-1])
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return backbones.build(run.encoder, image_size=size, in_chans=run.in_chans, **dataclasses.asdict(options))


def _recorded(knobs: Any, names: list[str], out: Path) -> dict[str, Any]:
    """The values that the run in a folder has for these knobs; none for a new run."""
    if not (out / "config.yaml").exists():
        return {}
    written, hints, found = config.read_recorded(out / "config.yaml"), typing.get_type_hints(type(knobs)), {}
    for field in dataclasses.fields(knobs):
        if field.name not in names:
            continue
        found[field.name] = written.get(stored_name(field))
        try:
            check(found[field.name], hints[field.name])
        except ValueError as problem:
            raise UserError(
                f"{out / 'config.yaml'} is not what the run wrote ({field.name}: {problem}): put it back as it was, or "
                f"choose another --out"
            ) from None
    return found
