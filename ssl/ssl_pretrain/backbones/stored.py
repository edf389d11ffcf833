"""Stands in for a frozen network whose outputs are stored: gives the rows of a batch back as features. No weights.

A run that reads a cache (`loop/teacher_cache.py`) has rows of numbers in place of the pixels of the network's views, so
methods call the network as usual and do not notice. Shapes: B images, L vectors of a row, D channels, an (h, w) grid.
"""

from collections.abc import Mapping
from typing import Any, final

import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Backbone, Features


@final
class StoredOutputs(Backbone):
    """Rows (B, 1, L, D) float32 become Features, rows (B, 1, h, w) int64 a tokenizer's ids as `patches` (B, h * w, 1).

    What was not stored is unusable: `pooled` is (B, 0), `patches` are none, `cls` is None. `norm` is the identity, because
    the final norm has been applied where it is asked for.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        stride: tuple[int, int],
        image_size: tuple[int, int],
        in_chans: int,
        block: int,
        outputs: tuple[str, ...],
        kind: str,
        grids: Mapping[int, tuple[int, int]],
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        """The network's numbers; block: that was stored, from 0; outputs: "pooled", "cls" and "patches", in this order;
        kind: the type of number that they are stored in; grids: by number of patches; origin: source and licence of the
        network, for lineages."""
        super().__init__()
        self.dim, self.depth, self.stride, self.image_size, self.in_chans = dim, depth, stride, image_size, in_chans
        self.block, self.outputs, self.kind, self.grids = block, outputs, kind, dict(grids)
        self.origin = dict(origin or {})
        self.supports = frozenset({"blocks"})
        self.norm = nn.Identity()

    def forward(self, images: Tensor, *, blocks: tuple[int, ...] = (), **options: Any) -> Features:
        """The stored features of rows. Raises ValueError for pixels, for other options than `blocks`, and for another block
        than the stored one."""
        if options or any(block % self.depth != self.block for block in blocks):
            raise ValueError(f"block {self.block} of the network is stored, not {blocks or options}")
        if images.ndim != 4 or images.shape[1] != 1:
            raise ValueError(f"stored outputs are read, not pixels of the shape {tuple(images.shape)}")
        rows = images[:, 0]
        nothing = rows.flatten(1)[:, :0]
        if not rows.is_floating_point():
            return Features(
                cls=None, patches=rows.flatten(1)[..., None], grid=(rows.shape[1], rows.shape[2]), pooled=nothing
            )
        pooled = rows[:, 0] if "pooled" in self.outputs else nothing
        tokens = rows[:, 1:] if "pooled" in self.outputs else rows
        cls = tokens[:, 0] if "cls" in self.outputs else None
        patches = tokens if cls is None else tokens[:, 1:]
        asked = (tokens,) if blocks else ()
        return Features(cls=cls, patches=patches, grid=self.grids[patches.shape[1]], pooled=pooled, blocks=asked)

    def layer_of(self, parameter: str) -> int:
        """It has no parameters."""
        raise ValueError(f"no parameter {parameter}")


@final
class StoredCodes(nn.Module):
    """Stands in for the codebook of a tokenizer whose ids are stored. `codes` (K, d), as they are used; `size`, K."""

    codes: Tensor

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.size, self.width = codes.shape
        self.register_buffer("codes", codes)

    def vectors(self) -> Tensor:
        """See `Quantizer.vectors`."""
        return self.codes

    def lookup(self, ids: Tensor) -> Tensor:
        """See `Quantizer.lookup`."""
        return F.embedding(ids, self.codes)

    def ids(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """The ids (B, h, w) of the `patches` of StoredOutputs."""
        return patches[..., 0].unflatten(1, grid)
