"""The hMLP stem of a vision transformer (Touvron et al., "Three things everyone should know about Vision Transformers",
ECCV 2022, section 5).

Shapes: B images, C channels, H x W pixels, p patch side, (h, w) grid of N patches, K of them kept, D width.
"""

import torch
from torch import Tensor, nn

from .. import distributed
from ..distributed.batch_norm import BatchNorm2d
from ..errors import UserError


class PatchNorm(BatchNorm2d):
    """Batch norm with the statistics of some patches only."""

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to the same shape. seen: float (B, 1, h, w), 1 for patches that count and 0 for others; None: all.
        In evaluation it has no effect."""
        if seen is None or not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        side = x.shape[2] // seen.shape[2]  # positions a patch side
        weights = seen.repeat_interleave(side, 2).repeat_interleave(side, 3)
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        count = weights.sum().to(x32).clamp_min(1.0)
        mean = (x32 * weights).sum((0, 2, 3)) / count
        var = ((x32 - mean.view(1, -1, 1, 1)).square() * weights).sum((0, 2, 3)) / count
        if distributed.size() > 1:  # processes may have different numbers of patches that count
            means, variances, counts = distributed.gather(torch.stack([mean, var, count.expand_as(mean)])[None]).unbind(
                1
            )
            shares, count = counts / counts.sum(0), counts.sum(0)[0]
            mean = (shares * means).sum(0)
            var = (shares * (variances + (means - mean).square())).sum(0)
        with torch.no_grad():
            unbiased = var * (count / (count - 1).clamp_min(1.0))
            for kept, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                moved = kept.lerp(new.to(kept.dtype), self.momentum)
                kept.copy_(torch.where(torch.isfinite(moved).all(), moved, kept))
        scale = torch.rsqrt(var + self.eps) * self.weight
        return ((x32 - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


class HMLPStem(nn.Module):
    """Patches to tokens by three convolutions whose strides are their sizes (p/4, 2 and 2 pixels), so that a patch sees
    only itself; each is followed by a batch norm, the first two by a GELU. The first two have D/4 channels.

    Batch norm couples patches in training. Its statistics are those of the patches that are neither left out nor replaced
    by a mask token, over all processes: masked patches have no influence.
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        """Raises UserError unless 4 divides the patch size and the width."""
        super().__init__()
        if patch_size % 4 or dim % 4:
            raise UserError(f"--stem hmlp needs multiples of 4: --patch-size is {patch_size}, --dim is {dim}")
        self.patch_size, narrow, first = patch_size, dim // 4, patch_size // 4
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, narrow, kernel_size=first, stride=first),
            PatchNorm(narrow),
            nn.GELU(),
            nn.Conv2d(narrow, narrow, kernel_size=2, stride=2),
            PatchNorm(narrow),
            nn.GELU(),
            nn.Conv2d(narrow, dim, kernel_size=2, stride=2),
            PatchNorm(dim),
        )

    def forward(self, images: Tensor, keep: Tensor | None = None, masked: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) to (B, N, D), or to (B, K, D) of the patches `keep` (B, K). masked: bool (B, N), patches
        whose results are not used."""
        p = self.patch_size
        seen = None if masked is None else (~masked).float()
        if keep is None:
            if seen is not None:
                seen = seen.unflatten(1, (images.shape[2] // p, images.shape[3] // p))[:, None]
            return self._through(images, seen).flatten(2).transpose(1, 2)
        patches = images.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        kept = patches.gather(1, keep[:, :, None, None, None].expand(-1, -1, *patches.shape[2:]))  # (B, K, C, p, p)
        if seen is not None:
            seen = seen.gather(1, keep).flatten()[:, None, None, None]
        return self._through(kept.flatten(0, 1), seen).flatten(1).unflatten(0, keep.shape)

    def _through(self, x: Tensor, seen: Tensor | None) -> Tensor:
        for part in self.proj:
            x = part(x, seen) if isinstance(part, PatchNorm) else part(x)
        return x
