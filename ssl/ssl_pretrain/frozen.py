"""Frozen networks: read, never trained. A teacher of features, a tokenizer, or an anchor's start weights.

Shapes: B images, C channels, H x W pixels as the network sees them, N patches, D channels of the network.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor, nn

from .backbones.backbone import Backbone, Features
from .backbones.quantizer import Quantizer
from .backbones.scales import Levels
from .backbones.stored import StoredCodes, StoredOutputs
from .backbones.token_stem import renormalisation
from .data.views import Sight
from .errors import UserError


def teacher_names(count: int) -> tuple[str, ...]:
    """The names of that many teachers: "teacher" (--teacher), then "teacher2" and so on (`Method.more_teachers`)."""
    return tuple("teacher" if i == 1 else f"teacher{i}" for i in range(1, count + 1))


def is_further_teacher(name: str) -> bool:
    """Whether a network's name is "teacher2" or one after it."""
    return name.startswith("teacher") and name.removeprefix("teacher").isdigit()


@final
class Frozen:
    """An encoder that a method reads and never trains.

    It is no module, so it is in no checkpoint, optimiser, EMA teacher or gradient bucket of the method that holds it. It
    stays in eval mode and never gets gradients. Call it with a view of the run: it undoes the run's normalisation and
    applies its own. A run may read its outputs from a cache: then the batch has these in place of the view, `backbone` is
    `StoredOutputs`, and nothing else changes.

    Attributes: `backbone`; `spec`, what the user named; `fingerprint` of its weights, architecture and preprocessing;
    `sight`, how it sees; `own` and `run`, mean and std of its images and of the run's views; `dim`, D; `quantizer`, of a
    tokenizer, else None; `method`, which has a decoder and whose encoder is `backbone`, of a run that is the teacher, else
    None.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        spec: str,
        fingerprint: str,
        sight: Sight,
        own: tuple[tuple[float, ...], tuple[float, ...]],
        run: tuple[tuple[float, ...], tuple[float, ...]],
        quantizer: Quantizer | StoredCodes | None = None,
        method: nn.Module | None = None,
    ) -> None:
        """own and run: mean and std, each C numbers, of the network's images and of the run's views."""
        self.backbone = backbone.requires_grad_(False).eval()
        self.spec, self.fingerprint, self.sight = spec, fingerprint, sight
        self.dim, self.pooled_dim = backbone.dim, backbone.pooled_dim
        self.quantizer = None if quantizer is None else quantizer.requires_grad_(False).eval()
        self.method = None if method is None else method.requires_grad_(False).eval()
        self.own, self.run = own, run
        self._scale = None if own == run else renormalisation(own, run)
        self._scale_on: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}  # copies of it, each made once

    @property
    def cached(self) -> bool:
        """Whether its outputs are read from a cache."""
        return isinstance(self.backbone, StoredOutputs)

    @torch.no_grad()
    def __call__(self, images: Tensor, **options: Any) -> Features:
        """Features of views (B, C, H, W) in the run's normalisation, without gradients. Options: see `Backbone.forward`."""
        if self._scale is not None:
            like = images.device, images.dtype
            if like not in self._scale_on:
                self._scale_on[like] = tuple(each.to(*like) for each in self._scale)
            factor, offset = self._scale_on[like]
            images = torch.addcmul(offset, images, factor)
        return self.backbone(images, **options)

    @torch.no_grad()
    def ids(self, images: Tensor) -> Tensor:
        """The tokenizer's ids (B, h, w) int64 of views (B, C, H, W) in the run's normalisation, of the finest scale if it
        has several. Computed in the precision of its weights also under autocast, so that ids do not depend on the run's
        precision."""
        assert self.quantizer is not None, f"{self.spec} is no tokenizer"
        with torch.autocast(images.device.type, enabled=False):
            seen = self(images)
            return self.quantizer.ids(seen.patches, seen.grid)

    @torch.no_grad()
    def levels(self, images: Tensor) -> tuple[Levels, tuple[int, int]]:
        """The ids of all scales of views as for `ids`, of a tokenizer of several, and the grid of the finest one."""
        assert isinstance(self.quantizer, Quantizer), f"{self.spec} has no codes of its own"
        with torch.autocast(images.device.type, enabled=False):
            seen = self(images)
            return self.quantizer.levels(seen.patches, seen.grid), seen.grid

    def check(self, name: str, size: tuple[int, int], own_pixels: bool = False) -> None:
        """Raise UserError where the network cannot see views of `size`. name: of the network, for the message. own_pixels:
        the size does not follow from the encoder's patches."""
        parameter = next(self.backbone.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        grid = tuple(side // step for side, step in zip(size, self.sight.stride, strict=True))
        try:
            found = self(torch.zeros(1, self.backbone.in_chans, *size, device=device))
        except (RuntimeError, ValueError, AssertionError) as problem:
            reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
            why = "" if own_pixels else ", which give it as many patches as the encoder has"
            raise UserError(
                f"--{name} {self.spec} does not take images of {size[0]} x {size[1]} pixels{why}: {reason}"
            ) from None
        if self.quantizer is not None and found.grid != grid:
            raise UserError(
                f"--{name} {self.spec} gives {found.grid[0]} x {found.grid[1]} ids where the encoder has {grid[0]} x "
                f"{grid[1]} patches: choose another --image-size, or a tokenizer for this grid"
            )


NONE: Mapping[str, Frozen] = MappingProxyType({})  # of a method that reads no frozen network
