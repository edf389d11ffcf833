"""Decoders of masked convolutional encoders: maps of the visible units in, whole images out. SparK's UNet (Tian et al.,
"Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling", ICLR 2023, section 3.2) and the one
block of FCMAE (Woo et al., "ConvNeXt V2", CVPR 2023, section 3).

Shapes: B images, C channels, H x W pixels, c_i channels of an encoder's map of Y_i x X_i positions, the finest first, E the
decoder's width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..backbones.backbone import Backbone
from ..backbones.convnext import Block
from ..backbones.masked_convolution import Visible
from ..distributed.batch_norm import BatchNorm2d, couples_samples
from ..errors import UserError
from .patches import unpatchify


class _LayerNorm(nn.LayerNorm):
    """A layer norm over the channels of each position of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:  # type: ignore[override]
        """(B, c, Y, X) to the same shape; what it gives where the image does not exist is not used."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Kept(nn.Module):
    """No norm: of a map that the encoder has normalised."""

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """The map."""
        return x


class Densify(nn.Module):
    """A map of the encoder as the decoder takes it: a norm, a learned vector at every position that does not exist (a mask
    embedding of this scale), and a convolution to the decoder's width."""

    def __init__(self, norm: nn.Module, channels: int, width: int, side: int) -> None:
        """side: of the convolution's kernel; 1 and equal widths: no convolution."""
        super().__init__()
        self.norm = norm
        self.mask_token = nn.Parameter(torch.empty(channels))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        same = side == 1 and channels == width
        self.proj = nn.Identity() if same else nn.Conv2d(channels, width, side, padding=side // 2)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """(B, c, Y, X) and (B, 1, Y, X) bool to (B, width, Y, X)."""
        x = self.norm(x, visible)
        return self.proj(torch.where(visible, x, self.mask_token[:, None, None].to(x.dtype)))


class _Up(nn.Module):
    """Twice as large and half as wide: a transposed convolution and two convolutions, each with a batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_sample = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            BatchNorm2d(width),
            nn.ReLU6(inplace=True),
            nn.Conv2d(width, width // 2, 3, padding=1, bias=False),
            BatchNorm2d(width // 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, Y, X) to (B, c / 2, 2Y, 2X)."""
        return self.conv(self.up_sample(x))


class UNetDecoder(nn.Module):
    """SparK's decoder: from the coarsest map on, each step doubles the size and halves the width, and the densified map of
    that size is added. Norms of the maps are of the encoder's kind, batch or layer norm; the last map of an encoder with
    layer norms comes with its own final norm.

    Raises UserError for a width that does not halve so often, and for an encoder whose maps do not double in size.
    """

    def __init__(self, encoder: Backbone, width: int) -> None:
        super().__init__()
        strides = [max(each) for each in encoder.map_strides]
        count = round(math.log2(strides[-1]))
        if any(tuple(each) != (2.0 ** (count - i),) * 2 for i, each in enumerate(reversed(encoder.map_strides))):
            raise UserError(
                f"--decoder unet needs an encoder whose maps double in size up to the image's, and the encoder's maps have "
                f"strides of {', '.join(f'{each:g}' for each in strides)} pixels: use --decoder fcmae"
            )
        least = 2 ** max(count, len(strides) - 1)
        if width % least:
            raise UserError(
                f"--decoder-dim {width} must be a multiple of {least}: it is halved at every step of the UNet"
            )
        batch_norm = couples_samples(encoder)
        self.densify = nn.ModuleList()
        for i, channels in enumerate(reversed(encoder.map_channels)):
            norm: nn.Module = BatchNorm2d(channels) if batch_norm else _LayerNorm(channels) if i else _Kept()
            self.densify.append(Densify(norm, channels, width // 2**i, 3 if i else 1))
        self.steps = nn.ModuleList(_Up(width // 2**i) for i in range(count))
        self.proj = nn.Conv2d(width // 2**count, encoder.in_chans, 1)
        _initialise(self)

    def forward(self, maps: Sequence[Tensor], visible: Visible) -> Tensor:
        """Maps (B, c_i, Y_i, X_i), the finest first, to images (B, C, H, W)."""
        x: Tensor | None = None
        for i, finer in enumerate(reversed(maps)):
            dense = self.densify[i](finer, visible.at(finer.shape[2], finer.shape[3]))
            x = dense if x is None else x + dense
            if i < len(self.steps):
                x = self.steps[i](x)
        assert x is not None
        for step in list(self.steps)[len(maps) :]:
            x = step(x)
        return self.proj(x)


class BlockDecoder(nn.Module):
    """FCMAE's decoder: one block of ConvNeXt V2 on the last map, and a linear layer to the pixels of each position."""

    def __init__(self, encoder: Backbone, width: int) -> None:
        super().__init__()
        self.stride = encoder.stride
        self.densify = nn.Conv2d(encoder.dim, width, 1)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.block = Block(width, layer_scale=None, grn=True)
        self.proj = nn.Linear(width, encoder.stride[0] * encoder.stride[1] * encoder.in_chans)
        _initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, maps: Sequence[Tensor], visible: Visible) -> Tensor:
        """Maps (B, c_i, Y_i, X_i), the finest first, of which the last is used, to images (B, C, H, W)."""
        x = self.densify(maps[-1])
        grid = (x.shape[2], x.shape[3])
        x = torch.where(visible.at(*grid), x, self.mask_token[:, None, None].to(x.dtype)).permute(0, 2, 3, 1)
        return unpatchify(self.proj(self.block(x)).flatten(1, 2), self.stride, grid)


def _initialise(decoder: nn.Module) -> None:
    """Convolutions and linear layers truncated normal, with a standard deviation of 0.02; transposed convolutions by their
    fan-out; biases 0 (SparK, as released)."""
    for part in decoder.modules():
        if isinstance(part, nn.ConvTranspose2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
        else:
            continue
        if part.bias is not None:
            nn.init.zeros_(part.bias)
