"""Images as rows of patches. Shapes: B images, C channels, H x W pixels, p patch side(s), N = (H/p)(W/p) patches in raster
order, F = p * p * C values a patch."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6  # added to a patch's variance


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, N, F): each patch's pixels row by row, channel last (MAE, section 3, as released)."""
    b, c, height, width = images.shape
    p, q = patch
    x = images.reshape(b, c, height // p, p, width // q, q)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * q * c)


def unpatchify(patches: Tensor, patch: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(B, N, F) -> (B, C, H, W): the inverse of `patchify` for a grid of N = h * w patches."""
    b = patches.shape[0]
    (p, q), (h, w) = patch, grid
    x = patches.reshape(b, h, w, p, q, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h * p, w * q)


def without(images: Tensor, hidden: Tensor, patch: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) with their patches `hidden` (B, N) bool at 0, the mean colour of normalised images."""
    grid = (images.shape[-2] // patch[0], images.shape[-1] // patch[1])
    pixels = hidden.unflatten(1, grid).repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)
    return images.masked_fill(pixels[:, None], 0.0)


def normalise(patches: Tensor) -> Tensor:
    """Patches (B, N, F) normalised to mean 0 and unbiased variance 1 over the F values of each, float32 (MAE, section
    4, "reconstruction target")."""
    values = patches.shape[-1]
    # A layer norm takes one pass over the patches, but divides by the biased standard deviation.
    biased = (values - 1) / values
    return F.layer_norm(patches.float(), (values,), eps=EPS * biased) * biased**0.5


def local_moments(images: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation, each (B, C, H, W) float32, of every channel over the `side` x `side` pixels
    around each pixel; at the border over those of them that the image has (SimMIM in the release of Swin V2). The variance
    is unbiased, and EPS is added to it. side: odd, at least 3."""
    height, width = images.shape[-2:]
    half = side // 2
    rows, columns = (
        (torch.arange(length, device=images.device) + half).clamp(max=length - 1)
        - (torch.arange(length, device=images.device) - half).clamp(min=0)
        + 1
        for length in (height, width)
    )
    count = rows[:, None] * columns  # (H, W)

    def around(x: Tensor) -> Tensor:
        """The mean, one axis after the other: a pooling of both at once costs the square of the side."""
        x = F.avg_pool2d(x, (side, 1), 1, (half, 0), count_include_pad=False)
        return F.avg_pool2d(x, (1, side), 1, (0, half), count_include_pad=False)

    x = images.float()
    mean = around(x)
    biased = (around(x.square()) - mean.square()).clamp_min(0)
    return mean, (biased * (count / (count - 1)) + EPS).sqrt()


def moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation (B, N, 1) float32 that `normalise` uses for patches (B, N, F)."""
    patches = patches.float()
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True, unbiased=True) + EPS).sqrt()
