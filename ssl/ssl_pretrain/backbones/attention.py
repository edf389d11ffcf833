"""Attention: selects the kernels, and builds the masks that methods need.

Shapes: B images, h heads, L tokens (prefix tokens first, then patches), d channels of a head; T tokens of several batches
of images of different sizes, one after another (`Packed`).
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BF16_PRODUCTS = torch.cpu._is_avx512_bf16_supported()
PLAIN = 2**18  # scores of a head: above this, storing all scores for the backward pass needs too much memory


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (Vaswani et al., 2017, eq. 1).

    q, k, v: (B, h, L, d) of one dtype. mask: broadcastable to (B, h, L, L); bool, True if a query (row) may attend to a
    key (column), at least one in every row; or float, added to the scaled scores. causal: a token attends to itself and
    earlier ones; not together with `mask`. Returns (B, h, L, d) of that dtype.
    """
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        # The CPU's half-precision kernels, above all their backward pass, are several times slower than float32
        # kernels with conversions. On CPUs with bfloat16 products, plain products are faster than both
        # (docs/design.md).
        with torch.autocast("cpu", enabled=False):
            plain = mask is None and not causal and q.shape[2] * k.shape[2] <= PLAIN
            if BF16_PRODUCTS and q.dtype == torch.bfloat16 and plain:
                return _in_products(q, k, v)
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal)
        return out.to(v.dtype)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def _in_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` as two matrix products with a softmax between them; scores and weights are stored in q's dtype."""
    heads, scale = q.shape[:2], q.shape[3] ** -0.5
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    # The mean key adds the same value to all scores of a query, which does not change the softmax. Without it the
    # scores are small, so their rounding errors are small. Its gradient is zero.
    k = k - k.detach().mean(1, keepdim=True)
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    return (torch.softmax(scores, dim=-1) @ v).unflatten(0, heads)


def weights(q: Tensor, k: Tensor, mask: Tensor | None = None, causal: bool = False, *, logits: bool = False) -> Tensor:
    """The weights softmax(q k^T / sqrt(d)) with which `attend` averages the values, or, with `logits`, what the softmax
    takes, with -inf where a query may not attend. Arguments as in `attend`. Returns (B, h, L, L) in float32, or in
    float64 for q of that dtype."""
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, torch.float32)
        scores = (q.to(dtype) @ k.to(dtype).mT) * q.shape[3] ** -0.5
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(dtype)
        return scores if logits else scores.softmax(-1)


# A kernel for sequences of different lengths: q, k, v (T, h, d), the bounds (sequences + 1,) int32, the list of
# lengths.
Ragged = Callable[[Tensor, Tensor, Tensor, Tensor, list[int]], Tensor]


@dataclass(frozen=True)
class Packed:
    """Layout of T tokens from several batches of images, image by image."""

    batches: tuple[tuple[int, int], ...]  # (B, L) of each
    kernel: Ragged | None  # None: one call of `attend` a batch
    bounds: Tensor | None  # (images + 1,) int32 where each image's tokens begin, and T; None without a kernel

    @classmethod
    def of(cls, batches: Sequence[tuple[int, int]], device: torch.device, dtype: torch.dtype, width: int) -> "Packed":
        """The layout of these batches, with the kernel for attention in `dtype` with heads of `width` channels."""
        kernel = ragged_kernel(device, dtype, width) if device.type == "cuda" else None
        return cls(tuple(batches), kernel, None if kernel is None else _bounds(batches, device))

    def like(self, batches: Sequence[tuple[int, int]]) -> "Packed":
        """The layout of other batches, with the same kernel."""
        bounds = None if self.bounds is None else _bounds(batches, self.bounds.device)
        return Packed(tuple(batches), self.kernel, bounds)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(B, L) of the batches; adjacent batches of the same length are merged."""
        grouped = itertools.groupby(self.batches, key=lambda batch: batch[1])
        return [(sum(images for images, _ in each), length) for length, each in grouped]

    def of_each(self, x: Tensor, first: int) -> Tensor:
        """The first tokens of each image, (1, T', D), from tokens (1, T, D)."""
        parts = x.squeeze(0).split([images * length for images, length in self.runs])
        kept = [part.unflatten(0, run)[:, :first].flatten(0, 1) for part, run in zip(parts, self.runs, strict=True)]
        return torch.cat(kept)[None]


def attend_packed(q: Tensor, k: Tensor, v: Tensor, packed: Packed, first: int | None = None) -> Tensor:
    """`attend` within each image of q, k, v (1, h, T, d) of one dtype. Returns (1, h, T, d) of that dtype, or (1, h, T', d)
    of the `first` queries of each image."""
    if packed.kernel is not None and packed.bounds is not None and first is None:
        lengths = [length for images, length in packed.batches for _ in range(images)]
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
        return packed.kernel(q, k, v, packed.bounds, lengths).transpose(0, 1)[None]
    found = []
    sizes = [images * length for images, length in packed.runs]
    for run, *parts in zip(packed.runs, *(x.split(sizes, dim=2) for x in (q, k, v)), strict=True):
        of_q, of_k, of_v = (part.squeeze(0).unflatten(1, run).transpose(0, 1) for part in parts)  # (B, h, L, d)
        out = attend(of_q if first is None else of_q[:, :, :first], of_k, of_v)
        found.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(found).transpose(0, 1)[None]


def _bounds(batches: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    # Created on the device: copying a list to it would be a synchronisation.
    starts, begin = [], 0
    for images, length in batches:
        starts.append(torch.arange(begin, begin + images * length, length, dtype=torch.int32, device=device))
        begin += images * length
    return torch.cat([*starts, torch.full((1,), begin, dtype=torch.int32, device=device)])


@functools.cache
def ragged_kernel(device: torch.device, dtype: torch.dtype, width: int) -> Ragged | None:
    """The first of torch's and xformers' kernels for sequences of different lengths that is installed, runs on this
    device in this dtype, and agrees with `attend` in forward and backward; None if there is none."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    return next((kernel for kernel in (_varlen, _xformers) if _agrees(kernel, device, dtype, width)), None)


def _varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, lengths: list[int]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, k, v, bounds, bounds, max(lengths), max(lengths))
    assert isinstance(out, Tensor)  # a pair only if more outputs are requested
    return out


def _xformers(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, lengths: list[int]) -> Tensor:
    from xformers.ops import memory_efficient_attention

    mask = _block_diagonal(tuple(lengths), q.device, torch.is_inference_mode_enabled())
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0]


@functools.lru_cache(maxsize=16)
def _block_diagonal(lengths: tuple[int, ...], device: torch.device, inference: bool) -> Any:
    """xformers' mask that separates sequences of these lengths. It is cached, because every block of every step needs
    the same one, and it moves its bounds to the device only once. Tensors made in inference mode cannot be used outside
    it."""
    from xformers.ops.fmha import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(list(lengths))


def _agrees(kernel: Ragged, device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether a kernel gives the results of `attend` for two images of 5 tokens and one of 3."""
    batches = ((2, 5), (1, 3))
    found = []
    try:
        for packed in (Packed(batches, kernel, _bounds(batches, device)), Packed(batches, None, None)):
            # Independent of the caller's mode, which may be without gradients: the result is cached.
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                # Fixed values, because the global generator must not be advanced.
                values = torch.sin(torch.arange(3 * 2 * 13 * width, device=device) * 0.7)
                inputs = values.view(3, 1, 2, 13, width).to(dtype).requires_grad_()
                q, k, v = inputs.unbind(0)
                out = attend_packed(q, k, v, packed)
                out.float().square().sum().backward()
            assert inputs.grad is not None
            found.append((out.detach().float(), inputs.grad.float()))
    except (ImportError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError):
        return False  # not in this version, not for this device, dtype or width
    return all(bool((a - b).abs().max() <= 0.05 * b.abs().max()) for a, b in zip(*found, strict=True))


def prefix_mask(lengths: Tensor, patches: int, prefix_tokens: int) -> Tensor:
    """The mask of prefix-causal attention (AIM: El-Nouby et al., 2024, section 3.2).

    The prefix tokens and the first `lengths` (B,) int64 of the patches attend to each other; every later patch attends
    to itself and all before it. Returns bool (B, 1, L, L), L = prefix_tokens + patches, True if row may attend to
    column.
    """
    position = torch.arange(prefix_tokens + patches, device=lengths.device)
    earlier = position[:, None] >= position
    within = position < prefix_tokens + lengths[:, None]  # (B, L)
    return (earlier | (within[:, :, None] & within[:, None, :]))[:, None]
