"""The residual network (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016), version 1.5: a bottleneck
strides in its 3x3 convolution, not in its first 1x1 (Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 5.1).

Shapes: B images, C channels, H x W pixels, c channels of a map of Y x X positions, (h, w) the last map, N = h * w
positions in raster order, D width of the last map. Parameters have torchvision's names; there is no `fc`.
"""

from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.batch_norm import BatchNorm2d
from ..errors import UserError
from ..flags import POSITIVE, within
from .backbone import Backbone, Features
from .masked_convolution import Visible

SIZES = {
    "resnet_micro": {"bottleneck": False, "depths": (1, 1, 1, 1), "width": 16, "stem": "small"},
    "resnet18": {"bottleneck": False, "depths": (2, 2, 2, 2)},
    "resnet50": {"bottleneck": True, "depths": (3, 4, 6, 3)},
}
STAGES = 4


def _at(visible: Visible | None, x: Tensor) -> Tensor | None:
    """Which positions of a map (B, c, Y, X) exist, as the batch norm takes it: (B, 1, Y, X) bool, or None for all."""
    return None if visible is None else visible.at(x.shape[2], x.shape[3])


class _Shortcut(nn.Sequential):
    """A projection of the shortcut: a convolution and a batch norm."""

    def forward(self, x: Tensor, visible: Visible | None = None) -> Tensor:
        """As a residual block."""
        conv, norm = self
        x = conv(x)
        return norm(x, _at(visible, x))


def _conv(inside: int, outside: int, side: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the map's size except for the stride; without bias, because a batch norm follows."""
    return nn.Conv2d(inside, outside, side, stride, padding=side // 2, bias=False)


def _shortcut(inside: int, outside: int, stride: int) -> _Shortcut | None:
    """The projection of the shortcut if a block changes the map's shape (option B of He et al., section 3.3)."""
    if stride == 1 and inside == outside:
        return None
    return _Shortcut(_conv(inside, outside, 1, stride), BatchNorm2d(outside))


class BasicBlock(nn.Module):
    """relu(x + f(x)), f two 3x3 convolutions."""

    expansion = 1

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inside, width, 3, stride), BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), BatchNorm2d(width)
        self.downsample = _shortcut(inside, width, stride)

    def forward(self, x: Tensor, visible: Visible | None = None) -> Tensor:
        """(B, c, Y, X) to (B, width, ceil(Y / stride), ceil(X / stride)). visible: the units that exist; all other
        positions are 0 in `x` and in the result."""
        y = self.conv1(x)
        y = F.relu(self.bn1(y, seen := _at(visible, y)), inplace=True)
        y = self.bn2(self.conv2(y), seen)
        return F.relu(y + (x if self.downsample is None else self.downsample(x, visible)), inplace=True)


class Bottleneck(nn.Module):
    """relu(x + f(x)), f a 1x1, a 3x3 and a widening 1x1 convolution."""

    expansion = 4

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = width * self.expansion
        self.conv1, self.bn1 = _conv(inside, width, 1), BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, outside, 1), BatchNorm2d(outside)
        self.downsample = _shortcut(inside, outside, stride)

    def forward(self, x: Tensor, visible: Visible | None = None) -> Tensor:
        """(B, c, Y, X) to (B, 4 * width, ceil(Y / stride), ceil(X / stride)). visible: as in `BasicBlock`."""
        y = F.relu(self.bn1(self.conv1(x), _at(visible, x)), inplace=True)
        y = self.conv2(y)
        y = F.relu(self.bn2(y, seen := _at(visible, y)), inplace=True)
        y = self.bn3(self.conv3(y), seen)
        return F.relu(y + (x if self.downsample is None else self.downsample(x, visible)), inplace=True)


class _Stage(nn.Sequential):
    """Residual blocks of one width."""

    def forward(self, x: Tensor, visible: Visible | None = None) -> Tensor:
        """The blocks one after another."""
        for block in self:
            x = block(x, visible)
        return x


@final
class ResNet(Backbone):
    """A residual network with batch norm over all processes, for images of any size; `depth` counts residual blocks.
    Raises UserError for options out of range."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The encoder (ResNet)."""

        bottleneck: bool
        """Use bottleneck blocks: three convolutions, four times as wide outside as inside, instead of two
        convolutions."""
        depths: tuple[int, int, int, int]
        """Number of residual blocks of each stage."""
        width: int = 64
        """Inner channels of the blocks of the first stage, and channels of the stem; each stage doubles them."""
        stem: Literal["imagenet", "small"] = "imagenet"
        """Stem: 7x7 convolution of stride 2 and max pooling, or 3x3 of stride 1 and none (images about 32 pixels)."""
        zero_init_residual: bool = False
        """Initialise the gain of the last batch norm of each residual branch with zero (Goyal et al. 2017)."""

        def __post_init__(self) -> None:
            within(self, POSITIVE, "depths", "width")

    supports = frozenset({"maps", "visible"})

    def __init__(self, image_size: tuple[int, int], in_chans: int, config: Config) -> None:
        super().__init__()
        height, width = image_size
        _validate((height, width), in_chans)
        block = Bottleneck if config.bottleneck else BasicBlock
        self.config, self.image_size, self.in_chans = config, (height, width), in_chans
        widths = [config.width * 2**i for i in range(STAGES)]  # inner channels of the blocks of each stage
        self.dim, self.depth = widths[-1] * block.expansion, sum(config.depths)
        stride = 32 if config.stem == "imagenet" else 8
        self.stride = (stride, stride)
        self.map_strides = tuple((stride // under, stride // under) for under in (8, 4, 2, 1))
        self.map_channels = tuple(width * block.expansion for width in widths)

        inside = widths[0]
        self.conv1 = _conv(in_chans, inside, 7, 2) if config.stem == "imagenet" else _conv(in_chans, inside, 3)
        self.bn1 = BatchNorm2d(inside)
        for i, (inner, depth) in enumerate(zip(widths, config.depths, strict=True)):
            stage = []
            for j in range(depth):
                stage.append(block(inside, inner, stride=2 if i > 0 and j == 0 else 1))
                inside = inner * block.expansion
            self.add_module(f"layer{i + 1}", _Stage(*stage))

        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(part, BasicBlock | Bottleneck) and config.zero_init_residual:
                nn.init.zeros_((part.bn3 if isinstance(part, Bottleneck) else part.bn2).weight)

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
        visible: Tensor | None = None,
    ) -> Features:
        """See `Backbone.forward`. H and W may be any size; the grid is H and W divided by the stride, rounded up.
        `patches` are the last map's positions and `pooled` is their mean. `maps` are the outputs of the four stages, of
        sides H and W divided by their strides, rounded up. Noise for drop path is ignored: ResNets have none.

        Raises UserError for images with another number of channels, UnsupportedByBackbone for keep, replace, another
        attention than "full", and blocks (their widths differ between stages), UserError for `visible` that does not fit
        the images.
        """
        self.refuse_options(keep, replace, attention, prefix_length, blocks)
        if images.shape[1] != self.in_chans:
            raise UserError(f"the encoder takes images of {self.in_chans} channels, not {images.shape[1]}")

        # Convolutions on the CPU were measured a seventh faster in this layout, and mixed precision on GPUs prefers it.
        x = images.contiguous(memory_format=torch.channels_last)
        units = None if visible is None else Visible.of(images, visible, self.unit)
        x = self.conv1(x if units is None else units.only(x))
        x = F.relu(self.bn1(x, _at(units, x)), inplace=True)
        if self.config.stem == "imagenet":
            x = F.max_pool2d(x, 3, stride=2, padding=1)
            x = x if units is None else units.only(x)
        outputs: list[Tensor] = []
        # Features have the precision of the parameters, also under autocast.
        dtype = self.bn1.weight.dtype
        for stage in self._stages():
            x = stage(x, units)
            if maps:
                outputs.append(x.to(dtype))
        patches, grid = x.flatten(2).transpose(1, 2).to(dtype), (x.shape[2], x.shape[3])
        pooled = patches.mean(1) if units is None else patches.sum(1) / units.count(*grid)
        return Features(cls=None, patches=patches, grid=grid, pooled=pooled, maps=tuple(outputs))

    def layer_of(self, parameter: str) -> int:
        """See `Backbone.layer_of`; nothing follows the blocks. Raises KeyError for an unknown parameter."""
        part, _, rest = parameter.partition(".")
        firsts = {f"layer{i + 1}": sum(self.config.depths[:i]) + 1 for i in range(STAGES)}
        if part in firsts:
            return firsts[part] + int(rest.partition(".")[0])
        return {"conv1": 0, "bn1": 0}[part]

    def _stages(self) -> list[nn.Module]:
        """The stages in order."""
        return [self.get_submodule(f"layer{i + 1}") for i in range(STAGES)]


def _validate(image_size: tuple[int, int], in_chans: int) -> None:
    """Raise UserError for invalid image sizes and channels."""
    if min(image_size) <= 0:
        raise UserError(f"--image-size is {image_size[0]} {image_size[1]}; both sides must be above 0")
    if in_chans <= 0:
        raise UserError(f"--in-chans is {in_chans}; it must be above 0")
