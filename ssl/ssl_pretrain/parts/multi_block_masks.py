"""Multi-block masks: a large context block, and several target blocks that are removed from it.

Assran et al., "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture" (2023), section 3.
Shapes: B images of this micro-batch, N of the global batch, P patches on an (h, w) grid in raster order, T target blocks
of M patches each, K patches of context.
"""

import torch
from torch import Tensor

from ..pretext import Step


def multi_block_masks(
    step: Step,
    grid: tuple[int, int],
    *,
    targets: int = 4,
    target_scale: tuple[float, float] = (0.15, 0.2),
    target_aspect: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
    min_keep: int = 10,
    reference: bool = False,
) -> tuple[Tensor, Tensor]:
    """The context's patches (B, K) and the targets' (B, T, M), int64 indices.

    All targets of a step have the same size, and so have all contexts of a step; the positions are drawn for each
    image. A context is its block without the image's targets. If that leaves fewer than `min_keep` patches (a quarter
    of the block, if that is less), the last targets are not removed. K is the shortest context of the global batch, so
    the shape is the same on every rank and for every micro-batch; random patches of longer contexts are dropped.

    reference: as in the released code: no block spans a whole side, positions exclude the last row and column, and
    longer contexts lose their last patches in raster order, so the bottom of the image is rarely seen.

    Sizes, positions and K are computed on the CPU, for the global batch, with a generator seeded by the step's next
    draw: the host needs the shapes as numbers, and reading them from an accelerator would be a synchronisation.
    """
    host = torch.Generator().manual_seed(step.generator().initial_seed())
    for_target, for_context = torch.rand(2, generator=host, dtype=torch.float64).tolist()
    margin = 1 if reference else 0
    size = block_size(grid, target_scale, target_aspect, for_target, margin)
    around = block_size(grid, context_scale, (1.0, 1.0), for_context, margin)
    min_keep = min(min_keep, max(1, around[0] * around[1] // 4))

    places = torch.tensor([[side - margin - taken + 1 for side, taken in zip(grid, block, strict=True)]
                           for block in [around] + [size] * targets])  # fmt: skip
    corners = (torch.rand(step.batch_size, 1 + targets, 2, generator=host) * places).long()  # (N, 1 + T, 2)
    length = int(_context(corners, grid, around, size, min_keep).sum(1).min())

    own = corners.to(step.device, non_blocking=True)[step.rows]
    seen = _context(own, grid, around, size, min_keep)  # (B, P)
    patches = grid[0] * grid[1]
    rank = torch.arange(patches, device=step.device) / patches if reference else step.rand(patches)
    context = torch.where(seen, rank, 1.0).argsort(1)[:, :length]

    top, left = own[:, 1:, :, None, None].unbind(2)  # (B, T, 1, 1) each
    row, column = (torch.arange(side, device=step.device) for side in size)
    return context, ((top + row[:, None]) * grid[1] + left + column).flatten(2)


def block_size(
    grid: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float], uniform: float, margin: int = 0
) -> tuple[int, int]:
    """Height and width of a block in patches. Its share of the grid and its ratio of height to width both come from one
    `uniform` number in [0, 1), so larger blocks are taller. Each is at least 1 and at most the grid's side minus
    `margin`."""
    area = int(grid[0] * grid[1] * (scale[0] + uniform * (scale[1] - scale[0])))
    ratio = aspect[0] + uniform * (aspect[1] - aspect[0])
    height, width = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
    return max(1, min(height, grid[0] - margin)), max(1, min(width, grid[1] - margin))


def _context(
    corners: Tensor, grid: tuple[int, int], around: tuple[int, int], size: tuple[int, int], min_keep: int
) -> Tensor:
    """The context mask, bool (B, P), True for context, from the corners (B, 1 + T, 2) of the context block and the
    target blocks."""
    seen = [_inside(corners[:, 0], around, grid)]  # without zero, one, two ... of the targets
    for corner in corners[:, 1:].unbind(1):
        seen.append(seen[-1] & ~_inside(corner, size, grid))
    stages = torch.stack(seen, dim=1)  # (B, 1 + T, P)
    last = (stages.sum(-1) >= min_keep).sum(1) - 1  # the counts decrease, so entries with enough patches come first
    return stages.gather(1, last[:, None, None].expand(-1, 1, stages.shape[2])).squeeze(1)


def _inside(corner: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The block of `size` at `corner` (B, 2) as bool (B, P)."""
    along = []
    for axis in (0, 1):
        place = torch.arange(grid[axis], device=corner.device)
        start = corner[:, axis, None]
        along.append((place >= start) & (place < start + size[axis]))
    return (along[0][:, :, None] & along[1][:, None, :]).flatten(1)
