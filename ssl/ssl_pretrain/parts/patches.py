"""Images as rows of patches. Shapes: B images, C channels, H x W pixels, p patch side(s), N = (H/p)(W/p) patches in raster
order, F = p * p * C values a patch."""

from torch import Tensor


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


def normalise(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each patch to mean 0 and variance 1 over its F values, the variance unbiased (MAE, section 4, "reconstruction
    target"). Returns (normalised (B, N, F), mean (B, N, 1), standard deviation (B, N, 1)), float32."""
    patches = patches.float()
    mean = patches.mean(-1, keepdim=True)
    deviation = (patches.var(-1, keepdim=True, unbiased=True) + 1e-6).sqrt()
    return (patches - mean) / deviation, mean, deviation
