"""The hMLP stem of a vision transformer (Touvron et al., "Three things everyone should know about Vision Transformers",
ECCV 2022, section 5).

Shapes: B images, C channels, H x W pixels, p patch side, (h, w) grid of N patches, K of them kept, D width.
"""

from torch import Tensor, nn

from ..distributed.batch_norm import BatchNorm2d
from ..errors import UserError
from .masked_convolution import Visible


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
            BatchNorm2d(narrow),
            nn.GELU(),
            nn.Conv2d(narrow, narrow, kernel_size=2, stride=2),
            BatchNorm2d(narrow),
            nn.GELU(),
            nn.Conv2d(narrow, dim, kernel_size=2, stride=2),
            BatchNorm2d(dim),
        )

    def forward(self, images: Tensor, keep: Tensor | None = None, masked: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) to (B, N, D), or to (B, K, D) of the patches `keep` (B, K). masked: bool (B, N), patches
        whose results are not used."""
        p = self.patch_size
        seen = None if masked is None else ~masked
        if keep is None:
            if seen is not None:
                seen = seen.unflatten(1, (images.shape[2] // p, images.shape[3] // p))
            return self._through(images, seen).flatten(2).transpose(1, 2)
        patches = images.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        kept = patches.gather(1, keep[:, :, None, None, None].expand(-1, -1, *patches.shape[2:]))  # (B, K, C, p, p)
        if seen is not None:
            seen = seen.gather(1, keep).flatten()[:, None, None]
        return self._through(kept.flatten(0, 1), seen).flatten(1).unflatten(0, keep.shape)

    def _through(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """Maps or patches (B, C, H, W) through all layers. seen: bool (B, h, w), the patches that statistics are of; the
        results of others are 0. In evaluation there are no such statistics, and all patches have results."""
        visible = Visible(seen) if seen is not None and self.training else None
        for part in self.proj:
            if visible is not None and isinstance(part, BatchNorm2d):
                x = part(x, visible.at(x.shape[2], x.shape[3]))
            else:
                x = part(x)
        return x
