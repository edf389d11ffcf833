"""Inverse block masks: a few small blocks of an image are kept, and all other patches are masked.

Baevski et al., "Efficient Self-supervised Learning with Contextualized Target Representations for Vision, Speech and
Language" (2022), section 3.3. Shapes: B masks, N patches on an (h, w) grid in raster order, C centres of blocks, K kept.
"""

import torch
from torch import Tensor

EXTRA = 0.07  # as released: more blocks than needed, because they overlap and cross the image's edge


def centres(patches: int, share: float, block: int) -> int:
    """Number of blocks of `block` x `block` patches to place in order to keep that `share` of the patches; at least
    1."""
    return max(1, int(patches * (share + EXTRA) / block**2))


def inverse_block_masking(
    centre_noise: Tensor, noise: Tensor, grid: tuple[int, int], kept: int, block: int
) -> tuple[Tensor, Tensor]:
    """Blocks of `block` x `block` patches around random centres; then random patches are removed or added, so that
    exactly `kept` patches are kept.

    centre_noise: (B, C) and noise: (B, N), uniform in [0, 1). Centres are drawn with replacement, and a block may cross
    the edge. Returns indices (B, kept) of the kept patches and (B, N - kept) of the masked ones, int64.
    """
    height, width = grid
    centre = (centre_noise * (height * width)).long()
    before = block // 2
    inside = []
    for place, side in ((centre // width, height), (centre % width, width)):
        start = place[..., None] - before
        along = torch.arange(side, device=noise.device)
        inside.append((along >= start) & (along < start + block))  # (B, C, side)
    covered = (inside[0][..., :, None] & inside[1][..., None, :]).any(1).flatten(1)  # (B, N)
    order = torch.where(covered, noise, noise + 1).argsort(1)
    return order[:, :kept], order[:, kept:]
