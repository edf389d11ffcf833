"""Random masks of patches. All counts are static, so shapes never change and the host does not wait for the device.
Shapes: B images, N patches in raster order, K kept patches."""

import torch
from torch import Tensor


def random_masking(noise: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Uniformly random sets of exactly `kept` patches from noise (B, N) (MAE, section 3).

    Returns indices (B, kept) of the kept patches and (B, N - kept) of the masked ones, int64, in the noise's order.
    """
    order = torch.argsort(noise, dim=1)
    return order[:, :kept], order[:, kept:]


def rows(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens (B, N, D) at index (B, K) -> (B, K, D)."""
    return torch.gather(tokens, 1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def put(tokens: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A copy of tokens (B, N, D) with rows `index` (B, K) replaced by values (B, K, D)."""
    return torch.scatter(tokens, 1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]), values)
