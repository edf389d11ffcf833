"""Inverse block masks: a few small blocks of an image are kept, all the rest is masked.

Baevski et al., "Efficient Self-supervised Learning with Contextualized Target Representations for Vision, Speech and
Language" (2022), section 3.3. Shapes: B masks, N patches on an (h, w) grid in raster order, C centres of blocks, K kept.
"""

import torch
from torch import Tensor

EXTRA = 0.07  # more blocks than the share to keep asks for, for they overlap and leave the image: the released setting


def centres(patches: int, share: float, block: int) -> int:
    """How many blocks of `block` x `block` patches are laid to keep that `share` of the patches: at least one."""
    return max(1, int(patches * (share + EXTRA) / block**2))


def inverse_block_masking(
    centre_noise: Tensor, noise: Tensor, grid: tuple[int, int], kept: int, block: int
) -> tuple[Tensor, Tensor]:
    """Blocks of `block` x `block` patches around random centres, then patches at random taken away or added, so that
    exactly `kept` are left.

    centre_noise: (B, C) and noise: (B, N), uniform in [0, 1). Centres are drawn with replacement, and a block may reach
    over the edge. Returns indices (B, kept) of the kept patches and (B, N - kept) of the masked ones, int64.
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
