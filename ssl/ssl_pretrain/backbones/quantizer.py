"""What makes an encoder a tokenizer: its patch features become ids of the nearest vectors of a codebook.

Shapes: B images, N patches on an (h, w) grid, D channels of the encoder, K codes of d channels.
"""

import contextlib
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 2048  # vectors whose distances to all codes are in memory at a time
USAGE = 10  # tokens for each code that usage is counted over, at least


@final
class Quantizer(nn.Module):
    """A linear layer from D to d channels, whose outputs get length 1, and K codes.

    Attributes: `size`, K; `width`, d; `unit`: codes are used with length 1; `codes` (K, d), a parameter if they are
    `trained` by gradients; `hits` (K,) int64: how often each code was the nearest one, in a fixed number of tokens.
    """

    codes: Tensor
    hits: Tensor

    def __init__(self, dim: int, size: int, width: int, *, unit: bool = False, trained: bool = False) -> None:
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

    def describe(self) -> dict[str, Any]:
        """The arguments that make a quantizer with these shapes, without `trained`."""
        return {"dim": self.dim, "size": self.size, "width": self.width, "unit": self.unit}

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
        """Ids (B, h, w) int64 of patch features (B, N, D) in raster order."""
        return self.nearest(self.embed(patches)).unflatten(1, grid)

    def usage(self) -> dict[str, float]:
        """By `hits`: "tokens" looked at, "codes_used" of them all, and "perplexity", exp of the entropy of the codes."""
        counts = self.hits.double()
        share = counts / counts.sum().clamp_min(1)
        entropy = -torch.special.xlogy(share, share).sum()
        return {
            "tokens": int(counts.sum()),
            "codes_used": int((counts > 0).sum()),
            "perplexity": float(entropy.exp()) if int(counts.sum()) else 0.0,
        }


@torch.no_grad()
def nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    """Ids of the nearest codes (K, d) by Euclidean distance: (..., d) to (...) int64. Of equal distances the first one."""
    with without_autocast(vectors.device):
        half = -0.5 * codes.square().sum(1)
        rows = vectors.reshape(-1, codes.shape[1])
        # The number of chunks would fix the number of images in a program that is made of this.
        chunks = [rows] if torch.compiler.is_exporting() else rows.split(CHUNK)
        found = [torch.addmm(half, each, codes.T).argmax(1) for each in chunks]
    return torch.cat(found).reshape(vectors.shape[:-1])


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within it, products have the precision of their factors. Nothing in a program that is being exported, which has one
    precision and could not be read with such a part in it."""
    if torch.compiler.is_exporting():
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
