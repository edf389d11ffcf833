"""Staged runs: one run whose views change on the way, as in "FastDINOv2: Frequency Based Curriculum Learning" (Zhang et
al., 2025): small images for three quarters of it, then large ones with patches of noise.

Only what is seen changes: model, optimiser, schedules and step count go on, and the encoder resizes its positions to
whatever grid it meets. So a stage leaves nothing in a checkpoint.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import flags
from ..config import Resolved
from ..data.views import Sight, ViewSpec, fitted
from ..errors import UserError
from ..pretext import Method
from .sizes import outline


@dataclass(frozen=True)
class Stage:
    """A part of a run, and the views of it."""

    first: int
    last: int  # the step after the stage's last one
    specs: tuple[ViewSpec, ...]


@dataclass(frozen=True, kw_only=True)
class _Size:
    """What a stage may set beside the method's knobs."""

    image_size: tuple[int, ...]
    """Pixels, one number or height and width."""

    def __post_init__(self) -> None:
        flags.within(self, flags.AT_LEAST_1, "image_size")


def plan(
    run: Resolved,
    kind: type[Method],
    knobs: Any,
    stride: tuple[int, int],
    networks: Mapping[str, Sight] | None = None,
    *,
    unit: tuple[int, int] | None = None,
) -> list[Stage]:
    """The stages of a run, in order, covering all its steps; one where `run.stages` is empty.

    Each of `run.stages` is "SHARE KEY=VALUE ...": a share of the run's steps, and what is different in it: image_size, or a
    knob of the method that its views depend on; several values are parted by commas. Raises UserError for anything else.
    networks: how the frozen networks see that have views of their own. stride, unit: pixels of a patch and of a mask unit
    of the encoder (None: a patch).
    """

    def views(knobs: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        specs = fitted(kind.views(knobs, image_size), image_size, stride, networks, unit=unit)
        return tuple(dataclasses.replace(spec, fast=run.aug == "fast") for spec in specs)

    usual = views(knobs, run.image_size)
    if not run.stages:
        return [Stage(0, run.steps, usual)]
    shares = [_share(text) for text in run.stages]
    if abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"--stages: the shares {', '.join(map(str, shares))} add up to {sum(shares):g}; they must to 1")
    bounds = [0, *(round(sum(shares[: i + 1]) * run.steps) for i in range(len(shares)))]
    stages = [
        Stage(first, last, views(*_settings(text, run, kind, knobs)))
        for text, first, last in zip(run.stages, bounds, bounds[1:], strict=False)
    ]
    return [stage for stage in stages if stage.first < stage.last]


def _share(text: str) -> float:
    """The share that a stage begins with."""
    try:
        share = float(text.split(maxsplit=1)[0])
    except (ValueError, IndexError):
        raise UserError(f"--stages {text!r} must begin with a share of the run, like '0.75 image_size=112'") from None
    if not 0 < share <= 1:
        raise UserError(f"--stages {text!r}: the share must lie above 0 and be at most 1")
    return share


def check_sizes(run: Resolved, options: Any) -> None:
    """Raise UserError for a stage with images that the encoder, with these options, does not take. Of stages that `plan`
    has read."""
    for text in run.stages:
        for word in text.split()[1:]:
            name, _, values = word.partition("=")
            if name.replace("-", "_") != "image_size":
                continue
            sides = [int(side) for side in values.split(",")]
            try:
                outline(dataclasses.replace(run, image_size=(sides[0], sides[-1])), options)
            except UserError as problem:
                remedy = re.sub(r"--image-size (\d+) (\d+)", r"image_size=\1,\2", str(problem))
                raise UserError(f"--stages {text!r}: {remedy}") from None


def _settings(text: str, run: Resolved, kind: type[Method], knobs: Any) -> tuple[Any, tuple[int, int]]:
    """The knobs and the image size of one stage."""
    usual: dict[str, Any] = {"image_size": list(run.image_size), **dataclasses.asdict(knobs)}
    argv: list[str] = []
    for word in text.split()[1:]:
        name, equals, values = word.partition("=")
        if not equals or not values:
            raise UserError(f"--stages {text!r}: {word!r} is not KEY=VALUE")
        argv += ["--" + name.replace("_", "-"), *values.split(",")]
    defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in usual.items()}
    size, changed = flags.parse([_Size, kind.Config], argv, defaults, prog=f"--stages {text!r}", description="")
    whole = (size.image_size[0], size.image_size[-1])
    before = kind.views(knobs, run.image_size)
    for field in dataclasses.fields(changed):
        value = getattr(changed, field.name)
        if value != getattr(knobs, field.name):
            alone = dataclasses.replace(knobs, **{field.name: value})
            if kind.views(alone, run.image_size) == before:
                raise UserError(f"--stages {text!r}: {field.name} changes no view; stages change only what is seen")
    return changed, whole
