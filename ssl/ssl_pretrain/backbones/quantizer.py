"""What makes an encoder a tokenizer: its patch features become ids of the nearest vectors of a codebook.

Shapes: B images, N patches on an (h, w) grid, D channels of the encoder, K codes of d channels, S scales with L places.
"""

from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nearest_codes import nearest, without_autocast
from .scales import Levels, Scales

USAGE = 10  # tokens for each code that usage is counted over, at least


@final
class Quantizer(nn.Module):
    """A linear layer from D to d channels, whose outputs get length 1, and K codes.

    With several scales (`backbones.scales`) an image has ids of each of them: `levels` gives all, `ids` those of the finest
    scale, which say what the coarser ones leave.

    Attributes: `size`, K; `width`, d; `unit`: codes are used with length 1; `codes` (K, d), a parameter if they are
    `trained` by gradients; `hits` (K,) int64: how often each code was the nearest one, in a fixed number of tokens;
    `scales`: None for one; with several, `hits_of_scales` (S, K) are the hits of each.
    """

    codes: Tensor
    hits: Tensor
    hits_of_scales: Tensor

    def __init__(
        self, dim: int, size: int, width: int, *, unit: bool = False, trained: bool = False, scales: Sequence[int] = ()
    ) -> None:
        """scales: cells of each scale along the finest one's longer side, ascending; none for one scale."""
        super().__init__()
        self.dim, self.size, self.width, self.unit = dim, size, width, unit
        self.project = nn.Linear(dim, width)
        # Smaller weights would turn all vectors faster than the codes move.
        nn.init.normal_(self.project.weight, std=dim**-0.5)
        nn.init.zeros_(self.project.bias)
        start = F.normalize(torch.randn(size, width), dim=-1)
        if trained:
            self.codes = nn.Parameter(start)
        else:
            self.register_buffer("codes", start)
        self.register_buffer("hits", torch.zeros(size, dtype=torch.int64))
        self.scales = Scales(scales, width) if scales else None
        if scales:
            self.register_buffer("hits_of_scales", torch.zeros(len(scales), size, dtype=torch.int64))

    def describe(self) -> dict[str, Any]:
        """The arguments that make a quantizer with these shapes, without `trained`."""
        described = {"dim": self.dim, "size": self.size, "width": self.width, "unit": self.unit}
        return described if self.scales is None else {**described, "scales": list(self.scales.sides)}

    def another(self) -> "Quantizer":
        """A quantizer of the same shapes, in host memory."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return Quantizer(**self.describe())

    def embed(self, patches: Tensor) -> Tensor:
        """Patch features (..., D) as unit vectors (..., d), float32 (or wider), also under autocast."""
        with without_autocast(patches.device):
            wide = torch.promote_types(patches.dtype, torch.float32)
            weight, bias = self.project.weight.to(wide), self.project.bias.to(wide)
            return F.normalize(F.linear(patches.to(wide), weight, bias), dim=-1)

    def vectors(self) -> Tensor:
        """The codes as they are used, (K, d)."""
        return F.normalize(self.codes, dim=-1) if self.unit else self.codes

    @torch.no_grad()
    def nearest(self, z: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Ids of the nearest codes by Euclidean distance: (..., d) to (...) int64. Of equal distances the first one.
        vectors: other codes (K, d) than its own."""
        return nearest(z, (self.vectors() if vectors is None else vectors).to(z.dtype))

    def lookup(self, ids: Tensor) -> Tensor:
        """The codes of ids: (...) int64 to (..., d)."""
        return F.embedding(ids, self.vectors())

    def ids(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Ids (B, h, w) int64 of patch features (B, N, D) in raster order; of the finest scale if there are several."""
        if self.scales is not None:
            return self.levels(patches, grid).ids[:, -grid[0] * grid[1] :].unflatten(1, grid)
        return self.nearest(self.embed(patches)).unflatten(1, grid)

    @torch.no_grad()
    def levels(self, patches: Tensor, grid: tuple[int, int]) -> Levels:
        """Patch features (B, N, D) as ids of all scales. Only with several of them."""
        assert self.scales is not None, "the quantizer has one scale"
        found: Levels = self.scales(self.embed(patches), grid, self.vectors())
        return found

    def usage(self) -> dict[str, Any]:
        """By `hits`: "tokens" looked at, "codes_used" of them all, and "perplexity", exp of the entropy of the codes. With
        several scales also "scales": the same of each, the coarsest first."""
        found: dict[str, Any] = self._usage(self.hits)
        if self.scales is not None:
            found["scales"] = [
                {"side": side, **self._usage(hits)}
                for side, hits in zip(self.scales.sides, self.hits_of_scales, strict=True)
            ]
        return found

    @staticmethod
    def _usage(hits: Tensor) -> dict[str, float]:
        counts = hits.double()
        share = counts / counts.sum().clamp_min(1)
        entropy = -torch.special.xlogy(share, share).sum()
        return {
            "tokens": int(counts.sum()),
            "codes_used": int((counts > 0).sum()),
            "perplexity": float(entropy.exp()) if int(counts.sum()) else 0.0,
        }
