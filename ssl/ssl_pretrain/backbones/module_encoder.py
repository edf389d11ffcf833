"""A module of the user's own code as an encoder: `--encoder module:PACKAGE:FUNCTION`. The function returns a torch module.

Building one imports the code, so its name comes from the user's command, never from a file (`encoder.load`).

Shapes: B images, C channels, H x W pixels, N patches on an (h, w) grid, D width of the features.
"""

import importlib
import inspect
import itertools
import os
import re
import sys
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ..distributed.batch_norm import globalize
from ..errors import UserError
from . import pyramid
from .backbone import Backbone, Features
from .wrapping import dropouts, of_map, of_tokens, use_inner_names

NAME = re.compile(r"[\w.]+:[\w.]+")


@final
class ModuleEncoder(Backbone):
    """The module that a function returns. The function is called without arguments, or with those of `image_size` (H, W)
    and `in_chans` that it has. The module's forward takes images (B, C, H, W) and gives (B, D), (B, D, h, w), (B, N, D) in
    raster order, or Features. A forward that has the parameter `maps` also gives Features with maps if it is True; a
    pyramid of others that give a grid is their last map resampled (pyramid.py).

    For layer decay the module's children are its layers, in their order. Raises UserError for a function that cannot be
    imported or returns something else, and for dropout.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The encoder (module)."""

        function: str
        """PACKAGE:FUNCTION that returns the module, given by --encoder module:PACKAGE:FUNCTION."""

    supports = frozenset()  # of any module; each has its own

    def __init__(self, image_size: tuple[int, int], in_chans: int, config: Config) -> None:
        super().__init__()
        self.config, self.image_size, self.in_chans = config, image_size, in_chans
        self.model = made(config.function, image_size=image_size, in_chans=in_chans)
        if dropped := dropouts(self.model):
            raise UserError(
                f"module:{config.function} has dropout ({', '.join(list(dropped)[:3])}), whose noise would differ between "
                f"processes and after a resume: set its rate to 0"
            )
        globalize(self.model)
        if not any(True for _ in self.model.parameters()):
            raise UserError(f"module:{config.function} has no parameters to train")
        use_inner_names(self)
        children = [name for name, child in self.model.named_children() if any(True for _ in child.parameters())]
        self._layers = {name: i for i, name in enumerate(children)}
        self.depth = max(len(children) - 1, 1)
        self._gives_maps = "maps" in inspect.signature(self.model.forward).parameters
        self.model.eval()
        try:
            with torch.no_grad():
                found = self._features(self._blank(image_size), self._gives_maps)
        except (RuntimeError, ValueError, TypeError, AssertionError) as problem:
            raise UserError(
                f"module:{config.function} does not take images of {in_chans} channels and {image_size[0]} x "
                f"{image_size[1]} pixels: {problem}"
            ) from None
        self.model.train()
        h, w = found.grid
        self.dim, self.stride = found.pooled.shape[1], (max(image_size[0] // h, 1), max(image_size[1] // w, 1))
        if self._gives_maps:
            _check_maps(found.maps, config.function)
            sides = [(image_size[0] / x.shape[2], image_size[1] / x.shape[3]) for x in found.maps]
            self.map_strides = tuple((pyramid.whole(down), pyramid.whole(right)) for down, right in sides)
            self.map_channels = tuple(x.shape[1] for x in found.maps)
        elif found.grid != (1, 1):
            self.map_strides = pyramid.strides(self.stride)
            self.map_channels = (found.patches.shape[2],) * len(pyramid.SCALES)
        else:
            self.no_maps = (
                f"module:{config.function} gives one vector of an image: let its forward give a map, (B, N, D), or take "
                f"maps=True and give Features with maps"
            )
        self.supports = frozenset({"maps"} if self.map_strides else ())

    def forward(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        replace: tuple[Tensor, Tensor] | None = None,
        attention: str | Tensor = "full",
        prefix_length: Tensor | None = None,
        blocks: tuple[int, ...] = (),
        drop: Tensor | None = None,
        maps: bool = False,
    ) -> Features:
        """See `Backbone.forward`; all options but `maps` are refused. Raises UserError for images with another number of
        channels, UnsupportedByBackbone for maps where there are none."""
        self.refuse_options(keep, replace, attention, prefix_length, blocks)
        if maps:
            self.require("the option maps", "maps")
        if images.shape[1] != self.in_chans:
            raise UserError(f"the encoder takes images of {self.in_chans} channels, not {images.shape[1]}")
        found = self._features(images, maps and self._gives_maps)
        if maps and not self._gives_maps:
            found.maps = pyramid.simple_pyramid(found.patches.mT.unflatten(2, found.grid))
        return found

    @property
    def code(self) -> str:
        """The name of the code that makes it, as `encoder.load` takes it."""
        return f"module:{self.config.function}"

    def layer_of(self, parameter: str) -> int:
        """See `Backbone.layer_of`: the place of the module's child that holds the parameter; 0 for the module's own
        parameters. Raises KeyError for an unknown parameter."""
        self.get_parameter(parameter)
        return self._layers.get(parameter.split(".")[1], 0)

    def _features(self, images: Tensor, maps: bool) -> Features:
        """The module's features, of the precision of its parameters, also under autocast; with its own maps."""
        output = self.model(images, maps=True) if maps else self.model(images)
        precise = output.to(next(self.model.parameters()).dtype) if isinstance(output, Tensor) else output
        return read_output(precise, images)

    def _blank(self, size: tuple[int, int]) -> Tensor:
        return torch.zeros(1, self.in_chans, *size, device=next(self.model.parameters()).device)

    @staticmethod
    def check_name(name: str) -> None:
        """Raise UserError unless the name is PACKAGE:FUNCTION. Imports nothing."""
        if not NAME.fullmatch(name):
            raise UserError(f"module:{name}: write module:PACKAGE:FUNCTION, a function that returns a torch module")


def made(name: str, **arguments: Any) -> nn.Module:
    """The module that the function PACKAGE:FUNCTION of the user's code returns, called with those of `arguments` that it
    has. The current folder is searched too. Raises UserError for a function that cannot be imported and another result."""
    package, _, function = name.partition(":")
    if os.getcwd() not in sys.path:  # an installed command does not search the current folder by itself
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(package)
        for part in function.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as problem:
        raise UserError(f"module:{name}: {problem}") from None
    try:
        signature = inspect.signature(found)
        given = {key: value for key, value in arguments.items() if key in signature.parameters}
    except (TypeError, ValueError):  # no function, or one without a signature
        signature, given = inspect.Signature(), {}
    try:
        signature.bind(**given)
    except TypeError as problem:
        able = " and ".join(arguments) or "none"
        raise UserError(f"module:{name}: the function needs other arguments than it gets ({able}): {problem}") from None
    module = found(**given)
    if not isinstance(module, nn.Module):
        raise UserError(f"module:{name}: it must return a torch module, not {type(module).__name__}")
    return module


def read_output(output: Any, images: Tensor) -> Features:
    """Features from a module's output. (B, D): one vector per image; (B, D, h, w): a map, pooled by its mean; (B, N,
    D): patches in raster order, pooled by their mean; Features: unchanged. Raises ValueError for another output."""
    if isinstance(output, Features):
        return output
    if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"its forward must give (B, D), (B, D, h, w), (B, N, D) or Features, not {shape}")
    if output.ndim == 2:
        return Features(cls=None, patches=output[:, None], grid=(1, 1), pooled=output)
    if output.ndim == 4:
        return of_map(output, output.mean((2, 3)))
    return of_tokens(output, images, 0, False, output.mean(1))


def _check_maps(maps: tuple[Tensor, ...], function: str) -> None:
    """Raise UserError unless they are maps, the finest first."""
    sides = [tuple(x.shape[2:]) for x in maps]
    coarser = all(fine[0] > coarse[0] and fine[1] > coarse[1] for fine, coarse in itertools.pairwise(sides))
    if not maps or any(x.ndim != 4 for x in maps) or not coarser:
        raise UserError(
            f"module:{function}: with maps=True its forward must give Features with `maps`, each (B, C, h, w), the finest "
            f"first, not of the shapes {[tuple(x.shape) for x in maps]}"
        )
